"""Tokens to their experts and back."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxembed import sharding
from jaxembed.models.layers.mlp import ACTIVATIONS
from jaxembed.models.layers.routing import Choice, ExpertOptions

# Logical axes of the experts' weights.
INTO, OUT_OF, BIAS = ("experts", "embed", "mlp"), ("experts", "mlp", "embed"), ("experts", "mlp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernels:
    """The weights of one layer's experts, in the dtype of the parameters.

    Attributes:
      up: [X, D, F], sharded as INTO.
      down: [X, F, D], sharded as OUT_OF.
      gate: [X, D, F], sharded as INTO, or None.
      up_bias: [X, F], sharded as BIAS, or None.
    """

    up: jax.Array
    down: jax.Array
    gate: jax.Array | None
    up_bias: jax.Array | None


def apply_experts(
    x_RxLxD: jax.Array, choice: Choice, kernels: Kernels, activation: str, options: ExpertOptions
) -> jax.Array:
    """Sends tokens through their experts: sum over a token's experts of weight · down(activation(…)).

    Args:
      x_RxLxD: states, sharded as `sharding.STATES`, of the computation's dtype.
      choice: where they go.
      kernels: the experts'.
      activation: a key of `jaxembed.models.layers.mlp.ACTIVATIONS`.
      options: how to compute.

    Returns:
      [R, L, D] in x's dtype, 0 where a token goes nowhere.
    """

    def whole(kernel: jax.Array) -> jax.Array:
        return jax.sharding.reshard(kernel.astype(x_RxLxD.dtype), jax.sharding.PartitionSpec(*[None] * kernel.ndim))

    wide, act = sharding.spec("batch", "sequence", None, None), ACTIVATIONS[activation]
    up = jnp.einsum("rld,xdf->rlxf", x_RxLxD, whole(kernels.up), out_sharding=wide)
    if kernels.up_bias is not None:
        up += whole(kernels.up_bias)
    if kernels.gate is None:
        hidden = act(up)
    else:
        hidden = act(jnp.einsum("rld,xdf->rlxf", x_RxLxD, whole(kernels.gate), out_sharding=wide)) * up
    out = jnp.einsum("rlxf,xfd->rlxd", hidden, whole(kernels.down), out_sharding=wide)
    taken = (choice.experts[..., None] == jnp.arange(len(kernels.up))) * choice.weights[..., None]
    return (out * taken.sum(2)[..., None].astype(out.dtype)).sum(2)
