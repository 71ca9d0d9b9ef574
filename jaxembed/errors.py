"""The one exception that reaches users as a single line and exit code 2."""


class UserError(Exception):
    """A mistake of the user's: a flag, a config field, a file. The message says what is wrong, where, and what to do.

    Commands print it as one line on standard error and leave with exit code 2 (`jaxembed.cli`); nothing else in the
    package catches it.
    """


class TrainingStopped(Exception):
    """Training cannot go on, through no mistake in the set-up: a loss that is not finite. Exit code 1, one line."""


def require(holds: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not holds:
        raise UserError(message)
