"""Search against NumPy's stable argsort, on 1 and 8 devices."""

import itertools

import jax
import numpy as np
import pytest

from jaxembed.config import MeshConfig
from jaxembed.sharding import make_mesh
from jaxembed.vectors import exact
from jaxembed.vectors.exact import top_k


def mesh(n: int, **sizes: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(**sizes), jax.devices()[:n])


def reference(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    numbers = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # stable: equal scores by the lower number
    return np.take_along_axis(scores, numbers, 1), numbers


def whole_numbers(seed: int, *shape: int) -> np.ndarray:
    """Small whole numbers: dot products are exact in float32, and many are equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


class InBlocks:
    """Vectors that are given a few at a time."""

    width = 6

    def __init__(self, vectors: np.ndarray, sizes: list[int]) -> None:
        self.vectors, self.sizes = vectors, sizes

    def __len__(self) -> int:
        return len(self.vectors)

    def blocks(self):
        start = 0
        for size in itertools.cycle(self.sizes):
            if start >= len(self.vectors):
                return
            yield start, self.vectors[start : start + size]
            start += size


@pytest.fixture
def small_tiles(monkeypatch):
    """Small enough that a few hundred documents make several tiles on each device, in several blocks."""
    small = {"TILE": 16, "SPAN": 3, "GROUP": 4, "FEW": 2, "QUERIES": 8, "BLOCK_BYTES": 4 * 16 * 6 * 4}
    for name, value in small.items():
        monkeypatch.setattr(exact, name, value)
    exact._search_block.clear_cache()
    yield
    exact._search_block.clear_cache()


@pytest.mark.parametrize("n_devices", [1, 3, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (15, 100), (257, 5), (700, 100)])
def test_ties_go_to_the_lower_number(small_tiles, n_devices, n, k):
    queries, documents = whole_numbers(0, 19, 6), whole_numbers(1, n, 6)
    scores, numbers = top_k(queries, documents, k, mesh(n_devices))
    wanted_scores, wanted_numbers = reference(queries, documents, k)
    assert scores.dtype == np.float32 and numbers.dtype == np.int32
    np.testing.assert_array_equal(numbers, wanted_numbers)
    np.testing.assert_array_equal(scores, wanted_scores)


@pytest.mark.parametrize("k", [2, 3, 9])
def test_any_order_of_the_documents(small_tiles, k):
    """The best last: every span has more to offer than few groups. First: none has. Shuffled: some have."""
    queries, documents = np.abs(whole_numbers(0, 9, 6)), np.repeat(np.arange(-200, 200), 2)[:, None].repeat(6, 1)
    for order in (slice(None), slice(None, None, -1), np.random.default_rng(3).permutation(len(documents))):
        ordered = documents[order].astype(np.float32)
        for found, wanted in zip(top_k(queries, ordered, k, mesh(1)), reference(queries, ordered, k)):
            np.testing.assert_array_equal(found, wanted)


def test_the_best_may_be_each_in_another_group(small_tiles):
    documents = np.zeros((48, 6), np.float32)  # one span, twelve groups
    documents[3::4] = np.random.default_rng(5).permutation(12)[:, None] + 1
    queries = np.eye(6, dtype=np.float32)
    for found, wanted in zip(top_k(queries, documents, 9, mesh(1)), reference(queries, documents, 9)):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("n_devices", [1, 3])
@pytest.mark.parametrize("sizes", [[1], [1000], [7, 0, 200]])
def test_documents_given_in_blocks_of_any_size(small_tiles, n_devices, sizes):
    queries, documents = whole_numbers(0, 9, 6), whole_numbers(1, 411, 6)
    found = top_k(queries, InBlocks(documents, sizes), 20, mesh(n_devices))
    for streamed, in_memory in zip(found, reference(queries, documents, 20)):
        np.testing.assert_array_equal(streamed, in_memory)


def test_blocks_are_read_as_they_are_searched(small_tiles):
    """Blocks are read when they are asked for: the one that comes after the one that is searched, and no more."""
    read, source = [], InBlocks(whole_numbers(1, 1000, 6), [64])
    blocks = source.blocks
    source.blocks = lambda: (read.append(start) or (start, block) for start, block in blocks())
    size = exact._block_size(1000, 6, 1)
    for start, _ in exact._blocks(source, size):
        assert read[-1] < start + size


def test_blocks_that_do_not_add_up_are_refused(small_tiles):
    source = InBlocks(whole_numbers(1, 100, 6), [30])
    source.blocks = lambda: iter([(0, source.vectors[:30])])
    with pytest.raises(ValueError, match="blocks of 30 documents in all, of 100"):
        top_k(source.vectors[:2], source, 5)
    source.blocks = lambda: iter([(0, source.vectors[:30]), (40, source.vectors[40:])])
    with pytest.raises(ValueError, match="after 30 documents says that it begins at 40"):
        top_k(source.vectors[:2], source, 5)


def test_recall_below_1_on_a_tpu(small_tiles, monkeypatch):
    """What TPUs run, here where `approx_max_k` is exact: the same documents in the same order, ties by number."""
    monkeypatch.setattr(exact, "platform", lambda: "tpu")
    queries, documents = whole_numbers(0, 9, 6), np.random.default_rng(4).normal(size=(411, 6)).astype(np.float32)
    documents[1::2] = documents[:-1:2]
    most, every = (top_k(queries, documents, 20, mesh(3), recall=recall) for recall in (0.9, 1.0))
    np.testing.assert_array_equal(most[1], every[1])
    np.testing.assert_allclose(most[0], every[0], rtol=1e-6)


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
    for wrong in ({"k": 0}, {"k": 1, "recall": 0.0}, {"k": 1, "recall": 1.5}):
        with pytest.raises(ValueError, match=f"{list(wrong)[-1]} = {list(wrong.values())[-1]}"):
            top_k(np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32), **wrong)


def test_blocks_are_bounded_and_even():
    tile, width = exact.TILE, 1024
    most = exact.BLOCK_BYTES // (4 * width)  # documents of a device
    for n in (1, tile, 8 * 9 * tile, 10_000_000, 8 * most + 1):
        size = exact._block_size(n, width, 8)
        tiles = size // (8 * tile)
        assert size % (8 * tile) == 0 and size <= 8 * most and tiles % exact._span(tiles) == 0
    assert exact._block_size(8 * 9 * tile, width, 8) == 8 * 10 * tile  # not 16 tiles, two spans of 8
    # Two blocks of about half, not a full and an empty one.
    assert exact._block_size(8 * most + 1, width, 8) < 8 * most
    assert exact._block_size(1 << 30, width, 64) * width * 4 <= exact.HOST_BYTES
