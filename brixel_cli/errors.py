"""Errors that the user can fix. Everything else keeps its traceback: it is a bug of brixel."""

UNREACHED = "not fetched"
"""What the reasons of rows begin with whose bytes did not come; the same command tries them again."""


class BrixelError(Exception):
    """Something the user can fix: the message says what, where, and what to do next. Exit code 1."""

    exit_code = 1


class UsageError(BrixelError):
    """A wrong option, recipe or argument, found before any work was done. Exit code 2."""

    exit_code = 2


class UnreachedError(BrixelError):
    """Bytes that a server did not give; the message starts with `UNREACHED`. The same command may get them later.

    Args:
        reason: why.
        missing: whether the server says that they are not there, or not for us: then planning goes on without them.
    """

    def __init__(self, reason: str, missing: bool = False):
        super().__init__(f"{UNREACHED}: {reason}")
        self.missing = missing


class WeightsError(BrixelError):
    """Weights that cannot be had, read, or matched with the model they are meant for."""


class SizeError(BrixelError, ValueError):
    """An image or grid size that the model cannot take."""
