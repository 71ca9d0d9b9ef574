"""Weights from files straight onto the mesh, a piece at a time, so that no host ever holds a whole model.

Each process reads the bytes that its own devices hold, and little more than PIECE_BYTES of them lie in its memory
beside what is on the devices.
"""

import mmap
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding

from jaxembed.hf.table import Index, LazyLeaf

PIECE_BYTES = 2**28


def load_onto(leaves: Mapping[str, LazyLeaf], targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads leaves straight onto their shards, each process only what its own devices hold.

    Args:
      leaves: by path, from `import_leaves`.
      targets: the wanted shape, dtype and sharding of each path to load; shardings over an abstract mesh
        (`jax.eval_shape` gives such) are taken to be over the mesh that is set.

    Returns:
      Path → array of the target's dtype and sharding.
    """
    return {path: _load_leaf(leaves[path], target) for path, target in targets.items()}


def _load_leaf(leaf: LazyLeaf, target: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.shape != target.shape:
        raise ValueError(f"a leaf of shape {leaf.shape} for a target of shape {target.shape}")
    layout = target.sharding
    if isinstance(layout, NamedSharding) and isinstance(layout.mesh, AbstractMesh):
        layout = NamedSharding(jax.sharding.get_mesh(), layout.spec)
    shards, held = [], {}
    for device, index in layout.addressable_devices_indices_map(leaf.shape).items():
        key = tuple((s.start, s.stop) for s in index)
        if key in held:  # devices that hold the same part share one reading of it
            shards.append(jax.device_put(held[key], device))
        else:
            shards.append(_read_onto(device, leaf, index, target.dtype))
            held[key] = shards[-1]
    return jax.make_array_from_single_device_arrays(leaf.shape, layout, shards)


def _read_onto(device: jax.Device, leaf: LazyLeaf, index: Index, dtype: np.dtype) -> jax.Array:
    """Reads one device's part of a leaf, in pieces along axis 0."""
    shape = tuple(len(range(*s.indices(n))) for s, n in zip(index, leaf.shape))
    bytes_per_row = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize if shape else 1
    rows = max(1, PIECE_BYTES // max(1, bytes_per_row))
    if not shape or shape[0] <= rows:
        whole = jax.device_put(leaf.read(index, dtype), device)
        _forget(leaf)
        return whole
    start, stop, _ = index[0].indices(leaf.shape[0])
    with jax.set_mesh(jax.sharding.Mesh([device], "alone")):  # not the run's mesh, which one device is only part of
        buffer = jax.jit(lambda: jax.numpy.zeros(shape, dtype))()
        for first in range(start, stop, rows):
            piece = leaf.read((slice(first, min(first + rows, stop)), *index[1:]), dtype)
            buffer = _write(buffer, jax.device_put(piece, device), first - start)
            buffer.block_until_ready()  # or pieces would gather in memory, on their way
            _forget(leaf)
    return jax.device_put(buffer, device)


@jax.jit(donate_argnums=0)
def _write(buffer: jax.Array, piece: jax.Array, first: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, piece, first, 0)


def _forget(leaf: LazyLeaf) -> None:
    """Gives the pages read so far back to the system, which else count as this process's memory."""
    for part in leaf.parts:
        owner = part
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            owner.madvise(mmap.MADV_DONTNEED)
