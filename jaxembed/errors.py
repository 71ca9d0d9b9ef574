"""Exceptions that reach users as a single line, and the exit codes of all commands.

0 done, or told to stop and saved; 1 training stopped; 2 the user's mistake; 3 another process of the run was lost, or a
store could not be reached: started again, the run may go on.
"""


class UserError(Exception):
    """A mistake of the user's: a flag, a config field, a file. The message says what is wrong, where, and what to do.

    Commands print it as one line on standard error and leave with exit code 2 (`jaxembed.cli`); nothing else in the
    package catches it.
    """

    code = 2


class StoreLost(UserError):
    """An object store could not be reached, or failed: that may pass, so the exit code is 3. One line."""

    code = 3


class TrainingStopped(Exception):
    """Training cannot go on, through no mistake in the set-up: a loss that is not finite. Exit code 1, one line."""

    code = 1


class ProcessLost(Exception):
    """Another process of the run is gone; started again, the run goes on. Exit code 3, one line."""

    code = 3


def exit_code(error: BaseException) -> int | None:
    """Returns the exit code of an error that reaches users as a single line; None of one that they should not see."""
    return error.code if isinstance(error, UserError | TrainingStopped | ProcessLost) else None


def require(holds: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not holds:
        raise UserError(message)
