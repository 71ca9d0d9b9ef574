"""Nomic's BERT: post-norm, rotary positions, a gated MLP, no biases but the norms'.

Nussbaum et al. 2024, arXiv:2402.01613. The mixture of experts of the second version is not here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed.data.batch import Rows
from jaxembed.models.layers.attention import AttentionSpec
from jaxembed.models.layers.dropout import Noise, dropout, layer_place
from jaxembed.models.layers.linear import Embedding, LayerNorm
from jaxembed.models.layers.mlp import Mlp
from jaxembed.models.layers.rope import RopeConfig, Tables, rope_tables
from jaxembed.models.layers.self_attention import SelfAttention
from jaxembed.models.layers.stack import apply_layers, finished
from jaxembed.models.options import ModelOptions, TokenStates, per_layer


@dataclasses.dataclass(frozen=True)
class NomicBertConfig:
    """The shape of a Nomic encoder.

    Attributes:
      vocab_size: tokens known; the table is padded to a multiple of 128 rows, whatever the mesh.
      width: D. layers: n. heads: H. mlp_width: F.
      rope: rotary positions; its width is K, the width of a head.
      max_length: longest text in tokens.
      type_vocab: rows of the token-type table (only type 0 is used).
      norm_eps: epsilon of the layer norms.
      initializer_range: standard deviation of fresh weights.
      attention: its mode, one for all layers or one for each.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    rope: RopeConfig
    max_length: int = 2048
    type_vocab: int = 2
    norm_eps: float = 1e-12
    initializer_range: float = 0.02
    attention: tuple[str, ...] = ("bidirectional",)

    @property
    def padded_vocab(self) -> int:
        """Rows of the token table."""
        return -(-self.vocab_size // 128) * 128


class Embeddings(nnx.Module):
    """Token + type vectors, normalised."""

    def __init__(self, key: jax.Array, config: NomicBertConfig, dtype: jnp.dtype) -> None:
        c = config
        keys = jax.random.split(key, 2)
        self.token = Embedding(keys[0], c.padded_vocab, c.width, c.initializer_range, dtype, "vocab")
        self.type = Embedding(keys[1], c.type_vocab, c.width, c.initializer_range, dtype)
        self.norm = LayerNorm(c.width, c.norm_eps, dtype)

    def __call__(self, rows: Rows, dtype: jnp.dtype) -> jax.Array:
        return self.norm(self.token(rows.tokens, dtype) + self.type(jnp.zeros_like(rows.tokens), dtype))


class Layer(nnx.Module):
    """One encoder block: each sub-layer is added to its input, then normalised."""

    def __init__(self, key: jax.Array, config: NomicBertConfig, dtype: jnp.dtype) -> None:
        c, stddev = config, config.initializer_range
        keys = jax.random.split(key, 2)
        self.attention = SelfAttention(keys[0], c.width, c.heads, c.rope.width, (stddev,) * 4, dtype, use_bias=False)
        self.attention_norm = LayerNorm(c.width, c.norm_eps, dtype)
        self.mlp = Mlp(keys[1], c.width, c.mlp_width, "silu", (stddev,) * 2, dtype, gated=True, biases=(False, False))
        self.mlp_norm = LayerNorm(c.width, c.norm_eps, dtype)

    def __call__(
        self,
        x: jax.Array,
        rows: Rows,
        spec: AttentionSpec,
        tables: Tables,
        rate: float,
        noise: Noise | None,
        index: jax.Array,
    ) -> jax.Array:
        place = layer_place(index)
        attended = self.attention(x, rows, spec, noise, place, tables=tables)
        x = self.attention_norm(x + dropout(attended, rate, noise, place + 1))
        return self.mlp_norm(x + dropout(self.mlp(x, noise, place), rate, noise, place + 2))


class NomicBert(nnx.Module):
    """A Nomic backbone: packed rows in, token states out.

    Args:
      key: PRNG key of fresh weights.
      config: the shape.
      options: how to compute.
    """

    def __init__(self, key: jax.Array, config: NomicBertConfig, options: ModelOptions) -> None:
        dtype = jnp.dtype(options.param_dtype)
        keys = jax.random.split(key, 2)
        self.embeddings = Embeddings(keys[0], config, dtype)
        self.layers = jax.vmap(lambda k: Layer(k, config, dtype))(jax.random.split(keys[1], config.layers))
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
          The last layer's states [R, L, D] in the compute dtype, and the chosen ones [len(chosen), R, L, D].
        """
        options, config = self.options, self.config
        x = self.embeddings(rows, jnp.dtype(options.dtype))
        x = dropout(x, options.dropout, noise, jnp.uint32(0))
        tables = rope_tables(config.rope, rows.positions, rows.segment_ids)
        specs = [
            AttentionSpec(mode, kernel=options.attention_kernel, dropout=options.attention_dropout)
            for mode in per_layer(config.attention, config.layers)
        ]

        def apply(x: jax.Array, layer: Layer, index: jax.Array, kind: AttentionSpec) -> jax.Array:
            return layer(x, rows, kind, tables, options.dropout, noise, index)

        states = apply_layers(self.layers, x, specs, apply, options, chosen)
        return finished(states, chosen, config.layers, self.finish)

    def finish(self, hidden_RxLxD: jax.Array) -> jax.Array:
        """Returns a layer's states as they are where that layer is the last: this family has no closing norm."""
        return hidden_RxLxD
