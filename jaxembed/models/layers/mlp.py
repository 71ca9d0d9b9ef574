"""Feed-forward sub-layers: plain, and gated (Shazeer 2020, arXiv:2002.05202)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed import sharding
from jaxembed.models.layers.dropout import Noise
from jaxembed.models.layers.linear import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
HIDDEN = sharding.spec("batch", "sequence", "mlp")


class Mlp(nnx.Module):
    """down(activation(up(x))), or gated: down(activation(gate(x)) · up(x)).

    Args:
      key: PRNG key of fresh weights.
      width: D.
      hidden: F.
      activation: a key of ACTIVATIONS.
      stddevs: of the initial kernels, into the hidden layer and out of it.
      dtype: of the parameters.
      gated: whether there is a gate.
      biases: whether there are biases into the hidden layer, and out of it.
    """

    def __init__(
        self,
        key: jax.Array,
        width: int,
        hidden: int,
        activation: str,
        stddevs: tuple[float, float],
        dtype: jnp.dtype,
        gated: bool = False,
        biases: tuple[bool, bool] = (True, True),
    ) -> None:
        sharding.require_divisible(hidden, "channels of the MLP")
        outer, inner = (("embed", width),), (("mlp", hidden),)
        keys = jax.random.split(key, 3 if gated else 2)
        self.up = Linear(keys[0], outer, inner, stddevs[0], dtype, biases[0])
        self.down = Linear(keys[1], inner, outer, stddevs[1], dtype, biases[1])
        if gated:
            self.gate = Linear(keys[2], outer, inner, stddevs[0], dtype, biases[0])
        self.gated = gated
        self.activation = activation

    def __call__(self, x: jax.Array, noise: Noise | None, place: jax.Array) -> jax.Array:
        """Returns [R, L, D] for x of that shape; `place` is the layer's first one of dropout."""
        activation = ACTIVATIONS[self.activation]
        up = self.up(x, HIDDEN, noise, place + 7)
        # Checkpointed: the backward pass computes the activation anew instead of reading its parts from memory.
        if self.gated:
            gate = self.gate(x, HIDDEN, noise, place + 9)
            hidden = jax.checkpoint(lambda gate, up: activation(gate) * up)(gate, up)
        else:
            hidden = jax.checkpoint(activation)(up)
        return self.down(hidden, sharding.STATES, noise, place + 8)
