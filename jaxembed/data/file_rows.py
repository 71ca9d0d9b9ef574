"""Rows of JSON lines, plain lines and parquet files, one file after the other, whatever their size."""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

from jaxembed.config import SourceConfig
from jaxembed.data.record_formats import BadRecord
from jaxembed.data.rows import Chooser, Row, reason, row_name
from jaxembed.data.sources import find_files, label_of
from jaxembed.errors import UserError
from jaxembed.storage import AnyPath, StorePath

_PARQUET_ROWS = 1024  # read at a time
_PARQUET_ERRORS = (OSError, ValueError, NotImplementedError)  # what pyarrow's own errors derive from


class FileRows:
    """The rows of a file, of a folder's files or of a glob's. A `RowSource`.

    Rows are numbered through all files: by lines in JSON lines, blank ones included, so that a number leads to a line.
    A line of a plain file is a row with the field 'text'.
    """

    licence = ""  # plain files do not say
    identity = ()

    def __init__(self, source: SourceConfig, where: str) -> None:
        """Finds the files; of parquet, reads the number of rows.

        Args:
          source: path and kind.
          where: the config field of the source, for messages.

        Raises:
          UserError: no such file, several kinds, an unreadable parquet file.
        """
        self.kind, self.files = find_files(source, f"{where}.path")
        self.title = source.path
        self.label = label_of(source.path, len(self.files))
        self.total = sum(map(_n_rows if self.kind == "parquet" else _n_bytes, self.files))
        self._begin()

    def _begin(self) -> None:
        self.done = 0
        self._starts: list[int] = []  # rows before each file that was opened

    def rows(self, choose: Chooser) -> Iterator[tuple[int, Row]]:
        """See `RowSource`."""
        self._begin()
        number = 0
        for file in self.files:
            self._starts.append(start := number)
            for line, row in self._parquet_rows(file, choose) if self.kind == "parquet" else self._line_rows(file):
                number = start + line
                if row is not None:
                    yield number, row

    def name(self, number: int) -> str:
        """See `RowSource`."""
        return row_name(self._places(self.files), number)

    def places(self) -> list[tuple[int, str]]:
        """See `RowSource`: the files' absolute paths."""
        return self._places(tuple(file.absolute() for file in self.files))

    def _places(self, files: tuple[AnyPath, ...]) -> list[tuple[int, str]]:
        join = " row " if self.kind == "parquet" else ":"
        return [(start, f"{file}{join}") for start, file in zip(self._starts, files)]

    def _line_rows(self, file: AnyPath) -> Iterator[tuple[int, Row | None]]:
        """Yields (line, row), None for the row of a blank line."""
        before, number = self.done, 0
        parse = _parse if self.kind == "jsonl" else _plain
        try:
            with file.open("rb") as raw:
                zipped = file.name.endswith(".gz")
                stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20) if zipped else raw
                for number, line in enumerate(stream, 1):
                    self.done = before + raw.tell()
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    yield number, parse(line) if line.strip() else None
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file}: cannot read on after line {number}: {reason(error)}") from error

    def _parquet_rows(self, path: AnyPath, choose: Chooser) -> Iterator[tuple[int, Row]]:
        number = 0
        with _open_parquet(path) as file:
            columns = choose(str(path), file.schema_arrow.names)
            try:
                for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        self.done += 1
                        yield number, row
            except _PARQUET_ERRORS as error:
                raise UserError(f"{path}: cannot read on after row {number}: {reason(error)}") from error


def _n_bytes(file: AnyPath) -> int:
    return file.stat().st_size


def _n_rows(path: AnyPath) -> int:
    with _open_parquet(path) as file:
        return file.metadata.num_rows


@contextlib.contextmanager
def _open_parquet(path: AnyPath) -> Iterator[Any]:
    import pyarrow.parquet  # only sources that need it pay for the import

    with contextlib.ExitStack() as stack:
        try:
            stored = isinstance(path, StorePath)
            file = pyarrow.parquet.ParquetFile(stack.enter_context(path.open()) if stored else path)
        except _PARQUET_ERRORS as error:
            raise UserError(f"{path}: not a readable parquet file: {reason(error)}") from error
        yield stack.enter_context(file)


def _plain(line: bytes) -> Row:
    try:
        return {"text": line.decode().rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return _no_utf8(error)


def _no_utf8(error: UnicodeDecodeError) -> BadRecord:
    return BadRecord(f"not UTF-8 (byte {error.start + 1} of the line)")


def _parse(line: bytes) -> Row:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _no_utf8(error)
    except json.JSONDecodeError as error:
        return BadRecord(f"broken JSON ({error.msg}, column {error.colno}); wants one object a line")
    except (ValueError, RecursionError) as error:
        return BadRecord(f"unreadable JSON ({reason(error)})")
    return row if isinstance(row, dict) else BadRecord(f"wants a JSON object, has {type(row).__name__}")
