"""Rotary positions: queries and keys are turned by angles that grow with their place in the text.

RoFormer, Su et al. 2021, arXiv:2104.09864, in the half-split layout of transformers: channel i is turned together with
channel i + n, the i-th of n frequencies. A checkpoint that was made for longer texts than it was trained on first says
so by a `Scaling`; the formulas are those of transformers' modeling_rope_utils.py. Everything here is float32.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxembed.sharding import BATCH, ROWS

Tables = tuple[jax.Array, jax.Array]  # cosines and sines [R, L, 1, n], float32


class Scaling(Protocol):
    """How the frequencies of longer texts differ. All implementations are frozen dataclasses."""

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by, which sharpens attention."""

    def frequencies(self, config: "RopeConfig", lengths_RxL: jax.Array) -> np.ndarray | jax.Array:
        """Returns radians per token, float32 [n], or [R, L, n] where they depend on the texts' lengths."""


@dataclasses.dataclass(frozen=True)
class Unscaled:
    """The frequencies as in the paper."""

    magnitude = 1.0

    def frequencies(self, config: "RopeConfig", lengths_RxL: jax.Array) -> np.ndarray:
        return config.base_frequencies.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): positions are divided by `factor`."""

    factor: float
    magnitude = 1.0

    def frequencies(self, config: "RopeConfig", lengths_RxL: jax.Array) -> np.ndarray:
        return (config.base_frequencies / self.factor).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Base stretched with the text's length, once that exceeds `length` ("dynamic NTK", described in arXiv:2309.00071).

    transformers takes the length of the longest text in a batch; here each text is turned as it would be alone.
    """

    factor: float
    length: int
    magnitude = 1.0

    def frequencies(self, config: "RopeConfig", lengths_RxL: jax.Array) -> jax.Array:
        longer = jnp.maximum(lengths_RxL, self.length).astype(jnp.float32) / self.length
        stretched = (self.factor * longer - (self.factor - 1)) ** (config.width / (config.width - 2))
        exponents = jnp.arange(0, config.width, 2, dtype=jnp.float32) / config.width
        return config.base_frequencies.astype(np.float32) * stretched[..., None] ** -exponents


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): slow frequencies are interpolated, fast ones kept, a ramp between.

    Attributes:
      factor: how much slower the slow ones are.
      length: longest text of the training, `original_max_position_embeddings`.
      magnitude: as in `Scaling`.
      fast: frequencies that turn more often than this in `length` tokens are kept.
      slow: frequencies that turn less often than this are interpolated.
      truncate: the ramp's ends are rounded to whole channels.
    """

    factor: float
    length: int
    magnitude: float
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True

    def frequencies(self, config: "RopeConfig", lengths_RxL: jax.Array) -> np.ndarray:
        first, last = (self._channel(turns, config) for turns in (self.fast, self.slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, config.width - 1)
        last += 0.001 if first == last else 0.0
        ramp = np.clip((np.arange(config.width // 2) - first) / (last - first), 0, 1)
        base = config.base_frequencies
        return (base / self.factor * ramp + base * (1 - ramp)).astype(np.float32)

    def _channel(self, turns: float, config: "RopeConfig") -> float:
        """The channel, as a real number, whose frequency turns so often in `length` tokens."""
        return config.width * math.log(self.length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's rule (Grattafiori et al. 2024, arXiv:2407.21783; code in meta-llama/llama-models).

    Attributes:
      factor: how much slower the slow frequencies are.
      low: frequencies that turn less often than this in `length` tokens are slowed down.
      high: those that turn more often than this are kept; between the two there is a ramp.
      length: longest text of the training, `original_max_position_embeddings`.
    """

    factor: float
    low: float
    high: float
    length: int
    magnitude = 1.0

    def frequencies(self, config: "RopeConfig", lengths_RxL: jax.Array) -> np.ndarray:
        base = config.base_frequencies
        turns = self.length * base / (2 * np.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return (base / self.factor * (1 - kept) + base * kept).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a factor per frequency, of short and of long texts.

    transformers takes the long factors for a whole batch whose longest text is long; here each text gets those that it
    would get alone.

    Attributes:
      short: n factors of texts of at most `length` tokens.
      long: those of longer ones.
      length: longest text of the training, `original_max_position_embeddings`.
      magnitude: as in `Scaling`.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    length: int
    magnitude: float

    def frequencies(self, config: "RopeConfig", lengths_RxL: jax.Array) -> jax.Array:
        short, long = ((config.base_frequencies / factors).astype(np.float32) for factors in (self.short, self.long))
        return jnp.where((lengths_RxL > self.length)[..., None], long, short)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions of one kind of layer.

    Attributes:
      width: 2 n, the channels of a head that are turned, from the first; the others stay as they are.
      theta: the base; frequency i is theta^(-2 i / width) radians per token.
      scaling: what is different for longer texts.
    """

    width: int
    theta: float = 10_000.0
    scaling: Scaling = Unscaled()

    @property
    def base_frequencies(self) -> np.ndarray:
        """Radians per token without scaling, float64 [n]."""
        return self.theta ** -(np.arange(0, self.width, 2) / self.width)


def rope_tables(config: RopeConfig, positions_RxL: jax.Array, segment_ids_RxL: jax.Array) -> Tables:
    """Returns cosines and sines of every token, float32 [R, L, 1, n]; to be computed once for all layers.

    Args:
      config: the frequencies.
      positions_RxL: int32, 0, 1, … inside each text.
      segment_ids_RxL: int32, the text of each token; texts are contiguous.
    """
    frequencies = config.scaling.frequencies(config, text_lengths(positions_RxL, segment_ids_RxL))
    angles = (positions_RxL.astype(jnp.float32)[..., None] * frequencies)[:, :, None]
    return jnp.cos(angles) * config.scaling.magnitude, jnp.sin(angles) * config.scaling.magnitude


def rotate(x_RxLxHxK: jax.Array, tables: Tables) -> jax.Array:
    """Turns the first 2 n channels of queries or keys [R, L, H, K]; computed in float32, returned in x's dtype."""
    cos, sin = tables
    n = cos.shape[-1]
    x = x_RxLxHxK.astype(jnp.float32)
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x_RxLxHxK.dtype)


def text_lengths(positions_RxL: jax.Array, segment_ids_RxL: jax.Array) -> jax.Array:
    """Returns the number of tokens of the text that each token belongs to: int32 [R, L]."""
    positions, segments = (jax.sharding.reshard(x, P(BATCH, None)) for x in (positions_RxL, segment_ids_RxL))
    place = jnp.arange(segments.shape[1])
    ends = jnp.concatenate([segments[:, 1:] != segments[:, :-1], jnp.ones_like(segments[:, :1], bool)], axis=1)
    last = jax.lax.cummin(jnp.where(ends, place, segments.shape[1]), axis=1, reverse=True)
    return jax.sharding.reshard(last - place + positions + 1, ROWS)
