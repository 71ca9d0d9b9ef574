"""ModernBERT: pre-norm, rotary positions, a gated MLP, local and global layers.

Warner et al. 2024, arXiv:2412.13663.
"""

import dataclasses
import math

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
class ModernBertConfig:
    """The shape of a ModernBERT encoder.

    Attributes:
      vocab_size: tokens known; the table is padded to a multiple of 128 rows, whatever the mesh.
      width: D. layers: n. heads: H. mlp_width: F.
      local: whether each layer is local, n of them.
      reach: the farthest distance seen in a local layer, on either side.
      rope: rotary positions of global layers. local_rope: those of local ones.
      max_length: longest text in tokens.
      norm_eps: epsilon of the layer norms.
      norm_bias, attention_bias, mlp_bias: whether these have biases.
      activation: a key of ACTIVATIONS.
      initializer_range: standard deviation of fresh weights; those that write to the residual stream are smaller.
      attention: its mode, one for all layers or one for each.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    local: tuple[bool, ...]
    reach: int
    rope: RopeConfig
    local_rope: RopeConfig
    max_length: int = 8192
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: str = "gelu"
    initializer_range: float = 0.02
    attention: tuple[str, ...] = ("bidirectional",)

    @property
    def padded_vocab(self) -> int:
        """Rows of the token table."""
        return -(-self.vocab_size // 128) * 128


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What is static about a layer: what it sees, and whether its rotary positions are those of local layers."""

    spec: AttentionSpec
    local: bool


class Layer(nnx.Module):
    """One encoder block: each sub-layer reads its input normalised, and is added to it."""

    def __init__(self, key: jax.Array, config: ModernBertConfig, dtype: jnp.dtype) -> None:
        c = config
        inward, outward = c.initializer_range, c.initializer_range / math.sqrt(2 * c.layers)
        keys = jax.random.split(key, 2)
        self.attention_norm = LayerNorm(c.width, c.norm_eps, dtype, c.norm_bias)
        self.attention = SelfAttention(
            keys[0], c.width, c.heads, c.width // c.heads, (inward, inward, inward, outward), dtype, c.attention_bias
        )
        self.mlp_norm = LayerNorm(c.width, c.norm_eps, dtype, c.norm_bias)
        biases = c.mlp_bias, c.mlp_bias
        self.mlp = Mlp(keys[1], c.width, c.mlp_width, c.activation, (inward, outward), dtype, gated=True, biases=biases)

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
        # The embeddings are normalised already: the first layer's norm is no part of the model, and gets no gradient.
        normed = jnp.where(index == 0, x, self.attention_norm(x))
        x += dropout(self.attention(normed, rows, spec, noise, place, tables=tables), rate, noise, place + 1)
        return x + dropout(self.mlp(self.mlp_norm(x), noise, place), rate, noise, place + 2)


class ModernBert(nnx.Module):
    """A ModernBERT backbone: packed rows in, token states out.

    Args:
      key: PRNG key of fresh weights.
      config: the shape.
      options: how to compute.
    """

    def __init__(self, key: jax.Array, config: ModernBertConfig, options: ModelOptions) -> None:
        c, dtype = config, jnp.dtype(options.param_dtype)
        keys = jax.random.split(key, 2)
        self.token = Embedding(keys[0], c.padded_vocab, c.width, c.initializer_range, dtype, "vocab")
        self.token_norm = LayerNorm(c.width, c.norm_eps, dtype, c.norm_bias)
        self.layers = jax.vmap(lambda k: Layer(k, config, dtype))(jax.random.split(keys[1], c.layers))
        self.norm = LayerNorm(c.width, c.norm_eps, dtype, c.norm_bias)
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
        x = self.token_norm(self.token(rows.tokens, jnp.dtype(options.dtype)))
        x = dropout(x, options.dropout, noise, jnp.uint32(0))
        tables = {
            local: rope_tables(rope, rows.positions, rows.segment_ids)
            for local, rope in ((False, config.rope), (True, config.local_rope))
        }

        def kind(mode: str, local: bool) -> LayerKind:
            reach = config.reach if local else 0
            kernel, rate = options.attention_kernel, options.attention_dropout
            return LayerKind(AttentionSpec(mode, reach, kernel=kernel, dropout=rate), local)

        def apply(x: jax.Array, layer: Layer, index: jax.Array, kind: LayerKind) -> jax.Array:
            return layer(x, rows, kind.spec, tables[kind.local], options.dropout, noise, index)

        kinds = [kind(*each) for each in zip(per_layer(config.attention, config.layers), config.local)]
        states = apply_layers(self.layers, x, kinds, apply, options, chosen)
        return finished(states, chosen, config.layers, self.finish)

    def finish(self, hidden_RxLxD: jax.Array) -> jax.Array:
        """Returns a layer's states as they are where that layer is the last: normalised."""
        return self.norm(hidden_RxLxD)
