"""The documents that a model finds for each query, without those that are known not to be wrong."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from jaxembed.mining import rules
from jaxembed.mining.collection import Collection

CELLS = 1 << 25  # candidates looked at together, each in about 50 bytes, in one search of all documents
LEAST = 256  # but so many records at least
DEEPEST = 4096  # documents searched for one query, at the most; or twice as many as are wanted

# (numbers of queries [Q], k) → scores float32 and numbers int32 of documents, [Q, k], best first
Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Block:
    """Some records' candidates, best first.

    Attributes:
      records: int64 [R], numbers of the records.
      numbers: int32 [R, K], of the documents.
      scores: float32 [R, K].
      left: bool [R, K]: the first so many candidates that no rule drops.
      dropped: per rule, bool [R, K]: what it drops before the last of them.
    """

    records: np.ndarray
    numbers: np.ndarray
    scores: np.ndarray
    left: np.ndarray
    dropped: dict[str, np.ndarray]


def candidates(collection: Collection, search: Search, searched: int, depth: int, keep_given: bool) -> Iterator[Block]:
    """Yields each record's best documents that are neither known to match nor to be in its group.

    What is dropped takes up no rank: where `depth` candidates are not left, the search goes twice as deep, and so on to
    DEEPEST.

    Args:
      collection: the records and documents.
      search: `Scorer.search`.
      searched: among how many documents.
      depth: how many candidates a record is to have.
      keep_given: drop the record's own negatives, because it keeps them.
    """
    records = np.argsort(collection.query, kind="stable")  # by query, so that few are searched for twice
    if not len(records):
        return
    deepest = min(searched, max(DEEPEST, 2 * depth))
    known = int(np.quantile(collection.most_known, 0.9))
    k = min(depth + min(known, depth) + 4, deepest)
    while len(records):
        again = []
        size = max(LEAST, CELLS // k)
        for start in range(0, len(records), size):
            part = records[start : start + size]
            queries, rows = np.unique(collection.query[part], return_inverse=True)
            scores, numbers = search(queries, k)
            block = _block(collection, part, scores[rows], numbers[rows], depth, keep_given)
            short = (block.left.sum(axis=1) < depth) & (k < deepest)
            yield _rows(block, ~short)
            again.append(part[short])
        records = np.concatenate(again)
        k = min(2 * k, deepest)


def _block(
    collection: Collection, records: np.ndarray, scores: np.ndarray, numbers: np.ndarray, depth: int, keep_given: bool
) -> Block:
    asked, keys = collection.asked[collection.query[records]], collection.document_keys[numbers]
    dropped = {
        "equal text": rules.equal_text(records, keys, collection.own),
        "known positive": rules.known_positive(asked, keys, collection.answers),
        "same group": rules.same_group(asked, keys, collection.groups_asked, collection.in_group),
        "given already": rules.given_already(records, keys, collection.given) & keep_given,
        "repeated text": rules.repeated_text(keys),
    }
    left = np.ones(keys.shape, bool)
    for name, mask in dropped.items():
        dropped[name], left = mask & left, left & ~mask
    wanted = (left.cumsum(axis=1) <= depth) & left
    # What lies behind the last one that is wanted depends on how deep the search went.
    seen = wanted[:, ::-1].cumsum(axis=1)[:, ::-1] > 0
    seen |= (left.sum(axis=1) < depth)[:, None]
    return Block(records, numbers, scores, wanted, {name: mask & seen for name, mask in dropped.items()})


def _rows(block: Block, chosen: np.ndarray) -> Block:
    dropped = {name: mask[chosen] for name, mask in block.dropped.items()}
    return Block(block.records[chosen], block.numbers[chosen], block.scores[chosen], block.left[chosen], dropped)
