"""What an engine may tell the world while it works; the console implements it, tests can listen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class Reporter(Protocol):
    """Receives stages, warnings and progress."""

    def say(self, message: str) -> None:
        """A stage of the work."""

    def warn(self, message: str) -> None:
        """Something that went wrong without ending the work."""

    def bar(self, title: str, total: int, done: int = 0, unit: str = "it") -> AbstractContextManager[Any]:
        """A progress bar with tqdm's `update` and `set_postfix_str`."""


class Silent:
    """A reporter for Python callers: warnings are Python's own, and nothing else is reported."""

    def say(self, message: str) -> None:
        """Report nothing."""

    def warn(self, message: str) -> None:
        """Warn as Python does."""
        warnings.warn(message, stacklevel=2)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0, unit: str = "it") -> Iterator[Any]:
        """Show nothing."""
        yield self

    def update(self, count: float = 1) -> None:
        """As tqdm's."""

    def set_postfix_str(self, text: str) -> None:
        """As tqdm's."""
