"""Grouped products: each way to compute them against loops over items in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_cases import ACTIVATIONS

from jaxembed.models.layers import grouped
from jaxembed.models.layers.blocks import HEIGHTS, Walk
from jaxembed.models.layers.grouped import Kernels, tiled_across

EXPERTS, WIDTH, HIDDEN = 5, 6, 10
N = HEIGHTS[0] + 88  # items: enough for the high blocks
SIZES = {
    "balanced": [N // EXPERTS] * EXPERTS,
    "high and low blocks": [3, N - 20, 0, 7, 10],
    "all to the last": [0, 0, 0, 0, N],
    "void tail": [70, 0, 64, 1, 200],
    "all void": [0] * EXPERTS,
}


def make(gated, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: np.float32(rng.normal(size=shape))  # noqa: E731
    scaled = lambda *shape: draw(*shape) / np.float32(math.sqrt(shape[1]))  # noqa: E731
    into, out_of = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    kernels = Kernels(
        up=scaled(*into),
        down=scaled(*out_of),
        gate=scaled(*into) if gated else None,
        up_bias=None if gated else draw(EXPERTS, HIDDEN),
    )
    return kernels, draw(N, WIDTH), draw(N, WIDTH), np.float32(rng.random(N))


def define(x, dy, weights, sizes, kernels, activation):
    """Outputs and gradients in float64, an expert at a time."""
    k = jax.tree.map(np.float64, kernels)
    x, dy, weights = (np.float64(a) for a in (x, dy, weights))
    y, d_x, d_weights, d_k = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights), jax.tree.map(np.zeros_like, k)
    ends = np.cumsum(sizes)
    for e, (start, end) in enumerate(zip(ends - sizes, ends)):
        here = slice(start, end)
        up = x[here] @ k.up[e] + (0 if k.up_bias is None else k.up_bias[e])
        a, slope = ACTIVATIONS[activation](up if k.gate is None else x[here] @ k.gate[e])
        hidden = a if k.gate is None else a * up
        y[here] = hidden @ k.down[e]
        d_weights[here] = (y[here] * dy[here]).sum(1)
        g = dy[here] * weights[here, None]
        d_k.down[e] = hidden.T @ g
        d_hidden = g @ k.down[e].T
        d_up = d_hidden * (slope if k.gate is None else a)
        d_k.up[e] = x[here].T @ d_up
        d_x[here] = d_up @ k.up[e].T
        if k.up_bias is not None:
            d_k.up_bias[e] = d_up.sum(0)
        if k.gate is not None:
            d_gate = d_hidden * up * slope
            d_k.gate[e] = x[here].T @ d_gate
            d_x[here] += d_gate @ k.gate[e].T
    return y, d_x, d_weights, d_k


def assert_near(got, want, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1e-9)), got, want)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("way", ["blocks", "blocks by shape", "ragged"])
def test_is_the_definition(way, gated, monkeypatch):
    if way == "blocks by shape":  # as a GPU walks
        monkeypatch.setattr(Walk, "by_data", Walk.by_shape)
    activation, kernel = "silu" if gated else "gelu", way.split()[0]

    @jax.jit
    def run(x, dy, weights, sizes, kernels):
        y = grouped.forward(x, sizes, kernels, activation, kernel)
        (d_x, d_weights), d_kernels = grouped.backward(x, dy, weights, sizes, kernels, activation, kernel)
        return y, d_x, d_weights, d_kernels

    kernels, x, dy, weights = make(gated)
    for sizes in SIZES.values():
        sizes = np.int32(sizes)
        want = define(x, dy, weights, sizes, kernels, activation)
        void = np.arange(N) >= sizes.sum()
        hostile = np.where(void[:, None], np.nan, x)  # whatever lies in void slots
        got = run(hostile, np.where(void[:, None], np.nan, dy), np.where(void, np.nan, weights), sizes, kernels)
        assert_near(got, want)
        if way == "blocks":
            low = run(*(jnp.asarray(a, jnp.bfloat16) for a in (x, dy)), weights, sizes, _cast(kernels))
            assert low[0].dtype == low[1].dtype == jnp.bfloat16
            assert_near(jax.tree.map(np.float32, low), want, 0.05)


def _cast(kernels):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), kernels)


def test_the_tpus_kernel_gradient_is_that_of_ragged_dot():
    """megablox, interpreted: items that do not fill its tiles, widths that do not, empty experts, a void tail."""
    rng = np.random.default_rng(0)
    a, b = np.float32(rng.normal(size=(100, 24))), np.float32(rng.normal(size=(100, 40)))
    for sizes in ([30, 0, 41, 9], [0, 0, 0, 100], [0, 0, 0, 0]):
        got = jax.jit(lambda *args: tiled_across(*args, interpret=True))(a, b, np.int32(sizes))
        ends = np.cumsum(sizes)
        want = np.stack([np.float64(a[e - n : e]).T @ b[e - n : e] for n, e in zip(sizes, ends)])
        assert_near(got, want)
