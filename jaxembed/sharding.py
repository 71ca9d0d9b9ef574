"""The mesh, and the one table that says which mesh axis each logical axis of an array lies on.

Meshes are explicit (`jax.sharding.AxisType.Explicit`): shardings are part of array types, and a contraction whose
communication was not written down does not compile. Axes that a run does not use have size 1.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxembed.config import MeshConfig
from jaxembed.errors import UserError

AXES = ("data", "fsdp", "tensor", "expert", "sequence")
BATCH = ("data", "fsdp", "expert")  # the axes that rows of a batch are sharded over

# Logical axis → mesh axes. `vocab` is tensor-major, so that gathering over fsdp leaves whole tensor shards.
TABLE: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    "batch": BATCH,
    "sequence": "sequence",
    "vocab": ("tensor", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
}


def spec(*logical: str | None, gathered: bool = False) -> P:
    """Returns the PartitionSpec of an array with these logical axes.

    Args:
      *logical: a name of TABLE per dimension, None for an unsharded one.
      gathered: leave out `fsdp`: the layout in which a weight is used, after its all-gather.

    Raises:
      ValueError: two dimensions would lie on the same mesh axis.
    """
    axes = [TABLE[name] for name in logical]
    if gathered:
        axes = [_without_fsdp(axis) for axis in axes]
    used = [a for axis in axes for a in ((axis,) if isinstance(axis, str) else axis or ())]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {logical} collide on a mesh axis: {axes}")
    return P(*axes)


def heads_axis(n_heads: int) -> str | None:
    """Returns the logical axis of so many key and value heads: 'heads', or None where `tensor` does not divide them.

    Every device of `tensor` then holds all of them. Needs a mesh set.
    """
    return "heads" if n_heads % jax.sharding.get_abstract_mesh().shape["tensor"] == 0 else None


def require_divisible(size: int, what: str) -> None:
    """Raises UserError where `tensor` does not divide `size`, the number of `what` that the model has; needs a mesh."""
    tensor = jax.sharding.get_abstract_mesh().shape["tensor"]
    if size % tensor:
        raise UserError(f"config.mesh.tensor = {tensor} does not divide the model's {size} {what}")


def require_shardable(names: Sequence[str | None], shape: Sequence[int]) -> None:
    """Raises UserError where the mesh does not divide a parameter's dimensions evenly; needs a mesh set."""
    mesh = jax.sharding.get_abstract_mesh().shape
    for axis, size in zip((TABLE[name] for name in names), shape):
        axes = (axis,) if isinstance(axis, str) else axis or ()
        parts = math.prod(mesh[name] for name in axes)
        if size % parts:
            said = " times ".join(f"config.mesh.{name} = {mesh[name]}" for name in axes if mesh[name] > 1)
            raise UserError(f"{said} does not divide a size of the model, {size}: take another mesh")


def _without_fsdp(axis: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if isinstance(axis, tuple):
        kept = tuple(a for a in axis if a != "fsdp")
        return kept[0] if len(kept) == 1 else kept or None
    return None if axis == "fsdp" else axis


ROWS = spec("batch", "sequence")  # tokens [R, L]
STATES = spec("batch", "sequence", None)  # token states [R, L, D]
MICRO_ROWS = P(None, *ROWS)  # tokens of all micro-batches [M, R, L]
TEXTS = P(BATCH)  # one entry per text [N]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Builds the mesh over all devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    fixed = math.prod(n for n in sizes if n != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        wanted = ", ".join(f"{axis} {n}" for axis, n in zip(AXES, sizes))
        raise UserError(f"config.mesh: {wanted} do not multiply to the {len(devices)} devices at hand")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def platform() -> str:
    """Returns what the mesh that is set consists of, 'cpu', 'gpu' or 'tpu', also where that is not this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Returns S, the number of shards that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def own_shards(mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    """Returns the numbers of the batch shards whose rows lie on this process's devices, in ascending order."""
    at = {device: place for place, device in np.ndenumerate(mesh.devices)}
    sizes = [mesh.shape[axis] for axis in BATCH]
    places = ([at[device][mesh.axis_names.index(axis)] for axis in BATCH] for device in mesh.local_devices)
    return tuple(sorted({int(np.ravel_multi_index(place, sizes)) for place in places}))


def to_host(array: np.ndarray | jax.Array) -> np.ndarray:
    """Brings an array to the host without the copy that `np.asarray` would leave in the jax.Array.

    To be called by all processes alike, with the array's mesh set. Only process 0 gets what lies on several processes,
    the others zeros. It is gathered a part at a time along axis 0, where that is not sharded, so that no device holds
    much more than its own.
    """
    if not isinstance(array, jax.Array) or array.is_fully_replicated:
        return np.asarray(array)
    whole = np.zeros(array.shape, array.dtype)  # memory that is never touched, where it stays as it is
    if array.is_fully_addressable:
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                whole[shard.index] = np.asarray(shard.data)
        return whole
    in_parts = array.ndim > 1 and array.sharding.spec[0] is None
    for part in range(len(array)) if in_parts else (slice(None),):
        gathered = _gathered_part(array, part) if in_parts else _gathered(array)
        gathered.block_until_ready()  # in all processes: one that runs ahead has too many under way, and can hang
        if jax.process_index() == 0:
            whole[part] = np.asarray(gathered)
    return whole


@jax.jit
def _gathered(array: jax.Array) -> jax.Array:
    return jax.sharding.reshard(array, P(*[None] * array.ndim))


@jax.jit
def _gathered_part(array: jax.Array, part: int) -> jax.Array:
    return _gathered(jax.lax.dynamic_index_in_dim(array, part, keepdims=False))


def put(array: jax.typing.ArrayLike, mesh: jax.sharding.Mesh, partition: P) -> jax.Array:
    """Lays a host array onto the mesh. Every process holds the whole array and hands over its own shards."""
    sharding = NamedSharding(mesh, partition)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
