"""The failures that a user can cause and mend."""


class UserError(Exception):
    """One clear line: what is wrong, which value, what to do. The scripts print it and end with status 2."""
