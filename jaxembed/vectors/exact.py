"""Exact nearest-neighbour search over all devices, in bounded memory.

Documents go to the mesh in blocks, which may be read from disk meanwhile; a block is spread over all devices, and a
device walks over its share in tiles, keeping the best k. What tiles, devices and blocks find is merged in the order of
the documents' numbers, so equal scores are ranked by the lower number, and tiles have one shape, so neither scores nor
ranks depend on the number of devices.

Sorting would take longer than the products, so most scores are never sorted. A query's best k lie in the k groups of
documents whose best scores are highest: were one of them in another group, each of these k groups would hold a
document before it. So groups are sorted, and the documents of k groups; and once k documents are known, only groups
whose best score is above the last of these.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxembed.config import MeshConfig
from jaxembed.sharding import AXES, make_mesh, platform, put
from jaxembed.similarity import centre_of, for_search

QUERIES = 1024  # compared at a time
TILE = 2048  # documents of a product, per device
SPAN = 8  # tiles whose scores are held at a time, at the most
GROUP = 16  # neighbouring documents that stand or fall together
FEW = 8  # groups that are sorted where no query needs more, at the least
BLOCK_BYTES = 1 << 28  # of documents on a device at a time
HOST_BYTES = 1 << 31  # of a block on the host, unless a tile for each device is more

Best = tuple[jax.Array, jax.Array]  # scores float32 [Q, k], best first; document numbers int32 [Q, k]


class Vectors(Protocol):
    """Vectors that are read a block at a time, such as `vectors.folder.VectorFolder`."""

    width: int

    def __len__(self) -> int: ...

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number of the first, float32 [n, width]), in order; n may be any."""
        ...


@dataclasses.dataclass(frozen=True)
class Compared:
    """Vectors whose dot products with `queries` rank them as a model's similarity does: see `similarity.for_search`.

    Attributes:
      vectors: as the model gave them.
      similarity: 'cosine', 'dot' or 'euclidean'.
    """

    vectors: Vectors
    similarity: str

    @property
    def width(self) -> int:
        """E, or one more."""
        return self.vectors.width + (self.similarity == "euclidean")

    def __len__(self) -> int:
        return len(self.vectors)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number of the first, float32 [n, width])."""
        for start, block in self.vectors.blocks():
            yield start, for_search(block[:0], block, self.similarity, self._centre)[1]

    def queries(self, queries_QxE: np.ndarray) -> np.ndarray:
        """Returns vectors to search with, float32 [Q, width]."""
        return for_search(queries_QxE, queries_QxE[:0], self.similarity, self._centre)[0]

    @functools.cached_property
    def _centre(self) -> np.ndarray | None:
        """The mean of the first block; None where distances are not compared."""
        return centre_of(next(iter(self.vectors.blocks()))[1]) if self.similarity == "euclidean" else None

    def scores(self, dots_QxK: np.ndarray, queries_QxE: np.ndarray) -> np.ndarray:
        """Returns similarities of dot products that `queries` had with these vectors: float32 [Q, K].

        Euclidean distances, with a minus, as √(|q|² - 2 (q·d - |d|²/2)); -inf, for what was not found, stays so.
        """
        if self.similarity != "euclidean":
            return dots_QxK
        queries_QxE = queries_QxE - self._centre
        squares_Q = np.einsum("qe,qe->q", queries_QxE, queries_QxE, dtype=np.float64)
        return -np.sqrt(np.maximum(squares_Q[:, None] - 2.0 * dots_QxK, 0)).astype(np.float32)


def top_k(
    queries_QxE: np.ndarray,
    documents: np.ndarray | Vectors,
    k: int,
    mesh: jax.sharding.Mesh | None = None,
    recall: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds each query's k documents of highest dot product: of highest cosine, where vectors have length 1.

    With several processes every one passes the same vectors and gets the same answer.

    Args:
      queries_QxE: float32, finite.
      documents: float32 [N, E], finite, or an object that gives them in blocks, of which two are in memory at a time,
        as many as a few gigabytes; at most 2^31 - 1 documents.
      k: how many; the number of documents where there are fewer.
      mesh: explicit, with the axes `sharding.AXES`; by default all devices.
      recall: below 1, TPUs may miss documents: each of the best k is expected to be found with this probability
        (`jax.lax.approx_max_k`; Chern et al. 2022, arXiv:2206.14286). Other devices gain nothing by it and stay exact.

    Returns:
      Scores, float32 [Q, k], highest first, and the documents' numbers, int32 [Q, k]. Of documents with equal scores
      the lower number comes first.

    Raises:
      ValueError: k is less than 1, recall is not within 0 … 1, the widths differ, or blocks do not add up.
    """
    n_documents, width = documents.shape if isinstance(documents, np.ndarray) else (len(documents), documents.width)
    if k < 1 or queries_QxE.shape[1] != width or not 0 < recall <= 1:
        said = f"k = {k}, recall = {recall}, queries {queries_QxE.shape}, documents {(n_documents, width)}"
        raise ValueError(f"top_k: {said}")
    mesh = mesh or make_mesh(MeshConfig())
    n_queries = len(queries_QxE)
    k = min(k, n_documents)
    if not n_queries or not k:
        return np.zeros((n_queries, k), np.float32), np.zeros((n_queries, k), np.int32)
    size = min(QUERIES, n_queries)
    with jax.set_mesh(mesh):
        recall = recall if platform() == "tpu" else 1.0
        nothing = np.full((size, k), -np.inf, np.float32), np.zeros((size, k), np.int32)
        best: list[Best] = [tuple(put(x, mesh, P()) for x in nothing) for _ in range(0, n_queries, size)]
        for start, block in _blocks(documents, _block_size(n_documents, width, mesh.size)):
            block = put(block, mesh, P(AXES))  # read and put while the devices search the block before
            jax.block_until_ready(best)  # else blocks would pile up
            for i, (_, queries) in enumerate(_blocks(queries_QxE, size)):
                place = np.int32(start), np.int32(n_documents)
                best[i] = _search_block(best[i], put(queries, mesh, P()), block, *place, recall=recall)
    scores, numbers = (np.concatenate([np.asarray(x) for x in parts])[:n_queries] for parts in zip(*best))
    return scores, numbers


