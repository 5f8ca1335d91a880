"""`python -m brixel_cli`, which torchrun needs."""

from brixel_cli.app import main

if __name__ == "__main__":
    main()
