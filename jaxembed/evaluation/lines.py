"""Reading the files of an evaluation: JSON lines and tables, plain or gzipped, every mistake named by FILE:LINE."""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from typing import Any

from jaxembed.errors import UserError
from jaxembed.storage import AnyPath

_ENDINGS = re.compile(r"(\.(jsonl|json|parquet|gz))+$")


def stem(path: AnyPath) -> str:
    """Returns a file's name without the endings that say what kind of file it is."""
    return _ENDINGS.sub("", path.name)


def find_file(folder: AnyPath, *names: str) -> AnyPath:
    """Returns the first of these files that the folder has, each as it is or with '.gz'.

    Raises:
      UserError: there is none.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise UserError(f"{folder}: there is no {' or '.join(names)} in it (also as .gz)")


def read_lines(path: AnyPath) -> Iterator[tuple[str, str]]:
    """Yields ('FILE:LINE', the line without its end) for every line that is not blank.

    Raises:
      UserError: there is no such file, it is a broken gzip file, or it is not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    number = 0
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.name.endswith(".gz") else raw as stream:
            for number, line in enumerate(stream, 1):
                text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode().rstrip("\r\n")
                if text.strip():
                    yield f"{path}:{number}", text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line)") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read beyond line {number}: {reason}") from error


def read_objects(path: AnyPath) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ('FILE:LINE', the object) for every line of a JSON-lines file.

    Raises:
      UserError: a line is not a JSON object; see also `read_lines`.
    """
    for where, line in read_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: broken JSON ({error}); wants one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: wants a JSON object, has {type(row).__name__}")
        yield where, row


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """Returns a text field.

    Raises:
      UserError: the field is missing, not a string, or holds half a surrogate pair, which no tokenizer takes.
    """
    text = _field(row, field, where)
    if not isinstance(text, str):
        raise UserError(f"{where}: {field!r} wants a string, has {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {field!r} is not valid Unicode (character {error.start})") from error
    return text


def id_of(row: dict[str, Any], field: str, where: str) -> str:
    """Returns an id as a string; some data sets write them as integers.

    Raises:
      UserError: the field is missing, empty, or neither a string nor an integer.
    """
    value = _field(row, field, where)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"{where}: {field!r} wants a string that is not empty, has {value!r}")
    return str(value)


def number_of(row: dict[str, Any], field: str, where: str) -> float:
    """Returns a finite number.

    Raises:
      UserError: the field is missing, not a number, infinite or NaN.
    """
    value = _field(row, field, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {field!r} wants a finite number, has {value!r}")
    return float(value)


def _field(row: dict[str, Any], field: str, where: str) -> Any:
    if field not in row:
        raise UserError(f"{where}: there is no {field!r}; the row has {', '.join(map(repr, row)) or 'no field'}")
    return row[field]
