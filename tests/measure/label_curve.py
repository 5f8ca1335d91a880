"""A table of probes with several shares of the labels: a row for each source, a column for each share.

python tests/measure/label_curve.py runs/probe/camvid_labels_0.1 runs/probe/camvid

Several folders of one share stand in one column: a source is taken from the first of them that has it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from brixel_cli.config.section import difference_lines, differences
from brixel_cli.core.metric_titles import figure_text, figure_title
from brixel_cli.core.probe_metrics import LEADING
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.results import Summary, as_dict


def curve(folders: Sequence[Path]) -> str:
    """The table as Markdown: the leading metric, mean and standard deviation over seeds.

    Raises:
        SystemExit: the probes differ in more than the share of the labels.
    """
    probes = sorted((ProbeFolder(folder).read() for folder in folders), key=lambda probe: probe.settings.label_fraction)
    first, *others = [as_dict(probe.settings) for probe in probes]
    for other in others:
        if changed := difference_lines(differences(first, other, ("label_fraction",))):
            sys.exit("The probes differ in more than the share of the labels:\n  " + "\n  ".join(changed))
    metric = LEADING[probes[0].settings.task.partition("_")[0]]
    labels = dict.fromkeys(label for probe in probes for label in probe.summary)
    shares: dict[float, dict[str, Summary]] = {}
    for probe in probes:
        column = shares.setdefault(probe.settings.label_fraction, {})
        column |= {label: entry for label, entry in probe.summary.items() if label not in column}
    rows = [
        [f"{figure_title(metric, False)}, {probes[0].settings.recipe}", *(f"{share * 100:.0f} %" for share in shares)]
    ]
    rows.append(["---", *("---:" for _ in shares)])
    for label in labels:
        found = [column.get(label) for column in shares.values()]
        rows.append([label, *(figure_text(metric, *entry.figure(metric)) if entry else "-" for entry in found)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(curve([Path(name) for name in sys.argv[1:]]) + "\n")
