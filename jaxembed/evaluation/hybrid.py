"""Hybrid search: a model's ranking and BM25's in one, as a baseline for what the two find that one alone does not.

Rankings are fused by reciprocal rank: a document's score is the sum over the rankings that hold it of 1 / (60 + rank),
ranks from 1 (Cormack, Clarke and Büttcher 2009, "Reciprocal rank fusion outperforms Condorcet and individual rank
learning methods"). Scores themselves, of which those of BM25 and of vectors have nothing in common, play no part.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from jaxembed.evaluation.retrieval import RetrievalData, kept, score_rankings

K = 60  # the larger, the less the first ranks count


def evaluate_hybrid(data: RetrievalData, *rankings: Iterable[np.ndarray]) -> dict[str, float]:
    """Fuses rankings and scores the result as a model's is; see `score_rankings`.

    Args:
      data: what is right. What is left out for a query is so before its rankings are fused.
      *rankings: each has the numbers of documents for every query, best first.
    """
    return score_rankings(data, map(fuse, zip(*(kept(data, ranking) for ranking in rankings), strict=True)))


def fuse(rankings: Iterable[Sequence[int]]) -> np.ndarray:
    """Fuses a query's rankings by reciprocal rank.

    Args:
      rankings: each of document numbers, best first.

    Returns:
      All documents of the rankings, best first; of equal scores the lower number first: int64 [n].
    """
    rankings = [np.asarray(ranking, np.int64) for ranking in rankings]
    numbers, place = np.unique(np.concatenate(rankings), return_inverse=True)
    scores = np.zeros(len(numbers))
    # Least parts first, so that the same ranks give the same sum in whichever ranking they are.
    parts = np.concatenate([1 / (K + 1 + np.arange(len(ranking))) for ranking in rankings])
    order = np.argsort(parts, kind="stable")
    np.add.at(scores, place[order], parts[order])
    return numbers[np.argsort(-scores, kind="stable")]
