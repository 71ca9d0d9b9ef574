"""What attention adds to its scores by the distance between two tokens: the `bias_HxW` of `attention`.

Two kinds: a learned number for each head and bucket of distances (T5, Raffel et al. 2020, arXiv:1910.10683; MPNet, Song
et al. 2020, arXiv:2004.09297, whose formula is the same), and a fixed slope for each head (ALiBi, Press et al. 2022,
arXiv:2108.12409), here as encoders have it: the same on both sides (Günther et al. 2023, arXiv:2310.19923).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxembed import sharding


class RelativeBias(nnx.Module):
    """A learned table [buckets, H], shared by all layers.

    Args:
      key: PRNG key of the table's normal initialisation.
      buckets: see `buckets_by_distance`.
      heads: H.
      stddev: of the initial table.
      dtype: of the parameter.
      max_distance: see `buckets_by_distance`.
    """

    def __init__(
        self, key: jax.Array, buckets: int, heads: int, stddev: float, dtype: jnp.dtype, max_distance: int = 128
    ) -> None:
        layout = sharding.spec(None, "heads")
        self.bias = nnx.Param(stddev * jax.random.normal(key, (buckets, heads), dtype, out_sharding=layout))
        self.buckets = buckets
        self.max_distance = max_distance

    def __call__(self, length: int) -> jax.Array:
        """Returns float32 [H, 2 length - 1], by key's place - query's."""
        buckets_W = buckets_by_distance(length, self.buckets, self.max_distance)
        table = self.bias[...].astype(jnp.float32)
        return table.at[buckets_W].get(out_sharding=P(None, "tensor"), mode="promise_in_bounds").T


def buckets_by_distance(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of every distance between two tokens of a row.

    One half of the buckets is for keys behind the query or at its place, the other for those ahead. Half of each half
    are distances of their own; the rest grow logarithmically up to `max_distance`, and the last takes all beyond.

    Args:
      length: tokens in the row.
      buckets: at least 4.
      max_distance: above buckets / 4.

    Returns:
      int32 [2 length - 1], for key's place - query's from 1 - length to length - 1.
    """
    ahead = np.arange(1 - length, length)
    distance = np.abs(ahead)
    half = buckets // 2
    exact = half // 2
    # float32 and in this order, as in transformers: edges between buckets lie on exact powers, where rounding decides.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int32), half - 1)
    return (np.where(ahead > 0, half, 0) + np.where(distance < exact, distance, far)).astype(np.int32)


def alibi_bias(heads: int, length: int) -> np.ndarray:
    """Returns -slope · distance, float32 [H, 2 length - 1], by key's place - query's."""
    distance = np.abs(np.arange(1 - length, length)).astype(np.float32)
    return -np.array(alibi_slopes(heads), np.float32)[:, None] * distance


def alibi_slopes(heads: int) -> list[float]:
    """Returns each head's slope: 2^(-8/n), 2^(-16/n), … for n heads, a power of 2.

    Other numbers of heads take those of the next lower power of 2 first, then every second one of the next higher: the
    authors' rule, github.com/ofirpress/attention_with_linear_biases.
    """
    lower = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    return slopes if lower == heads else slopes + alibi_slopes(2 * lower)[0::2][: heads - lower]
