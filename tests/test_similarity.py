"""Comparing vectors: against sentence-transformers, and by search."""

import numpy as np
import pytest

from jaxembed.errors import UserError
from jaxembed.similarity import all_pairs, centre_of, for_search, pairwise, unit

KINDS = ["cosine", "dot", "euclidean", "manhattan"]


def vectors(n, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 6)) * rng.uniform(0.1, 5, (n, 1))).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_sentence_transformers(kind):
    from sentence_transformers import util

    names = {"cosine": "cos_sim", "dot": "dot_score", "euclidean": "euclidean_sim", "manhattan": "manhattan_sim"}
    a, b = vectors(5, 0), vectors(7, 1)
    wanted = getattr(util, names[kind])(a, b).numpy()
    got = all_pairs(a, b, kind)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pairwise(a, b[:5], kind), np.diag(wanted[:, :5]), rtol=1e-5, atol=1e-6)
    assert all_pairs(a[:0], b, kind).shape == (0, 7) and pairwise(a[:0], b[:0], kind).shape == (0,)


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean"])
def test_dot_products_of_what_is_searched_rank_alike(kind):
    queries, documents = vectors(20, 2), vectors(50, 3)
    ours, theirs = for_search(queries, documents, kind)
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal((ours @ theirs.T).argsort(1), all_pairs(queries, documents, kind).argsort(1))


def test_small_distances_between_long_vectors_keep_their_order():
    offset = 30 * unit(vectors(1, 4))
    queries, documents = offset + 0.05 * vectors(20, 2), offset + 0.05 * vectors(50, 3)
    ours, theirs = for_search(queries, documents, "euclidean", centre_of(documents))
    wanted = all_pairs(queries.astype(np.float64), documents.astype(np.float64), "euclidean").argsort(1)
    np.testing.assert_array_equal((ours @ theirs.T).argsort(1), wanted)


def test_manhattan_distances_cannot_be_searched_by():
    with pytest.raises(UserError, match="manhattan distance"):
        for_search(vectors(1, 0), vectors(1, 0), "manhattan")


def test_a_vector_of_zeros_stays_one():
    np.testing.assert_array_equal(unit(np.zeros((2, 3), np.float32)), np.zeros((2, 3)))
