"""Damaged files and kills: what brixel must survive. `python -m hostile` and `python -m hostile.kills`."""
