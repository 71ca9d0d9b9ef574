"""Retrieval from training records that were held out: each query is to find its positives among all documents."""

import collections
import re

from jaxembed.config import SourceConfig
from jaxembed.data.records import Record, RecordReader
from jaxembed.data.sources import DATA_SETS, parse_spec
from jaxembed.evaluation.lines import stem
from jaxembed.evaluation.retrieval import RetrievalData
from jaxembed.storage import path_of

_VERSION = re.compile(r"[:/]\d+\.\d+\.\d+$")  # of a data set of tfds


def read_pairs(spec: str, where: str) -> RetrievalData:
    """Makes a retrieval set of a set of records.

    The documents are the distinct positives and hard negatives of all records; those that are equal as strings are one.
    A query that several records share has the positives of them all, each with gain 1. What training never takes for
    a query's negative is no wrong answer here either, and is left out of its ranking: documents of other records of its
    group (or of its label, where there is no group) but its own hard negatives, the query itself, and texts that it
    answers in another record. Scores that records may have are not looked at.

    Args:
      spec: a file, folder or glob, 'tfds:NAME[:SPLIT]' or 'hf:NAME[:SPLIT]': see `sources.parse_spec`.
      where: the flag or config field that names it, for messages.

    Raises:
      UserError: nothing there, or a bad record (named FILE:LINE).
    """
    source = SourceConfig(**parse_spec(spec))
    gains: dict[str, dict[str, float]] = {}  # by query; a text is its own id
    groups_of: dict[str, set[str]] = collections.defaultdict(set)  # query → its groups
    texts_of: dict[str, set[str]] = collections.defaultdict(set)  # group → its documents
    answered_by: dict[str, set[str]] = collections.defaultdict(set)  # text → queries that it answers
    documents: set[str] = set()
    for record in RecordReader(source, "error", where):
        positives, group = record.positives, _group(record)
        known = gains.setdefault(record.query, {})
        known.update(dict.fromkeys(record.negatives, 0.0) | known | dict.fromkeys(positives, 1.0))
        documents.update(positives, record.negatives)
        if group:
            groups_of[record.query].add(group)
            texts_of[group].update(positives, record.negatives)
        for positive in positives:
            answered_by[positive].add(record.query)
    in_group = {group: frozenset(texts) for group, texts in texts_of.items()}
    left_out = []
    for query, known in gains.items():
        same = frozenset(documents & {query, *answered_by[query]})
        gains[query] = {text: gain for text, gain in known.items() if gain or text not in same}
        left_out.append((same, *(in_group[group] for group in groups_of[query])))
    # Sorted, so that equal scores are not ranked in an order that has to do with the answers.
    ordered = sorted(documents)
    return RetrievalData(set_name(source), list(gains), list(gains), ordered, ordered, list(gains.values()), left_out)


def set_name(source: SourceConfig) -> str:
    """Returns a source's short name: without folders, endings and version; of a data set with its split."""
    if source.name:
        name = _VERSION.sub("", source.name).replace("/", "-")
    else:
        path = path_of(_VERSION.sub("", source.path.rstrip("/"))).resolve()
        name = stem(path).strip("*.-_") or path.parent.name  # a glob may be nothing but a star
    return f"{name}-{source.split}" if source.source in DATA_SETS else name


def _group(record: Record) -> str:
    return f"group {record.group}" if record.group else f"label {record.label}" if record.label else ""
