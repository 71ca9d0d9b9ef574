"""Feed-forward parts of many experts over items sorted by expert, forward and backward, on one device.

'blocks', for CPUs and GPUs: a loop over pieces of consecutive items of one expert, each a few plain products (the
idea of MegaBlocks, Gale et al. 2022, arXiv:2211.15841). 'ragged', for TPUs: `jax.lax.ragged_dot`, which is one kernel
there, and megablox (jax.experimental.pallas.ops.tpu) for the kernels' gradients, of which XLA makes items times
experts; so it does of all three elsewhere.

Nothing here is differentiated by jax: loops as long as the data say have no reverse mode.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxembed import sharding
from jaxembed.models.layers.blocks import Walk, zero_from
from jaxembed.models.layers.mlp import ACTIVATIONS

TILE = 512  # edge of megablox's tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernels:
    """The weights of one layer's experts, or their gradients.

    Attributes:
      up: [X, D, F].
      down: [X, F, D].
      gate: [X, D, F], or None.
      up_bias: [X, F], or None.
    """

    up: jax.Array
    down: jax.Array
    gate: jax.Array | None
    up_bias: jax.Array | None


def forward(x_NxD: jax.Array, sizes_X: jax.Array, kernels: Kernels, activation: str, kernel: str) -> jax.Array:
    """Returns each item's output: down(activation(up(x))), or gated: down(activation(gate(x)) · up(x)).

    Args:
      x_NxD: items, those of the first expert first. What lies beyond the sum of the sizes is void.
      sizes_X: int32, items of each expert.
      kernels: in x's dtype. Products are summed in float32 and rounded to that dtype, as those of dense layers are.
      activation: a key of `jaxembed.models.layers.mlp.ACTIVATIONS`.
      kernel: 'auto' | 'blocks' | 'ragged'.

    Returns:
      [N, D] in x's dtype, 0 where void.
    """

    def outputs(products: OfOne | OfAll, kernels: Kernels, x: jax.Array) -> tuple[tuple[jax.Array], None]:
        hidden = _activated(activation)(*_into(products, kernels, x))
        return (products.through(hidden.astype(x.dtype), kernels.down),), None

    return _computed(outputs, (x_NxD,), sizes_X, kernels, (jnp.zeros_like(x_NxD),), None, kernel)[0][0]


def backward(
    x_NxD: jax.Array,
    dy_NxD: jax.Array,
    weights_N: jax.Array,
    sizes_X: jax.Array,
    kernels: Kernels,
    activation: str,
    kernel: str,
) -> tuple[tuple[jax.Array, jax.Array], Kernels]:
    """Returns the gradients of sum(weight · <dy, output>); the hidden layer is computed anew.

    Args:
      x_NxD, sizes_X, kernels, activation, kernel: as for `forward`.
      dy_NxD: in x's dtype.
      weights_N: float32.

    Returns:
      Those of x, [N, D] in x's dtype, and of the weights, float32 [N], both 0 where void; those of kernels, float32.
    """

    def gradients(
        products: OfOne | OfAll, kernels: Kernels, x: jax.Array, dy: jax.Array, weights: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Kernels]:
        hidden, pull = jax.vjp(_activated(activation), *_into(products, kernels, x))
        # As for a weight of 1: so it gives the gradient of the weight, too.
        d_hidden = products.back(dy, kernels.down).astype(jnp.float32)
        d_weights = (d_hidden * hidden).sum(-1)
        d_up, *d_gate = pull(d_hidden * weights[:, None])
        d_x = products.back(d_up, kernels.up).astype(jnp.float32)
        if d_gate:
            d_x += products.back(d_gate[0], kernels.gate).astype(jnp.float32)
        d_kernels = Kernels(
            up=products.across(x, d_up),
            down=products.across(hidden.astype(x.dtype), (dy * weights[:, None]).astype(x.dtype)),
            gate=products.across(x, d_gate[0]) if d_gate else None,
            up_bias=None if kernels.up_bias is None else products.summed(d_up.astype(jnp.float32)),
        )
        return (d_x, d_weights), d_kernels

    rows = jnp.zeros_like(x_NxD), jnp.zeros_like(weights_N)
    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), kernels)
    return _computed(gradients, (x_NxD, dy_NxD, weights_N), sizes_X, kernels, rows, sums, kernel)


class OfOne:
    """Products of the rows of one expert, whose kernels are [A, B]. Those with kernels are of the rows' dtype, which
    is what they move through memory; sums over rows are float32."""

    def through(self, rows_NxA: jax.Array, kernel: jax.Array) -> jax.Array:
        """Rows times the kernel, [N, B]."""
        return _dot(rows_NxA, kernel, 1, 0, rows_NxA.dtype)

    def back(self, rows_NxB: jax.Array, kernel: jax.Array) -> jax.Array:
        """Rows times the transposed kernel, [N, A]."""
        return _dot(rows_NxB, kernel, 1, 1, rows_NxB.dtype)

    def across(self, rows_NxA: jax.Array, rows_NxB: jax.Array) -> jax.Array:
        """The kernel's gradient: transposed rows times rows."""
        return _dot(rows_NxA, rows_NxB, 0, 0, jnp.float32)

    def of_rows(self, bias: jax.Array) -> jax.Array:
        """The bias [B], as it is added to rows."""
        return bias

    def summed(self, rows_NxB: jax.Array) -> jax.Array:
        """The bias's gradient."""
        return rows_NxB.sum(0)


