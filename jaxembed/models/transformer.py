"""Decoder-shaped transformers: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, phi3, and the sparse mixtral,
qwen2_moe, qwen3_moe, olmoe.

One block, normalised before each sub-layer, with rotary positions, grouped queries and a gated MLP (Llama, Touvron et
al. 2023, arXiv:2302.13971). What differs between the families is in the config: biases (Qwen 2, arXiv:2407.10671),
norms of queries and keys (Qwen 3, arXiv:2505.09388), windows (Mistral, arXiv:2310.06825), norms behind the sub-layers
and soft-capped scores (Gemma 2, arXiv:2408.00118), other rotary positions in local layers (Gemma 3, arXiv:2503.19786),
experts in place of MLPs (Mixtral, arXiv:2401.04088), all heads' queries normed together (OLMoE, arXiv:2409.02060).
What attention may see is the config's too: such a model becomes an encoder by its mode (LLM2Vec, arXiv:2404.05961), or
in its last layers only (BeLLM, Li & Li 2024, arXiv:2311.05296).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed import sharding
from jaxembed.data.batch import Rows
from jaxembed.models.layers.attention import HEADS, AttentionSpec, attention
from jaxembed.models.layers.dropout import Noise, dropout, layer_place
from jaxembed.models.layers.experts import Experts
from jaxembed.models.layers.linear import Dims, Embedding, Linear, RMSNorm
from jaxembed.models.layers.mlp import Mlp
from jaxembed.models.layers.parts import DENSE, SPARSE, feed, make_parts, parts_of_layers
from jaxembed.models.layers.rope import RopeConfig, Tables, rope_tables, rotate
from jaxembed.models.layers.routing import ExpertsShape, Routed
from jaxembed.models.layers.stack import apply_layers, finished
from jaxembed.models.options import ModelOptions, TokenStates, per_layer


@dataclasses.dataclass(frozen=True)
class Window:
    """What local layers see, in tokens on either side.

    Attributes:
      causal: in a causal layer, or one that sees a prefix.
      bidirectional: in a bidirectional one.
    """

    causal: int
    bidirectional: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape of a decoder-shaped transformer.

    Attributes:
      vocab_size: tokens known; the table is padded to a multiple of 128 rows, whatever the mesh.
      width: D. layers: n. heads: H. kv_heads: G, which divides H. head_width: K. mlp_width: F.
      max_length: longest text in tokens.
      rope: rotary positions.
      local_rope: those of local layers.
      local: whether layers are local, one value for all or one for each.
      window: what local layers see.
      attention: its mode, one for all layers or one for each.
      norm_eps: epsilon of the norms.
      norm_offset: what is added to the norms' scales: 1 for the Gemma family.
      activation: of the gate, a key of `jaxembed.models.layers.mlp.ACTIVATIONS`.
      qkv_bias: whether queries, keys and values have biases. out_bias: the output of attention. mlp_bias: the MLP.
      qk_norm: whether each head's queries and keys are normalised. qk_norm_joint: those of all heads together.
      clip_qkv: bound of queries, keys and values; 0 = none.
      sandwich: whether the sub-layers' outputs are normalised too.
      embedding_scale: token vectors are multiplied by it.
      score_scale: of attention's scores; 0 = 1 / sqrt(K).
      softcap: bound of attention's scores; 0 = none.
      initializer_range: standard deviation of fresh weights.
      experts: those of sparse layers; None where there are no such layers.
      sparse: whether layers are sparse, one value for all or one for each.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    max_length: int
    rope: RopeConfig
    local_rope: RopeConfig
    local: tuple[bool, ...] = (False,)
    window: Window = Window(0, 0)
    attention: tuple[str, ...] = ("causal",)
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_joint: bool = False
    clip_qkv: float = 0.0
    sandwich: bool = False
    embedding_scale: float = 1.0
    score_scale: float = 0.0
    softcap: float = 0.0
    initializer_range: float = 0.02
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
      rope: which rotary positions it has.
      part: where its feed-forward part lies: LAYERS, or in a model with sparse layers DENSE or SPARSE.
    """

    spec: AttentionSpec
    rope: RopeConfig
    part: str


