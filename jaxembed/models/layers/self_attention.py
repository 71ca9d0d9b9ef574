"""The attention sub-layer of encoders: four projections around `attention`."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed import sharding
from jaxembed.data.batch import Rows
from jaxembed.models.layers.attention import HEADS, AttentionSpec, attention
from jaxembed.models.layers.dropout import Noise
from jaxembed.models.layers.linear import Linear
from jaxembed.models.layers.rope import Tables, rotate


class SelfAttention(nnx.Module):
    """Multi-head self-attention with as many key heads as query heads.

    Args:
      key: PRNG key of fresh weights.
      width: D.
      heads: H.
      head_width: K.
      stddevs: of the initial kernels of query, key, value and out.
      dtype: of the parameters.
      use_bias: whether the projections have biases.
    """

    def __init__(
        self,
        key: jax.Array,
        width: int,
        heads: int,
        head_width: int,
        stddevs: tuple[float, float, float, float],
        dtype: jnp.dtype,
        use_bias: bool = True,
    ) -> None:
        sharding.require_divisible(heads, "attention heads")
        outer, inner = (("embed", width),), (("heads", heads), (None, head_width))
        keys = jax.random.split(key, 4)
        self.query = Linear(keys[0], outer, inner, stddevs[0], dtype, use_bias)
        self.key = Linear(keys[1], outer, inner, stddevs[1], dtype, use_bias)
        self.value = Linear(keys[2], outer, inner, stddevs[2], dtype, use_bias)
        self.out = Linear(keys[3], inner, outer, stddevs[3], dtype, use_bias)

    def __call__(
        self,
        x: jax.Array,
        rows: Rows,
        spec: AttentionSpec,
        noise: Noise | None,
        place: jax.Array,
        *,
        tables: Tables | None = None,
        bias_HxW: jax.Array | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          x: states [R, L, D].
          rows: where each text lies.
          spec: what may be seen.
          noise: dropout of attention weights; None for none.
          place: the layer's first place of dropout.
          tables: of rotary positions; None for none.
          bias_HxW: float32, by relative position; None for none. See `attention`.

        Returns:
          [R, L, D] in x's dtype.
        """
        q, k, v = (
            project(x, HEADS, noise, place + 3 + i) for i, project in enumerate((self.query, self.key, self.value))
        )
        if tables is not None:
            q, k = rotate(q, tables), rotate(k, tables)
        out = attention(q, k, v, rows.segment_ids, spec, noise, place, bias_HxW=bias_HxW)
        return self.out(out, sharding.STATES, noise, place + 6)
