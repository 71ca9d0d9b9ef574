"""Exact nearest-neighbour search over all devices, in bounded memory.

Documents go to the mesh in blocks, a block is spread over all devices, and a device walks over its share in tiles,
keeping the best k. What tiles, devices and blocks find is merged in the order of the documents' numbers, so equal
scores are ranked by the lower number, and tiles have one shape, so neither scores nor ranks depend on the number of
devices.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxembed.config import MeshConfig
from jaxembed.sharding import AXES, make_mesh, put

QUERIES = 1024  # compared at a time
TILE = 2048  # documents compared at a time, per device
BLOCK_BYTES = 1 << 28  # of documents on a device at a time

Best = tuple[jax.Array, jax.Array]  # scores float32 [Q, k], best first; document numbers int32 [Q, k]


def top_k(
    queries_QxE: np.ndarray, documents_NxE: np.ndarray, k: int, mesh: jax.sharding.Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Finds each query's k documents of highest dot product: of highest cosine, where vectors have length 1.

    With several processes every one passes the same arrays and gets the same answer.

    Args:
      queries_QxE: float32, finite.
      documents_NxE: float32, finite; at most 2^31 - 1 documents.
      k: how many; the number of documents where there are fewer.
      mesh: explicit, with the axes `sharding.AXES`; by default all devices.

    Returns:
      Scores, float32 [Q, k], highest first, and the documents' numbers, int32 [Q, k]. Of documents with equal scores
      the lower number comes first.

    Raises:
      ValueError: k is less than 1, or the widths differ.
    """
    if k < 1 or queries_QxE.shape[1] != documents_NxE.shape[1]:
        raise ValueError(f"top_k: k = {k}, queries {queries_QxE.shape}, documents {documents_NxE.shape}")
    mesh = mesh or make_mesh(MeshConfig())
    n_queries, n_documents = len(queries_QxE), len(documents_NxE)
    k = min(k, n_documents)
    if not n_queries or not k:
        return np.zeros((n_queries, k), np.float32), np.zeros((n_queries, k), np.int32)
    size = min(QUERIES, n_queries)
    with jax.set_mesh(mesh):
        nothing = np.full((size, k), -np.inf, np.float32), np.zeros((size, k), np.int32)
        best: list[Best] = [tuple(put(x, mesh, P()) for x in nothing) for _ in range(0, n_queries, size)]
        for start, block in _blocks(documents_NxE, _block_size(*documents_NxE.shape, mesh.size)):
            documents = put(block, mesh, P(AXES))
            for i, (_, queries) in enumerate(_blocks(queries_QxE, size)):
                place = np.int32(start), np.int32(n_documents)
                best[i] = _search_block(best[i], put(queries, mesh, P()), documents, *place)
            jax.block_until_ready(best)  # else the blocks to come would pile up on the devices
    scores, numbers = (np.concatenate([np.asarray(x) for x in parts])[:n_queries] for parts in zip(*best))
    return scores, numbers


def _block_size(n: int, width: int, devices: int) -> int:
    """Returns how many documents all devices take at a time: whole tiles, blocks as equal as can be."""
    tiles = -(-n // (TILE * devices))  # of a device, in all blocks
    blocks = -(-tiles // max(1, BLOCK_BYTES // (4 * TILE * width)))
    return -(-tiles // blocks) * TILE * devices


def _blocks(array: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Cuts an array along its first axis; the last block is filled up with zeros. Yields (start, float32 block)."""
    for start in range(0, len(array), size):
        block = np.asarray(array[start : start + size], np.float32)
        missing = size - len(block)
        yield start, np.pad(block, ((0, missing), (0, 0))) if missing else block


@functools.partial(jax.jit, donate_argnums=0)
def _search_block(
    best: Best, queries_QxE: jax.Array, documents_NxE: jax.Array, start: jax.Array, n_documents: jax.Array
) -> Best:
    """Merges what a block of documents has to offer into the best so far.

    Args:
      best: of the blocks before, replicated.
      queries_QxE: replicated.
      documents_NxE: sharded over all devices.
      start: number of the block's first document.
      n_documents: of all blocks; what lies beyond is padding.
    """
    k = best[0].shape[1]

    def local(queries: jax.Array, documents: jax.Array, start: jax.Array, n_documents: jax.Array) -> Best:
        first = start + jax.lax.axis_index(AXES) * documents.shape[0]

        def one_tile(best: Best, tile: tuple[jax.Array, jax.Array]) -> tuple[Best, None]:
            vectors, numbers = tile
            scores = jnp.dot(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
            scores = jnp.where(numbers < n_documents, scores, -jnp.inf)
            return _merge(best, (scores, jnp.broadcast_to(numbers, scores.shape))), None

        tiles = documents.reshape(-1, TILE, documents.shape[1])
        numbers = first + jnp.arange(documents.shape[0], dtype=jnp.int32).reshape(-1, TILE)
        nothing = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
        return jax.lax.scan(one_tile, jax.lax.pcast(nothing, AXES, to="varying"), (tiles, numbers))[0]

    # Side by side, the devices' finds stand in the order of the documents' numbers.
    search = jax.shard_map(local, in_specs=(P(), P(AXES), P(), P()), out_specs=P(None, AXES))
    found = search(queries_QxE, documents_NxE, start, n_documents)
    return _merge(best, jax.tree.map(lambda x: jax.sharding.reshard(x, P()), found))


def _merge(before: Best, after: Best) -> Best:
    """Returns the best k of both. `lax.top_k` keeps the order of equals, and `before` has the lower numbers."""
    scores, numbers = (jnp.concatenate(pair, axis=1) for pair in zip(before, after))
    scores, places = jax.lax.top_k(scores, before[0].shape[1])
    return scores, jnp.take_along_axis(numbers, places, axis=1)
