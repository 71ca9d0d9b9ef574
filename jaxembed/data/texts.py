"""Single texts with their ids, as encoding and searching take them: from files and data sets, whatever their size."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxembed.config import SourceConfig
from jaxembed.data.record_formats import BadRecord, require_unicode
from jaxembed.data.records import open_rows
from jaxembed.data.sources import check_place, parse_spec
from jaxembed.errors import UserError

TEXT, TITLE = "text", "title"
IDS = ("_id", "id")


class TextReader:
    """The texts of a file, folder, glob or data set, as an iterable of (id, text); every iteration reads it anew.

    Attributes:
      source: the rows, with how far they were read.
    """

    def __init__(self, spec: str, where: str, field: str = "", id_field: str = "") -> None:
        """Finds the rows without reading them.

        Args:
          spec: JSON lines, plain lines (.txt) or parquet: a file, folder or glob; or 'tfds:NAME[:SPLIT]',
            'hf:NAME[:SPLIT]'.
          where: the flag that names it, for messages.
          field: the column of the texts, one or a list in each row; '' = 'text', with a 'title' beside it in front,
            as in BEIR.
          id_field: the column of the ids; '' = '_id' or 'id' where there is one, else the rows' numbers, from 1.

        Raises:
          UserError: there is nothing of that name, or of several kinds.
        """
        source = SourceConfig(**parse_spec(spec))
        check_place(source, where)
        self.source = open_rows(source, where)
        self._where, self._field, self._id_field = where, field, id_field

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yields id and text of each; of a list's texts the ids are ID.0, ID.1, and so on.

        Raises:
          UserError: a row without text or with something else there, named FILE:LINE; an unreadable file; no text.
        """
        empty = True
        for number, row in self.source.rows(self._choose):
            try:
                if isinstance(row, BadRecord):
                    raise row
                for text in self._texts(number, row):
                    empty = False
                    yield text
            except BadRecord as error:
                raise UserError(f"{self.source.name(number)}: {error}") from error
        if empty:
            raise UserError(f"{self._where}: {self.source.title} has no text")

    def _texts(self, number: int, row: dict[str, Any]) -> Iterator[tuple[str, str]]:
        key, field = self._id(number, row), self._field or TEXT
        value = row.get(field)
        if isinstance(value, list | tuple):
            for i, item in enumerate(value):
                yield f"{key}.{i}", _string(item, field)
            return
        if value is None:
            has = ", ".join(map(str, list(row)[:8])) or "nothing"
            raise BadRecord(f"no {field!r} (the row has {has}): name the column of the texts by --field")
        text = _string(value, field)
        if not self._field and row.get(TITLE) is not None:
            text = f"{_string(row[TITLE], TITLE)} {text}".strip()
        yield key, text

    def _id(self, number: int, row: dict[str, Any]) -> str:
        names = (self._id_field,) if self._id_field else IDS
        value = next((row[name] for name in names if row.get(name) is not None), None)
        if value is None and not self._id_field:
            return str(number)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise BadRecord(f"{' or '.join(names)} wants a name or a whole number, has {value!r}")
        return require_unicode(str(value), names[0])

    def _choose(self, where: str, columns: Sequence[str]) -> list[str]:
        """Returns those of a table's columns that are wanted, in the table's order."""
        field = self._field or TEXT
        for asked, flag in ((field, "--field"), (self._id_field, "--id_field")):
            if asked and asked not in columns:
                raise UserError(f"{where}: no column {asked!r}, but {', '.join(columns)}: name one by {flag}")
        wanted = {field, *((self._id_field,) if self._id_field else IDS), *(() if self._field else (TITLE,))}
        return [column for column in columns if column in wanted]


def _string(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{field!r} wants text, has {type(value).__name__}")
    return require_unicode(value, field)
