"""Stacks of layers of several kinds against a plain loop, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxembed.models.layers.stack import apply_layers, periods
from jaxembed.models.options import ModelOptions

KINDS = {
    "alike": "aaaa",
    "a period of two": "ababab",
    "a period of three and a rest": "aabaaba",
    "the last differ": "aaaabb",
    "no period": "abc",
}


class Layer(nnx.Module):
    """x → kind's function of (weight · x + the layer's number)."""

    def __init__(self, key: jax.Array) -> None:
        self.weight = nnx.Param(jax.random.normal(key, (3, 3)))


FUNCTIONS = {"a": jnp.tanh, "b": jnp.sin, "c": jnp.cos}


def apply(x: jax.Array, layer: Layer, index: jax.Array, kind: str) -> jax.Array:
    return FUNCTIONS[kind](x @ layer.weight[...] + index)


@pytest.mark.parametrize(
    ("kinds", "remat"), [*((kinds, "none") for kinds in KINDS.values()), (KINDS["a period of two"], "full")]
)
def test_a_stack_is_the_loop_over_its_layers(kinds, remat):
    with jax.enable_x64(True):
        compare(kinds, remat)


def compare(kinds, remat):
    n, chosen = len(kinds), (2, 0, len(kinds))
    layers = jax.vmap(Layer)(jax.random.split(jax.random.key(0), n))
    graph, params = nnx.split(layers)
    x = jax.random.normal(jax.random.key(1), (2, 5, 3))

    def stacked(params, x):
        options = ModelOptions(remat=remat, unroll=1)
        states = apply_layers(nnx.merge(graph, params), x, kinds, apply, options, chosen)
        last, kept = states.last, states.chosen
        return last.sum(), (last, *kept)

    def loop(params, x):
        states = [x]
        for i, kind in enumerate(kinds):
            layer = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], params))
            states.append(apply(states[-1], layer, i, kind))
        return states[-1].sum(), (states[-1], *(states[i] for i in chosen))

    got, want = (jax.jit(f)(params, x) for f in (jax.value_and_grad(g, (0, 1), has_aux=True) for g in (stacked, loop)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_periods_cover_every_layer_once():
    found = {kinds: periods(kinds) for kinds in KINDS.values()}
    assert found == {
        "aaaa": [(0, 1, 4)],
        "ababab": [(0, 2, 3)],
        "aabaaba": [(0, 3, 2), (6, 1, 1)],
        "aaaabb": [(0, 1, 4), (4, 1, 2)],
        "abc": [(0, 1, 1), (1, 1, 1), (2, 1, 1)],
    }
