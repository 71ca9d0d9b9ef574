"""Weights from files straight onto the mesh, a piece at a time, so that no host ever holds a whole model.

Each process reads the bytes that its own devices hold, and little more than PIECE_BYTES of them lie in its memory
beside what is on the devices.
"""

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence

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
    """Reads one device's part of a leaf, in pieces along axis 0, of experts along axis 1 too."""
    ranges = [range(*s.indices(n)) for s, n in zip(index, leaf.shape)]
    shape = tuple(map(len, ranges))
    pieces = list(_pieces(shape, PIECE_BYTES // np.dtype(dtype).itemsize, max(1, leaf.stacked)))
    if len(pieces) == 1:
        whole = jax.device_put(leaf.read(index, dtype), device)
        _forget(leaf)
        return whole
    with jax.set_mesh(jax.sharding.Mesh([device], "alone")):  # not the run's mesh, which one device is only part of
        buffer = jax.jit(lambda: jax.numpy.zeros(shape, dtype))()
        for piece in pieces:
            here = tuple(slice(r.start + p.start, r.start + p.stop) for r, p in zip(ranges, piece))
            values = leaf.read((*here, *index[len(here) :]), dtype)
            starts = [p.start for p in piece] + [0] * (len(shape) - len(piece))
            buffer = _write(buffer, jax.device_put(values, device), starts)
            buffer.block_until_ready()  # or pieces would gather in memory, on their way
            _forget(leaf)
    return jax.device_put(buffer, device)


def _pieces(shape: Sequence[int], entries: int, axes: int) -> Iterator[Index]:
    """Cuts an array into pieces of up to so many entries, as far as its first axes allow; yields their slices there."""
    if axes == 0 or math.prod(shape) <= entries:
        yield ()
        return
    step = max(1, entries // math.prod(shape[1:]))
    for first in range(0, shape[0], step):
        here = slice(first, min(first + step, shape[0]))
        for rest in _pieces(shape[1:], entries, axes - 1) if step == 1 else ((),):
            yield here, *rest


@jax.jit(donate_argnums=0)
def _write(buffer: jax.Array, piece: jax.Array, starts: Sequence[int]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, piece, starts)


def _forget(leaf: LazyLeaf) -> None:
    """Gives the pages read so far back to the system, which else count as this process's memory."""
    files = {}
    for part in leaf.parts:
        owner = part
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if isinstance(owner, mmap.mmap):
            files[id(owner)] = owner
    for file in files.values() if hasattr(mmap, "MADV_DONTNEED") else ():
        file.madvise(mmap.MADV_DONTNEED)
