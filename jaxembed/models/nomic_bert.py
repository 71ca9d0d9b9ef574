"""Nomic's BERT: post-norm, its layers dense or sparse.

The first version has rotary positions, gated MLPs and no biases but the norms' (Nussbaum et al. 2024,
arXiv:2402.01613). The second has plain MLPs with biases, and experts in their place in every second layer (Nussbaum &
Duderstadt 2025, arXiv:2502.07972). With a table of positions in place of the rotary ones a BERT with experts is a
member too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed.data.batch import Rows
from jaxembed.models.layers.attention import AttentionSpec
from jaxembed.models.layers.dropout import Noise, dropout, layer_place
from jaxembed.models.layers.experts import Experts
from jaxembed.models.layers.linear import Embedding, LayerNorm
from jaxembed.models.layers.mlp import Mlp
from jaxembed.models.layers.parts import DENSE, SPARSE, feed, make_parts, parts_of_layers
from jaxembed.models.layers.rope import RopeConfig, Tables, rope_tables
from jaxembed.models.layers.routing import ExpertsShape, Routed
from jaxembed.models.layers.self_attention import SelfAttention
from jaxembed.models.layers.stack import apply_layers, finished
from jaxembed.models.options import ModelOptions, TokenStates, per_layer


@dataclasses.dataclass(frozen=True)
class NomicBertConfig:
    """The shape of a Nomic encoder.

    Attributes:
      vocab_size: tokens known; the table is padded to a multiple of 128 rows, whatever the mesh.
      width: D. layers: n. heads: H. mlp_width: F.
      rope: rotary positions, whose width is K, the width of a head; None for a table of positions.
      max_length: longest text in tokens; the rows of that table.
      type_vocab: rows of the token-type table (only type 0 is used).
      norm_eps: epsilon of the layer norms.
      activation: of the MLPs, a key of `jaxembed.models.layers.mlp.ACTIVATIONS`.
      gated: whether MLPs have gates.
      attention_bias: whether attention's projections have biases.
      mlp_biases: whether MLPs have biases into the hidden layer, and out of it.
      initializer_range: standard deviation of fresh weights.
      attention: its mode, one for all layers or one for each.
      experts: those of sparse layers; None where there are no such layers.
      sparse: whether layers are sparse, one value for all or one for each.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    rope: RopeConfig | None
    max_length: int = 2048
    type_vocab: int = 2
    norm_eps: float = 1e-12
    activation: str = "silu"
    gated: bool = True
    attention_bias: bool = False
    mlp_biases: tuple[bool, bool] = (False, False)
    initializer_range: float = 0.02
    attention: tuple[str, ...] = ("bidirectional",)
    experts: ExpertsShape | None = None
    sparse: tuple[bool, ...] = (True,)

    @property
    def padded_vocab(self) -> int:
        """Rows of the token table."""
        return -(-self.vocab_size // 128) * 128


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is static about a layer.

    Attributes:
      spec: what its attention sees.
      part: where its feed-forward part lies: LAYERS, or in a model with sparse layers DENSE or SPARSE.
    """

    spec: AttentionSpec
    part: str


class Embeddings(nnx.Module):
    """Token + type vectors, + position vectors where positions are not rotary, normalised."""

    def __init__(self, key: jax.Array, config: NomicBertConfig, dtype: jnp.dtype) -> None:
        c = config
        keys = jax.random.split(key, 3)
        self.token = Embedding(keys[0], c.padded_vocab, c.width, c.initializer_range, dtype, "vocab")
        self.type = Embedding(keys[1], c.type_vocab, c.width, c.initializer_range, dtype)
        if c.rope is None:
            self.position = Embedding(keys[2], c.max_length, c.width, c.initializer_range, dtype)
        self.norm = LayerNorm(c.width, c.norm_eps, dtype)
        self.rotary = c.rope is not None

    def __call__(self, rows: Rows, dtype: jnp.dtype) -> jax.Array:
        x = self.token(rows.tokens, dtype) + self.type(jnp.zeros_like(rows.tokens), dtype)
        return self.norm(x if self.rotary else x + self.position(rows.positions, dtype))


class Layer(nnx.Module):
    """One encoder block: each sub-layer is added to its input, then normalised.

    In models with sparse layers the feed-forward part lies elsewhere.
    """

    def __init__(self, key: jax.Array, config: NomicBertConfig, dtype: jnp.dtype) -> None:
        c, stddevs = config, (config.initializer_range,) * 4
        keys = jax.random.split(key, 2)
        head_width = c.rope.width if c.rope else c.width // c.heads
        self.attention = SelfAttention(keys[0], c.width, c.heads, head_width, stddevs, dtype, c.attention_bias)
        self.attention_norm = LayerNorm(c.width, c.norm_eps, dtype)
        if c.experts is None:
            self.mlp = _mlp(keys[1], c, dtype)
        self.mlp_norm = LayerNorm(c.width, c.norm_eps, dtype)

    def __call__(
        self,
        x: jax.Array,
        rows: Rows,
        tables: Tables | None,
        spec: AttentionSpec,
        options: ModelOptions,
        noise: Noise | None,
        index: jax.Array,
        part: Mlp | Experts | None = None,
    ) -> tuple[jax.Array, Routed | None]:
        """Returns its output, and what its router did; `part` is its feed-forward part, where that lies elsewhere."""
        place, rate = layer_place(index), options.dropout
        attended = self.attention(x, rows, spec, noise, place, tables=tables)
        x = self.attention_norm(x + dropout(attended, rate, noise, place + 1))
        out, routed = feed(part or self.mlp, x, rows, options, noise, place)
        return self.mlp_norm(x + dropout(out, rate, noise, place + 2)), routed


class NomicBert(nnx.Module):
    """A Nomic backbone: packed rows in, token states out.

    Args:
      key: PRNG key of fresh weights.
      config: the shape.
      options: how to compute.

    Raises:
      UserError: the mesh's `tensor` does not divide the heads or the MLP, or `expert` the experts.
    """

    def __init__(self, key: jax.Array, config: NomicBertConfig, options: ModelOptions) -> None:
        dtype = jnp.dtype(options.param_dtype)
        keys = jax.random.split(key, 2)
        self.embeddings = Embeddings(keys[0], config, dtype)
        self.layers = jax.vmap(lambda k: Layer(k, config, dtype))(jax.random.split(keys[1], config.layers))
        if config.experts is not None:
            stddevs = (config.initializer_range,) * 2
            makers = {
                SPARSE: lambda k: Experts(k, config.width, config.experts, stddevs, dtype),
                DENSE: lambda k: _mlp(k, config, dtype),
            }
            names = parts_of_layers(config.experts, config.sparse, config.layers)
            for name, stack in make_parts(jax.random.fold_in(keys[1], 1), names, makers).items():
                setattr(self, name, stack)
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
        tables = rope_tables(config.rope, rows.positions, rows.segment_ids) if config.rope else None

        def apply(x: jax.Array, layer: Layer, index: jax.Array, *part: Mlp | Experts, kind: Kind) -> Any:
            out = layer(x, rows, tables, kind.spec, options, noise, index, *part)
            return out if part else out[0]

        kinds = _kinds(config, options)
        parts = None
        if config.experts is not None:
            parts = {name: getattr(self, name) for name in {kind.part for kind in kinds}}
        states = apply_layers(self.layers, x, kinds, apply, options, chosen, parts)
        return finished(states, chosen, config.layers, self.finish)

    def finish(self, hidden_RxLxD: jax.Array) -> jax.Array:
        """Returns a layer's states as they are where that layer is the last: this family has no closing norm."""
        return hidden_RxLxD


def _kinds(config: NomicBertConfig, options: ModelOptions) -> list[Kind]:
    """Returns the kind of each layer."""
    modes, parts = (
        per_layer(config.attention, config.layers),
        parts_of_layers(config.experts, config.sparse, config.layers),
    )
    kernel, rate = options.attention_kernel, options.attention_dropout
    return [Kind(AttentionSpec(mode, kernel=kernel, dropout=rate), part) for mode, part in zip(modes, parts)]


def _mlp(key: jax.Array, c: NomicBertConfig, dtype: jnp.dtype) -> Mlp:
    return Mlp(key, c.width, c.mlp_width, c.activation, (c.initializer_range,) * 2, dtype, c.gated, c.mlp_biases)
