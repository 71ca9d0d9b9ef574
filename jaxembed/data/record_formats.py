"""The file formats of training records: which keys of a row hold the query, its positives and the rest.

A layout maps our field names to keys of the file. `jaxembed` is this package's own format; `st` is what
sentence-transformers trains on (columns by order), `flagembedding` and `tevatron` are those systems' JSON lines.
`texts` has single texts, each a pair with itself: for SimCSE (arXiv:2104.08821), whose two views of a text differ by
dropout.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_POSITIVES = 65_535  # counts are kept as uint16
_MAX_SCORE = 3.4e38  # scores are kept as float32

Layout = Mapping[str, tuple[str, ...]]  # our field → the file's keys, whose values are joined

_NAMES = ("group", "id", "label", "instruction")
_PLAIN = ("query", "positive", "negative", "negative_query", "scores", *_NAMES)
_LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "jaxembed": {field: (field,) for field in _PLAIN},
    "texts": {"text": ("text",), **{field: (field,) for field in _NAMES}},
    "flagembedding": {
        "query": ("query",),
        "positive": ("pos",),
        "negative": ("neg",),
        "scores": ("pos_scores", "neg_scores"),
        "instruction": ("prompt",),
    },
    "tevatron": {
        "query": ("query",),
        "positive": ("positive_passages",),
        "negative": ("negative_passages",),
        "id": ("query_id",),
    },
}

# Column names of sentence-transformers data sets. 'hypothesis' is a query beside 'entailment', else an answer.
_ST_QUERIES = ("anchor", "query", "question", "sentence1", "premise", "hypothesis")
_ST_POSITIVES = ("positive", "answer", "response", "sentence2", "hypothesis", "entailment")
_ST_NEGATIVE = re.compile(r"(hard_)?negatives?(_?\d+)?|contradiction")
_ST_LABELS = ("label", "labels", "score", "scores")
_ST_NO_TEXT = re.compile(r"id|.*_(id|ids|idx)|dataset_name")


class BadRecord(ValueError):
    """A row that is no record; the message says why."""


@dataclass(frozen=True)
class Record:
    """A query with the texts that match it and the texts that do not.

    Attributes:
      query: never empty.
      positives: at least one, none empty.
      negatives: hard negatives, none empty.
      group: rows of one group are never each other's negatives; '' for none.
      id: the record's name in its data set.
      scores: a teacher's or annotator's, one per positive then negative; or empty.
      label: a class: like a group, but within one source.
      instruction: replaces `{instruction}` in a prompt.
      negative_queries: for each negative a query that it does answer; or empty.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    group: str = ""
    id: str = ""
    scores: tuple[float, ...] = ()
    label: str = ""
    instruction: str = ""
    negative_queries: tuple[str, ...] = ()


def fields_of(record_format: str) -> tuple[str, ...]:
    """Returns the fields that `columns` may name a key for."""
    return ("text", *_NAMES) if record_format == "texts" else (*_PLAIN, "score")


@functools.lru_cache(maxsize=256)
def layout_of(record_format: str, columns: tuple[tuple[str, str], ...], keys: tuple[str, ...]) -> Layout:
    """Returns where a row with these keys holds each field. `columns` (field, key) wins over the format's own names.

    Sentence-transformers goes by the order of the columns: anchor, positive, negatives. Here, columns with the
    customary names are known by them whatever their order, and others beside them ignored; where the anchor's or the
    positive's name is not customary, the order decides and every further column is a negative, as there.
    """
    chosen = {("scores" if field == "score" else field): (key,) for field, key in columns}
    if record_format == "st":
        return _st_layout(chosen, keys) | chosen
    layout = _LAYOUTS[record_format] | chosen
    if record_format == "texts":
        return layout | {"query": layout["text"], "positive": layout["text"]}
    if record_format == "jaxembed" and layout["query"][0] not in keys and "sentence1" in keys:
        layout = layout | {"query": ("sentence1",), "positive": ("sentence2",), "scores": ("score",)} | chosen
    if record_format == "tevatron" and layout["query"][0] not in keys and "query_text" in keys:
        layout = layout | {"query": ("query_text",)} | chosen
    return layout


