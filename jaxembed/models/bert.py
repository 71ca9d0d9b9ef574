"""The BERT family: bert, roberta, xlm-roberta (post-norm encoders with learned absolute positions).

BERT: Devlin et al. 2018, arXiv:1810.04805. RoBERTa: Liu et al. 2019, arXiv:1907.11692, the same block with positions
counted from pad_token_id + 1.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed import sharding
from jaxembed.data.batch import Rows
from jaxembed.models.layers.attention import HEADS, AttentionSpec, attention
from jaxembed.models.layers.dropout import Noise, dropout, layer_place
from jaxembed.models.layers.linear import Embedding, LayerNorm, Linear
from jaxembed.models.layers.stack import apply_layers
from jaxembed.models.options import ModelOptions, TokenStates, per_layer

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
MLP = sharding.spec("batch", "sequence", "mlp")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT-family encoder.

    Attributes:
      vocab_size: tokens known; the table is padded to a multiple of 128 rows, whatever the mesh.
      width: D. layers: n. heads: H. mlp_width: F.
      positions: rows of the position table.
      type_vocab: rows of the token-type table (only type 0 is used).
      norm_eps: epsilon of the layer norms.
      activation: a key of ACTIVATIONS.
      position_offset: the table's row of a text's first token: 0 for bert, pad_token_id + 1 for roberta.
      initializer_range: standard deviation of fresh weights.
      attention: its mode, one for all layers or one for each.
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

    @property
    def padded_vocab(self) -> int:
        """Rows of the token table."""
        return -(-self.vocab_size // 128) * 128

    @property
    def max_length(self) -> int:
        """Longest text in tokens that the position table serves."""
        return self.positions - self.position_offset


class Embeddings(nnx.Module):
    """Token + position + type vectors, normalised."""

    def __init__(self, key: jax.Array, config: BertConfig, dtype: jnp.dtype) -> None:
        c = config
        keys = jax.random.split(key, 3)
        self.token = Embedding(keys[0], c.padded_vocab, c.width, c.initializer_range, dtype, "vocab")
        self.position = Embedding(keys[1], c.positions, c.width, c.initializer_range, dtype)
        self.type = Embedding(keys[2], c.type_vocab, c.width, c.initializer_range, dtype)
        self.norm = LayerNorm(c.width, c.norm_eps, dtype)
        self.offset = c.position_offset

    def __call__(self, rows: Rows, dtype: jnp.dtype) -> jax.Array:
        types = jnp.zeros_like(rows.tokens)
        x = self.token(rows.tokens, dtype) + self.type(types, dtype)
        return self.norm(x + self.position(rows.positions + self.offset, dtype))


class Attention(nnx.Module):
    """Multi-head self-attention with its four projections."""

    def __init__(self, key: jax.Array, config: BertConfig, dtype: jnp.dtype) -> None:
        width = (("embed", config.width),)
        heads = (("heads", config.heads), (None, config.width // config.heads))
        keys = jax.random.split(key, 4)
        self.query = Linear(keys[0], width, heads, config.initializer_range, dtype)
        self.key = Linear(keys[1], width, heads, config.initializer_range, dtype)
        self.value = Linear(keys[2], width, heads, config.initializer_range, dtype)
        self.out = Linear(keys[3], heads, width, config.initializer_range, dtype)

    def __call__(
        self, x: jax.Array, rows: Rows, spec: AttentionSpec, noise: Noise | None, place: jax.Array
    ) -> jax.Array:
        q, k, v = (
            project(x, HEADS, noise, place + 3 + i) for i, project in enumerate((self.query, self.key, self.value))
        )
        out = attention(q, k, v, rows.segment_ids, spec, noise, place)
        return self.out(out, sharding.STATES, noise, place + 6)


class Mlp(nnx.Module):
    """The feed-forward sub-layer."""

    def __init__(self, key: jax.Array, config: BertConfig, dtype: jnp.dtype) -> None:
        width, hidden = (("embed", config.width),), (("mlp", config.mlp_width),)
        keys = jax.random.split(key, 2)
        self.up = Linear(keys[0], width, hidden, config.initializer_range, dtype)
        self.down = Linear(keys[1], hidden, width, config.initializer_range, dtype)
        self.activation = config.activation

    def __call__(self, x: jax.Array, noise: Noise | None, place: jax.Array) -> jax.Array:
        # Checkpointed: the backward pass computes the activation anew instead of reading its parts from memory.
        activation = jax.checkpoint(ACTIVATIONS[self.activation])
        return self.down(activation(self.up(x, MLP, noise, place + 7)), sharding.STATES, noise, place + 8)


class Layer(nnx.Module):
    """One encoder block: each sub-layer is added to its input, then normalised."""

    def __init__(self, key: jax.Array, config: BertConfig, dtype: jnp.dtype) -> None:
        keys = jax.random.split(key, 2)
        self.attention = Attention(keys[0], config, dtype)
        self.attention_norm = LayerNorm(config.width, config.norm_eps, dtype)
        self.mlp = Mlp(keys[1], config, dtype)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps, dtype)

    def __call__(
        self, x: jax.Array, rows: Rows, spec: AttentionSpec, rate: float, noise: Noise | None, index: jax.Array
    ) -> jax.Array:
        place = layer_place(index)
        x = self.attention_norm(x + dropout(self.attention(x, rows, spec, noise, place), rate, noise, place + 1))
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
        specs = [
            AttentionSpec(mode, kernel=options.attention_kernel, dropout=options.attention_dropout)
            for mode in per_layer(config.attention, config.layers)
        ]

        def apply(x: jax.Array, layer: Layer, index: jax.Array, kind: AttentionSpec) -> jax.Array:
            return layer(x, rows, kind, options.dropout, noise, index)

        last, kept = apply_layers(self.layers, x, specs, apply, options, chosen)
        return TokenStates(last, jnp.stack(kept) if chosen else None)

    def finish(self, hidden_RxLxD: jax.Array) -> jax.Array:
        """Returns a layer's states as they are where that layer is the last: this family has no closing norm."""
        return hidden_RxLxD
