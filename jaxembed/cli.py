"""What every command does the same: flags, one line for the user's mistakes, exit codes.

absl leaves with code 1 for `--help` and prints tracebacks for unknown config fields; here `--help` is 0 and every
mistake of the user's is one line on standard error and code 2.
"""

import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from logging import LogRecord

from absl import flags, logging

from jaxembed.errors import UserError, exit_code


def run(main: Callable[[], None], doc: str) -> None:
    """Parses the flags, calls `main`, and leaves with its exit code; see `jaxembed.errors`."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_handler().addFilter(_is_no_traceback_of_orbax)
    sys.unraisablehook = _show_unless_of_tensorstore
    try:
        code = _run(main, doc)
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def _is_no_traceback_of_orbax(record: LogRecord) -> bool:
    """Leaves out what is logged of an error in orbax's threads and tasks: it is raised again in ours."""
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())


def _show_unless_of_tensorstore(unraisable: "sys.UnraisableHookArgs") -> None:
    """Leaves out what tensorstore's threads say, once per array, of a checkpoint that could not be written."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _run(main: Callable[[], None], doc: str) -> int:
    if {"--help", "-h", "-help", "--helpshort"} & set(sys.argv[1:]):
        print(doc.strip() + "\n")
        print(flags.FLAGS.main_module_help())
        return 0
    try:
        _parse()
        main()
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return code
    return 0


def _parse() -> None:
    try:
        rest = flags.FLAGS(sys.argv)
    except flags.Error as error:
        raise UserError(_message(error)) from error
    except Exception as error:  # a config file is a program, which may raise anything, and so may an override
        raise UserError(f"--config: {_explain(error)}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: every option is a flag, --name=value")


def _explain(error: Exception) -> str:
    """Returns what went wrong: in the config file's own code, or in overriding one of its fields."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    if not {"absl", "ml_collections"} & set(pathlib.Path(frames[-1].filename).parts):
        return f"{frames[-1].filename}:{frames[-1].lineno}: {type(error).__name__}: {_message(error)}"
    if isinstance(error, KeyError | AttributeError) and "has no attribute" not in str(error):
        # ml_collections' word on a field that the config does not have, quoted once or twice.
        said = str(error).strip("'\"").replace("\\n", ". ").replace("\\'", "'")
        listed = any(argument.startswith(("--config.stages[", "--config.data.train[")) for argument in sys.argv)
        return f"no such field: {said}" + "; of a stage or source, flags set what the config file sets" * listed
    if isinstance(error, IndexError):
        return "index out of range; add a source in the config file, or by --data"
    return _message(error)


def _message(error: Exception) -> str:
    """Returns an error's message without the traceback that absl puts into some."""
    text = str(error).strip() or type(error).__name__
    if "Traceback (most recent call last)" in text:
        head = text.split("Error whilst", 1)[0].rstrip(": ")
        return f"{head}: {text.splitlines()[-1]}"
    return " ".join(text.split())
