"""State-space mixers, in the place where a transformer has attention: Mamba's and Mamba-2's.

Mamba (Gu & Dao 2023, arXiv:2312.00752), with the norms of Falcon Mamba (Zuo et al. 2024, arXiv:2410.05355) if wanted;
Mamba-2 (Dao & Gu 2024, arXiv:2405.21060). What is meant is what transformers computes. Step sizes, decays and states
are float32 whatever the model's dtype.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxembed import sharding
from jaxembed.errors import UserError
from jaxembed.models.layers.dropout import Noise
from jaxembed.models.layers.linear import Dims, Linear
from jaxembed.models.layers.mlp import ACTIVATIONS, HIDDEN
from jaxembed.models.layers.recurrence import Borders
from jaxembed.models.layers.selective_scan import selective_scan
from jaxembed.models.layers.short_conv import ShortConv
from jaxembed.models.layers.ssd import HEADS, STEPS, state_space_dual

# Tokens in a chunk. An associative scan walks over [Q, N, I] many times, so that had better stay near; products pay for
# larger chunks on CPUs, and fill a matrix unit elsewhere.
STEPS_CHUNK, ASSOCIATIVE_CHUNK, CPU_PRODUCTS_CHUNK, PRODUCTS_CHUNK = 64, 8, 32, 128


@dataclasses.dataclass(frozen=True)
class SsmOptions:
    """How to compute: the fields of `jaxembed.config.SsmConfig` of the same names.

    Attributes:
      kernel: form of Mamba's scan: 'associative', 'steps' (token after token), or 'auto', which takes these on CPU and
        TPU.
      chunk: tokens in a chunk; 0 = the usual number.
    """

    kernel: str = "auto"
    chunk: int = 0

    @property
    def form(self) -> str:
        """The form of Mamba's scan."""
        usual = "associative" if sharding.platform() == "gpu" else "steps"
        return usual if self.kernel == "auto" else self.kernel

    @property
    def scan_chunk(self) -> int:
        """Tokens in a chunk of Mamba."""
        return self.chunk or (STEPS_CHUNK if self.form == "steps" else ASSOCIATIVE_CHUNK)

    @property
    def products_chunk(self) -> int:
        """Tokens in a chunk of Mamba-2."""
        return self.chunk or (CPU_PRODUCTS_CHUNK if sharding.platform() == "cpu" else PRODUCTS_CHUNK)


@dataclasses.dataclass(frozen=True)
class Mamba1Shape:
    """The shape of a mixer as in Mamba.

    Attributes:
      channels: I. state: N. kernel: K, tokens that the convolution sees.
      rank: of the map that makes step sizes.
      activation: behind the convolution and of the gate, a key of `jaxembed.models.layers.mlp.ACTIVATIONS`.
      bias: whether the maps into the mixer and out of it have biases. conv_bias: the convolution.
      inner_eps: epsilon of Falcon Mamba's norms, without weights, of step sizes, B and C; 0 = no such norms.
      step_range: the smallest and the largest of fresh step sizes.
      step_floor: none is smaller.
      step_scale: of the fresh map that makes them.
    """

    channels: int
    state: int
    rank: int
    kernel: int = 4
    activation: str = "silu"
    bias: bool = False
    conv_bias: bool = True
    inner_eps: float = 0.0
    step_range: tuple[float, float] = (0.001, 0.1)
    step_floor: float = 1e-4
    step_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Mamba2Shape:
    """The shape of a mixer as in Mamba-2.

    Attributes:
      heads: H. head_width: P. state: N. groups: G; head h reads and writes with group h // (H / G).
      kernel, activation, bias, conv_bias, step_range, step_floor: as in `Mamba1Shape`.
      norm_eps: of the gated norm. norm_groups: its channels are normed in so many groups, each of whole heads.
      step_limit: step sizes are kept within.
    """

    heads: int
    head_width: int
    state: int
    groups: int = 1
    kernel: int = 4
    activation: str = "silu"
    bias: bool = False
    conv_bias: bool = True
    norm_eps: float = 1e-5
    norm_groups: int = 1
    step_limit: tuple[float, float] = (0.0, math.inf)
    step_range: tuple[float, float] = (0.001, 0.1)
    step_floor: float = 1e-4

    @property
    def channels(self) -> int:
        """I = H P."""
        return self.heads * self.head_width


