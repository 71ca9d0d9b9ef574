"""Records that give away what a model is to be evaluated on."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxembed.config import SourceConfig
from jaxembed.data.record_formats import BadRecord, Record
from jaxembed.data.records import open_rows
from jaxembed.data.rows import RowSource
from jaxembed.data.sources import DATA_SETS, check_place, parse_spec
from jaxembed.errors import UserError
from jaxembed.evaluation.lines import stem
from jaxembed.evaluation.sets import classification_files
from jaxembed.mining.dropping import Dropped, part_of
from jaxembed.mining.text_keys import letters, words
from jaxembed.storage import path_of

WHERE = "--against"
# Columns of texts: similarity and entailment sets, BEIR's and classification's, records of all formats.
COLUMNS = ("sentence1", "sentence2", "sentence", "premise", "hypothesis", "text", "query", "question", "anchor")
COLUMNS += ("positive", "positives", "pos", "answer", "negative", "negatives", "neg")
TITLE = "title"  # before `text`, as BEIR joins them


class Contamination:
    """Drops records whose query or positives are in evaluation sets; of hard negatives only those texts. A `Rule`.

    A text is in a set where a text of the set has the same letters and digits, whatever their case, or where both share
    a run of so many words, as GPT-3's filter looks for (Brown et al. 2020, arXiv:2005.14165, appendix C).
    """

    def __init__(self, specs: Sequence[str], ngram: int) -> None:
        """Reads the sets.

        Args:
          specs: of each set: see `places`.
          ngram: words in a row that count as a copy; 0 = only whole texts do.

        Raises:
          UserError: a set that is not there, cannot be read or has no texts.
        """
        self._ngram = ngram
        self._texts: dict[str, str] = {}  # letters → the set's name
        self._runs: dict[int, str] = {}  # hash of words → the set's name
        names = []
        for spec in specs:
            names.append(_name(spec))
            for text in _texts(spec):
                key = letters(text)
                if key:
                    self._texts.setdefault(key, names[-1])
                for run in self._runs_of(text):
                    self._runs.setdefault(run, names[-1])
        what = ("text of", *([f"{ngram} words of"] if ngram else []))
        self.reasons = tuple(f"{kind} {name}" for name in dict.fromkeys(names) for kind in what)

    def __call__(self, record: Record, dropped: Dropped) -> Record | None:
        """See `Rule`."""
        for text in (record.query, *record.positives):
            reason = self.reason(text)
            if reason:
                dropped.add(reason, record)
                return None
        clean = [not self.reason(text) for text in record.negatives]
        dropped.texts += clean.count(False)
        return record if all(clean) else part_of(record, [True] * len(record.positives), clean)

    def reason(self, text: str) -> str:
        """Returns why a text is of an evaluation set; '' where it is not."""
        name = self._texts.get(letters(text))
        if name is not None:
            return f"text of {name}"
        found = next((self._runs[run] for run in self._runs_of(text) if run in self._runs), None)
        return "" if found is None else f"{self._ngram} words of {found}"

    def _runs_of(self, text: str) -> Iterator[int]:
        if self._ngram:
            found = words(text)
            for i in range(len(found) - self._ngram + 1):
                yield hash(" ".join(found[i : i + self._ngram]))


def places(spec: str) -> list[str]:
    """Returns the sources of an evaluation set.

    Args:
      spec: a similarity or entailment file, a BEIR folder, records, or TRAIN:TEST of a classification set; a file,
        folder or glob, tfds:NAME:SPLIT or hf:NAME:SPLIT.

    Raises:
      UserError: there is nothing of that name.
    """
    if ":" in spec and not spec.startswith(tuple(f"{name}:" for name in DATA_SETS)) and not path_of(spec).exists():
        try:
            return [str(path) for path in classification_files(spec)]
        except UserError as error:
            raise type(error)(f"{WHERE}: {error}") from error
    check_place(SourceConfig(**parse_spec(spec)), WHERE)
    return [spec]


def sources(spec: str) -> list[RowSource]:
    """Opens the sources of an evaluation set; see `places`."""
    return [open_rows(SourceConfig(**parse_spec(place)), WHERE) for place in places(spec)]


def _name(spec: str) -> str:
    if spec.startswith(tuple(f"{name}:" for name in DATA_SETS)):
        return spec
    return stem(path_of(places(spec)[-1].rstrip("/")))


def _texts(spec: str) -> Iterator[str]:
    """Yields the texts of a set."""
    for source in sources(spec):
        found = False
        for number, row in source.rows(_choose):
            if isinstance(row, BadRecord):
                raise UserError(f"{source.name(number)}: {row}")
            texts = list(_texts_of(row))
            if not texts:
                raise UserError(f"{source.name(number)}: no text in {', '.join(map(str, row))}: {_wanted()}")
            found = True
            yield from texts
        if not found:
            raise UserError(f"{WHERE}: {source.title} is empty")


def _texts_of(row: dict[str, Any]) -> Iterator[str]:
    for column in COLUMNS:
        value = row.get(column)
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str):
                yield text
    if isinstance(row.get(TITLE), str) and isinstance(row.get("text"), str):
        yield f"{row[TITLE]} {row['text']}"


def _choose(where: str, columns: Sequence[str]) -> list[str]:
    chosen = [column for column in columns if column in (*COLUMNS, TITLE)]
    if not chosen:
        raise UserError(f"{where}: has the columns {', '.join(columns)}: {_wanted()}")
    return chosen


def _wanted() -> str:
    return f"wants one of {', '.join(COLUMNS)}"
