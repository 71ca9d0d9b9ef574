"""The mesh, and the one table that says which mesh axis each logical axis of an array lies on.

Meshes are explicit (`jax.sharding.AxisType.Explicit`): shardings are part of array types, and a contraction whose
communication was not written down does not compile. Axes that a run does not use have size 1.
"""

import math
from collections.abc import Sequence

import jax
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


def put(array: jax.typing.ArrayLike, mesh: jax.sharding.Mesh, partition: P) -> jax.Array:
    """Lays a host array onto the mesh. Every process holds the whole array and hands over its own shards."""
    sharding = NamedSharding(mesh, partition)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
