"""Hard negatives by rules: candidates of one model, scores of the same or of another, and what is taken."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxembed.hashing import mix
from jaxembed.mining import rules
from jaxembed.mining.candidates import Block, Search, candidates
from jaxembed.mining.collection import Collection, Lists
from jaxembed.mining.settings import Settings
from jaxembed.mining.tally import Tally
from jaxembed.mining.text_keys import hashes

# (numbers of queries [N], of documents [N]) → similarities float32 [N]
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Mined:
    """What was found for R records.

    Attributes:
      negatives: numbers of each record's new negatives, the best by the first model first.
      scores: of these, float32.
      positive_scores: of the records' positives, float32, in the order of `Collection.positives`.
      given_scores: of the negatives that they had, float32, in the order of `Collection.negatives`.
      tally: what was dropped, and the scores of what was not.
    """

    negatives: Lists
    scores: np.ndarray
    positive_scores: np.ndarray
    given_scores: np.ndarray
    tally: Tally


def mine(collection: Collection, search: Search, score: Score, settings: Settings, rescore: bool = False) -> Mined:
    """Finds hard negatives for all records.

    The rules come in the order of `candidates` and then: ranks before the window, absolute margin, relative margin,
    ceiling, floor. Of a query's positives in all its records, whatever its case and instruction there, the lowest score
    decides about margins, as in sentence-transformers. There, too, positives take up no rank; but a window that begins
    later than at the first rank is laid there over what the margins have left, here over the model's ranking.

    Args:
      collection: records and documents.
      search: the first model's: see `Scorer.search`.
      score: similarities that margins, ceiling and floor are about, and that are kept: see `Scorer.score`.
      settings: the rules.
      rescore: `score` is another model's than `search`.
    """
    owners = collection.query[collection.positives.owners]
    positive_scores = score(owners, collection.positives.values)
    given_scores = np.zeros(0, np.float32)
    if not settings.replace:
        given_scores = score(collection.query[collection.negatives.owners], collection.negatives.values)
    lowest = np.full(collection.n_asked, np.inf, np.float32)
    np.minimum.at(lowest, collection.asked[owners], positive_scores)
    lowest = lowest[collection.asked]
    wanted = np.full(len(collection.records), settings.negatives)
    if not settings.replace:
        wanted = np.maximum(wanted - collection.negatives.counts, 0)
    draw = _Draw(collection, settings.seed) if settings.sampling == "random" else None
    found: list[tuple[np.ndarray, ...]] = []
    tally = Tally(positive_scores)
    for block in candidates(collection, search, len(collection.documents), settings.last, not settings.replace):
        if rescore:
            block = _rescored(block, collection, score)
        left, dropped = _by_score(block, lowest[collection.query[block.records]], settings)
        order = draw(block) if draw else None
        chosen = rules.choose(left, wanted[block.records], order)
        tally.add(block.scores, block.dropped, dropped, left, chosen, rescore)
        rows, _ = np.nonzero(chosen)
        found.append((block.records[rows], block.numbers[chosen], block.scores[chosen]))
    records, numbers, scores = (np.concatenate(parts) for parts in zip(*found))
    order = np.argsort(records, kind="stable")
    start = np.searchsorted(records[order], np.arange(len(collection.records) + 1))
    return Mined(Lists(numbers[order].astype(np.int64), start), scores[order], positive_scores, given_scores, tally)


def _by_score(block: Block, positive_R: np.ndarray, settings: Settings) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns what the window and the rules about scores leave, and what each of them drops, bool [R, K]."""
    left, dropped = block.left, {}

    def drop(name: str, mask: np.ndarray) -> None:
        nonlocal left
        dropped[name], left = mask & left, left & ~mask

    if settings.first:
        drop("before the window", rules.before_window(left, settings.first))
    if settings.absolute_margin is not None:
        drop("absolute margin", rules.absolute_margin(block.scores, positive_R, settings.absolute_margin))
    if settings.relative_margin is not None:
        drop("relative margin", rules.relative_margin(block.scores, positive_R, settings.relative_margin))
    if settings.max_score is not None:
        drop("above --max_score", rules.above(block.scores, settings.max_score))
    if settings.min_score is not None:
        drop("below --min_score", rules.below(block.scores, settings.min_score))
    return left, dropped


def _rescored(block: Block, collection: Collection, score: Score) -> Block:
    """Returns a block with other scores of the candidates that are left; those that are dropped keep theirs."""
    scores = block.scores.copy()
    rows, columns = np.nonzero(block.left)
    scores[rows, columns] = score(collection.query[block.records[rows]], block.numbers[rows, columns].astype(np.int64))
    return dataclasses.replace(block, scores=scores)


class _Draw:
    """A number for each pair of query and document that depends on nothing but their texts and the seed."""

    def __init__(self, collection: Collection, seed: int) -> None:
        self._collection, self._seed = collection, seed
        self._queries, self._documents = hashes(collection.queries), hashes(collection.documents)

    def __call__(self, block: Block) -> np.ndarray:
        """Returns uint32 [R, K]."""
        queries = self._queries[self._collection.query[block.records]]
        mixed = mix(mix(jnp.asarray(queries) ^ jnp.uint32(self._seed)))
        return np.asarray(mix(mixed[:, None] ^ jnp.asarray(self._documents[block.numbers])))
