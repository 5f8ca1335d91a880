"""Errors that the user can fix. Everything else keeps its traceback: it is a bug of brixel."""


class BrixelError(Exception):
    """Something the user can fix: the message says what, where, and what to do next. Exit code 1."""

    exit_code = 1


class UsageError(BrixelError):
    """A wrong option, recipe or argument, found before any work was done. Exit code 2."""

    exit_code = 2


class WeightsError(BrixelError):
    """Weights that cannot be had, read, or matched with the model they are meant for."""


class SizeError(BrixelError, ValueError):
    """An image or grid size that the model cannot take."""
