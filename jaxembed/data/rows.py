"""What every kind of source gives: numbered rows, their names, and what the rows were made from."""

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from jaxembed.data.record_formats import BadRecord
from jaxembed.storage import AnyPath

Row = dict[str, Any] | BadRecord  # a row that cannot be read is the reason why
Chooser = Callable[[str, Sequence[str]], list[str]]  # (what has them, columns) → those that records are made of


class RowSource(Protocol):
    """A source's rows, in a fixed order, numbered from 1.

    Attributes:
      kind: 'jsonl', 'txt', 'parquet', 'tfds' or 'hf'.
      title: the source as the user named it, for messages.
      label: a short name of it without any path of this machine.
      licence: what the data set says of its own licence; '' where it says nothing.
      files: what the rows are made from; their bytes and `identity` decide the rows.
      identity: what else decides them, such as a split.
      done, total: how far the reading is, in bytes or rows.
    """

    kind: str
    title: str
    label: str
    licence: str
    files: tuple[AnyPath, ...]
    identity: tuple[str, ...]
    done: int
    total: int

    def rows(self, choose: Chooser) -> Iterator[tuple[int, Row]]:
        """Yields every row anew with its number; only the columns that `choose` names need be in it.

        Raises:
          UserError: the source cannot be read to its end; `choose` finds no column that serves.
        """

    def name(self, number: int) -> str:
        """Returns how messages name a row that was read: 'FILE:LINE', 'FILE row N', 'tfds:NAME:SPLIT row N'."""

    def places(self) -> list[tuple[int, str]]:
        """Returns, for `row_name`, where each file that was read begins, named so that it can be found later."""


def row_name(places: Sequence[tuple[int, str]], number: int) -> str:
    """Returns the name of a row.

    Args:
      places: per file, in order: how many rows come before it, and what stands before a row's number in its name.
      number: of the row in the whole source, from 1.
    """
    before, prefix = places[bisect.bisect_left(places, number, key=lambda place: place[0]) - 1]
    return f"{prefix}{number - before}"


def reason(error: BaseException) -> str:
    """Returns an error's message as the end of one line."""
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
