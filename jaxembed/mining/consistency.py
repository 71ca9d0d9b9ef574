"""Pairs whose positive a model does not find for their query: most likely noise."""

from collections.abc import Sequence

import numpy as np

from jaxembed.data.record_formats import Record
from jaxembed.embedder import Embedder
from jaxembed.mining.candidates import candidates
from jaxembed.mining.collection import Collection
from jaxembed.mining.dropping import Dropped, part_of
from jaxembed.mining.scoring import Scorer
from jaxembed.mining.text_keys import hashes


def consistent(
    records: Sequence[Record],
    embedder: Embedder,
    prompts: tuple[str, str],
    first: int,
    pool: int,
    dropped: Dropped,
    bar: bool = False,
) -> list[Record]:
    """Keeps pairs whose positive is among the first for its query, as the consistency filter of E5 does.

    (Wang et al. 2022, arXiv:2212.03533, section 3; there the first 2 of a million random passages.) Documents that may
    match the query too do not count against a positive: other positives of the query, what equals it, and documents of
    its group or label. Positives that are not found are left out of their records; a record without any is dropped.

    Args:
      records: their positives and negatives are the documents.
      embedder: the model.
      prompts: of queries and documents: see `scoring.prompts_of`.
      first: so many.
      pool: search among so many documents, drawn by a hash of their texts; all where there are no more.
      dropped: counts what is dropped.
      bar: show progress on standard error.

    Raises:
      UserError: the model's vectors are not finite.
    """
    reason = f"positive not among the first {first}"
    dropped.name([reason])
    collection = Collection.of(records)
    scorer = Scorer(embedder, collection, prompts, pool=drawn(collection.documents, pool), bar=bar)
    positives = collection.positives
    scores = scorer.score(collection.query[positives.owners], positives.values)
    found = scores >= thresholds(collection, scorer, first)[positives.owners]
    kept = []
    for number, record in enumerate(records):
        of_record = found[positives.start[number] : positives.start[number + 1]]
        if not of_record.any():
            dropped.add(reason, record, f"{scores[positives.start[number]]:.3f}")
            continue
        dropped.texts += int((~of_record).sum())
        kept.append(part_of(record, of_record, [True] * len(record.negatives)))
    return kept


def thresholds(collection: Collection, scorer: Scorer, first: int) -> np.ndarray:
    """Returns what a record's positives have to reach: float32 [R].

    That is the score of the document that comes `first` of those that are no answers, -inf where there are fewer.
    """
    scores = np.full(len(collection.records), -np.inf, np.float32)
    for block in candidates(collection, scorer.search, scorer.searched, first, keep_given=False):
        rows, columns = np.nonzero(block.left & (block.left.cumsum(axis=1) == first))
        scores[block.records[rows]] = block.scores[rows, columns]
    return scores


def drawn(documents: Sequence[str], pool: int) -> np.ndarray:
    """Returns the numbers of so many documents, rising: those of the lowest hashes, all where there are no more."""
    if len(documents) <= pool:
        return np.arange(len(documents))
    return np.sort(np.argsort(hashes(documents), kind="stable")[:pool])