class Mamba1Mixer(nnx.Module):
    """Mamba's mixer.

    Args:
      key: PRNG key of fresh weights.
      width: D.
      shape: the mixer's.
      dtype: of the parameters.

    Raises:
      UserError: the mesh's `tensor` does not divide the channels.
    """

    def __init__(self, key: jax.Array, width: int, shape: Mamba1Shape, dtype: jnp.dtype) -> None:
        s, keys = shape, jax.random.split(key, 7)
        sharding.require_divisible(s.channels, "channels of its mixers")
        outer, inner = (("embed", width),), (("mlp", s.channels),)
        self.into = _linear(keys[0], outer, inner, dtype, s.bias)
        self.gate = _linear(keys[1], outer, inner, dtype, s.bias)
        self.conv = ShortConv(keys[2], s.kernel, inner, dtype, s.conv_bias)
        self.select = _linear(keys[3], inner, ((None, s.rank + 2 * s.state),), dtype, False)
        stddev = s.step_scale * (3 * s.rank) ** -0.5  # as of numbers drawn evenly from ± step_scale / √rank
        self.step = Linear(keys[4], ((None, s.rank),), inner, stddev, dtype)
        self.step.bias = nnx.Param(_fresh_steps(keys[5], s, inner, dtype))
        a_IxN = jnp.broadcast_to(jnp.log(jnp.arange(1, s.state + 1, dtype=dtype)), (s.channels, s.state))
        self.a_log = nnx.Param(jax.sharding.reshard(a_IxN, sharding.spec("mlp", None)))
        self.skip = nnx.Param(jnp.ones(s.channels, dtype, out_sharding=sharding.spec("mlp")))
        self.out = _linear(keys[6], inner, outer, dtype, s.bias)
        self.shape = shape

    def __call__(
        self,
        x: jax.Array,
        borders: Borders,
        options: SsmOptions,
        noise: Noise | None,
        place: jax.Array,
        reverse: bool = False,
    ) -> jax.Array:
        """Returns [R, L, D] for x of that shape.

        Args:
          x: [R, L, D].
          borders: of the texts.
          options: how to compute.
          noise: dropout of adapters' inputs.
          place: 3 less than the first of the places of its linear layers.
          reverse: whether texts are read from their ends.
        """
        s, activation = self.shape, ACTIVATIONS[self.shape.activation]
        inner = self.conv(self.into(x, HIDDEN, noise, place + 3), borders, reverse)
        inner = jax.checkpoint(activation)(inner)
        selected = self.select(inner, sharding.STATES, noise, place + 5)
        low, write, read = jnp.split(selected.astype(_wide(x)), [s.rank, s.rank + s.state], axis=-1)
        if s.inner_eps:
            low, write, read = (_unit_rms(y, s.inner_eps) for y in (low, write, read))
        step = jax.checkpoint(jax.nn.softplus)(self.step(low, HIDDEN, noise, place + 6))
        y = selective_scan(
            inner,
            step,
            -jnp.exp(self.a_log[...].astype(step.dtype)),
            write,
            read,
            self.skip[...].astype(step.dtype),
            borders,
            chunk=options.scan_chunk,
            associative=options.form == "associative",
            reverse=reverse,
        )
        gate = self.gate(x, HIDDEN, noise, place + 4)
        y = jax.checkpoint(lambda y, gate: y * activation(gate))(y, gate)
        return self.out(y, sharding.STATES, noise, place + 7)


class Mamba2Mixer(nnx.Module):
    """Mamba-2's mixer. Arguments as of `Mamba1Mixer`.

    Raises:
      UserError: the mesh's `tensor` does not divide the heads, or heads of one group would lie with half of another.
    """

    def __init__(self, key: jax.Array, width: int, shape: Mamba2Shape, dtype: jnp.dtype) -> None:
        s, keys = shape, jax.random.split(key, 10)
        sharding.require_divisible(s.heads, "heads of its mixers")
        self.groups_axis = _groups_axis(s.groups)
        outer, steps = (("embed", width),), (("heads", s.heads),)
        heads, groups = (*steps, (None, s.head_width)), ((self.groups_axis, s.groups), (None, s.state))
        self.gate = _linear(keys[0], outer, heads, dtype, s.bias)
        self.into = _linear(keys[1], outer, heads, dtype, s.bias)
        self.write = _linear(keys[2], outer, groups, dtype, s.bias)
        self.read = _linear(keys[3], outer, groups, dtype, s.bias)
        self.step = _linear(keys[4], outer, steps, dtype, s.bias)
        self.conv_into = ShortConv(keys[5], s.kernel, heads, dtype, s.conv_bias)
        self.conv_write = ShortConv(keys[6], s.kernel, groups, dtype, s.conv_bias)
        self.conv_read = ShortConv(keys[7], s.kernel, groups, dtype, s.conv_bias)
        self.step_bias = nnx.Param(_fresh_steps(keys[8], s, steps, dtype))
        a_H = jnp.log(jnp.arange(1, s.heads + 1, dtype=dtype))
        self.a_log = nnx.Param(jax.sharding.reshard(a_H, sharding.spec("heads")))
        self.skip = nnx.Param(jnp.ones(s.heads, dtype, out_sharding=sharding.spec("heads")))
        self.norm = GatedNorm(s, dtype)
        self.out = _linear(keys[9], heads, outer, dtype, s.bias)
        self.shape = shape

    def __call__(
        self,
        x: jax.Array,
        borders: Borders,
        options: SsmOptions,
        noise: Noise | None,
        place: jax.Array,
        reverse: bool = False,
    ) -> jax.Array:
        """Returns [R, L, D] for x of that shape; arguments as of `Mamba1Mixer`."""
        s, wide = self.shape, _wide(x)
        groups = sharding.spec("batch", "sequence", self.groups_axis, None)
        convolved = [
            jax.checkpoint(ACTIVATIONS[s.activation])(conv(linear(x, layout, noise, place + number), borders, reverse))
            for conv, linear, layout, number in (
                (self.conv_into, self.into, HEADS, 4),
                (self.conv_write, self.write, groups, 5),
                (self.conv_read, self.read, groups, 6),
            )
        ]
        step = self.step(x, STEPS, noise, place + 7).astype(wide) + self.step_bias[...].astype(wide)
        step = jnp.clip(jax.nn.softplus(step), *s.step_limit)
        y = state_space_dual(
            convolved[0],
            step,
            -jnp.exp(self.a_log[...].astype(wide)),
            *convolved[1:],
            self.skip[...].astype(wide),
            borders,
            chunk=options.products_chunk,
            groups_axis=self.groups_axis,
            reverse=reverse,
        )
        y = jax.checkpoint(lambda y, gate: self.norm(y, gate))(y, self.gate(x, HEADS, noise, place + 3))
        return self.out(y, sharding.STATES, noise, place + 8)


