"""Post-norm encoders without rotary positions: bert, roberta, xlm-roberta, mpnet and the Jina-2 kind.

BERT: Devlin et al. 2018, arXiv:1810.04805. RoBERTa: Liu et al. 2019, arXiv:1907.11692, the same block with positions
counted from pad_token_id + 1. MPNet: Song et al. 2020, arXiv:2004.09297, with a learned bias by distance beside them.
Jina-2: Günther et al. 2023, arXiv:2310.19923, with a fixed bias by distance in their place and a gated MLP.
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
from jaxembed.models.layers.relative_bias import RelativeBias, alibi_bias
from jaxembed.models.layers.self_attention import SelfAttention
from jaxembed.models.layers.stack import apply_layers, finished
from jaxembed.models.options import ModelOptions, TokenStates, per_layer


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT-family encoder.

    Attributes:
      vocab_size: tokens known; the table is padded to a multiple of 128 rows, whatever the mesh.
      width: D. layers: n. heads: H. mlp_width: F.
      positions: rows of the position table; with ALiBi there is no table, this is the longest text.
      type_vocab: rows of the token-type table (only type 0 is used); 0 for no table.
      norm_eps: epsilon of the layer norms.
      activation: a key of `jaxembed.models.layers.mlp.ACTIVATIONS`.
      position_offset: the table's row of a text's first token: 0 for bert, pad_token_id + 1 for roberta.
      initializer_range: standard deviation of fresh weights.
      attention: its mode, one for all layers or one for each.
      buckets: of the learned bias by distance; 0 for no such bias.
      alibi: whether there is a fixed bias by distance, in place of the position table.
      gated: whether the MLP is gated, without a bias into its hidden layer.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    positions: int = 512
    type_vocab: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    position_offset: int = 0
    initializer_range: float = 0.02
    attention: tuple[str, ...] = ("bidirectional",)
    buckets: int = 0
    alibi: bool = False
    gated: bool = False

    @property
    def padded_vocab(self) -> int:
        """Rows of the token table."""
        return -(-self.vocab_size // 128) * 128

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.positions - self.position_offset


class Embeddings(nnx.Module):
    """Token + position + type vectors, as far as the config has them, normalised."""

    def __init__(self, key: jax.Array, config: BertConfig, dtype: jnp.dtype) -> None:
        c = config
        keys = jax.random.split(key, 3)
        self.token = Embedding(keys[0], c.padded_vocab, c.width, c.initializer_range, dtype, "vocab")
        if not c.alibi:
            self.position = Embedding(keys[1], c.positions, c.width, c.initializer_range, dtype)
        if c.type_vocab:
            self.type = Embedding(keys[2], c.type_vocab, c.width, c.initializer_range, dtype)
        self.norm = LayerNorm(c.width, c.norm_eps, dtype)
        self.config = config

    def __call__(self, rows: Rows, dtype: jnp.dtype) -> jax.Array:
        x = self.token(rows.tokens, dtype)
        if self.config.type_vocab:
            x += self.type(jnp.zeros_like(rows.tokens), dtype)
        if not self.config.alibi:
            x += self.position(rows.positions + self.config.position_offset, dtype)
        return self.norm(x)


class Layer(nnx.Module):
    """One encoder block: each sub-layer is added to its input, then normalised."""

    def __init__(self, key: jax.Array, config: BertConfig, dtype: jnp.dtype) -> None:
        c, stddev = config, config.initializer_range
        keys = jax.random.split(key, 2)
        self.attention = SelfAttention(keys[0], c.width, c.heads, c.width // c.heads, (stddev,) * 4, dtype)
        self.attention_norm = LayerNorm(c.width, c.norm_eps, dtype)
        self.mlp = Mlp(
            keys[1], c.width, c.mlp_width, c.activation, (stddev,) * 2, dtype, c.gated, biases=(not c.gated, True)
        )
        self.mlp_norm = LayerNorm(c.width, c.norm_eps, dtype)

    def __call__(
        self,
        x: jax.Array,
        rows: Rows,
        spec: AttentionSpec,
        bias_HxW: jax.Array | None,
        rate: float,
        noise: Noise | None,
        index: jax.Array,
    ) -> jax.Array:
        place = layer_place(index)
        attended = self.attention(x, rows, spec, noise, place, bias_HxW=bias_HxW)
        x = self.attention_norm(x + dropout(attended, rate, noise, place + 1))
        return self.mlp_norm(x + dropout(self.mlp(x, noise, place), rate, noise, place + 2))


class Bert(nnx.Module):
    """A BERT-family backbone: packed rows in, token states out.

    Args:
      key: PRNG key of fresh weights.
      config: the shape.
      options: how to compute.
    """

    def __init__(self, key: jax.Array, config: BertConfig, options: ModelOptions) -> None:
        dtype = jnp.dtype(options.param_dtype)
        keys = jax.random.split(key, 2)
        self.embeddings = Embeddings(keys[0], config, dtype)
        self.layers = jax.vmap(lambda k: Layer(k, config, dtype))(jax.random.split(keys[1], config.layers))
        if config.buckets:
            bias_key = jax.random.fold_in(key, 2)
            self.relative_bias = RelativeBias(bias_key, config.buckets, config.heads, config.initializer_range, dtype)
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
        bias_HxW = self._bias(rows.tokens.shape[1])
        specs = [
            AttentionSpec(mode, kernel=options.attention_kernel, dropout=options.attention_dropout)
            for mode in per_layer(config.attention, config.layers)
        ]

        def apply(x: jax.Array, layer: Layer, index: jax.Array, kind: AttentionSpec) -> jax.Array:
            return layer(x, rows, kind, bias_HxW, options.dropout, noise, index)

        states = apply_layers(self.layers, x, specs, apply, options, chosen)
        return finished(states, chosen, config.layers, self.finish)

    def _bias(self, length: int) -> jax.Array | None:
        """What is added to the scores of rows of this length, [H, 2 length - 1]."""
        if self.config.alibi:
            return jnp.asarray(alibi_bias(self.config.heads, length))
        return self.relative_bias(length) if self.config.buckets else None

    def finish(self, hidden_RxLxD: jax.Array) -> jax.Array:
        """Returns a layer's states as they are where that layer is the last: this family has no closing norm."""
        return hidden_RxLxD
