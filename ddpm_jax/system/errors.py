"""The failures that a user can cause and mend."""


class UserError(Exception):
    """One clear line: what is wrong, which value, what to do. The scripts print it and end with status 2."""


class NoSuchSplit(UserError):
    """A set of images has no part of that name."""


class Stopped(Exception):
    """A run that was asked to stop by a signal and did so in order; the scripts end with status 128 + the signal."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number
