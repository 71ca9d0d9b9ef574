"""Hybrids of state-space and attention layers: bamba.

Most layers have a Mamba-2 mixer in the place of attention; every layer has a gated MLP behind it (Bamba, IBM, Princeton
and UIUC 2024, as in transformers). Attention's layers may see both ways; the mixers read forwards.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxembed.data.batch import Rows
from jaxembed.models.layers.attention import AttentionSpec
from jaxembed.models.layers.dropout import Noise, dropout, layer_place
from jaxembed.models.layers.linear import Embedding, RMSNorm
from jaxembed.models.layers.mlp import Mlp
from jaxembed.models.layers.recurrence import Borders
from jaxembed.models.layers.rope import Tables, rope_tables
from jaxembed.models.layers.ssm import Mamba2Mixer, Mamba2Shape
from jaxembed.models.layers.stack import apply_layers, finished
from jaxembed.models.options import ModelOptions, TokenStates, per_layer
from jaxembed.models.transformer import Attention, TransformerConfig

ATTENTION, MIXERS = "attention", "mixers"  # the stacks of what layers do not share, by their names in the model
BEHIND_MLP = 7  # how much further the places of a mixer lie, so that they are not those of the MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(TransformerConfig):
    """The shape of a hybrid: that of a decoder-shaped transformer (dense, without windows), and its mixers'.

    Attributes:
      mixer: the mixers' shape.
      mixers: whether each layer has one in the place of attention.
    """

    mixer: Mamba2Shape
    mixers: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is static about a layer.

    Attributes:
      part: the stack that has its mixer, or its attention.
      spec: what its attention sees; None for a mixer.
    """

    part: str
    spec: AttentionSpec | None


class Layer(nnx.Module):
    """What all layers have: the norms and the MLP."""

    def __init__(self, key: jax.Array, config: HybridConfig, dtype: jnp.dtype) -> None:
        c = config
        self.mixing_norm, self.mlp_norm = (RMSNorm(c.width, c.norm_eps, dtype) for _ in range(2))
        stddevs, biases = (c.initializer_range,) * 2, (c.mlp_bias,) * 2
        self.mlp = Mlp(key, c.width, c.mlp_width, c.activation, stddevs, dtype, gated=True, biases=biases)

    def __call__(
        self,
        x: jax.Array,
        rows: Rows,
        borders: Borders,
        tables: Tables,
        spec: AttentionSpec | None,
        options: ModelOptions,
        noise: Noise | None,
        index: jax.Array,
        part: Attention | Mamba2Mixer,
    ) -> jax.Array:
        place, rate = layer_place(index), options.dropout
        normed = self.mixing_norm(x)
        if spec is None:
            out = part(normed, borders, options.ssm, noise, place + BEHIND_MLP)
        else:
            out = part(normed, rows, tables, spec, noise, place)
        x += dropout(out, rate, noise, place + 1)
        return x + dropout(self.mlp(self.mlp_norm(x), noise, place), rate, noise, place + 2)


class Hybrid(nnx.Module):
    """A hybrid backbone: packed rows in, token states out.

    Args:
      key: PRNG key of fresh weights.
      config: the shape.
      options: how to compute.

    Raises:
      UserError: the mesh's `tensor` does not divide the heads, of attention or of mixers, or the MLP.
    """

    def __init__(self, key: jax.Array, config: HybridConfig, options: ModelOptions) -> None:
        dtype = jnp.dtype(options.param_dtype)
        keys = jax.random.split(key, 3)
        self.token = Embedding(keys[0], config.padded_vocab, config.width, config.initializer_range, dtype, "vocab")
        self.layers = jax.vmap(lambda k: Layer(k, config, dtype))(jax.random.split(keys[1], config.layers))
        of_layer, is_mixer = jax.random.split(keys[2], config.layers), np.array(config.mixers)
        if not is_mixer.all():
            self.attention = jax.vmap(lambda k: Attention(k, config, dtype))(of_layer[~is_mixer])
        if is_mixer.any():
            self.mixers = jax.vmap(lambda k: Mamba2Mixer(k, config.width, config.mixer, dtype))(of_layer[is_mixer])
        self.norm = RMSNorm(config.width, config.norm_eps, dtype)
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
        x = self.token(rows.tokens, jnp.dtype(options.dtype))
        x = dropout(x, options.dropout, noise, jnp.uint32(0))
        borders = Borders.of(rows.segment_ids)
        tables = rope_tables(config.rope, rows.positions, rows.segment_ids)

        def apply(x: jax.Array, layer: Layer, index: jax.Array, part: nnx.Module, kind: Kind) -> Any:
            return layer(x, rows, borders, tables, kind.spec, options, noise, index, part), None

        kinds = _kinds(config, options)
        parts = {name: getattr(self, name) for name in {kind.part for kind in kinds}}
        states = apply_layers(self.layers, x, kinds, apply, options, chosen, parts)
        return finished(states, chosen, config.layers, self.finish)

    def finish(self, hidden_RxLxD: jax.Array) -> jax.Array:
        """Returns a layer's states as they are where that layer is the last: normalised."""
        return self.norm(hidden_RxLxD)


def _kinds(config: HybridConfig, options: ModelOptions) -> Sequence[Kind]:
    """Returns the kind of each layer."""
    kernel, rate = options.attention_kernel, options.attention_dropout
    kinds = []
    for is_mixer, mode in zip(config.mixers, per_layer(config.attention, config.layers)):
        spec = AttentionSpec(mode, scale=config.score_scale, kernel=kernel, dropout=rate)
        kinds.append(Kind(MIXERS, None) if is_mixer else Kind(ATTENTION, spec))
    return kinds
