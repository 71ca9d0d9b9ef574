"""Reads training records from files and data sets, one after the other, whatever their size."""

import functools
from collections.abc import Iterator, Sequence

from jaxembed.config import SourceConfig, nearest
from jaxembed.data.file_rows import FileRows
from jaxembed.data.record_formats import BadRecord, Record, fields_of, layout_of, to_record
from jaxembed.data.rows import RowSource
from jaxembed.errors import UserError

__all__ = ["Record", "RecordReader", "open_rows"]

_KEPT_REASONS = 5


class RecordReader:
    """The records of one source, as an iterable: every iteration reads it anew and resets the counters.

    Attributes:
      source: its rows, with its kind, label and licence, and how far they were read.
      line: number of the record yielded last, from 1: line or row of a file, row of a data set. Where there are
        several files, numbers run through all of them; `name` knows the file.
      skipped: bad records left out so far.
      reasons: what was wrong with the first of them, each 'FILE:LINE: reason'.
    """

    def __init__(self, source: SourceConfig, on_bad_record: str, where: str) -> None:
        """Checks the source without reading its rows. A 'tfds' data set that is not prepared yet is, now.

        Args:
          source: files or data set, kind, format and columns.
          on_bad_record: 'error' raises at the first bad record, 'skip' leaves bad ones out and counts them.
          where: the config field of the source, for messages.

        Raises:
          UserError: there is no such source, or it is of no known kind; an unknown field in `columns`.
        """
        fields = fields_of(source.format)
        for field in source.columns:
            if field not in fields:
                raise UserError(
                    f"{where}.columns: there is no field {field!r} in records of format {source.format!r}"
                    f"{nearest(field, fields)}"
                )
        self.source = open_rows(source, where)
        self._columns = tuple(sorted(source.columns.items()))
        self._format = source.format
        self._skip = on_bad_record == "skip"
        self._where = where
        self._reset()

    def _reset(self) -> None:
        self.line = self.skipped = 0
        self.reasons: list[str] = []

    def name(self, line: int) -> str:
        """Returns 'FILE:LINE', 'FILE row LINE' of a parquet file, or 'tfds:NAME:SPLIT row LINE', of what was read."""
        return self.source.name(line)

    def __iter__(self) -> Iterator[Record]:
        """Yields the good records.

        Raises:
          UserError: a bad record where they are errors, an unreadable file, a source without any good record, a column
            named in the config that no record has.
        """
        self._reset()
        unseen = {key for _, key in self._columns}
        layout = functools.partial(layout_of, self._format, self._columns)
        n_good = 0
        for line, row in self.source.rows(self._choose):
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
            raise UserError(f"{self._where}.columns: no record of {self.source.title} has {', '.join(sorted(unseen))}")
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
        """Raises UserError when the source held no good record."""
        if n_good == 0:
            why = f"all {self.skipped} are bad, the first: {self.reasons[0]}" if self.reasons else "it is empty"
            raise UserError(f"{self.source.title}: no usable record: {why}")

    def _choose(self, where: str, columns: Sequence[str]) -> list[str]:
        """Returns those of a table's columns that records are made of, in the table's order."""
        wanted = {key for keys in layout_of(self._format, self._columns, tuple(columns)).values() for key in keys}
        chosen = [column for column in columns if column in wanted]
        if not chosen:
            raise UserError(
                f"{where}: has the columns {', '.join(columns)}, none that a record of format {self._format!r} is made "
                f"of: set {self._where}.format or .columns"
            )
        return chosen


def open_rows(source: SourceConfig, where: str) -> RowSource:
    """Opens the rows of a source; packages that read data sets are imported only where one is named."""
    if source.source == "tfds":
        from jaxembed.data.tfds_rows import TfdsRows

        return TfdsRows(source, where)
    if source.source == "hf":
        from jaxembed.data.hf_rows import HfRows

        return HfRows(source, where)
    return FileRows(source, where)