class GatedNorm(nnx.Module):
    """Division of y · silu(gate) by its root mean square over groups of heads, in float32."""

    def __init__(self, shape: Mamba2Shape, dtype: jnp.dtype) -> None:
        size = shape.heads, shape.head_width
        self.scale = nnx.Param(jnp.ones(size, dtype, out_sharding=sharding.spec("heads", None)))
        self.epsilon, self.groups = shape.norm_eps, shape.norm_groups

    def __call__(self, y: jax.Array, gate: jax.Array) -> jax.Array:
        """Returns [R, L, H, P] in y's dtype, for arrays of that shape."""
        z = y.astype(_wide(y))
        z *= jax.nn.silu(gate.astype(z.dtype))
        heads = z.shape[2]
        group = np.arange(heads) * self.groups // heads
        # A product, not a mean: the heads of a group may lie on several devices.
        mean_HxH = jnp.asarray((group[:, None] == group) * self.groups / heads, z.dtype)
        squares = jnp.square(z).mean(-1)
        squares = jnp.einsum("rlh,hk->rlk", squares, mean_HxH, precision="highest", out_sharding=STEPS)
        z *= jax.lax.rsqrt(squares + self.epsilon)[..., None]
        return (z * self.scale[...].astype(z.dtype)).astype(y.dtype)


MIXERS: dict[type, Callable[..., nnx.Module]] = {Mamba1Shape: Mamba1Mixer, Mamba2Shape: Mamba2Mixer}


def make_mixer(key: jax.Array, width: int, shape: Mamba1Shape | Mamba2Shape, dtype: jnp.dtype) -> nnx.Module:
    """Makes a mixer of that shape; arguments as of `Mamba1Mixer`."""
    return MIXERS[type(shape)](key, width, shape, dtype)


def _linear(key: jax.Array, inputs: Dims, outputs: Dims, dtype: jnp.dtype, use_bias: bool) -> Linear:
    """Makes a linear layer as fresh as torch's: its kernel is as large as if drawn evenly from ± 1 / √inputs."""
    stddev = (3 * math.prod(size for _, size in inputs)) ** -0.5
    return Linear(key, inputs, outputs, stddev, dtype, use_bias)


def _fresh_steps(key: jax.Array, s: Mamba1Shape | Mamba2Shape, dims: Dims, dtype: jnp.dtype) -> jax.Array:
    """Returns biases whose softplus is spread evenly, by its logarithm, over the range of fresh step sizes."""
    names, shape = zip(*dims)
    low, high = (math.log(edge) for edge in s.step_range)
    drawn = jax.random.uniform(key, shape, dtype, low, high, out_sharding=sharding.spec(*names))
    step = jnp.maximum(jnp.exp(drawn), s.step_floor)
    return step + jnp.log(-jnp.expm1(-step))


def _groups_axis(groups: int) -> str | None:
    """Returns the logical axis of groups, None where every device holds them all and reads those of its heads.

    Raises:
      UserError: neither of their number and the mesh's `tensor` is a multiple of the other.
    """
    tensor = jax.sharding.get_abstract_mesh().shape["tensor"]
    if groups % tensor and tensor % groups:
        raise UserError(f"config.mesh.tensor = {tensor} and the {groups} groups of the model's mixers do not fit")
    return "heads" if groups % tensor == 0 else None


def _unit_rms(x: jax.Array, epsilon: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)


def _wide(x: jax.Array) -> jnp.dtype:
    """float32, or float64 where x is."""
    return jnp.promote_types(x.dtype, jnp.float32)
