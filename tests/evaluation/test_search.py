"""Search against NumPy's stable argsort, on 1 and 8 devices."""

import jax
import numpy as np
import pytest

from jaxembed.config import MeshConfig
from jaxembed.evaluation import search
from jaxembed.evaluation.search import top_k
from jaxembed.sharding import make_mesh


def mesh(n: int, **sizes: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(**sizes), jax.devices()[:n])


def reference(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    numbers = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # stable: equal scores by the lower number
    return np.take_along_axis(scores, numbers, 1), numbers


def whole_numbers(seed: int, *shape: int) -> np.ndarray:
    """Small whole numbers: dot products are exact in float32, and many are equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


@pytest.fixture
def small_tiles(monkeypatch):
    """Small enough that a few hundred documents make several tiles on each device, in several blocks."""
    monkeypatch.setattr(search, "TILE", 16)
    monkeypatch.setattr(search, "QUERIES", 8)
    monkeypatch.setattr(search, "BLOCK_BYTES", 2 * 16 * 6 * 4)
    search._search_block.clear_cache()
    yield
    search._search_block.clear_cache()


@pytest.mark.parametrize("n_devices", [1, 3, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (15, 100), (257, 5), (700, 100)])
def test_ties_go_to_the_lower_number(small_tiles, n_devices, n, k):
    queries, documents = whole_numbers(0, 19, 6), whole_numbers(1, n, 6)
    scores, numbers = top_k(queries, documents, k, mesh(n_devices))
    wanted_scores, wanted_numbers = reference(queries, documents, k)
    assert scores.dtype == np.float32 and numbers.dtype == np.int32
    np.testing.assert_array_equal(numbers, wanted_numbers)
    np.testing.assert_array_equal(scores, wanted_scores)


def test_all_scores_equal_and_negative(small_tiles):
    queries, documents = -np.ones((2, 6), np.float32), np.ones((300, 6), np.float32)
    scores, numbers = top_k(queries, documents, 40)
    np.testing.assert_array_equal(numbers, [range(40)] * 2)  # no padding (score 0) among them
    np.testing.assert_array_equal(scores, np.full((2, 40), -6))


def test_device_count_changes_no_bit():
    rng = np.random.default_rng(2)
    queries, documents = rng.normal(size=(1100, 48)), rng.normal(size=(9000, 48))
    queries, documents = (x.astype(np.float32) / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents))
    documents = documents.astype(np.float32)
    documents[5000:5200] = documents[100:300]  # equal vectors, on other devices
    queries = queries.astype(np.float32)
    one = top_k(queries, documents, 100, mesh(1))
    for other in (mesh(8), mesh(8, data=2, fsdp=2, tensor=2)):
        for a, b in zip(one, top_k(queries, documents, 100, other)):
            np.testing.assert_array_equal(a, b)
    wanted_scores, _ = reference(queries, documents, 100)
    np.testing.assert_allclose(one[0], wanted_scores, atol=1e-6)
    exact = np.einsum("qe,qke->qk", queries.astype(np.float64), documents[one[1]].astype(np.float64))
    np.testing.assert_allclose(one[0], exact, atol=1e-6)


def test_runs_inside_another_mesh():
    queries, documents = whole_numbers(0, 3, 4), whole_numbers(1, 50, 4)
    with jax.set_mesh(mesh(8)):
        _, numbers = top_k(queries, documents, 7, mesh(1))
    np.testing.assert_array_equal(numbers, reference(queries, documents, 7)[1])


def test_nothing_to_search():
    scores, numbers = top_k(np.zeros((0, 4), np.float32), np.zeros((9, 4), np.float32), 3)
    assert scores.shape == numbers.shape == (0, 3)
    scores, numbers = top_k(np.zeros((2, 4), np.float32), np.zeros((0, 4), np.float32), 3)
    assert scores.shape == numbers.shape == (2, 0)


def test_refuses_wrong_shapes():
    with pytest.raises(ValueError, match="top_k"):
        top_k(np.zeros((1, 4), np.float32), np.zeros((1, 5), np.float32), 3)
    with pytest.raises(ValueError, match="k = 0"):
        top_k(np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32), 0)


def test_blocks_are_bounded_and_even():
    tile, width = search.TILE, 1024
    most = search.BLOCK_BYTES // (4 * width)  # documents of a device
    for n in (1, tile, 10_000_000, 8 * most + 1):
        size = search._block_size(n, width, 8)
        assert size % (8 * tile) == 0 and size <= 8 * most
    assert (
        search._block_size(8 * most + 1, width, 8) < 8 * most
    )  # two blocks of about half, not a full and an empty one
