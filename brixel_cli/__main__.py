"""The `brixel` command, and `python -m brixel_cli`, which torchrun needs. What is slow to import comes late."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, _interrupted)
    from brixel_cli.app import app

    app()


def _interrupted(_: int, frame: FrameType | None) -> None:
    """Ctrl-C: an interrupt in a command's work, which the command reports; before that, and in imports, the end.

    Imports do not expect to be interrupted: some end in other errors, with tracebacks, and some swallow it.
    """
    begun = False
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith("<frozen importlib"):
            begun = False
            break
        begun = begun or os.sep + os.path.join("brixel_cli", "cli", "") in name
        frame = frame.f_back
    if begun:
        raise KeyboardInterrupt
    os.write(2, b"interrupted; what was saved stays\n")
    os._exit(130)


if __name__ == "__main__":
    main()
