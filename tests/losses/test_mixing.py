"""Mixed negatives: what they are made of, how their weights are spread, and that their place does not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from embedded_cases import MESHES, assert_same, emptied, evaluate, make_case, permuted
from scipy import stats

from jaxembed.hashing import uniform
from jaxembed.losses import mixing
from jaxembed.losses.embedded import Embedded, own_scores, weighted_mean
from jaxembed.losses.mixing import mixed_negatives

COUNT = 4


def total(e: Embedded):
    """A loss that all mixtures enter, differently."""
    vectors, present = mixed_negatives(e, COUNT)
    scores = own_scores(e.queries, vectors, present) * jnp.arange(1, 1 + COUNT)
    return weighted_mean(scores.sum(1), e.weights), {}


@jax.jit
def mix(case: Embedded):
    return mixed_negatives(case, COUNT)


def test_mixtures_are_convex_combinations_of_a_pairs_own_hard_negatives():
    case = make_case(1, negatives=3)
    vectors, there = jax.tree.map(np.asarray, mix(case))
    present = case.present[:, 2:]
    assert (there == (present.sum(1) > 1)[:, None]).all() and there.any() and not there.all()
    assert vectors.shape == (16, COUNT, 8) and vectors.dtype == np.float32 and not vectors[~there].any()
    zeros = (case.weights == 0) & ~np.abs(case.queries).any(1)
    for i, c in zip(*np.nonzero(there & ~zeros[:, None])):
        own = case.documents[i, 2:][present[i]]
        weights, *_ = np.linalg.lstsq(own.T.astype(np.float64), vectors[i, c], rcond=None)
        assert np.abs(own.T @ weights - vectors[i, c]).max() < 1e-5 and np.linalg.norm(vectors[i, c]) == pytest.approx(
            1, rel=1e-5
        )
        shares = weights / weights.sum()
        assert (shares > -1e-5).all() and (shares > 1e-5).sum() == (2 if c % 2 == 0 else len(own))


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_devices_and_places_do_not_matter(mesh):
    case = make_case(2)
    one = evaluate(total, case)
    assert_same(evaluate(total, case, mesh), one)
    order = np.random.default_rng(0).permutation(16)
    moved = evaluate(total, permuted(case, order), mesh)
    gradients = {name: x[np.argsort(order)] for name, x in moved.gradients.items()}
    assert_same(dataclasses.replace(moved, gradients=gradients), one)
    another = evaluate(total, dataclasses.replace(case, seed=np.uint32(5)))
    assert abs(another.value - one.value) > 1e-3 * abs(one.value)


def test_the_gradient_flows_through_the_hard_negatives_alone_as_if_the_weights_were_constants():
    case = make_case(3)
    gradient = evaluate(total, case).gradients["documents"]
    step, direction = 1e-2, np.random.default_rng(1).normal(size=case.documents.shape).astype(np.float32)
    direction[:, :2] = 0
    direction[~case.present] = 0
    weights, total_weight = case.weights, case.weights.sum()

    def value(documents):
        """The definition in float64, with the weights of the mixtures of the case as it stands."""
        result = 0.0
        for i in range(16):
            present = case.present[i, 2:]
            if weights[i] == 0 or present.sum() < 2:
                continue
            own = documents[i, 2:][present]
            for c in range(COUNT):
                mixed = own.T @ shares[i, c][present]
                result += weights[i] * (c + 1) * case.queries[i] @ mixed / np.linalg.norm(mixed)
        return result / total_weight

    shares = np.zeros((16, COUNT, 3))
    vectors = np.asarray(mix(case)[0], np.float64)
    for i in range(16):
        present = case.present[i, 2:]
        for c in range(COUNT):
            shares[i, c][present] = np.linalg.lstsq(
                case.documents[i, 2:][present].T.astype(np.float64), vectors[i, c], rcond=None
            )[0]
    up, down = (value(case.documents + np.float64(sign * step) * direction) for sign in (1, -1))
    assert (gradient * direction).sum() == pytest.approx((up - down) / (2 * step), rel=2e-3)
    assert not gradient[:, :2].any() and not gradient[case.weights == 0].any()


def test_an_empty_step_has_no_mixtures():
    got = evaluate(total, emptied(make_case(1)))
    assert got.value == 0 and not any(x.any() for x in got.gradients.values())


def test_shares_are_spread_as_they_should_be():
    pairs = 4096
    case = make_case(0, pairs=16)
    texts = jax.tree.map(lambda x: np.zeros((pairs, *x.shape[1:]), x.dtype), case.query_texts)
    texts = dataclasses.replace(texts, pair=np.arange(pairs, dtype=np.int32))
    numbers = jax.jit(lambda e: mixing._bits(e, 2, 4))(dataclasses.replace(case, query_texts=texts))
    draws = np.asarray(uniform(numbers))
    assert draws.min() > 0 and draws.max() < 1
    for column in draws.reshape(pairs, -1).T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    correlations = np.corrcoef(draws.reshape(pairs, -1).T) - np.eye(8)
    assert np.abs(correlations).max() < 0.06  # 4 standard deviations
    shares = np.asarray(mixing._beta_2_2(jnp.asarray(draws[:, 0, 0])))
    assert stats.kstest(shares, stats.beta(2, 2).cdf).pvalue > 1e-3
