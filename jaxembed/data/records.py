"""Reads training records from JSON lines and parquet files, one after the other, whatever the file's size."""

import functools
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from jaxembed.config import SourceConfig, nearest
from jaxembed.data.record_formats import FIELDS, BadRecord, Record, layout_of, to_record
from jaxembed.errors import UserError

__all__ = ["Record", "RecordReader"]

_JSONL = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_KEPT_REASONS = 5
_PARQUET_ROWS = 1024  # read at a time
_PARQUET_ERRORS = (OSError, ValueError, NotImplementedError)  # what pyarrow's own errors derive from


class RecordReader:
    """The records of one source, as an iterable: every iteration reads the file anew and resets the counters.

    Attributes:
      path: the file.
      kind: 'jsonl' or 'parquet'.
      line: line of the record yielded last, or its row in a parquet file; both from 1.
      done, total: how far the reading is: bytes of the file, or rows of a parquet file.
      skipped: bad records left out so far.
      reasons: what was wrong with the first of them, each 'FILE:LINE: reason'.
    """

    def __init__(self, source: SourceConfig, on_bad_record: str, where: str) -> None:
        """Checks the source without reading it.

        Args:
          source: the file, its kind, format and columns.
          on_bad_record: 'error' raises at the first bad record, 'skip' leaves bad ones out and counts them.
          where: the config field of the source, for messages.

        Raises:
          UserError: no such file, a folder, an unknown kind of file, an unknown field in `columns`.
        """
        self.path = pathlib.Path(source.path).expanduser()
        self.kind = _kind(self.path, source.source, where)
        for field in source.columns:
            if field not in FIELDS:
                raise UserError(f"{where}.columns: there is no field {field!r}{nearest(field, FIELDS)}")
        self._columns = tuple(sorted(source.columns.items()))
        self._format = source.format
        self._skip = on_bad_record == "skip"
        self._where = where
        self.total = self.path.stat().st_size
        if self.kind == "parquet":
            with _open_parquet(self.path) as file:
                self.total = file.metadata.num_rows
        self._reset()

    def _reset(self) -> None:
        self.line = self.done = self.skipped = 0
        self.reasons: list[str] = []

    def name(self, line: int) -> str:
        """Returns 'FILE:LINE', or 'FILE row LINE' of a parquet file."""
        return place(str(self.path), self.kind, line)

    def __iter__(self) -> Iterator[Record]:
        """Yields the good records.

        Raises:
          UserError: a bad record where they are errors, an unreadable file, a file without any good record, a column
            named in the config that no record has.
        """
        self._reset()
        unseen = {key for _, key in self._columns}
        layout = functools.partial(layout_of, self._format, self._columns)
        n_good = 0
        for line, row in self._rows():
            try:
                if isinstance(row, BadRecord):
                    raise row
                unseen.difference_update(row)
                record = to_record(row, layout(tuple(row)), self._format)
            except BadRecord as error:
                self.reject(line, str(error))
                continue
            self.line = line
            n_good += 1
            yield record
        if n_good and unseen:
            raise UserError(f"{self._where}.columns: no record of {self.path} has {', '.join(sorted(unseen))}")
        self.require(n_good)

    def reject(self, line: int, reason: str) -> None:
        """Counts a bad record, or raises UserError where bad records are errors."""
        message = f"{self.name(line)}: {reason}"
        if not self._skip:
            raise UserError(message)
        self.skipped += 1
        if len(self.reasons) < _KEPT_REASONS:
            self.reasons.append(message)

    def require(self, n_good: int) -> None:
        """Raises UserError when the file held no good record."""
        if n_good == 0:
            why = f"all {self.skipped} are bad, the first: {self.reasons[0]}" if self.reasons else "the file is empty"
            raise UserError(f"{self.path}: no record to train on: {why}")

    def _rows(self) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
        return self._json_rows() if self.kind == "jsonl" else self._parquet_rows()

    def _json_rows(self) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
        number = 0
        try:
            with open(self.path, "rb") as raw:
                zipped = self.path.name.endswith(".gz")
                stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20) if zipped else raw
                for number, line in enumerate(stream, 1):
                    self.done = raw.tell()
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.strip():
                        yield number, _parse(line)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self.path}: cannot read on after line {number}: {_reason(error)}") from error

    def _parquet_rows(self) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
        with _open_parquet(self.path) as file:
            names = tuple(file.schema_arrow.names)
            wanted = {key for keys in layout_of(self._format, self._columns, names).values() for key in keys}
            columns = [name for name in names if name in wanted]
            if not columns:
                raise UserError(
                    f"{self.path}: has the columns {', '.join(names)}, none that a record of format "
                    f"{self._format!r} is made of: set {self._where}.format or .columns"
                )
            try:
                for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                    for row in batch.to_pylist():
                        self.done += 1
                        yield self.done, row
            except _PARQUET_ERRORS as error:
                raise UserError(f"{self.path}: cannot read on after row {self.done}: {_reason(error)}") from error


def place(path: str, kind: str, line: int) -> str:
    """Returns how messages name a record."""
    return f"{path}:{line}" if kind == "jsonl" else f"{path} row {line}"


def _kind(path: pathlib.Path, source: str, where: str) -> str:
    if path.is_dir():
        raise UserError(f"{where}.path: {path} is a folder, wants a file ({', '.join(_JSONL)} or .parquet)")
    if not path.is_file():
        raise UserError(f"{where}.path: there is no file {path}")
    if source != "auto":
        return source
    if path.name.endswith(_JSONL):
        return "jsonl"
    if path.suffix == ".parquet":
        return "parquet"
    raise UserError(
        f"{where}.path: {path.name} is none of {', '.join(_JSONL)}, .parquet: rename it, or set {where}.source"
    )


def _open_parquet(path: pathlib.Path) -> Any:
    import pyarrow.parquet  # only sources that need it pay for the import

    try:
        return pyarrow.parquet.ParquetFile(path)
    except _PARQUET_ERRORS as error:
        raise UserError(f"{path}: not a readable parquet file: {_reason(error)}") from error


def _parse(line: bytes) -> dict[str, Any] | BadRecord:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(f"not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return BadRecord(f"broken JSON ({error.msg}, column {error.colno}); wants one object a line")
    except (ValueError, RecursionError) as error:
        return BadRecord(f"unreadable JSON ({_reason(error)})")
    return row if isinstance(row, dict) else BadRecord(f"wants a JSON object, has {type(row).__name__}")


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
