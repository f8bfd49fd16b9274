"""Faults of the user's: a sentence with the rule, the value and the fix."""


class UserError(Exception):
    """Something the user can put right. The command prints it as one line and exits with code 2."""


class Unreachable(UserError):
    """The database does not answer: a wrong address, or one that is unavailable for a moment."""


class Unreadable(UserError):
    """A stored value that neither Optuna nor this program writes."""
