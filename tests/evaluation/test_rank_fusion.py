"""Rankings fused: against a few lines of plain Python, and as a row and a metric beside the model's."""

from fractions import Fraction

import numpy as np

from jaxembed.evaluation.hybrid import evaluate_hybrid, fuse
from jaxembed.evaluation.retrieval import RetrievalData, score_rankings


def reference(rankings):
    """Exact fractions, so that equal sums are equal."""
    scores = {}
    for ranking in rankings:
        for rank, number in enumerate(ranking, 1):
            scores[number] = scores.get(number, 0) + Fraction(1, 60 + rank)
    return sorted(scores, key=lambda number: (-scores[number], number))


def test_by_hand():
    # 5: 1/62 + 1/61, 9: 1/61 alone, 2: 1/62, 7: 1/63
    np.testing.assert_array_equal(fuse([[9, 5, 7], [5, 2]]), [5, 9, 2, 7])
    np.testing.assert_array_equal(fuse([[9, 5], [5, 9]]), [5, 9])  # equal: by number
    assert len(fuse([[], []])) == 0


def test_is_reciprocal_rank_fusion():
    rng = np.random.default_rng(0)
    for _ in range(50):
        rankings = [rng.permutation(150)[: rng.integers(0, 120)] for _ in range(rng.integers(2, 4))]
        np.testing.assert_array_equal(fuse(rankings), reference(rankings))


def test_what_is_left_out_takes_no_rank():
    documents = [f"d{i}" for i in range(5)]
    data = RetrievalData("x", ["q"], ["q"], documents, documents, [{"d2": 1.0}], [(frozenset({"d0", "d1"}),)])
    # 1/61 each: the lower number comes first. Did d0 and d1 take ranks, d3 would.
    assert evaluate_hybrid(data, [np.array([0, 1, 2])], [np.array([3])])["recall@1"] == 100


def test_one_ranking_stays_as_it_is():
    documents = [f"d{i:03}" for i in range(150)]
    gains = [{"d003": 1.0, "d120": 2.0}, {"d007": 1.0}]
    data = RetrievalData("x", ["p", "q"], ["p", "q"], documents, documents, gains, [(), ()])
    rankings = np.random.default_rng(1).permuted(np.tile(np.arange(150), (2, 1)), axis=1)
    assert evaluate_hybrid(data, rankings) == score_rankings(data, rankings)
