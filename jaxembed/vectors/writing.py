"""Files that are written piece by piece, and are there whole or not at all."""

import contextlib
import gzip
import io
import os
import pathlib
from collections.abc import Iterator

from jaxembed.errors import UserError
from jaxembed.storage import AnyPath, publish, staged


@contextlib.contextmanager
def replacing(path: AnyPath, where: str) -> Iterator[pathlib.Path]:
    """Gives a place to write a file at, which takes its own when the block ends, on disk or in a store.

    Args:
      path: the file; folders are made where there are none.
      where: the flag that names it, for messages.

    Raises:
      UserError: it cannot be written.
    """
    place = staged(path)
    part = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, place)
    except OSError as error:
        raise UserError(f"{where}={path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    publish(path)


@contextlib.contextmanager
def text_stream(part: pathlib.Path, zipped: bool) -> Iterator[io.TextIOWrapper]:
    """Opens a file for text in UTF-8, zipped without name and time, so that the bytes say the text alone."""
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(part.open("wb"))
        if zipped:
            raw = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0))
        yield stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8", newline="\n"))
