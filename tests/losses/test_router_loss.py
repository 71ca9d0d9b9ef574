"""Losses of routers against loops over tokens, and the whole step's: the same however the batch is cut up."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ONE, make_mesh, random_params
from tiny_run import tiny_config

from jaxembed import model_source
from jaxembed.config import MeshConfig, RouterConfig
from jaxembed.data.batch import PairShape, Rows
from jaxembed.losses.router import router_loss
from jaxembed.models.layers.rope import RopeConfig
from jaxembed.models.layers.routing import ExpertsShape, choose, sums_of
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import HeadConfig, ModelFactory, TextEncoder, flatten
from jaxembed.models.transformer import Transformer, TransformerConfig
from jaxembed.step import make_loss
from jaxembed.training_data import open_data

SHAPE = ExpertsShape(count=8, top_k=2, width=16, normalize=True, shared_width=8)


def rows_of(segments):
    """Rows of which only the segments matter."""
    nothing = np.zeros(segments.shape, np.int32)
    return Rows(nothing, segments, nothing, nothing - 1, nothing > 0)


def by_loops(logits, segments, config):
    """The definition, token by token in float64: what is added, the metrics, the gradient by the logits."""
    layers, _, _, count = logits.shape
    balances, squares, entropies, loads, gradients = [], [], [], [], []
    for layer in logits.astype(np.float64):
        taken, probability, square, entropy, shares, tokens = np.zeros(count), np.zeros(count), 0.0, 0.0, {}, 0
        for place in np.ndindex(segments.shape):
            if segments[place] == 0:
                continue
            largest = layer[place].max()
            log_sum = largest + np.log(np.exp(layer[place] - largest).sum())
            p = np.exp(layer[place] - log_sum)
            for expert in np.argsort(-p)[: SHAPE.top_k]:
                taken[expert] += 1
            probability, square, entropy = probability + p, square + log_sum**2, entropy - (p * np.log(p)).sum()
            shares[place], tokens = (p, log_sum), tokens + 1
        f = taken / (SHAPE.top_k * tokens)
        balances.append(count * (f * probability / tokens).sum())
        squares.append(square / tokens)
        entropies.append(entropy / tokens / np.log(count))
        loads.append(count * f)
        gradient = np.zeros_like(layer)
        for place, (p, log_sum) in shares.items():
            by_balance = count / tokens * p * (f - (f * p).sum())
            gradient[place] = (config.balance * by_balance + config.z * 2 * log_sum * p / tokens) / layers
        gradients.append(gradient)
    metrics = {
        "router/balance": np.mean(balances),
        "router/z": np.mean(squares),
        "router/entropy": np.mean(entropies),
        "router/busiest": np.max(loads),
        "router/idlest": np.min(loads),
        "router/dropped": 0.0,
        "router/load": np.stack(loads),
    }
    return config.balance * np.mean(balances) + config.z * np.mean(squares), metrics, np.stack(gradients)


@functools.cache
def compiled(config):
    """(logits [n, R, L, X], segments [R, L]) → ((what is added, metrics), gradient by the logits)."""

    def loss(logits, segments):
        rows, layers = rows_of(segments), []
        for layer in logits:
            probabilities = jnp.where((segments > 0)[..., None], jax.nn.softmax(layer), 0)
            layers.append(sums_of(layer, probabilities, choose(probabilities, rows, SHAPE), rows, SHAPE.count))
        return router_loss(jax.tree.map(lambda *each: jnp.stack(each), *layers), config)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("void", [False, True])
def test_loss_metrics_and_gradient_are_those_of_loops(void):
    config = RouterConfig(balance=0.3, z=0.02)
    rng = np.random.default_rng(5)
    logits = 2 * rng.normal(size=(2, 4, 6, SHAPE.count)).astype(np.float32)
    segments = np.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 4, 4], [5, 0, 0, 0, 0, 0], [0] * 6], np.int32)
    if void:
        segments[1:] = 0
    with jax.set_mesh(make_mesh()):
        (value, metrics), gradient = compiled(config)(logits, segments)
    want, want_metrics, want_gradient = by_loops(logits, segments, config)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert metrics.keys() == want_metrics.keys()
    for name, one in want_metrics.items():
        np.testing.assert_allclose(metrics[name], one, rtol=1e-5, atol=1e-7, err_msg=name)
    assert np.abs(gradient - want_gradient).max() <= 1e-6 * np.abs(want_gradient).max()
    assert not np.asarray(gradient)[:, segments == 0].any()


def test_even_experts_have_balance_one_and_the_highest_entropy():
    everywhere = jnp.eye(SHAPE.count)[jnp.arange(16).reshape(1, 2, 8) % SHAPE.count] * 1e-6
    with jax.set_mesh(make_mesh()):
        (_, metrics), _ = compiled(RouterConfig(balance=0.3, z=0.02))(everywhere, jnp.ones((2, 8), jnp.int32))
    assert float(metrics["router/balance"]) == pytest.approx(1, abs=1e-5)
    assert float(metrics["router/entropy"]) == pytest.approx(1, abs=1e-5)


CUTS = {  # mesh, micro-batches, tokens of a row
    "one device": (ONE, 1, "auto"),
    "longer rows in micro-batches": (ONE, 4, "80"),
    "8 devices": (MeshConfig(2, expert=4), 1, "auto"),
}


def whole_step(folder, mesh_config, micro_batches, row_length):
    """The loss of a step of a sparse decoder, its metrics and its gradient; and how its rows look."""
    config = tiny_config(folder, data__row_length=row_length, grad_cache=micro_batches)
    mesh = make_mesh(mesh_config)
    blueprint, _ = model_source.open_source(config, folder)
    data = open_data(config, blueprint, mesh, {})
    rope = RopeConfig(8)
    decoder = TransformerConfig(blueprint.backbone.vocab_size, 32, 2, 4, 2, 8, 40, 64, rope, rope, experts=SHAPE)
    options = ModelOptions()
    factory = ModelFactory(lambda: TextEncoder(jax.random.key(0), Transformer, decoder, HeadConfig(), options))
    batch = data.builder.build(0)[0]
    config = dataclasses.replace(config, router=RouterConfig(balance=0.5, z=0.01))
    loss = make_loss(config, factory, PairShape(data.plan.positives, data.plan.negatives))
    with jax.set_mesh(mesh):
        params = {"model": random_params(factory), "loss": {}}
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, metrics), gradient = run(params, data.to_device(batch, mesh), jnp.int32(0), {})
        return float(value), jax.device_get(metrics), flatten(jax.device_get(gradient)), batch.rows


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("router")
    return functools.cache(lambda name: whole_step(folder, *CUTS[name]))


@pytest.mark.parametrize("name", list(CUTS)[1:])
def test_a_step_is_the_same_however_the_batch_is_cut_up(cut, name):
    want, want_metrics, want_gradient, rows = cut("one device")
    got, metrics, gradient, other_rows = cut(name)
    padding = [int((r.segment_ids == 0).sum()) for r in (rows, other_rows)]
    assert padding[0] != padding[1]  # if it were counted, it would show
    assert abs(got - want) <= 1e-5 * abs(want)
    for key in want_metrics:
        np.testing.assert_allclose(metrics[key], want_metrics[key], rtol=1e-5, atol=1e-6, err_msg=key)
    assert want_metrics["router/load"].shape == (2, SHAPE.count)
    assert gradient.keys() == want_gradient.keys()
    for path, one in want_gradient.items():
        assert np.abs(gradient[path] - one).max() <= 1e-5 * np.abs(one).max(), path


def test_the_routers_losses_are_in_the_step(cut):
    value, metrics, gradient, rows = cut("one device")
    assert metrics["router/balance"] > 1.05
    added = 0.5 * metrics["router/balance"] + 0.01 * metrics["router/z"]
    assert added > 0.05 * value > 0
    tokens = (rows.segment_ids > 0).sum()
    assert (
        dataclasses.astuple(SHAPE)[:2] == (8, 2) and np.abs(gradient["model/backbone/experts/router/kernel"]).max() > 0
    )
    # Loads are whole numbers of real tokens.
    counts = metrics["router/load"] * SHAPE.top_k * tokens / SHAPE.count
    np.testing.assert_allclose(counts, np.round(counts), atol=0.01)