class Attention(nnx.Module):
    """Self-attention with rotary positions and grouped queries."""

    def __init__(self, key: jax.Array, config: TransformerConfig, dtype: jnp.dtype) -> None:
        c = config
        sharding.require_divisible(c.heads, "attention heads")
        width = (("embed", c.width),)
        heads = (("heads", c.heads), (None, c.head_width))
        kv_heads = ((sharding.heads_axis(c.kv_heads), c.kv_heads), (None, c.head_width))
        keys = jax.random.split(key, 4)
        self.query = Linear(keys[0], width, heads, c.initializer_range, dtype, c.qkv_bias)
        self.key = Linear(keys[1], width, kv_heads, c.initializer_range, dtype, c.qkv_bias)
        self.value = Linear(keys[2], width, kv_heads, c.initializer_range, dtype, c.qkv_bias)
        self.out = Linear(keys[3], heads, width, c.initializer_range, dtype, c.out_bias)
        self.qk_norm, self.clip_qkv = c.qk_norm, c.clip_qkv
        if c.qk_norm:
            joint = (heads[:1], kv_heads[:1]) if c.qk_norm_joint else ((), ())
            self.query_norm, self.key_norm = (_norm(c, c.head_width, dtype, dims) for dims in joint)
        self.kv_spec = sharding.spec("batch", "sequence", kv_heads[0][0], None)

    def __call__(
        self, x: jax.Array, rows: Rows, tables: Tables, spec: AttentionSpec, noise: Noise | None, place: jax.Array
    ) -> jax.Array:
        q = self.query(x, HEADS, noise, place + 3)
        k = self.key(x, self.kv_spec, noise, place + 4)
        v = self.value(x, self.kv_spec, noise, place + 5)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.clip_qkv:
            q, k, v = (jnp.clip(y, -self.clip_qkv, self.clip_qkv) for y in (q, k, v))
        q, k = rotate(q, tables), rotate(k, tables)
        out = attention(q, k, v, rows.segment_ids, spec, noise, place, prefix_RxL=rows.prompt_mask)
        return self.out(out, sharding.STATES, noise, place + 6)


class Layer(nnx.Module):
    """One block: each sub-layer reads its normalised input, and is added to it.

    In models with sparse layers the feed-forward part lies elsewhere.
    """

    def __init__(self, key: jax.Array, config: TransformerConfig, dtype: jnp.dtype) -> None:
        c = config
        keys = jax.random.split(key, 2)
        self.attention_norm = _norm(c, c.width, dtype)
        self.attention = Attention(keys[0], c, dtype)
        self.mlp_norm = _norm(c, c.width, dtype)
        if c.experts is None:
            self.mlp = _mlp(keys[1], c, dtype)
        self.sandwich = c.sandwich
        if c.sandwich:
            self.attention_out_norm, self.mlp_out_norm = (_norm(c, c.width, dtype) for _ in range(2))

    def __call__(
        self,
        x: jax.Array,
        rows: Rows,
        tables: Tables,
        spec: AttentionSpec,
        options: ModelOptions,
        noise: Noise | None,
        index: jax.Array,
        part: Mlp | Experts | None = None,
    ) -> tuple[jax.Array, Routed | None]:
        """Returns its output, and what its router did; `part` is its feed-forward part, where that lies elsewhere."""
        place, rate = layer_place(index), options.dropout
        out = self.attention(self.attention_norm(x), rows, tables, spec, noise, place)
        x += dropout(self.attention_out_norm(out) if self.sandwich else out, rate, noise, place + 1)
        out, routed = feed(part or self.mlp, self.mlp_norm(x), rows, options, noise, place)
        return x + dropout(self.mlp_out_norm(out) if self.sandwich else out, rate, noise, place + 2), routed


