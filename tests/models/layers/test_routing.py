"""Where tokens go, and what is counted of it, against loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.data.batch import Rows
from jaxembed.models.layers.routing import NOWHERE, ExpertsShape, choose, sums_of

EXPERTS, TOP_K, LENGTH = 6, 2, 12
ONE = MeshConfig(1)
SHAPE = ExpertsShape(EXPERTS, TOP_K, 8, normalize=False)
# The texts of each row, by number and tokens; what follows is padding.
TEXTS = [[(1, 5), (2, 4)], [(3, 12)], [(4, 1), (5, 2), (6, 7)], []]
SOURCES = {1: 0, 2: 1, 3: 8, 4: 2, 5: 0, 6: 5}


def make_rows(texts):
    segments, source = np.zeros((len(texts), LENGTH), np.int32), np.full((len(texts), LENGTH), -1, np.int32)
    for row, inside in enumerate(texts):
        start = 0
        for number, n in inside:
            segments[row, start : start + n], source[row, start : start + n] = number, SOURCES[number]
            start += n
    return Rows(segments, segments, segments, segments, segments > 0, source)


def make_logits(texts, seed=0):
    """Each text's are its own, wherever it lies; on padding there is nonsense."""
    logits = np.float32(np.random.default_rng(seed).normal(size=(len(texts), LENGTH, EXPERTS)))
    for row, inside in enumerate(texts):
        start = 0
        for number, n in inside:
            logits[row, start : start + n] = np.random.default_rng((seed, number)).normal(size=(n, EXPERTS))
            start += n
    return logits


def softmax(logits, rows):
    e = np.exp(np.float64(logits))
    return np.float32(np.where((rows.segment_ids > 0)[..., None], e / e.sum(-1, keepdims=True), 0))


def run(logits, rows, shape, expert_choice=False, config=ONE):
    """Returns the choice's arrays, weights by expert [R, L, X], and the sums."""
    n = config.data * config.expert * config.sequence
    mesh = sharding.make_mesh(config, jax.devices()[:n])
    with jax.set_mesh(mesh):
        put = lambda a, spec: sharding.put(a, mesh, spec)  # noqa: E731
        logits, probabilities = put(logits, sharding.STATES), put(softmax(logits, rows), sharding.STATES)
        rows = jax.tree.map(lambda a: put(a, sharding.ROWS), rows)

        @jax.jit
        def f(logits, probabilities, rows):
            routed = (None, None) if shape.by_source else (logits, probabilities)
            choice = choose(routed[1], rows, shape, expert_choice)
            return choice.experts, choice.weights, sums_of(*routed, choice, rows, shape.count), choice.per_token

        experts, weights, sums, per_token = jax.device_get(f(logits, probabilities, rows))
    of_expert = (experts[..., None] == np.arange(shape.count)) * weights[..., None]
    return experts, of_expert.sum(2), sums, int(per_token)


@pytest.mark.parametrize("normalize", [False, True])
def test_tokens_take_their_likeliest_experts(normalize):
    rows, logits = make_rows(TEXTS), make_logits(TEXTS)
    shape = dataclasses.replace(SHAPE, normalize=normalize)
    experts, weights, sums, per_token = run(logits, rows, shape)
    p, want, load = softmax(logits, rows), np.zeros((4, LENGTH, EXPERTS)), np.zeros(EXPERTS)
    z = entropy = 0.0
    for row, place in zip(*np.nonzero(rows.segment_ids)):
        here = p[row, place]
        taken = sorted(range(EXPERTS), key=lambda e: -here[e])[:TOP_K]
        assert set(experts[row, place]) == set(taken)
        for e in taken:
            want[row, place, e] = here[e] / (sum(here[taken]) if normalize else 1)
            load[e] += 1
        z += np.log(np.exp(np.float64(logits[row, place])).sum()) ** 2
        entropy -= (here * np.log(here)).sum()
    assert per_token == TOP_K
    assert (experts[rows.segment_ids == 0] == NOWHERE).all()
    np.testing.assert_allclose(weights, want, atol=1e-6)
    np.testing.assert_array_equal(sums.load, load)
    np.testing.assert_allclose(sums.probability, p.sum((0, 1)), rtol=1e-5)
    np.testing.assert_allclose([sums.z, sums.entropy], [z, entropy], rtol=1e-5)
    assert (sums.tokens, sums.dropped) == (31, 0)