@dataclasses.dataclass(frozen=True)
class OfAll:
    """The same of rows sorted by expert, with the kernels [X, A, B] and biases [X, B] of all."""

    sizes_X: jax.Array
    n_rows: int  # N, with void ones

    def through(self, rows_NxA: jax.Array, kernel: jax.Array) -> jax.Array:
        return _ragged_dot(rows_NxA, kernel, self.sizes_X, 1, 1, rows_NxA.dtype)

    def back(self, rows_NxB: jax.Array, kernel: jax.Array) -> jax.Array:
        return _ragged_dot(rows_NxB, kernel, self.sizes_X, 1, 2, rows_NxB.dtype)

    def across(self, rows_NxA: jax.Array, rows_NxB: jax.Array) -> jax.Array:
        if sharding.platform() == "tpu":
            return tiled_across(rows_NxA, rows_NxB, self.sizes_X)
        return _ragged_dot(rows_NxA, rows_NxB, self.sizes_X, 0, 0, jnp.float32)

    @property
    def _experts(self) -> jax.Array:
        """Each row's expert; X where void."""
        ends = jnp.cumsum(self.sizes_X)
        return jnp.searchsorted(ends, jnp.arange(self.n_rows), side="right")

    def of_rows(self, bias: jax.Array) -> jax.Array:
        return bias.at[self._experts].get(mode="fill", fill_value=0)

    def summed(self, rows_NxB: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(rows_NxB, self._experts, len(self.sizes_X), indices_are_sorted=True)


def tiled_across(rows_NxA: jax.Array, rows_NxB: jax.Array, sizes_X: jax.Array, interpret: bool = False) -> jax.Array:
    """Returns `OfAll.across` by megablox; `interpret` without a TPU."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tile = min(TILE, -(-len(rows_NxA) // 8) * 8)
    rows_NxA, rows_NxB = (jnp.pad(rows, ((0, -len(rows) % tile), (0, 0))) for rows in (rows_NxA, rows_NxB))
    tiling = tile, min(TILE, rows_NxA.shape[1]), min(TILE, rows_NxB.shape[1])
    return tgmm(rows_NxA.T, rows_NxB, sizes_X, jnp.float32, tiling, interpret=interpret)


def _ragged_dot(
    a: jax.Array, b: jax.Array, sizes_X: jax.Array, of_a: int, of_b: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Contracts a's dimension `of_a` with b's `of_b`. Rows of a are sorted by expert; b has kernels [X, …], or rows."""
    numbers = jax.lax.RaggedDotDimensionNumbers((((of_a,), (of_b,)), ((), ())), [0], [0] if b.ndim == 3 else [])
    return jax.lax.ragged_dot_general(a, b, sizes_X, numbers, preferred_element_type=dtype)


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=dtype)


def _into(products: OfOne | OfAll, kernels: Kernels, x: jax.Array) -> tuple[jax.Array, ...]:
    """Returns what the activation takes: (up,), or (up, gate)."""
    up = products.through(x, kernels.up)
    if kernels.up_bias is not None:
        up += products.of_rows(kernels.up_bias)
    return (up,) if kernels.gate is None else (up, products.through(x, kernels.gate))


def _activated(activation: str) -> Callable[..., jax.Array]:
    """Returns the map of what `_into` returns to the hidden layer, float32."""
    f = ACTIVATIONS[activation]

    def hidden(up: jax.Array, *gate: jax.Array) -> jax.Array:
        up = up.astype(jnp.float32)
        return f(gate[0].astype(jnp.float32)) * up if gate else f(up)

    return hidden


def _computed(
    compute: Callable[..., tuple[tuple[jax.Array, ...], Any]],
    inputs: tuple[jax.Array, ...],
    sizes_X: jax.Array,
    kernels: Kernels,
    outputs: tuple[jax.Array, ...],
    sums: Any,
    kernel: str,
) -> tuple[tuple[jax.Array, ...], Any]:
    """Computes all items, at once or in blocks.

    Args:
      compute: (products, kernels, *inputs) → (outputs, what is summed over an expert's items: a tree).
      inputs: arrays [N, …].
      sizes_X, kernels, kernel: as for `forward`.
      outputs: zeros of the outputs' shapes and dtypes, [N, …].
      sums: zeros of the sums' shapes, a tree of [X, …]; None for none.
    """
    n_items, ends = len(inputs[0]), jnp.cumsum(sizes_X)
    if kernel == "ragged" or (kernel == "auto" and sharding.platform() == "tpu"):
        rows, sums = compute(OfAll(sizes_X, n_items), kernels, *(zero_from(x, ends[-1]) for x in inputs))
        return tuple(zero_from(x, ends[-1]).astype(zeros.dtype) for x, zeros in zip(rows, outputs)), sums
    walk = Walk(functools.partial(compute, OfOne()), inputs, outputs, sums, kernels)
    return walk.by_data(sizes_X) if sharding.platform() == "cpu" else walk.by_shape(sizes_X)
