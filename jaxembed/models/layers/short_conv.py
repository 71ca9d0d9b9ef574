"""The short convolution in front of a state-space layer: each channel by itself, over the last K tokens of its text."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed import sharding
from jaxembed.errors import UserError
from jaxembed.models.layers import recurrence
from jaxembed.models.layers.linear import Dims
from jaxembed.models.layers.recurrence import Borders
from jaxembed.sharding import ROWS


class ShortConv(nnx.Module):
    """y_t = bias + Σ_j kernel_{K-1-j} x_{t-j} for j = 0 … K - 1, tokens of other texts being 0.

    Args:
      key: PRNG key of fresh weights, uniform as those of torch's Conv1d.
      size: K.
      channels: logical axis and size of each dimension of the channels.
      dtype: of the parameters.
      use_bias: whether there is a bias.
    """

    def __init__(self, key: jax.Array, size: int, channels: Dims, dtype: jnp.dtype, use_bias: bool) -> None:
        names, shape = zip(*channels)
        sharding.require_shardable(names, shape)
        layout, bound = sharding.spec(None, *names), size**-0.5
        kernel = jax.random.uniform(key, (size, *shape), dtype, -bound, bound, out_sharding=layout)
        self.kernel = nnx.Param(kernel)
        self.use_bias = use_bias
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(shape, dtype, out_sharding=sharding.spec(*names)))
        self.names = names

    def __call__(self, x: jax.Array, borders: Borders, reverse: bool = False) -> jax.Array:
        """Returns [R, L, …] for x of that shape and dtype; with `reverse` a token sees those behind it."""
        layout, of_kernel = sharding.spec("batch", "sequence", *self.names), sharding.spec(None, *self.names)

        @jax.checkpoint  # else the backward pass would read each of the K shifted copies of x from memory
        def local(x: jax.Array, texts: jax.Array, kernel: jax.Array) -> jax.Array:
            return _convolve(x, texts, kernel, reverse)

        mapped = jax.shard_map(local, in_specs=(layout, ROWS, of_kernel), out_specs=layout)
        y = mapped(x, borders.texts, self.kernel[...])
        return y + self.bias[...].astype(x.dtype) if self.use_bias else y


def _convolve(x: jax.Array, texts_rxl: jax.Array, kernel: jax.Array, reverse: bool) -> jax.Array:
    """Convolves a shard's tokens [r, l, …]; inside `jax.shard_map`."""
    size, length = len(kernel), x.shape[1]
    if length < size - 1:
        raise UserError(
            f"config.mesh.sequence leaves shards of {length} tokens, but a convolution reaches {size - 1} tokens back: "
            "set it lower, or config.data.row_length higher"
        )
    if reverse:
        x, texts_rxl = jnp.flip(x, 1), jnp.flip(texts_rxl, 1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    seen = [recurrence.before(y, size - 1, reverse, fill) for y, fill in ((x, 0), (texts_rxl, -1))]
    whole, whole_texts = (jnp.concatenate([y, z], axis=1) for y, z in zip(seen, (x, texts_rxl)))
    out = x.astype(wide) * kernel[-1]
    for back in range(1, size):
        first = size - 1 - back
        here = slice(first, first + length)
        same = _over_channels(whole_texts[:, here] == texts_rxl, x.shape)
        out += jnp.where(same, whole[:, here], 0).astype(wide) * kernel[first]
    out = out.astype(x.dtype)
    return jnp.flip(out, 1) if reverse else out


def _over_channels(tokens_rxl: jax.Array, shape: Sequence[int]) -> jax.Array:
    return tokens_rxl.reshape(*tokens_rxl.shape, *[1] * (len(shape) - 2))