def test_experts_take_their_likeliest_tokens_of_each_text():
    rows, logits = make_rows(TEXTS), make_logits(TEXTS)
    experts, weights, sums, per_token = run(logits, rows, SHAPE, expert_choice=True)
    p, dropped, seats_of = softmax(logits, rows), 0, []
    assert experts.shape[-1] == EXPERTS and per_token == TOP_K
    for row, inside in enumerate(TEXTS):
        for number, n in inside:
            here = rows.segment_ids[row] == number
            taken, probability = weights[row, here] > 0, p[row, here]
            seats = taken.sum(0)
            seats_of.append(tuple(seats))
            assert seats.sum() == n * TOP_K
            assert seats.max() - seats.min() <= 1
            for e in range(EXPERTS):
                best = sorted(range(n), key=lambda t: -probability[t, e])[: seats[e]]
                assert set(np.nonzero(taken[:, e])[0]) == set(best)
            np.testing.assert_allclose(weights[row, here], np.where(taken, probability, 0), atol=1e-7)
            dropped += (~taken.any(1)).sum()
    assert len({s for s in seats_of if max(s) > min(s)}) > 1  # the odd seats are not always the same experts'
    assert (experts[rows.segment_ids == 0] == NOWHERE).all()
    assert sums.dropped == dropped
    assert sums.load.sum() == sums.tokens * TOP_K == 31 * TOP_K


def test_a_texts_choice_by_experts_is_its_own():
    """Other neighbours, other rows, other places, another mesh."""
    moved = [[(6, 7), (1, 5)], [], [(5, 2)], [(2, 4), (4, 1)]]

    def found(texts, config=ONE):
        rows = make_rows(texts)
        weights = run(make_logits(texts), rows, SHAPE, True, config)[1]
        return {number: weights[rows.segment_ids == number] for inside in texts for number, _ in inside}

    want = found(TEXTS)
    for got in (found(moved), found(TEXTS, MeshConfig(2, 1, 1, 2)), found(moved, MeshConfig(2, 1, 1, 1, 2))):
        for number, weights in got.items():
            np.testing.assert_allclose(weights, want[number], atol=1e-7)


def test_a_source_goes_to_its_expert():
    rows = make_rows(TEXTS)
    shape = dataclasses.replace(SHAPE, by_source=True, served=4)
    experts, weights, sums, per_token = run(make_logits(TEXTS), rows, shape)
    real = rows.segment_ids > 0
    want = np.where(real, rows.source % EXPERTS, NOWHERE)[..., None]
    np.testing.assert_array_equal(experts, want)
    np.testing.assert_array_equal(weights.sum(-1), real)
    np.testing.assert_array_equal(sums.load, [(want == e).sum() for e in range(EXPERTS)])
    assert (per_token, sums.z, sums.dropped) == (1, None, 0)
    without = run(make_logits(TEXTS), dataclasses.replace(rows, source=None), shape)[0]
    np.testing.assert_array_equal(without[..., 0], np.where(real, 4, NOWHERE))


def test_gradients_of_probability_and_z_alone():
    """Loads, entropy and who takes whom have none; a weight has that of its probability."""
    rows, logits = make_rows(TEXTS), make_logits(TEXTS)
    moves = {"load": False, "entropy": False, "dropped": False, "probability": True, "z": True}

    def said(logits):
        real = (rows.segment_ids > 0)[..., None]
        probabilities = jnp.where(real, jax.nn.softmax(logits), 0)
        choice = choose(probabilities, rows, SHAPE)
        sums = sums_of(logits, probabilities, choice, rows, EXPERTS)
        return jnp.stack([choice.weights.sum(), *(getattr(sums, name).max() for name in moves)])

    with jax.set_mesh(sharding.make_mesh(ONE, jax.devices()[:1])):
        slopes = np.asarray(jax.jit(jax.jacrev(said))(logits))
    assert [bool(slope.any()) for slope in slopes] == [True, *moves.values()]
    assert not slopes[:, rows.segment_ids == 0].any()
