"""What an engine may tell the world while it works; the console implements it, tests can listen."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol


class Reporter(Protocol):
    """Receives stages, warnings and progress."""

    def say(self, message: str) -> None:
        """A stage of the work."""

    def warn(self, message: str) -> None:
        """Something that went wrong without ending the work."""

    def bar(self, title: str, total: int, done: int = 0, unit: str = "it") -> AbstractContextManager[Any]:
        """A progress bar with tqdm's `update` and `set_postfix_str`."""
