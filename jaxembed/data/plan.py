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
from jaxembed.data.shares import pairs_by_share, share_out
from jaxembed.errors import UserError

if TYPE_CHECKING:
    from jaxembed.data.cache import TokenCache

NO_SLOT = -1  # text index of a slot that holds no text
_PERIOD = 65_536  # draws after which the pattern of sources repeats, at the most
_RECORDS, _POSITIVES, _NEGATIVES = range(3)  # what a hash is for


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The texts of one step: B pairs of T texts.

    Attributes:
      step: its number.
      source_B: int32, the source of each pair.
      record_B: int64, the record in its source.
      texts_BxT: int64, text numbers in the source's cache, NO_SLOT where the record has fewer: column 0 the query,
        1 … P positives, then K hard negatives; then, where the plan has negative queries, for each of these negatives
        a query that it does answer.
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
    often. Draws belong to sources by a pattern that repeats after at most 65,536 draws and spreads each source evenly.
    The draws of one source walk through shuffles of its records, a new one for every pass, so that a record comes
    exactly once per pass. How the pattern fills the steps:

    - mixed: a step takes the next B draws.
    - steps of one source (`one_source` = h): round(h · B) pairs come from the step's main source, which changes from
      step to step by the same pattern, and only the other pairs are the next draws. h = 1 makes batches of a single
      source (Nomic Embed, arXiv:2402.01613; Arctic-Embed, arXiv:2405.05374), less makes the semi-homogeneous batches
      of KaLM-Embedding (arXiv:2501.01028).
    - fixed shares (the sources' `share`): every step has the same number of pairs of each source, as in the balance of
      Conan-embedding (arXiv:2408.15710); weights and numbers of records do not matter.

    In each case the pairs of a source lie evenly over the places of a step, so that a part of it holds its part of all.

    Attributes:
      caches: a token cache per source.
      sources: their configs: weight or share, in_batch, negatives_from, cross_device.
      batch_size: pairs per step, B.
      positives: positives per pair, P: the wish, or the most that any record has.
      negatives: hard negatives per pair, K, likewise.
      negative_queries: whether a step also has a query that each hard negative answers.
      texts_per_pair: T = 1 + P + K, + K with negative queries.
      seed: of the shuffles.
      max_length: tokens of the longest text of all sources.
      steps_per_epoch: steps in which a source of weight 1 is seen once: sum(weight · records) / B. With fixed shares
        sources are not seen equally often, and an epoch is as many pairs as there are records: over all records, the
        average number of times that they are seen is then 1.
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
        negative_queries: bool = False,
        one_source: float = 0.0,
    ) -> None:
        """Makes the plan.

        Args:
          caches: a token cache per source.
          sources: their configs.
          batch_size: pairs per step.
          positives: the most that a step uses of a record.
          negatives: likewise of its hard negatives.
          seed: of the shuffles.
          negative_queries: whether the losses want the hard negatives' own queries.
          one_source: part of each step's pairs that come from one source; not with shares.

        Raises:
          UserError: a source without in-batch negatives has no hard negatives either; a share of the batch is no pair.
        """
        self.caches = tuple(caches)
        self.sources = tuple(sources)
        self.batch_size = batch_size
        self.positives = min(positives, max(c.max_positives for c in self.caches))
        self.negatives = min(negatives, max(c.max_negatives for c in self.caches))
        self.negative_queries = negative_queries
        self.texts_per_pair = 1 + self.documents + self.negatives * negative_queries
        self.seed = seed
        self.max_length = max(c.max_length for c in self.caches)
        for i, (cache, source) in enumerate(zip(self.caches, self.sources)):
            if not source.in_batch and cache.max_negatives == 0:
                raise UserError(
                    f"config.data.train[{i}].in_batch = False, but {source.path or source.name} has no hard negatives: "
                    "its pairs would have nothing to be told from"
                )
        weighted = [Fraction(str(s.weight)) * c.n_records for s, c in zip(self.sources, self.caches)]
        self.steps_per_epoch = float(sum(weighted) / batch_size)
        if any(source.share for source in self.sources):  # the pattern is one step
            self._pattern = Pattern.of(np.array(pairs_by_share([s.share for s in self.sources], batch_size)))
        else:
            self._pattern = Pattern.of(quotas(weighted, _PERIOD))
        self._n_main = round(one_source * batch_size)
        is_mixed_B, turn_B = interleave(np.array([self._n_main, batch_size - self._n_main]))
        self._order_B = turn_B + is_mixed_B * self._n_main  # which of (main draws, mixed draws) stands at each place
        self._n_records = np.array([c.n_records for c in self.caches], np.int64)
        self._parts_of_negatives = np.array([1 + c.negative_queries for c in self.caches])

    @property
    def documents(self) -> int:
        """Documents per pair, D = P + K."""
        return self.positives + self.negatives

    def step(self, n: int) -> StepPlan:
        """Returns the texts of step n ≥ 0."""
        source_B, turn_B = self._draws(n)
        size_B = self._n_records[source_B]
        epoch_B, index_B = np.divmod(turn_B, size_B)
        record_B = permute(index_B, size_B, mix(self.seed, _RECORDS, source_B, epoch_B))

        first_B = self.take(source_B, record_B, lambda cache, record: cache.first_text[record])
        end_B = self.take(source_B, record_B, lambda cache, record: cache.first_text[record + 1])
        n_positives_B = self.take(source_B, record_B, lambda cache, record: cache.n_positives[record]).astype(np.int64)
        n_negatives_B = (end_B - first_B - 1 - n_positives_B) // self._parts_of_negatives[source_B]
        draw_B = n * self.batch_size + np.arange(self.batch_size)
        positive_BxP = _choose(n_positives_B, self.positives, mix(self.seed, _POSITIVES, draw_B))
        negative_BxK = _choose(n_negatives_B, self.negatives, mix(self.seed, _NEGATIVES, draw_B))
        first_Bx1 = first_B[:, None]
        negatives_Bx1 = first_Bx1 + 1 + n_positives_B[:, None]
        columns = [
            first_Bx1,
            np.where(positive_BxP >= 0, first_Bx1 + 1 + positive_BxP, NO_SLOT),
            np.where(negative_BxK >= 0, negatives_Bx1 + negative_BxK, NO_SLOT),
        ]
        if self.negative_queries:
            answered_BxK = (negative_BxK >= 0) & (self._parts_of_negatives[source_B] == 2)[:, None]
            columns.append(np.where(answered_BxK, negatives_Bx1 + n_negatives_B[:, None] + negative_BxK, NO_SLOT))
        texts_BxT = np.concatenate(columns, axis=1)
        lengths_BxT = self.take(source_B, np.maximum(texts_BxT, 0), lambda cache, text: cache.lengths[text])
        lengths_BxT = np.where(texts_BxT >= 0, lengths_BxT, 0).astype(np.int32)
        return StepPlan(n, source_B.astype(np.int32), record_B, texts_BxT, lengths_BxT)

    def _draws(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each pair of step n, and how many pairs the source gave before it, int64 [B].

        In the order of the draws a step's main pairs come before its mixed ones.
        """
        n_mixed = self.batch_size - self._n_main
        main, _ = self._pattern.at(n)
        main_turn = self._pattern.before(n)[main] * self._n_main + self._pattern.before(n * n_mixed)[main]
        mixed, mixed_turn = self._pattern.at(n * n_mixed + np.arange(n_mixed))
        mixed_turn += self._pattern.before(n + 1)[mixed] * self._n_main
        source_B = np.concatenate([np.full(self._n_main, main), mixed])
        turn_B = np.concatenate([main_turn + np.arange(self._n_main), mixed_turn])
        return source_B[self._order_B], turn_B[self._order_B]

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


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which source each draw belongs to: a pattern of Q draws that repeats.

    Attributes:
      quotas_S: int64, draws of a period that belong to each source; Q in all.
      source_Q: int64, the source of each draw of a period.
      turn_Q: int64, how many draws its source had earlier in the period.
    """

    quotas_S: np.ndarray
    source_Q: np.ndarray
    turn_Q: np.ndarray

    @classmethod
    def of(cls, quotas_S: np.ndarray) -> "Pattern":
        """Makes the pattern that spreads so many draws of each source evenly."""
        return cls(quotas_S, *interleave(quotas_S))

    def at(self, draw: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each draw ≥ 0, and how many draws it had before, int64 of the shape of `draw`."""
        period, place = np.divmod(draw, self.source_Q.size)
        source = self.source_Q[place]
        return source, period * self.quotas_S[source] + self.turn_Q[place]

    def before(self, draw: int) -> np.ndarray:
        """Returns how many of the draws before this one each source had, int64 [S]."""
        period, place = divmod(draw, self.source_Q.size)
        return period * self.quotas_S + np.bincount(self.source_Q[:place], minlength=self.quotas_S.size)


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
    return 1 + np.array(share_out(whole, most - len(whole)), np.int64)  # one each, the others in proportion


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
