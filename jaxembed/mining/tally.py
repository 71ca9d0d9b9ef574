"""What mining and cleaning count: how much each rule dropped, and how scores are spread."""

import numpy as np

BINS = 80


class Tally:
    """Counts of candidates by what became of them, and histograms of their scores.

    Attributes:
      dropped: candidates that each rule has dropped, by its name, in the order of the rules.
      candidates: all that were looked at.
      left: those that no rule has dropped; most are not needed.
      chosen: those that were taken.
      histograms: counts of scores, int64 [BINS]: of 'positives', 'negatives' (taken) and 'dropped'.
    """

    def __init__(self, positive_scores: np.ndarray) -> None:
        """Begins with the scores of the positives."""
        self.dropped: dict[str, int] = {}
        self.candidates = self.left = self.chosen = 0
        self.histograms = {name: np.zeros(BINS, np.int64) for name in ("positives", "negatives", "dropped")}
        self._positives, self._edges = positive_scores, np.zeros(0)
        self.sums = {"positives": (float(positive_scores.sum(dtype=np.float64)), len(positive_scores))}

    @property
    def edges(self) -> np.ndarray:
        """The limits of the bins, float64 [BINS + 1], from the first candidates. What lies beyond is in the last."""
        if not len(self._edges):
            self._begin(self._positives[:0])
        return self._edges

    def add(
        self,
        scores: np.ndarray,
        known: dict[str, np.ndarray],
        dropped: dict[str, np.ndarray],
        left: np.ndarray,
        chosen: np.ndarray,
        rescored: bool,
    ) -> None:
        """Counts some records' candidates; arrays [R, K].

        Args:
          scores: float32.
          known: what was dropped for what it is, by rule.
          dropped: what was dropped for its rank or score.
          left: what was not.
          chosen: what was taken of it.
          rescored: the scores of `known` are another model's.
        """
        for name, mask in {**known, **dropped}.items():
            self.dropped[name] = self.dropped.get(name, 0) + int(mask.sum())
        self.left += int(left.sum())
        self.chosen += int(chosen.sum())
        self.candidates = self.left + sum(self.dropped.values())
        shown = dropped if rescored else {**known, **dropped}
        others = [mask for name, mask in shown.items() if name not in ("equal text", "given already")]
        out = np.logical_or.reduce(others) if others else np.zeros_like(left)
        if not len(self._edges) and (out | left).any():
            self._begin(scores[out | left])
        self._spread("negatives", scores[chosen])
        self._spread("dropped", scores[out])

    def mean(self, name: str) -> float:
        """Returns the mean score of 'positives', 'negatives' or 'dropped'; NaN where there are none."""
        total, count = self.sums.get(name, (0.0, 0))
        return total / count if count else float("nan")

    def _begin(self, scores: np.ndarray) -> None:
        both = np.concatenate([self._positives, scores])
        low, high = float(both.min()), float(both.max())
        self._edges = np.linspace(low - 0.03 * (high - low) - 1e-6, high + 0.03 * (high - low) + 1e-6, BINS + 1)
        self.histograms["positives"] = self._count(self._positives)

    def _spread(self, name: str, scores: np.ndarray) -> None:
        if not len(scores):
            return
        self.histograms[name] += self._count(scores)
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = total + float(scores.sum(dtype=np.float64)), count + len(scores)

    def _count(self, scores: np.ndarray) -> np.ndarray:
        return np.histogram(np.clip(scores, self._edges[0], self._edges[-1]), self._edges)[0]
