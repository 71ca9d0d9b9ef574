"""State-space backbones: mamba, mamba2, falcon_mamba, each reading forwards alone or both ways.

A block is a norm and a mixer, whose output is added to its input (Gu & Dao 2023, arXiv:2312.00752). Both ways means a
second mixer that reads every text from its end (Vision Mamba, Zhu et al. 2024, arXiv:2401.09417); the two outputs are
averaged, so that the stream has the size that a causal checkpoint's layers know.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed.data.batch import Rows
from jaxembed.models.layers.dropout import Noise, dropout, layer_place
from jaxembed.models.layers.linear import Embedding, RMSNorm
from jaxembed.models.layers.recurrence import Borders
from jaxembed.models.layers.ssm import Mamba1Shape, Mamba2Shape, make_mixer
from jaxembed.models.layers.stack import apply_layers, finished
from jaxembed.models.options import ModelOptions, TokenStates

BACKWARD = ("none", "shared", "separate")
SECOND_MIXER = 6  # how much further the places of the backward mixer lie


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """The shape of a state-space backbone.

    Attributes:
      vocab_size: tokens known; the table is padded to a multiple of 128 rows, whatever the mesh.
      width: D. layers: n.
      mixer: Mamba's or Mamba-2's.
      max_length: what is usual for texts, in tokens; nothing bounds them.
      norm_eps: epsilon of the norms.
      initializer_range: standard deviation of fresh token vectors.
      residual_float32: whether the stream between layers is float32 whatever the model's dtype.
      backward: 'none', or the weights of the mixer that reads backwards: 'shared' with the other, or 'separate'.
    """

    vocab_size: int
    width: int
    layers: int
    mixer: Mamba1Shape | Mamba2Shape
    max_length: int = 2048
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    residual_float32: bool = True
    backward: str = "none"

    @property
    def padded_vocab(self) -> int:
        """Rows of the token table."""
        return -(-self.vocab_size // 128) * 128

    @property
    def attention(self) -> tuple[str, ...]:
        """What a token sees, in attention's words."""
        return ("causal" if self.backward == "none" else "bidirectional",)


class Layer(nnx.Module):
    """One block: the mixers read the normalised input, and are added to it."""

    def __init__(self, key: jax.Array, config: MambaConfig, dtype: jnp.dtype) -> None:
        c = config
        self.norm = RMSNorm(c.width, c.norm_eps, dtype)
        self.mixer = make_mixer(key, c.width, c.mixer, dtype)
        if c.backward == "separate":
            self.backward = make_mixer(jax.random.fold_in(key, 1), c.width, c.mixer, dtype)
        self.config = config

    def __call__(
        self, x: jax.Array, borders: Borders, options: ModelOptions, noise: Noise | None, index: jax.Array
    ) -> jax.Array:
        place, how = layer_place(index), self.config.backward
        normed = self.norm(x).astype(options.dtype)
        out = self.mixer(normed, borders, options.ssm, noise, place)
        if how != "none":
            second = self.backward if how == "separate" else self.mixer
            out = (out + second(normed, borders, options.ssm, noise, place + SECOND_MIXER, reverse=True)) / 2
        return x + dropout(out, options.dropout, noise, place + 1).astype(x.dtype)


class Mamba(nnx.Module):
    """A state-space backbone: packed rows in, token states out.

    Args:
      key: PRNG key of fresh weights.
      config: the shape.
      options: how to compute.

    Raises:
      UserError: the mesh's `tensor` does not divide the mixers' channels or heads.
    """

    def __init__(self, key: jax.Array, config: MambaConfig, options: ModelOptions) -> None:
        dtype = jnp.dtype(options.param_dtype)
        keys = jax.random.split(key, 2)
        self.token = Embedding(keys[0], config.padded_vocab, config.width, config.initializer_range, dtype, "vocab")
        self.layers = jax.vmap(lambda k: Layer(k, config, dtype))(jax.random.split(keys[1], config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps, dtype)
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
          The last layer's states after the closing norm [R, L, D] in the compute dtype, and the chosen ones
          [len(chosen), R, L, D], not normalised but for the last layer's.
        """
        options, config = self.options, self.config
        dtype = jnp.dtype(options.dtype)
        x = dropout(self.token(rows.tokens, dtype), options.dropout, noise, jnp.uint32(0))
        if config.residual_float32:
            x = x.astype(jnp.promote_types(dtype, jnp.float32))
        borders = Borders.of(rows.segment_ids)

        def apply(x: jax.Array, layer: Layer, index: jax.Array, kind: Any) -> jax.Array:
            return layer(x, borders, options, noise, index)

        states = apply_layers(self.layers, x, (None,) * config.layers, apply, options, chosen)
        return finished(states, chosen, config.layers, self.finish)

    def finish(self, hidden_RxLxD: jax.Array) -> jax.Array:
        """Returns a layer's states as they are where that layer is the last: normalised, in the compute dtype."""
        return self.norm(hidden_RxLxD).astype(self.options.dtype)
