"""Linear layers, embedding tables and normalisation, with their shardings."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxembed import sharding
from jaxembed.models.layers.dropout import Noise

Dims = tuple[tuple[str | None, int], ...]  # (logical axis, size) of each dimension


class Linear(nnx.Module):
    """An affine map between groups of dimensions, such as [D] → [H, K] or [H, K] → [D].

    Args:
      key: PRNG key of the kernel's normal initialisation.
      inputs: logical axis and size of each input dimension.
      outputs: the same for the output.
      stddev: of the initial kernel; the bias starts at zero.
      use_bias: whether there is a bias.
      dtype: of the parameters.
    """

    def __init__(
        self, key: jax.Array, inputs: Dims, outputs: Dims, stddev: float, dtype: jnp.dtype, use_bias: bool = True
    ) -> None:
        names, shape = zip(*(inputs + outputs))
        sharding.require_shardable(names, shape)
        self.kernel = nnx.Param(stddev * jax.random.normal(key, shape, dtype, out_sharding=sharding.spec(*names)))
        self.use_bias = use_bias
        if use_bias:
            names_out, shape_out = zip(*outputs)
            # A bias is small: it lies whole on every fsdp shard.
            self.bias = nnx.Param(jnp.zeros(shape_out, dtype, out_sharding=sharding.spec(*names_out, gathered=True)))
        self.names = names
        self.n_inputs = len(inputs)
        self.adapter: nnx.Module | None = nnx.data(None)  # see `jaxembed.models.lora`

    def __call__(
        self, x: jax.Array, out_spec: P, noise: Noise | None = None, place: jax.typing.ArrayLike = 0
    ) -> jax.Array:
        """Applies the map.

        Args:
          x: [..., inputs], any float dtype.
          out_spec: the sharding of the result.
          noise: dropout of an adapter's input; None for none.
          place: number of the call's place in the model, for that mask.

        Returns:
          [..., outputs] in x's dtype.
        """
        y = _product(x, self.kernel[...], sharding.spec(*self.names, gathered=True), self.n_inputs, out_spec)
        if self.adapter is not None:
            y += self.adapter(x, out_spec, noise, place)
        return y + self.bias[...].astype(x.dtype) if self.use_bias else y


def _contract(x: jax.Array, kernel: jax.Array, gathered: P, n_inputs: int, out_spec: P) -> jax.Array:
    """Contracts x [..., inputs] with a kernel [inputs, outputs] that is cast and gathered for it."""
    kernel = jax.sharding.reshard(kernel.astype(x.dtype), gathered)
    contracted = tuple(range(x.ndim - n_inputs, x.ndim)), tuple(range(n_inputs))
    return jax.lax.dot_general(x, kernel, (contracted, ((), ())), out_sharding=out_spec)


def _forward(x: jax.Array, kernel: jax.Array, *how: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _contract(x, kernel, *how), (x, kernel)


def _backward(gathered: P, n_inputs: int, out_spec: P, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> Any:
    return jax.vjp(lambda x, kernel: _contract(x, kernel, gathered, n_inputs, out_spec), *saved)[1](g)


# The backward pass casts and gathers anew. By itself it would hold what the forward pass made, a copy of every layer's
# kernels: a model's worth of memory.
_product = jax.custom_vjp(_contract, nondiff_argnums=(2, 3, 4))
_product.defvjp(_forward, _backward)


class Embedding(nnx.Module):
    """A table of vectors [V, D], looked up by token id."""

    def __init__(
        self, key: jax.Array, size: int, width: int, stddev: float, dtype: jnp.dtype, axis: str | None = None
    ) -> None:
        self.names = (axis, None if axis else "embed")
        sharding.require_shardable(self.names, (size, width))
        spec = sharding.spec(*self.names)
        self.embedding = nnx.Param(stddev * jax.random.normal(key, (size, width), dtype, out_sharding=spec))

    def __call__(self, ids_RxL: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Returns [R, L, D] in `dtype`."""
        table = self.embedding[...].astype(dtype)
        table = jax.sharding.reshard(table, sharding.spec(*self.names, gathered=True))
        return table.at[ids_RxL].get(out_sharding=sharding.STATES, mode="promise_in_bounds")


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axes, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
      width: of the last axis.
      epsilon: added to the mean square.
      dtype: of the parameter.
      offset: added to the scale: 0, or 1 for the Gemma family, whose scales are stored around 0.
      joint: logical axis and size of dimensions before the last that are normalised together with it.
    """

    def __init__(self, width: int, epsilon: float, dtype: jnp.dtype, offset: float = 0.0, joint: Dims = ()) -> None:
        names, shape = zip(*joint, (None, width))
        self.scale = nnx.Param(jnp.full(shape, 1 - offset, dtype, out_sharding=sharding.spec(*names)))
        self.axes = tuple(range(-len(shape), 0))
        self.epsilon = epsilon
        self.offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x normalised, in x's dtype."""
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.square(y).mean(self.axes, keepdims=True) + self.epsilon)
        return (y * (self.scale[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32 (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, width: int, epsilon: float, dtype: jnp.dtype, use_bias: bool = True) -> None:
        self.scale = nnx.Param(jnp.ones(width, dtype, out_sharding=P(None)))
        self.use_bias = use_bias
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(width, dtype, out_sharding=P(None)))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x normalised, in x's dtype."""
        y = x.astype(jnp.float32)
        centred = y - y.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        y *= self.scale[...].astype(jnp.float32)
        return (y + self.bias[...].astype(jnp.float32) if self.use_bias else y).astype(x.dtype)
