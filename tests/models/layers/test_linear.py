"""Linear layers, tables and norms against NumPy float64, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import MESHES, ONE, make_mesh

from jaxembed import sharding
from jaxembed.models.layers.linear import Embedding, LayerNorm, Linear
from jaxembed.sharding import ROWS, STATES

D, H, K, V = 16, 4, 6, 64
ALL_MESHES = {"1": ONE, **MESHES}
KEY = jax.random.key(3)
HEADS = sharding.spec("batch", "sequence", "heads", None)


@pytest.fixture(params=ALL_MESHES.values(), ids=ALL_MESHES)
def mesh(request):
    mesh = make_mesh(request.param)
    with jax.set_mesh(mesh):
        yield mesh


def states(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_linear_maps_groups_of_dimensions_with_gradients(mesh):
    x, upstream = states(8, 4, D), states(8, 4, H, K)
    layer = jax.jit(lambda: Linear(KEY, (("embed", D),), (("heads", H), (None, K)), 0.5, jnp.float32))()
    assert jax.typeof(layer.kernel[...]).sharding.spec == P("fsdp", "tensor", None)
    assert jax.typeof(layer.bias[...]).sharding.spec == P("tensor", None)
    layer.bias[...] = layer.bias[...] + 1.5
    kernel = np.asarray(layer.kernel[...], np.float64)

    def loss(layer, x, upstream):
        y = layer(x, HEADS)
        return (y * upstream).sum(), y

    args = sharding.put(x, mesh, STATES), sharding.put(upstream, mesh, HEADS)
    (_, y), (by_layer, by_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(layer, *args)
    assert jax.typeof(y).sharding.spec == HEADS
    np.testing.assert_allclose(y, np.einsum("rld,dhk->rlhk", x, kernel) + 1.5, atol=1e-5)
    np.testing.assert_allclose(by_x, np.einsum("rlhk,dhk->rld", upstream, kernel), atol=1e-5)
    np.testing.assert_allclose(by_layer.kernel[...], np.einsum("rld,rlhk->dhk", x, upstream.astype(float)), atol=1e-5)
    np.testing.assert_allclose(by_layer.bias[...], upstream.sum((0, 1), dtype=float), atol=1e-5)


def test_linear_contracts_several_dimensions(mesh):
    x = states(8, 4, H, K)
    layer = jax.jit(lambda: Linear(KEY, (("heads", H), (None, K)), (("embed", D),), 0.5, jnp.float32, False))()
    assert not hasattr(layer, "bias")
    y = jax.jit(lambda layer, x: layer(x, STATES))(layer, sharding.put(x, mesh, HEADS))
    np.testing.assert_allclose(y, np.einsum("rlhk,hkd->rld", x, np.asarray(layer.kernel[...], float)), atol=1e-5)


def test_fresh_weights_are_the_same_on_every_mesh_and_as_wide_as_asked(mesh):
    make = lambda: Linear(KEY, (("embed", 64),), (("mlp", 128),), 0.02, jnp.float32)  # noqa: E731
    kernel = np.asarray(jax.jit(make)().kernel[...])
    assert abs(kernel.std() / 0.02 - 1) < 0.03 and abs(kernel.mean()) < 4 * 0.02 / np.sqrt(kernel.size)
    with jax.set_mesh(make_mesh()):
        np.testing.assert_array_equal(kernel, jax.jit(make)().kernel[...])


def test_embedding_looks_up_rows_and_sums_their_gradients(mesh):
    ids = np.random.default_rng(1).integers(0, 20, (8, 4)).astype(np.int32)
    upstream = states(8, 4, D)
    table = jax.jit(lambda: Embedding(KEY, V, D, 1.0, jnp.float32, "vocab"))()
    assert jax.typeof(table.embedding[...]).sharding.spec == P(("tensor", "fsdp"), None)

    def loss(table, ids, upstream):
        x = table(ids, jnp.float32)
        return (x * upstream).sum(), x

    args = sharding.put(ids, mesh, ROWS), sharding.put(upstream, mesh, STATES)
    (_, x), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(table, *args)
    np.testing.assert_array_equal(x, np.asarray(table.embedding[...])[ids])
    want = np.zeros((V, D))
    np.add.at(want, ids, upstream)
    np.testing.assert_allclose(gradient.embedding[...], want, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_is_float32_inside(dtype):
    """Values of mean 100 and spread 1: a variance as a difference of squares, or in bfloat16, would be lost."""
    x = jnp.asarray(100 + states(8, 4, D), dtype)
    with jax.set_mesh(make_mesh()):
        norm = LayerNorm(D, 1e-12, jnp.float32)
        norm.scale[...], norm.bias[...] = jnp.linspace(0.5, 2, D), jnp.linspace(-1, 1, D)
        y = norm(x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    want = exact * np.linspace(0.5, 2, D) + np.linspace(-1, 1, D)
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), want, atol=1e-4 if dtype == jnp.float32 else 2**-7 * 6)