def _block_size(n: int, width: int, devices: int) -> int:
    """Returns how many documents all devices take at a time: whole spans of tiles, blocks as equal as can be."""
    tiles = -(-n // (TILE * devices))  # of a device, in all blocks
    of_block = min(BLOCK_BYTES, HOST_BYTES // devices) // (4 * TILE * width)
    blocks = -(-tiles // max(1, of_block))
    tiles = -(-tiles // blocks)
    return -(-tiles // _span(tiles)) * _span(tiles) * TILE * devices


def _span(tiles: int) -> int:
    """Returns how many tiles' scores to hold at a time: at most `SPAN`, such that few tiles are added to fill up."""
    return -(-tiles // -(-tiles // SPAN))


def _blocks(vectors: np.ndarray | Vectors, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts and joins vectors into blocks of one size, the last one filled up with zeros. Yields (start, float32)."""
    if not isinstance(vectors, np.ndarray):
        yield from _joined(vectors, size)
        return
    for start in range(0, len(vectors), size):
        block = np.asarray(vectors[start : start + size], np.float32)
        missing = size - len(block)
        yield start, np.pad(block, ((0, missing), (0, 0))) if missing else block


def _joined(vectors: Vectors, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """As `_blocks`; each block has memory of its own, which the device may use as it is."""
    start, filled, block = 0, 0, np.zeros((size, vectors.width), np.float32)
    for first, part in vectors.blocks():
        if first != start + filled:
            raise ValueError(f"top_k: the block after {start + filled} documents says that it begins at {first}")
        while len(part):
            taken = min(len(part), size - filled)
            block[filled : filled + taken] = part[:taken]
            part, filled = part[taken:], filled + taken
            if filled == size:
                yield start, block
                start, filled, block = start + size, 0, np.zeros((size, vectors.width), np.float32)
    if start + filled != len(vectors):
        raise ValueError(f"top_k: blocks of {start + filled} documents in all, of {len(vectors)}")
    if filled:
        yield start, block


@functools.partial(jax.jit, donate_argnums=0, static_argnames="recall")
def _search_block(
    best: Best,
    queries_QxE: jax.Array,
    documents_NxE: jax.Array,
    start: jax.Array,
    n_documents: jax.Array,
    recall: float,
) -> Best:
    """Merges what a block of documents has to offer into the best so far.

    Args:
      best: of the blocks before, replicated.
      queries_QxE: replicated.
      documents_NxE: sharded over all devices.
      start: number of the block's first document.
      n_documents: of all blocks; what lies beyond is padding.
      recall: 1, or what a span's best k are found with.
    """
    k = best[0].shape[1]

    def local(before: Best, queries: jax.Array, documents: jax.Array, start: jax.Array, n_documents: jax.Array) -> Best:
        first = start + jax.lax.axis_index(AXES) * documents.shape[0]

        def scores_of(tile: tuple[jax.Array, jax.Array]) -> jax.Array:
            vectors, number = tile
            scores = jnp.dot(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
            return jnp.where(number + jnp.arange(TILE) < n_documents, scores, -jnp.inf)

        def one_span(best: Best, span: tuple[jax.Array, jax.Array]) -> tuple[Best, None]:
            scores_SxQxT = jax.lax.map(scores_of, span)
            if recall < 1:
                return _merge_most(best, scores_SxQxT, span[1][0], recall), None
            # What cannot come before the last of the blocks before need not be looked at either.
            least_Q = jnp.maximum(best[0][:, -1], before[0][:, -1])
            return _merge_all(best, scores_SxQxT, span[1][0], least_Q), None

        tiles = documents.shape[0] // TILE
        shape = (tiles // _span(tiles), _span(tiles))
        spans = documents.reshape(*shape, TILE, -1), first + TILE * jnp.arange(tiles, dtype=jnp.int32).reshape(shape)
        nothing = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
        return jax.lax.scan(one_span, jax.lax.pcast(nothing, AXES, to="varying"), spans)[0]

    # Side by side, the devices' finds stand in the order of the documents' numbers.
    search = jax.shard_map(local, in_specs=(P(), P(), P(AXES), P(), P()), out_specs=P(None, AXES))
    found = search(best, queries_QxE, documents_NxE, start, n_documents)
    return _merge(best, jax.tree.map(lambda x: jax.sharding.reshard(x, P()), found))


def _merge_all(best: Best, scores_SxQxT: jax.Array, first: jax.Array, least_Q: jax.Array) -> Best:
    """Merges a span's documents into the best so far, exactly.

    Args:
      best: of documents of lower numbers.
      scores_SxQxT: of S tiles; -inf for what is no document.
      first: number of the span's first document.
      least_Q: only a higher score can be among the best; -inf where any can.
    """
    k, (s, q, t) = best[0].shape[1], scores_SxQxT.shape
    groups = s * t // GROUP
    scores_SxQxGxD = scores_SxQxT.reshape(s, q, t // GROUP, GROUP)
    highest_QxG = jnp.swapaxes(scores_SxQxGxD.max(3), 0, 1).reshape(q, groups)

    def of_groups(count: int) -> Best:
        """Merges the documents of so many groups, those of the highest scores."""
        if count >= groups:
            return _merge(best, _numbered(jnp.swapaxes(scores_SxQxT, 0, 1).reshape(q, s * t), first))
        chosen_QxC = jnp.sort(jax.lax.top_k(highest_QxG, count)[1], axis=1)  # in the order of the numbers
        tile_QxC, place_QxC = jnp.divmod(chosen_QxC, t // GROUP)
        scores_QxCxD = scores_SxQxGxD[tile_QxC, jnp.arange(q)[:, None], place_QxC]
        numbers_QxCxD = first + chosen_QxC[:, :, None] * GROUP + jnp.arange(GROUP, dtype=jnp.int32)
        return _merge(best, (scores_QxCxD.reshape(q, -1), numbers_QxCxD.reshape(q, -1)))

    few = max(FEW, k // 3)
    if k <= few:
        return of_groups(k)
    all_are_few = ((highest_QxG > least_Q[:, None]).sum(1) <= few).all()
    return jax.lax.cond(all_are_few, lambda: of_groups(few), lambda: of_groups(k))


def _merge_most(best: Best, scores_SxQxT: jax.Array, first: jax.Array, recall: float) -> Best:
    """Merges a span's documents into the best so far, but for some; arguments as for `_merge_all`."""
    scores_QxN = jnp.swapaxes(scores_SxQxT, 0, 1).reshape(scores_SxQxT.shape[1], -1)
    k = min(best[0].shape[1], scores_QxN.shape[1])
    scores, places = jax.lax.approx_max_k(scores_QxN, k, recall_target=recall)
    places, scores = jax.lax.sort((places, scores), num_keys=1)  # in the order of the numbers
    return _merge(best, (scores, first + places))


def _numbered(scores_QxN: jax.Array, first: jax.Array) -> Best:
    numbers_N = first + jnp.arange(scores_QxN.shape[1], dtype=jnp.int32)
    return scores_QxN, jnp.broadcast_to(numbers_N, scores_QxN.shape)


def _merge(before: Best, after: Best) -> Best:
    """Returns the best k of both. `lax.top_k` keeps the order of equals, and `before` has the lower numbers."""
    scores, numbers = (jnp.concatenate(pair, axis=1) for pair in zip(before, after))
    scores, places = jax.lax.top_k(scores, before[0].shape[1])
    return scores, jnp.take_along_axis(numbers, places, axis=1)