class Transformer(nnx.Module):
    """A decoder-shaped backbone: packed rows in, token states out.

    Args:
      key: PRNG key of fresh weights.
      config: the shape.
      options: how to compute.

    Raises:
      UserError: the mesh's `tensor` does not divide the heads or the MLP, or `expert` the experts.
    """

    def __init__(self, key: jax.Array, config: TransformerConfig, options: ModelOptions) -> None:
        dtype = jnp.dtype(options.param_dtype)
        keys = jax.random.split(key, 2)
        self.token = Embedding(keys[0], config.padded_vocab, config.width, config.initializer_range, dtype, "vocab")
        self.layers = jax.vmap(lambda k: Layer(k, config, dtype))(jax.random.split(keys[1], config.layers))
        self.norm = _norm(config, config.width, dtype)
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
          rows: arrays [R, L]; see `jaxembed.data.batch.Rows`. `prompt_mask` is the prefix of layers of that mode.
          noise: dropout masks; None switches dropout off.
          chosen: layers whose states are wanted too; 0 is the embeddings' output, i the output of the i-th layer. See
            `finish`.

        Returns:
          The last layer's states after the closing norm [R, L, D] in the compute dtype, and the chosen ones
          [len(chosen), R, L, D], not normalised but for the last layer's.
        """
        options, config = self.options, self.config
        dtype = jnp.dtype(options.dtype)
        # transformers rounds the scale to the compute dtype too: in bfloat16 √3072 = 55.4 is 55.5.
        x = self.token(rows.tokens, dtype) * jnp.asarray(config.embedding_scale, dtype)
        x = dropout(x, options.dropout, noise, jnp.uint32(0))
        kinds = _kinds(config, options, rows.tokens.shape[1])
        tables = {kind.rope: rope_tables(kind.rope, rows.positions, rows.segment_ids) for kind in kinds}

        def apply(x: jax.Array, layer: Layer, index: jax.Array, *part: Mlp | Experts, kind: Kind) -> Any:
            out = layer(x, rows, tables[kind.rope], kind.spec, options, noise, index, *part)
            return out if part else out[0]

        parts = None
        if config.experts is not None:
            parts = {name: getattr(self, name) for name in {kind.part for kind in kinds}}
        states = apply_layers(self.layers, x, kinds, apply, options, chosen, parts)
        return finished(states, chosen, config.layers, self.finish)

    def finish(self, hidden_RxLxD: jax.Array) -> jax.Array:
        """Returns a layer's states as they are where that layer is the last: normalised."""
        return self.norm(hidden_RxLxD)


def _kinds(config: TransformerConfig, options: ModelOptions, length: int) -> Sequence[Kind]:
    """Returns the kind of each layer, in rows of this length: a window that no text exceeds makes no difference."""
    kinds = []
    modes, locals_ = (per_layer(values, config.layers) for values in (config.attention, config.local))
    parts = parts_of_layers(config.experts, config.sparse, config.layers)
    for mode, local, part in zip(modes, locals_, parts):
        reach = config.window.bidirectional if mode == "bidirectional" else config.window.causal
        spec = AttentionSpec(
            mode=mode,
            reach=reach if local else 0,
            softcap=config.softcap,
            scale=config.score_scale,
            kernel=options.attention_kernel,
            dropout=options.attention_dropout,
        )
        kinds.append(Kind(spec.in_rows_of(length), config.local_rope if local else config.rope, part))
    return kinds


def _mlp(key: jax.Array, c: TransformerConfig, dtype: jnp.dtype) -> Mlp:
    stddevs, biases = (c.initializer_range,) * 2, (c.mlp_bias,) * 2
    return Mlp(key, c.width, c.mlp_width, c.activation, stddevs, dtype, gated=True, biases=biases)


def _norm(config: TransformerConfig, width: int, dtype: jnp.dtype, joint: Dims = ()) -> RMSNorm:
    return RMSNorm(width, config.norm_eps, dtype, config.norm_offset, joint)