def _st_layout(chosen: Layout, keys: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    taken = {key for value in chosen.values() for key in value}
    texts = [k for k in keys if k not in taken and k not in _ST_LABELS and not _ST_NO_TEXT.fullmatch(k)]
    query = chosen.get("query") or tuple(k for k in _ST_QUERIES if k in texts)[:1]
    positive = chosen.get("positive") or tuple(k for k in _ST_POSITIVES if k in texts and k not in query)[:1]
    negatives = tuple(k for k in texts if _ST_NEGATIVE.fullmatch(k))
    if not (query and positive):
        rest = list(texts)
        query = chosen.get("query") or tuple(rest[:1])
        rest = [k for k in rest if k not in query]
        positive = chosen.get("positive") or tuple(rest[:1])
        negatives = tuple(k for k in rest if k not in positive)
    label = tuple(k for k in _ST_LABELS if k in keys and k not in taken)[:1]
    return {
        "query": query or ("query",),
        "positive": positive or ("positive",),
        "negative": negatives,
        "scores": label,
        "id": ("id",),
    }


def to_record(row: Mapping[str, Any], layout: Layout, record_format: str) -> Record:
    """Returns the row as a `Record`.

    Raises:
      BadRecord: a query or positive is missing or empty, a value has the wrong type, the scores do not fit.
    """
    query = _texts(row, layout["query"], "query", record_format)
    if len(query) != 1:
        raise BadRecord(f"{layout['query'][0]!r} holds {len(query)} texts, wants one")
    positives = _texts(row, layout["positive"], "positive", record_format)
    negatives = _texts(row, layout.get("negative", ()), "", record_format)
    if len(positives) > MAX_POSITIVES:
        raise BadRecord(f"{len(positives)} positives, at most {MAX_POSITIVES} are possible")
    negative_queries = _texts(row, layout.get("negative_query", ()), "", record_format)
    if negative_queries and len(negative_queries) != len(negatives):
        raise BadRecord(
            f"{len(negative_queries)} negative queries for {len(negatives)} negatives, wants one for each negative"
        )
    scores = _scores(row, layout.get("scores", ()), record_format)
    if scores and len(scores) != len(positives) + len(negatives):
        raise BadRecord(
            f"{len(scores)} scores for {len(positives)} positives and {len(negatives)} negatives, wants one for each"
        )
    names = {field: _name(row, layout.get(field, ())) for field in _NAMES}
    return Record(query[0], positives, negatives, scores=scores, negative_queries=negative_queries, **names)


def _texts(row: Mapping[str, Any], keys: tuple[str, ...], required: str, record_format: str) -> tuple[str, ...]:
    texts: list[str] = []
    for key in keys:
        value = row.get(key)
        if value is None:
            continue
        items = value if isinstance(value, list | tuple) else (value,)
        texts += [_text(item, key, record_format) for item in items]
    if required and not texts:
        if any(row.get(key) is not None for key in keys):
            raise BadRecord(f"{keys[0]!r} is an empty list")
        if record_format == "tevatron" and f"{required}_document_ids" in row:
            raise BadRecord("documents are given by id: join them with their corpus into 'positive_passages' first")
        has = ", ".join(str(key) for key in list(row)[:8]) or "nothing"
        raise BadRecord(f"no {keys[0]!r} (the record has {has}): set the source's format, or name it in columns")
    return tuple(texts)


def _text(item: Any, key: str, record_format: str) -> str:
    if record_format == "tevatron" and isinstance(item, Mapping):
        title, text = item.get("title") or "", item.get("text")
        if not isinstance(text, str) or not isinstance(title, str):
            raise BadRecord(f"a passage of {key!r} has no 'text'")
        item = f"{title} {text}" if title else text
    if not isinstance(item, str):
        raise BadRecord(f"{key!r} wants text, has {type(item).__name__}")
    if not item.strip():
        raise BadRecord(f"{key!r} is empty")
    return require_unicode(item, key)


def _scores(row: Mapping[str, Any], keys: tuple[str, ...], record_format: str) -> tuple[float, ...]:
    scores: list[float] = []
    for key in keys:
        value = row.get(key)
        if value is None or (record_format == "st" and isinstance(value, str)):
            continue  # a text label of a sentence-transformers pair names the pair's class, no score
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, bool) or not isinstance(item, int | float):
                raise BadRecord(f"{key!r} wants numbers, has {type(item).__name__}")
            if not abs(item) <= _MAX_SCORE:
                raise BadRecord(f"{key!r} holds NaN or a number beyond float32")
            scores.append(float(item))
    return tuple(scores)


def _name(row: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    value = row.get(keys[0]) if keys else None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""  # NaN is how tables write a missing number
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise BadRecord(f"{keys[0]!r} wants text or a whole number, has {type(value).__name__}")
    return require_unicode(str(value), keys[0])


def require_unicode(text: str, key: str) -> str:
    """Returns the text; refuses half a surrogate pair, which JSON can spell but UTF-8, hence the tokenizer, cannot."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRecord(f"{key!r} is not valid Unicode (a lone surrogate at character {error.start})") from error
    return text
