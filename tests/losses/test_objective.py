"""The sum of losses over sources and sizes, against the losses themselves."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from embedded_cases import assert_same, define, evaluate, make_case
from test_infonce import define_infonce

from jaxembed.config import Config, DataConfig, LossConfig, MatryoshkaConfig, ModelConfig, SourceConfig
from jaxembed.losses.embedded import Embedded
from jaxembed.losses.infonce import infonce
from jaxembed.losses.objective import Size, loss_params, objective, sizes_of, terms_of
from jaxembed.losses.ranking import cosent

INFONCE = LossConfig(temperature=0.1)
COSENT = LossConfig(name="cosent", temperature=0.05, weight=0.5)


def make_config(losses: tuple[LossConfig, ...] = (), by_source: tuple = ((), ()), **changes: object) -> Config:
    sources = tuple(SourceConfig(path="x", losses=labels) for labels in by_source)
    return Config(loss=INFONCE, losses=losses, data=DataConfig(train=sources), **changes)


def run(config: Config, *depths: Embedded, params: dict | None = None) -> tuple[float, dict[str, float]]:
    params = loss_params(config, depths[0].queries.shape[1], 6) if params is None else params
    value, metrics = jax.jit(lambda depths: objective(config, params, depths))(list(depths))
    return float(value), {name: float(x) for name, x in metrics.items()}


def only(case: Embedded, source: int) -> Embedded:
    texts = dataclasses.replace(
        case.query_texts, weight=np.where(case.query_texts.source == source, case.query_texts.weight, 0)
    )
    return dataclasses.replace(case, query_texts=texts)


def cut(case: Embedded, width: int) -> Embedded:
    def unit(x: np.ndarray) -> np.ndarray:
        x = x[..., :width]
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    return dataclasses.replace(case, queries=unit(case.queries), documents=unit(case.documents))


@pytest.fixture(scope="module")
def case() -> Embedded:
    return make_case(3)


def test_one_loss_is_itself(case):
    value, metrics = run(make_config(), case)
    want, more = infonce(case, temperature=0.1)
    assert value == pytest.approx(float(want), rel=1e-6)
    assert metrics == {"accuracy": pytest.approx(float(more["accuracy"])), "temperature": pytest.approx(0.1)}


def test_each_source_trains_its_own_loss(case):
    config = make_config((INFONCE, COSENT), (("infonce",), ("cosent",)))
    value, metrics = run(config, case)
    first, second = infonce(only(case, 0), temperature=0.1)[0], cosent(only(case, 1), temperature=0.05)[0]
    assert value == pytest.approx(float(first + 0.5 * second), rel=1e-6)
    assert metrics["loss/infonce"] == pytest.approx(float(first), rel=1e-6)
    assert metrics["loss/cosent"] == pytest.approx(float(second), rel=1e-6)
    assert {"accuracy/infonce", "temperature/infonce", "temperature/cosent"} <= metrics.keys()


def test_a_source_without_names_trains_all_losses():
    terms = terms_of(make_config((INFONCE, COSENT), ((), ("cosent",))))
    assert [(term.label, term.sources) for term in terms] == [("infonce", (0,)), ("cosent", (0, 1))]


def test_sizes():
    dims = MatryoshkaConfig(dims=(4, 2))
    assert sizes_of(dims) == (Size(), Size(0, 0, 4), Size(0, 0, 2))
    grid = sizes_of(MatryoshkaConfig(dims=(4,), layers=(2, 1)))
    assert [size.label for size in grid] == ["full", "dim4", "layers2", "layers2_dim4", "layers1", "layers1_dim4"]
    assert sizes_of(MatryoshkaConfig(dims=(4, 2), layers=(2, 1), pairs="zip")) == (Size(), Size(1, 2, 4), Size(2, 1, 2))


def test_matryoshka_is_the_weighted_mean_over_widths(case):
    config = make_config(matryoshka=MatryoshkaConfig(dims=(4, 2), weights=(1.0, 0.5, 2.0)))
    value, metrics = run(config, case)
    losses = [float(infonce(x, temperature=0.1)[0]) for x in (case, cut(case, 4), cut(case, 2))]
    assert value == pytest.approx(np.average(losses, weights=(1, 0.5, 2)), rel=1e-6)
    assert [metrics[f"loss/{size}"] for size in ("full", "dim4", "dim2")] == pytest.approx(losses, rel=1e-6)


def test_vectors_of_any_length_are_cut_and_left_so():
    case = make_case(3, unit=False)
    config = make_config(matryoshka=MatryoshkaConfig(dims=(4,)), model=ModelConfig(normalize=False))
    short = dataclasses.replace(case, queries=case.queries[..., :4], documents=case.documents[..., :4])
    losses = [float(infonce(x, temperature=0.1)[0]) for x in (case, short)]
    assert run(config, case)[0] == pytest.approx(np.mean(losses), rel=1e-6)


def test_depths_are_sizes_too(case):
    shallow = make_case(4)
    shallow = dataclasses.replace(case, queries=shallow.queries, documents=shallow.documents)
    config = make_config(matryoshka=MatryoshkaConfig(dims=(4,), layers=(1,), pairs="zip"))
    losses = [float(infonce(x, temperature=0.1)[0]) for x in (case, cut(shallow, 4))]
    value, metrics = run(config, case, shallow)
    assert value == pytest.approx(np.mean(losses), rel=1e-6)
    assert metrics["loss/layers1_dim4"] == pytest.approx(losses[1], rel=1e-6)


def divergence(case: Embedded, width: int, temperature: float) -> float:
    """KL(full || cut) over the documents that a query is compared with and its positives, in float64."""
    from test_infonce import drawn, negatives

    small, total, weights = cut(case, width), 0.0, 0.0
    for i, weight in enumerate(case.query_texts.weight):
        if weight == 0:
            continue
        columns = [*negatives(case, "qd", "all", (i, -1)), *((i, p) for p in drawn(case, i))]
        full, cut_scores = (
            np.array([np.float64(c.queries[i]) @ np.float64(c.documents[j, d]) for j, d in columns]) / temperature
            for c in (case, small)
        )
        logs = [x - np.log(np.exp(x - x.max()).sum()) - x.max() for x in (full, cut_scores)]
        total += weight * (np.exp(logs[0]) * (logs[0] - logs[1])).sum()
        weights += weight
    return total / weights


def test_smaller_sizes_are_drawn_to_the_full_one(case):
    config = make_config(matryoshka=MatryoshkaConfig(dims=(4,), kl=0.7))
    value, metrics = run(config, case)
    want = divergence(case, 4, 0.1)
    losses = [float(infonce(x, temperature=0.1)[0]) for x in (case, cut(case, 4))]
    assert want > 0.05
    assert metrics["divergence/dim4"] == pytest.approx(want, rel=1e-5)
    assert value == pytest.approx((losses[0] + losses[1] + 0.7 * want) / 2, rel=1e-6)


def objective_of(config: Config):
    def loss(e: Embedded, **learned: jax.Array) -> tuple[jax.Array, dict]:
        params = {"infonce": {"log_temperature": learned["log_temperature"]}} if learned else {}
        return objective(config, params, [e])

    return loss


EVERYTHING = objective_of(
    make_config(
        (dataclasses.replace(INFONCE, learn_temperature=True, exchange="ring", tile=5), COSENT),
        ((), ("cosent",)),
        matryoshka=MatryoshkaConfig(dims=(4,), kl=0.5),
    )
)


@pytest.mark.parametrize("mesh", ["data 8", "data 4 x fsdp 2"])
def test_devices_change_nothing(case, mesh):
    learned = {"log_temperature": math.log(0.1)}
    want = evaluate(EVERYTHING, case, "1", learned)
    assert want.gradients["log_temperature"] != 0
    assert_same(evaluate(EVERYTHING, case, mesh, learned), want)


def test_the_full_size_learns_nothing_from_the_divergence(case):
    """The gradient of the divergence, alone: finite differences see the full size as a constant."""
    weights = MatryoshkaConfig(dims=(4,), weights=(0.0, 1.0))
    both, plain = (make_config(matryoshka=dataclasses.replace(weights, kl=kl)) for kl in (1.0, 0.0))

    def value(config: Config, queries: jax.Array) -> jax.Array:
        return objective(config, {}, [dataclasses.replace(case, queries=queries)])[0]

    gradients = [jax.grad(value, argnums=1)(config, jnp.asarray(case.queries)) for config in (both, plain)]
    of_divergence = np.asarray(gradients[0] - gradients[1])
    assert np.abs(of_divergence[:, :4]).max() > 1e-3
    assert not of_divergence[:, 4:].any()


def test_own_parameters_by_label():
    losses = (
        dataclasses.replace(INFONCE, learn_temperature=True),
        LossConfig(name="sigmoid", bias=-5.0),
        LossConfig(name="match", label="jasper"),
        LossConfig(name="spread_out"),
    )
    params = loss_params(make_config(losses), 8, 6)
    assert {label: set(own) for label, own in params.items()} == {
        "infonce": {"log_temperature"},
        "sigmoid": {"bias"},
        "jasper": {"projection"},
    }
    assert params["jasper"]["projection"].shape == (8, 6) and params["sigmoid"]["bias"] == -5
    assert "jasper" not in loss_params(make_config(losses), 8, 8)


def test_a_learned_temperature_stays_above_its_bound(case):
    config = make_config((dataclasses.replace(INFONCE, learn_temperature=True),))
    low = {"infonce": {"log_temperature": jnp.float32(math.log(1e-4))}}
    assert run(config, case, params=low)[1]["temperature"] == pytest.approx(0.01)
    slope = jax.grad(lambda params: objective(config, params, [case])[0])(low)
    assert slope["infonce"]["log_temperature"] != 0  # it can rise again


def test_the_definition_of_infonce_at_a_width(case):
    config = make_config(matryoshka=MatryoshkaConfig(dims=(4,), weights=(0.0, 1.0)))
    want = define(define_infonce, cut(case, 4), {"temperature": 0.1})
    assert run(config, case)[0] == pytest.approx(want.value, rel=1e-5)
