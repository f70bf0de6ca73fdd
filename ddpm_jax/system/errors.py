"""Errors that a user can cause and fix."""


class UserError(Exception):
    """One clear line: what is wrong, which value, what to do. The scripts print it and end with status 2."""


class NoSuchSplit(UserError):
    """A data set has no split of that name."""


class Stopped(Exception):
    """A run stopped by a signal after saving a checkpoint; the scripts end with status 128 + the signal."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number
