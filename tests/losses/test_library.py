"""The losses as other JAX programs call them: without a mesh, with one of automatic axes, with axes of other names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxembed.losses.library import compute, describe

N, D, E = 16, 3, 8
AXES = {"automatic": (AxisType.Auto, ("rows",)), "explicit": (AxisType.Explicit, ())}


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=shape)
    return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True))


QUERIES, DOCUMENTS = unit(N, E), unit(N, D, E, seed=1)
PRESENT = np.random.default_rng(2).random((N, D)) < 0.8
PRESENT[:, 0] = True


def definition(queries: np.ndarray, documents: np.ndarray, groups: np.ndarray, ids: np.ndarray) -> float:
    """The mean of -log softmax over a query's positive, its hard negatives and others' documents, in float64."""
    q, d = np.float64(queries), np.float64(documents)
    losses = []
    for i in range(N):
        rivals = []
        for j in range(N):
            for k in range(D):
                rival = k > 0 if i == j else groups[i] < 0 or groups[i] != groups[j]
                if rival and PRESENT[j, k] and ids[j, k] != ids[i, 0]:
                    rivals.append(q[i] @ d[j, k] / 0.1)
        positive = q[i] @ d[i, 0] / 0.1
        losses.append(np.log(np.exp(positive) + np.exp(rivals).sum()) - positive)
    return float(np.mean(losses))


GROUPS = np.where(np.arange(N) % 4 == 0, 1, -1)
IDS = N + np.arange(N * D).reshape(N, D)
IDS[5, 0] = IDS[6, 0]


def loss(queries: jax.Array, documents: jax.Array, temperature: jax.Array, axes: tuple = ()) -> jax.Array:
    texts = describe(
        queries, documents, present=PRESENT, groups=jnp.asarray(GROUPS), document_ids=jnp.asarray(IDS), axes=axes
    )
    return compute("infonce", texts, temperature=temperature, tile=7)[0]


@pytest.fixture(scope="module")
def alone() -> tuple:
    return jax.value_and_grad(loss, argnums=(0, 1, 2))(QUERIES, DOCUMENTS, jnp.float32(0.1))


def test_without_a_mesh_it_is_the_definition(alone):
    assert float(alone[0]) == pytest.approx(definition(QUERIES, DOCUMENTS, GROUPS, IDS), rel=1e-5)


@pytest.mark.parametrize("kind", AXES)
def test_on_eight_devices_it_is_the_same(alone, kind):
    axis_type, axes = AXES[kind]
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, NamedSharding(mesh, P("rows")))  # noqa: E731
        gradient = jax.jit(jax.value_and_grad(lambda *args: loss(*args, axes), argnums=(0, 1, 2)))
        value, gradients = gradient(put(QUERIES), put(DOCUMENTS), jnp.float32(0.1))
    assert float(value) == pytest.approx(float(alone[0]), rel=1e-6)
    for got, want in zip(gradients, alone[1]):
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("kind", AXES)
def test_losses_of_whole_batches_know_all_meshes(kind):
    axis_type, axes = AXES[kind]
    scores = np.random.default_rng(3).random((N, D))
    for name in ("spread_out", "cosent"):
        want = compute(name, describe(QUERIES, DOCUMENTS, scores=scores))[0]
        mesh = jax.make_mesh((8,), ("rows",), axis_types=(axis_type,))
        with jax.set_mesh(mesh):
            q, d = (jax.device_put(x, NamedSharding(mesh, P("rows"))) for x in (QUERIES, DOCUMENTS))
            got = jax.jit(lambda q, d, name=name: compute(name, describe(q, d, scores=scores, axes=axes))[0])(q, d)
        assert float(got) == pytest.approx(float(want), rel=1e-5)


def test_queries_of_weight_0_and_sources():
    """A batch of two sources, one of them weightless, is the other one alone."""
    half = N // 2
    weights = jnp.where(jnp.arange(N) < half, 1.0, 0.0)
    both = describe(QUERIES, DOCUMENTS, sources=jnp.arange(N) // half, weights=weights)
    one = describe(QUERIES[:half], DOCUMENTS[:half])
    for name, options in (("infonce", {}), ("sigmoid", {"bias": -3.0})):
        assert compute(name, both, **options)[0] == pytest.approx(float(compute(name, one, **options)[0]), rel=1e-6)


def test_what_lies_in_empty_places_does_not_matter():
    """Not even NaN, in value or gradient; nor bfloat16, which is taken as float32."""
    weights = jnp.where(jnp.arange(N) == 3, 0.0, 1.0)

    def value(q, d):
        return compute("infonce", describe(q, d, present=PRESENT, weights=weights))[0]

    there = PRESENT & (np.arange(N) != 3)[:, None]
    broken = (QUERIES.copy(), np.where(there[..., None], DOCUMENTS, np.nan))
    broken[0][3] = np.inf
    gradients = [jax.grad(value, argnums=(0, 1))(*vectors) for vectors in ((QUERIES, DOCUMENTS), broken)]
    jax.tree.map(np.testing.assert_array_equal, *gradients)
    assert value(*(jnp.asarray(x, jnp.bfloat16) for x in (QUERIES, DOCUMENTS))).dtype == jnp.float32


def test_numbers_given_to_one_side_are_no_numbers_of_the_other():
    want = float(compute("infonce", describe(QUERIES, DOCUMENTS))[0])
    for ids in ({"document_ids": jnp.arange(N * D).reshape(N, D)}, {"query_ids": N + jnp.arange(N)}):
        assert float(compute("infonce", describe(QUERIES, DOCUMENTS, **ids))[0]) == pytest.approx(want, rel=1e-6)


def test_mixing_needs_a_seed():
    with pytest.raises(ValueError, match="need a seed"):
        compute("infonce", describe(QUERIES, DOCUMENTS), mixed_negatives=2)


def test_own_negatives_alone():
    texts = describe(QUERIES, DOCUMENTS, in_batch=False)
    scores = np.einsum("ne,nde->nd", np.float64(QUERIES), np.float64(DOCUMENTS)) / 0.05
    want = (np.log(np.exp(scores).sum(1)) - scores[:, 0]).mean()
    assert compute("infonce", texts)[0] == pytest.approx(want, rel=1e-5)


def test_what_a_loss_does_not_take_is_refused():
    with pytest.raises(TypeError, match="hardness"):
        compute("sigmoid", describe(QUERIES, DOCUMENTS), bias=0.0, hardness=1.0)
