"""Low-rank adapters: their formula and gradients, on every mesh; fresh, merged, dropped, packed."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_text_encoder import HEAD, LAYOUT, LENGTH, TEXTS, assert_near, run
from tiny_models import CONFIG, ONE, alone, make_mesh, pack, put_rows, random_params

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.models.bert import Bert
from jaxembed.models.layers.attention import HEADS
from jaxembed.models.layers.dropout import Noise, dropout, step_seed
from jaxembed.models.layers.linear import Linear
from jaxembed.models.lora import Adapter, Lora, is_adapter, merge
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import ModelFactory, TextEncoder, flatten, join, split, unflatten

SHARDED = {"fsdp 4, tensor 2": MeshConfig(1, 4, 2), "tensor 2, expert 2, sequence 2": MeshConfig(1, 1, 2, 2, 2)}
TARGETS = tuple(
    f"layers/{name}" for name in ("attention/query", "attention/value", "attention/out", "mlp/up", "mlp/down")
)
LORA = Lora(rank=3, scale=0.7, dropout=0.0, targets=TARGETS)
DROPPED = Lora(rank=3, scale=0.7, dropout=0.3, targets=TARGETS)
WIDTH, HEAD_COUNT, HEAD_WIDTH, LAYERS = 8, 4, 3, 2
ROWS, TOKENS = 8, 6


def make_factory(lora=None):
    """A tiny encoder with a projection."""
    arguments = Bert, CONFIG, HEAD, ModelOptions(unroll=1), lora  # one layer to compile
    return ModelFactory(lambda: TextEncoder(jax.random.key(0), *arguments))


def reference(x, kernel, bias, a, b, upstream, mask):
    """y = x W + bias + scale · dropped(x) A B in float64, of one layer; with the gradients of A, B and x."""
    n_in, n_out, rank = x.shape[-1], bias.size, a.shape[-1]
    w, a, b = kernel.reshape(n_in, n_out), a.reshape(n_in, rank), b.reshape(rank, n_out)
    y = np.zeros((*x.shape[:2], n_out))
    gradients = np.zeros_like(a), np.zeros_like(b), np.zeros_like(x)
    for i in np.ndindex(x.shape[:2]):
        dropped, g = x[i] * mask[i], upstream[i]
        y[i] = x[i] @ w + bias.reshape(-1) + 0.7 * (dropped @ a) @ b
        gradients[0][:] += 0.7 * np.outer(dropped, b @ g)
        gradients[1][:] += 0.7 * np.outer(dropped @ a, g)
        gradients[2][i] = w @ g + 0.7 * mask[i] * (a @ (b @ g))
    return y, gradients


@pytest.mark.parametrize("mesh", [ONE, *SHARDED.values()], ids=["one", *SHARDED])
@pytest.mark.parametrize("into_heads", [True, False])
def test_an_adapter_is_its_formula(mesh, into_heads):
    """Forward and gradients in both layers of a stack, [D] → [H, K] or back, with dropout of the input."""
    width, heads = (("embed", WIDTH),), (("heads", HEAD_COUNT), (None, HEAD_WIDTH))
    inputs, outputs = (width, heads) if into_heads else (heads, width)
    x_spec, y_spec = (sharding.STATES, HEADS) if into_heads else (HEADS, sharding.STATES)
    x_shape, y_shape = ([size for _, size in dims] for dims in (inputs, outputs))
    n_in, n_out = math.prod(x_shape), math.prod(y_shape)
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    x, upstream = draw(ROWS, TOKENS, *x_shape), draw(LAYERS, ROWS, TOKENS, *y_shape)
    a, b = draw(LAYERS, *x_shape, DROPPED.rank), draw(LAYERS, DROPPED.rank, *y_shape)
    kernel, bias = draw(LAYERS, *x_shape, *y_shape), draw(LAYERS, *y_shape)
    texts, positions = rng.integers(1, 9, (2, ROWS, TOKENS)).astype(np.int32)

    def make():
        linear = jax.vmap(lambda key: Linear(key, inputs, outputs, 0.1, jnp.float32))(
            jax.random.split(jax.random.key(0), LAYERS)
        )
        linear.adapter = Adapter(jax.random.key(1), linear, DROPPED)
        return linear

    def loss(weights, x, noise, upstream):
        linear = make()
        for param, value in zip((linear.adapter.a, linear.adapter.b, linear.kernel, linear.bias), weights):
            param[...] = value
        apply = lambda _, layer: (None, layer[0](x, y_spec, noise, layer[1]))  # noqa: E731
        _, y = jax.lax.scan(apply, None, (linear, jnp.arange(LAYERS, dtype=jnp.uint32)))
        return (y * upstream).sum(), y

    with jax.set_mesh(make_mesh(mesh)):
        put = functools.partial(lambda mesh, array, spec: sharding.put(array, mesh, spec), jax.sharding.get_mesh())
        abstract = jax.eval_shape(make)
        leaves = abstract.adapter.a, abstract.adapter.b, abstract.kernel, abstract.bias
        specs = [leaf.sharding.spec for leaf in leaves]
        assert specs[0][-1] is None and specs[1][1] is None  # the rank lies whole
        weights = [put(array, spec) for array, spec in zip((a, b, kernel, bias), specs)]
        noise = Noise(step_seed(0, jnp.int32(0)), *(put(array, sharding.ROWS) for array in (texts, positions)))
        function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        arguments = weights, put(x, x_spec), noise, put(upstream, P(None, *y_spec))
        (_, y), ((grad_a, grad_b, *_), grad_x) = function(*arguments)
        ones = put(np.ones((ROWS, TOKENS, n_in), np.float32), sharding.STATES)
        masks = [np.asarray(dropout(ones, DROPPED.dropout, noise, jnp.uint32(i)), np.float64) for i in range(LAYERS)]
    assert 0.2 < np.mean(np.array(masks) == 0) < 0.4
    x64, total_x = x.reshape(ROWS, TOKENS, n_in).astype(np.float64), 0
    for i in range(LAYERS):
        parts = (array[i].astype(np.float64) for array in (kernel, bias, a, b))
        want, gradients = reference(x64, *parts, upstream[i].reshape(ROWS, TOKENS, n_out).astype(np.float64), masks[i])
        near(y[i], want)
        near(grad_a[i], gradients[0])
        near(grad_b[i], gradients[1])
        total_x += gradients[2]
    near(grad_x, total_x)


def near(got, want):
    assert np.abs(np.asarray(got).reshape(want.shape) - want).max() <= 1e-5 * np.abs(want).max()


def test_fresh_adapters_change_no_bit_and_merged_ones_nothing_else():
    """The same vectors without adapters, with fresh ones, with B = 0; with trained ones, merged or not."""
    packed = pack(TEXTS, LAYOUT, LENGTH)
    plain, adapted = make_factory(), make_factory(LORA)
    with jax.set_mesh(make_mesh()):
        encode = {f: jax.jit(lambda params, rows, f=f: f.bind(params)(rows, packed.slots)) for f in (plain, adapted)}
        rows, params = put_rows(packed.rows), random_params(adapted)
        fresh = flatten(jax.jit(adapted.fresh)())
        for path, leaf in fresh.items():
            if path.endswith("/b"):
                assert not leaf.any()
            elif path.endswith("/a"):  # uniform in ± 1 / √inputs
                bound = 1 / math.sqrt(math.prod(leaf.shape[1:-1]))
                assert 0.9 * bound < np.abs(leaf).max() <= bound and np.std(leaf) == pytest.approx(bound / 3**0.5, 0.1)
        trained, base = (flatten(part) for part in split(params))
        assert {path for path in trained if is_adapter(path)} | {"projection/kernel", "projection/bias"} == set(trained)
        assert flatten(join(unflatten(trained), unflatten(base))).keys() == flatten(params).keys()
        head = {path: leaf for path, leaf in trained.items() if not is_adapter(path)}
        want = encode[plain](unflatten(base | head), rows)
        start = head | {path: fresh[path] for path in trained if is_adapter(path)}
        np.testing.assert_array_equal(encode[adapted](unflatten(base | start), rows), want)
        unmerged = np.asarray(encode[adapted](params, rows))
        assert np.abs(unmerged - want).max() > 0.1
        within = {path.removeprefix("backbone/"): leaf for path, leaf in (base | trained).items() if path not in head}
        leaves = {f"backbone/{path}": leaf for path, leaf in merge(within, LORA).items()}
        assert np.abs(encode[plain](unflatten(leaves | head), rows) - unmerged).max() <= 1e-5


@pytest.fixture(scope="module")
def dropped_on_one_device():
    return run(make_factory(DROPPED), pack(TEXTS, LAYOUT, LENGTH), step=3, gradient=True)


def test_the_mesh_does_not_show(dropped_on_one_device):
    """Vectors, and gradients of adapters and of all else, with dropout of the adapters' inputs."""
    mesh = SHARDED["tensor 2, expert 2, sequence 2"]
    vectors, gradients = run(make_factory(DROPPED), pack(TEXTS, LAYOUT, LENGTH, 2), mesh, 3, True)
    assert np.abs(vectors - dropped_on_one_device[0]).max() <= 1e-5
    assert_near(gradients, dropped_on_one_device[1], 1e-5)


def test_dropout_is_of_the_text_not_of_its_place(dropped_on_one_device):
    vectors, _ = dropped_on_one_device
    factory = make_factory(DROPPED)
    assert np.abs(run(factory, pack(TEXTS, alone(TEXTS), 16), step=3) - vectors).max() <= 1e-5
    assert np.abs(run(factory, pack(TEXTS, alone(TEXTS), 16)) - vectors).max() > 0.01  # and there is some
