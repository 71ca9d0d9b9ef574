"""The encoders of T5, mT5 and FLAN-T5: pre-norm, no positions but a learned bias by distance.

T5: Raffel et al. 2020, arXiv:1910.10683; version 1.1 and mT5 (Xue et al. 2021, arXiv:2010.11934) gate the MLP; FLAN-T5
(Chung et al. 2022, arXiv:2210.11416) is T5 1.1 trained on. As a sentence encoder: Ni et al. 2021, arXiv:2108.08877.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed.data.batch import Rows
from jaxembed.models.layers.attention import AttentionSpec
from jaxembed.models.layers.dropout import Noise, dropout, layer_place
from jaxembed.models.layers.linear import Embedding, RMSNorm
from jaxembed.models.layers.mlp import Mlp
from jaxembed.models.layers.relative_bias import RelativeBias
from jaxembed.models.layers.self_attention import SelfAttention
from jaxembed.models.layers.stack import apply_layers, finished
from jaxembed.models.options import ModelOptions, TokenStates, per_layer


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The shape of a T5 encoder.

    Attributes:
      vocab_size: tokens known; the table is padded to a multiple of 128 rows, whatever the mesh.
      width: D. layers: n. heads: H. mlp_width: F.
      head_width: K; H · K need not be D.
      max_length: longest text in tokens; the model itself knows no bound.
      buckets: of the bias by distance.
      max_distance: from which on all distances share a bucket.
      norm_eps: epsilon of the norms.
      activation: a key of ACTIVATIONS.
      gated: whether the MLP is gated.
      initializer_factor: of the standard deviations of fresh weights.
      attention: its mode, one for all layers or one for each.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    head_width: int
    mlp_width: int
    max_length: int = 512
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    initializer_factor: float = 1.0
    attention: tuple[str, ...] = ("bidirectional",)

    @property
    def padded_vocab(self) -> int:
        """Rows of the token table."""
        return -(-self.vocab_size // 128) * 128

    @property
    def initializer_range(self) -> float:
        """Standard deviation of a fresh kernel [D, …]."""
        return self.initializer_factor * self.width**-0.5


class Layer(nnx.Module):
    """One encoder block: each sub-layer reads its input normalised, and is added to it."""

    def __init__(self, key: jax.Array, config: T5Config, dtype: jnp.dtype) -> None:
        c, stddev = config, config.initializer_range
        keys = jax.random.split(key, 2)
        # The query's is smaller because scores are not divided by sqrt(K).
        query, out = stddev * c.head_width**-0.5, c.initializer_factor * (c.heads * c.head_width) ** -0.5
        self.attention_norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.attention = SelfAttention(
            keys[0], c.width, c.heads, c.head_width, (query, stddev, stddev, out), dtype, use_bias=False
        )
        self.mlp_norm = RMSNorm(c.width, c.norm_eps, dtype)
        stddevs = stddev, c.initializer_factor * c.mlp_width**-0.5
        self.mlp = Mlp(keys[1], c.width, c.mlp_width, c.activation, stddevs, dtype, c.gated, biases=(False, False))

    def __call__(
        self,
        x: jax.Array,
        rows: Rows,
        spec: AttentionSpec,
        bias_HxW: jax.Array,
        rate: float,
        noise: Noise | None,
        index: jax.Array,
    ) -> jax.Array:
        place = layer_place(index)
        attended = self.attention(self.attention_norm(x), rows, spec, noise, place, bias_HxW=bias_HxW)
        x += dropout(attended, rate, noise, place + 1)
        return x + dropout(self.mlp(self.mlp_norm(x), noise, place), rate, noise, place + 2)


class T5(nnx.Module):
    """A T5 encoder: packed rows in, token states out.

    Args:
      key: PRNG key of fresh weights.
      config: the shape.
      options: how to compute.
    """

    def __init__(self, key: jax.Array, config: T5Config, options: ModelOptions) -> None:
        c, dtype = config, jnp.dtype(options.param_dtype)
        keys = jax.random.split(key, 3)
        self.token = Embedding(keys[0], c.padded_vocab, c.width, c.initializer_factor, dtype, "vocab")
        self.relative_bias = RelativeBias(keys[1], c.buckets, c.heads, c.initializer_range, dtype, c.max_distance)
        self.layers = jax.vmap(lambda k: Layer(k, config, dtype))(jax.random.split(keys[2], c.layers))
        self.norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.config = config
        self.options = options

    def __call__(self, rows: Rows, noise: Noise | None = None, chosen: tuple[int, ...] = ()) -> TokenStates:
        """Encodes rows.

        Args:
          rows: arrays [R, L]; see `jaxembed.data.batch.Rows`.
          noise: dropout masks; None switches dropout off.
          chosen: layers whose states are wanted too; 0 is the embeddings' output, i the output of the i-th layer. See
            `finish`.

        Returns:
          The last layer's states [R, L, D] in the compute dtype, normalised, and the chosen ones.
        """
        options, config = self.options, self.config
        x = self.token(rows.tokens, jnp.dtype(options.dtype))
        x = dropout(x, options.dropout, noise, jnp.uint32(0))
        bias_HxW = self.relative_bias(rows.tokens.shape[1])
        specs = [
            AttentionSpec(mode, scale=1.0, kernel=options.attention_kernel, dropout=options.attention_dropout)
            for mode in per_layer(config.attention, config.layers)
        ]

        def apply(x: jax.Array, layer: Layer, index: jax.Array, kind: AttentionSpec) -> jax.Array:
            return layer(x, rows, kind, bias_HxW, options.dropout, noise, index)

        states = apply_layers(self.layers, x, specs, apply, options, chosen)
        return finished(states, chosen, config.layers, self.finish)

    def finish(self, hidden_RxLxD: jax.Array) -> jax.Array:
        """Returns a layer's states as they are where that layer is the last: normalised."""
        return self.norm(hidden_RxLxD)
