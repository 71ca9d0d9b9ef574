"""What tests of stored vectors share: a folder as `jaxembed.encode` leaves it, of any vectors."""

import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxembed.storage import AnyPath
from jaxembed.vectors.folder import Manifest, ShardWriter, VectorFolder
from jaxembed.vectors.quantize import CALIBRATED, quantize, ranges_of

VECTORS = np.random.default_rng(0).normal(size=(10, 12)).astype(np.float32)
IDS = [f"d{i}" for i in range(8)] + ["ümlaut", "new\nline"]
USUAL = {
    "model": "a-model",
    "files": (("in.jsonl", 3, 4),),
    "width": 12,
    "dtype": "float32",
    "compute_dtype": "float32",
    "similarity": "cosine",
    "layout": "npy",
    "shard_size": 4,
}


def manifest(**said: Any) -> Manifest:
    """A manifest; what is neither said nor usual is empty."""
    types = typing.get_type_hints(Manifest)
    empty = {name: (typing.get_origin(kind) or kind)() for name, kind in types.items()}
    return Manifest(**empty | USUAL | said)


def write_shards(path: AnyPath, shards: Sequence[int] = (2, 0, 1), finished: bool = True, **said: Any) -> AnyPath:
    """Writes some shards of VECTORS, in this order; returns the folder."""
    writer = ShardWriter(path, manifest(**said))
    writer.claim()
    if writer.manifest.dtype in CALIBRATED:
        writer.write_ranges(ranges_of(VECTORS))
    for shard in shards:
        part = slice(4 * shard, 4 * shard + 4)
        writer.write(shard, IDS[part], quantize(VECTORS[part], writer.manifest.dtype, writer.ranges()))
    assert writer.done() == set(shards)
    if finished:
        writer.finish(len(VECTORS))
    return path


def write_vectors(
    path: AnyPath, vectors_NxE: np.ndarray, ids: Sequence[str] | None = None, finished: bool = True, **said: Any
) -> VectorFolder | None:
    """Writes vectors, ten to a shard."""
    writer = ShardWriter(path, manifest(**{"width": vectors_NxE.shape[1], "shard_size": 10} | said))
    writer.claim()
    if writer.manifest.dtype in CALIBRATED:
        writer.write_ranges(ranges_of(vectors_NxE))
    ids, size = [f"d{i}" for i in range(len(vectors_NxE))] if ids is None else list(ids), writer.manifest.shard_size
    for shard, start in enumerate(range(0, len(vectors_NxE), size)):
        part = slice(start, start + size)
        stored = quantize(vectors_NxE[part].astype(np.float32), writer.manifest.dtype, writer.ranges())
        writer.write(shard, ids[part], stored)
    if not finished:
        return None
    writer.finish(len(vectors_NxE))
    return VectorFolder.open(path, "--")
