"""Static shapes: how long a row is, and the few numbers of rows that a bin may have.

XLA compiles a step for each shape. A bin's rows are padded up to the next of a few *rungs*, chosen once from what
planned steps need and kept with the run.
"""

import bisect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxembed.data.cache import TokenCache

_HEADROOM = 0.03  # the last rung but one stands so far above the most rows seen
_WORTH = 0.005  # of all rows: a rung that saves less is not worth a compilation


def choose_row_length(caches: Sequence["TokenCache"], multiple: int) -> int:
    """Returns the shortest row, in tokens, that holds the longest text of all sources.

    Short rows waste least attention on pairs of tokens that may not see each other.

    Args:
      caches: of the sources.
      multiple: what the kernels want a row's length to be a multiple of.
    """
    longest = max(cache.max_length for cache in caches)
    return math.ceil(longest / multiple) * multiple


def worst_case_rows(n_texts: int, row_length: int, max_length: int) -> int:
    """Returns the most rows that `packing.pack` can need for n_texts of up to max_length tokens.

    A row is opened only where no open one has room, so each of those holds row_length // max_length texts already.
    """
    return math.ceil(n_texts / (row_length // max_length))


def choose_rungs(rows_needed: Sequence[int], worst_case: int, max_rungs: int = 6) -> tuple[int, ...]:
    """Chooses the numbers of rows that a bin may have.

    The last rung is the worst case, so that no step can fail; the one before stands a little above the most seen; the
    others are those of the seen numbers that make the expected padding least (dynamic programming over their
    histogram), as many as save at least half a percent of the rows each.

    Args:
      rows_needed: rows of the fullest bin in each of some planned steps.
      worst_case: rows that no step exceeds.
      max_rungs: the most to choose, at least 2.

    Returns:
      The rungs in ascending order.
    """
    seen, counts = np.unique(np.asarray(rows_needed, np.int64), return_counts=True)
    top = min(worst_case, int(seen[-1]) + math.ceil(_HEADROOM * int(seen[-1])))
    below = _best_subset(seen, counts, top, max_rungs - 2)
    return tuple(sorted({*below, top, worst_case}))


def rung_for(rows: int, rungs: Sequence[int]) -> int:
    """Returns the lowest rung that holds so many rows.

    Raises:
      ValueError: none does.
    """
    place = bisect.bisect_left(rungs, rows)
    if place == len(rungs):
        raise ValueError(f"a bin needs {rows} rows, more than the highest of the rungs {tuple(rungs)}")
    return rungs[place]


def _best_subset(seen: np.ndarray, counts: np.ndarray, top: int, most: int) -> list[int]:
    """Returns up to `most` of the seen numbers which, with `top` above them, waste the fewest rows."""
    ends = np.append(seen, top)
    steps_before = np.concatenate([[0], np.cumsum(counts)])
    rows_before = np.concatenate([[0], np.cumsum(counts * seen)])
    # waste[i, j]: rows wasted when the numbers i … j are padded to the j-th; the top stands behind the last number.
    i, j = np.ogrid[: ends.size, : ends.size]
    last = np.minimum(j + 1, seen.size)
    waste = np.where(i <= j, ends[j] * (steps_before[last] - steps_before[i]) - (rows_before[last] - rows_before[i]), 0)
    unreachable = rows_before[-1] + ends[-1] * steps_before[-1] + 1
    waste = np.where(i <= j, waste, unreachable)
    # best[j]: the least waste of the numbers up to the j-th, when it is the highest of k + 1 rungs.
    best = waste[0]
    origins: list[np.ndarray] = []
    totals = [best[-1]]
    for _ in range(min(most, seen.size)):
        candidates = best[:-1, None] + waste[1:]
        origins.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
        totals.append(best[-1])
    n_rungs = 0
    while n_rungs < len(origins) and totals[n_rungs] - totals[n_rungs + 1] >= _WORTH * rows_before[-1]:
        n_rungs += 1
    chosen, end = [], seen.size
    for origin in reversed(origins[:n_rungs]):
        end = origin[end]
        chosen.append(int(seen[end]))
    return chosen[::-1]
