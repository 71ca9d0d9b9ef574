"""Low-rank adapters: small trained matrices beside linear layers whose own kernels stay as they are.

LoRA: Hu et al. 2021, arXiv:2106.09685. Scaled by alpha / √rank: rsLoRA, Kalajdzievski 2023, arXiv:2312.03732.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxembed import sharding
from jaxembed.models.layers.dropout import Noise, dropout
from jaxembed.models.layers.linear import Linear

NAME = "adapter"  # of an adapter in its linear layer


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which linear layers have adapters, and of what kind.

    Attributes:
      rank: r, their width.
      scale: of their outputs: alpha / r, or alpha / √r.
      dropout: of their inputs, between 0 and 1.
      targets: paths of the linear layers in the backbone, such as 'layers/attention/query', stacked over its layers.
    """

    rank: int
    scale: float
    dropout: float
    targets: tuple[str, ...]


class Adapter(nnx.Module):
    """scale · dropout(x) A B, for a stack of n linear layers [inputs] → [outputs]; an equal part of it in each layer.

    A [n, inputs, r] starts uniform in ± 1 / √inputs and B [n, r, outputs] at zero, as in the peft library. Both are
    float32. They lie on the mesh as the kernel does, the rank whole.

    Args:
      key: PRNG key of A.
      linear: the stack of linear layers.
      lora: the adapter's kind.
    """

    def __init__(self, key: jax.Array, linear: Linear, lora: Lora) -> None:
        n, *shape = linear.kernel.shape
        inputs, outputs = shape[: linear.n_inputs], shape[linear.n_inputs :]
        self.names_a = *linear.names[: linear.n_inputs], None
        self.names_b = None, *linear.names[linear.n_inputs :]
        spec_a, spec_b = (P(None, *sharding.spec(*names)) for names in (self.names_a, self.names_b))
        bound = 1 / math.sqrt(math.prod(inputs))
        a = jax.random.uniform(key, (n, *inputs, lora.rank), jnp.float32, -bound, bound, out_sharding=spec_a)
        self.a = nnx.Param(a)
        self.b = nnx.Param(jnp.zeros((n, lora.rank, *outputs), jnp.float32, out_sharding=spec_b))
        self.n_inputs = linear.n_inputs
        self.lora = lora

    def __call__(self, x: jax.Array, out_spec: P, noise: Noise | None, place: jax.typing.ArrayLike) -> jax.Array:
        """Returns what the adapter of one layer adds; arguments as for `Linear`, x being [R, L, inputs]."""
        if noise is not None and self.lora.dropout:
            x = _dropped(x, self.lora.dropout, noise, place)
        a = jax.sharding.reshard(self.a[...].astype(x.dtype), sharding.spec(*self.names_a, gathered=True))
        b = (self.lora.scale * self.b[...]).astype(x.dtype)
        b = jax.sharding.reshard(b, sharding.spec(*self.names_b, gathered=True))
        lead = x.ndim - self.n_inputs
        contracted = tuple(range(lead, x.ndim)), tuple(range(self.n_inputs))
        # Where the inputs lie on `tensor`, a sum over its devices, of r numbers for a token.
        narrow_spec = P(*jax.typeof(x).sharding.spec[:lead], None)
        narrow = jax.lax.dot_general(x, a, (contracted, ((), ())), out_sharding=narrow_spec)
        return jax.lax.dot_general(narrow, b, (((lead,), (0,)), ((), ())), out_sharding=out_spec)


def _dropped(x: jax.Array, rate: float, noise: Noise, place: jax.typing.ArrayLike) -> jax.Array:
    """Drops channels of x [R, L, inputs], where inputs may be heads and their channels."""
    layout = jax.typeof(x).sharding
    flat_spec = P(*layout.spec[:3])  # only the first of the input dimensions is ever sharded
    flat = jax.lax.reshape(x, (*x.shape[:2], math.prod(x.shape[2:])), out_sharding=flat_spec)
    return jax.lax.reshape(dropout(flat, rate, noise, place), x.shape, out_sharding=layout)


def attach(backbone: nnx.Module, lora: Lora, key: jax.Array) -> None:
    """Gives fresh adapters to linear layers of a backbone. They change nothing before they are trained.

    Args:
      backbone: a model whose equal layers are stacked.
      lora: which layers, and the adapters' kind.
      key: PRNG key of the fresh weights.
    """
    for i, path in enumerate(lora.targets):
        linear = functools.reduce(getattr, path.split("/"), backbone)
        linear.adapter = Adapter(jax.random.fold_in(key, i), linear, lora)


def is_adapter(path: str) -> bool:
    """Whether a parameter's path is that of an adapter's A or B."""
    return f"/{NAME}/" in path


def merge(leaves: Mapping[str, jax.Array], lora: Lora) -> dict[str, jax.Array]:
    """Adds the adapters to their kernels: the same model without adapters.

    Args:
      leaves: path in the backbone → array. The kernels' own memory is used again.
      lora: the adapters' kind.

    Returns:
      The leaves without those of the adapters; sums are taken in float32, then cast to the kernel's type.
    """
    merged = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    for target in lora.targets:
        path = f"{target}/kernel"
        a, b = (leaves[f"{target}/{NAME}/{part}"] for part in "ab")
        merged[path] = _merge(merged[path], a, b, lora.scale)
    return merged


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _merge(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """kernel [n, inputs, outputs] + scale · A B."""
    numbers = ((a.ndim - 1,), (1,)), ((0,), (0,))
    highest = jax.lax.Precision.HIGHEST
    product = jax.lax.dot_general(a, b, numbers, precision=highest, out_sharding=jax.typeof(kernel).sharding)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
