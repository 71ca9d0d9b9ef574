"""The plan: which texts are in step n, as a function of (seed, n) alone.

Nothing is stored per record and nothing is counted along the way, so that any step can be asked for at once, by any
process, whatever the number of hosts or devices.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from jaxembed.config import SourceConfig
from jaxembed.data.permutation import mix, permute
from jaxembed.errors import UserError

if TYPE_CHECKING:
    from jaxembed.data.cache import TokenCache

NO_SLOT = -1  # text index of a slot that holds no text
_PERIOD = 65_536  # draws after which the pattern of sources repeats, at the most
_RECORDS, _POSITIVES, _NEGATIVES = range(3)  # what a hash is for


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The texts of one step: B pairs of T = 1 + P + K texts.

    Attributes:
      step: its number.
      source_B: int32, the source of each pair.
      record_B: int64, the record in its source.
      texts_BxT: int64, text numbers in the source's cache, NO_SLOT where the record has fewer: column 0 the query,
        1 … P positives, then K hard negatives.
      lengths_BxT: int32, tokens of each text, 0 for none.
    """

    step: int
    source_B: np.ndarray
    record_B: np.ndarray
    texts_BxT: np.ndarray
    lengths_BxT: np.ndarray


class Plan:
    """Draws records from one or several sources.

    A record is drawn at a rate proportional to its source's weight: with equal weights every record comes equally
    often. Draw number k (step · B + place in the batch) belongs to a source by a pattern that repeats after at most
    65,536 draws and spreads each source evenly. The draws of one source walk through shuffles of its records, a new
    one for every pass, so that a record comes exactly once per pass.

    Attributes:
      caches: a token cache per source.
      sources: their configs: weight, in_batch, negatives_from.
      batch_size: pairs per step, B.
      positives: positives per pair, P: the wish, or the most that any record has.
      negatives: hard negatives per pair, K, likewise.
      texts_per_pair: T = 1 + P + K.
      seed: of the shuffles.
      max_length: tokens of the longest text of all sources.
      steps_per_epoch: steps in which a source of weight 1 is seen once: sum(weight · records) / B.
    """

    def __init__(
        self,
        caches: Sequence["TokenCache"],
        sources: Sequence[SourceConfig],
        *,
        batch_size: int,
        positives: int,
        negatives: int,
        seed: int,
    ) -> None:
        """Makes the plan; `positives` and `negatives` are the most that a step uses of a record.

        Raises:
          UserError: a source without in-batch negatives has no hard negatives either.
        """
        self.caches = tuple(caches)
        self.sources = tuple(sources)
        self.batch_size = batch_size
        self.positives = min(positives, max(c.max_positives for c in self.caches))
        self.negatives = min(negatives, max(c.max_negatives for c in self.caches))
        self.texts_per_pair = 1 + self.positives + self.negatives
        self.seed = seed
        self.max_length = max(c.max_length for c in self.caches)
        for i, (cache, source) in enumerate(zip(self.caches, self.sources)):
            if not source.in_batch and cache.max_negatives == 0:
                raise UserError(
                    f"config.data.train[{i}].in_batch = False, but {source.path or source.name} has no hard negatives: "
                    "its pairs would have nothing to be told from"
                )
        shares = [Fraction(str(s.weight)) * c.n_records for s, c in zip(self.sources, self.caches)]
        self.steps_per_epoch = float(sum(shares) / batch_size)
        self._quotas = quotas(shares, _PERIOD)
        self._pattern, self._turns = interleave(self._quotas)
        self._n_records = np.array([c.n_records for c in self.caches], np.int64)

    def step(self, n: int) -> StepPlan:
        """Returns the texts of step n ≥ 0."""
        draw_B = n * self.batch_size + np.arange(self.batch_size)
        period_B, place_B = np.divmod(draw_B, self._pattern.size)
        source_B = self._pattern[place_B]
        turn_B = period_B * self._quotas[source_B] + self._turns[place_B]  # how many the source gave before
        size_B = self._n_records[source_B]
        epoch_B, index_B = np.divmod(turn_B, size_B)
        record_B = permute(index_B, size_B, mix(self.seed, _RECORDS, source_B, epoch_B))

        first_B = self.take(source_B, record_B, lambda cache, record: cache.first_text[record])
        end_B = self.take(source_B, record_B, lambda cache, record: cache.first_text[record + 1])
        n_positives_B = self.take(source_B, record_B, lambda cache, record: cache.n_positives[record]).astype(np.int64)
        n_negatives_B = end_B - first_B - 1 - n_positives_B
        positive_BxP = _choose(n_positives_B, self.positives, mix(self.seed, _POSITIVES, draw_B))
        negative_BxK = _choose(n_negatives_B, self.negatives, mix(self.seed, _NEGATIVES, draw_B))
        first_Bx1 = first_B[:, None]
        texts_BxT = np.concatenate(
            [
                first_Bx1,
                np.where(positive_BxP >= 0, first_Bx1 + 1 + positive_BxP, NO_SLOT),
                np.where(negative_BxK >= 0, first_Bx1 + 1 + n_positives_B[:, None] + negative_BxK, NO_SLOT),
            ],
            axis=1,
        )
        lengths_BxT = self.take(source_B, np.maximum(texts_BxT, 0), lambda cache, text: cache.lengths[text])
        lengths_BxT = np.where(texts_BxT >= 0, lengths_BxT, 0).astype(np.int32)
        return StepPlan(n, source_B.astype(np.int32), record_B, texts_BxT, lengths_BxT)

    def take(
        self, source_B: np.ndarray, index: np.ndarray, field: Callable[["TokenCache", np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Reads a field of every source's cache at once.

        Args:
          source_B: int [B], which cache each row reads from.
          index: int64 [B, …], where.
          field: reads one cache at the given places.

        Returns:
          An array of `index`'s shape, of the field's dtype.
        """
        if len(self.caches) == 1:
            return np.asarray(field(self.caches[0], index))
        result = None
        for source, cache in enumerate(self.caches):
            rows = np.flatnonzero(source_B == source)
            if rows.size:
                values = np.asarray(field(cache, index[rows]))
                result = np.empty(index.shape, values.dtype) if result is None else result
                result[rows] = values
        return result


def quotas(shares: Sequence[Fraction], most: int) -> np.ndarray:
    """Returns how many draws of a period each source gets, int64 [S], at least 1 each.

    Exactly in proportion to `shares` where a period of up to `most` draws can be; else rounded on a period of `most`,
    which moves a source's share by less than 2 / most.
    """
    common = math.lcm(*(share.denominator for share in shares))
    whole = [int(share * common) for share in shares]
    divisor = math.gcd(*whole)
    total = sum(whole)
    if total // divisor <= most:
        return np.array([w // divisor for w in whole], np.int64)
    free = most - len(whole)  # one slot each, the others by largest remainder
    given = [1 + w * free // total for w in whole]
    by_remainder = sorted(range(len(whole)), key=lambda s: -(whole[s] * free % total))
    for s in by_remainder[: most - sum(given)]:
        given[s] += 1
    return np.array(given, np.int64)


def interleave(quotas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spreads each source's draws evenly over a period of Q = sum(quotas).

    Returns:
      The source of each draw, int64 [Q], and how many draws its source had earlier in the period, int64 [Q].
    """
    source = np.repeat(np.arange(quotas.size), quotas)
    turn = np.concatenate([np.arange(q) for q in quotas])
    order = np.argsort((turn + 0.5) / quotas[source], kind="stable")
    return source[order], turn[order]


def _choose(available_B: np.ndarray, columns: int, key_B: np.ndarray) -> np.ndarray:
    """Returns int64 [B, columns]: distinct numbers below `available`, all of them where they fit, -1 in empty columns.

    Where there are more than columns, the choice is the beginning of a shuffle by the row's key.
    """
    column = np.arange(columns)
    chosen = np.where(column < available_B[:, None], column, -1)
    more = np.flatnonzero(available_B > columns) if columns else ()
    if len(more):
        chosen[more] = permute(column, available_B[more, None], key_B[more, None])
    return chosen
