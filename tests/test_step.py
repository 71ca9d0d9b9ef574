"""The train step: the same loss, gradient and weights on every mesh, for every number of micro-batches."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_config

from jaxembed import model_source, sharding
from jaxembed.config import Config, MeshConfig
from jaxembed.data.batch import HARD_NEGATIVE, NO_GROUP, VOID
from jaxembed.data.loader import BatchBuilder
from jaxembed.models.text_encoder import flatten
from jaxembed.optimizer import make_optimizer
from jaxembed.step import TrainState, init_state, loss_params, make_loss, make_step
from jaxembed.training_data import open_data

TOLERANCE = 1e-5  # of losses, gradients and weights, relative to the largest entry of their array
MESHES = {
    "data 8": MeshConfig(8),
    "fsdp 8": MeshConfig(1, 8),
    "data 2, fsdp 2, tensor 2": MeshConfig(2, 2, 2),
    "data 2, expert 2, sequence 2": MeshConfig(2, 1, 1, 2, 2),
}
ONE = MeshConfig(1)
KEY_BIAS = "attention/key/bias"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("step")


@dataclasses.dataclass
class Bench:
    """A run's parts on one mesh, without its loop."""

    config: Config
    mesh_config: MeshConfig

    def __post_init__(self) -> None:
        sizes = [getattr(self.mesh_config, axis) for axis in sharding.AXES]
        self.mesh = sharding.make_mesh(self.mesh_config, jax.devices()[: int(np.prod(sizes))])
        blueprint, load = model_source.open_source(self.config)
        self.data = open_data(self.config, blueprint, self.mesh, {})
        self.factory = blueprint.factory(model_source.options(self.config.model), self.config.seed)
        with jax.set_mesh(self.mesh):
            abstract = {"model": self.factory.abstract(), "loss": jax.eval_shape(lambda: loss_params(self.config))}
            self.optimizer = make_optimizer(self.config.optimizer, self.config.steps, abstract)
            self.first = jax.jit(lambda model: init_state(self.config, self.optimizer, model))(load(self.factory))
            self._step = jax.jit(self._make_step())

        # One shape, the largest, so that one program is compiled.
        self.builder = BatchBuilder(self.data.plan, **self.data.meta["layout"], rungs=self.data.builder.rungs[-1:])

    def _make_step(self) -> Any:
        return make_step(self.config, self.factory, self.optimizer, self.data.plan.positives, self.config.steps)

    def batch(self, n: int) -> Any:
        return self.data.to_device(self.builder.build(n)[0], self.mesh)

    def gradient(self, n: int = 0) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of step n and its gradient, dropout on where the config has it."""
        loss = make_loss(self.config, self.factory, self.data.plan.positives)
        step = jnp.int32(n) if self.config.model.dropout else None
        with jax.set_mesh(self.mesh):
            (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
                self.first.params, self.batch(n), step
            )
        return float(value), host(gradient)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, float]]:
        with jax.set_mesh(self.mesh):
            state, metrics = self._step(state, batch)
        return state, {name: float(x) for name, x in metrics.items()}

    def train(self, steps: int) -> tuple[TrainState, list[float]]:
        state, losses = self.first, []
        for n in range(steps):
            state, metrics = self.step(state, self.batch(n))
            losses.append(metrics["loss"])
        return state, losses


def host(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten(jax.device_get(tree)).items()}


def assert_near(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """max|a - b| / max|b| of every array is at most TOLERANCE.

    A key's bias shifts all scores of a query alike, which softmax does not see: its true gradient is 0, and what is
    computed is rounding. That one array is held against the largest entry of its kernel's gradient.
    """
    assert got.keys() == want.keys()
    for path, b in want.items():
        yardstick = want[path.replace("bias", "kernel")] if path.endswith(KEY_BIAS) else b
        assert np.abs(got[path] - b).max() <= TOLERANCE * np.abs(yardstick).max(), path


FULL = {"loss__learn_temperature": True, "loss__symmetric": True}
DROPOUT = {"model__dropout": 0.1, "model__attention_dropout": 0.1, "model__attention_kernel": "xla"}


@functools.cache
def on_one_device(folder, *changes):
    return Bench(tiny_config(folder, **dict(changes)), ONE)


@functools.cache
def reference_gradient(folder, *changes):
    return on_one_device(folder, *changes).gradient()


@functools.cache
def reference_training(folder):
    return on_one_device(folder, *FULL.items()).train(20)


def test_the_batch_holds_every_turn_of_the_relation(folder):
    """What the comparisons below rest on."""
    bench = on_one_device(folder, *FULL.items())
    batch, _ = bench.builder.build(0)
    q, d = batch.queries, batch.documents
    assert set(q.source) == {0, 1} and len(set(q.scope)) == 2
    assert (d.pair == VOID).any()
    assert ((d.rank == HARD_NEGATIVE) & (d.pair != VOID)).any() and (d.rank == 1).any()
    groups, counts = np.unique(q.group[q.group != NO_GROUP], return_counts=True)
    assert len(groups) > 1 and counts.max() > 1
    real = d.text[d.pair != VOID]
    assert len(np.unique(real)) < len(real) and np.isin(q.text, real).any()


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("mesh", MESHES)
def test_loss_and_gradient_do_not_depend_on_the_mesh(folder, mesh, dropout):
    changes = FULL | (DROPOUT if dropout else {})
    want, want_gradient = reference_gradient(folder, *changes.items())
    got, got_gradient = Bench(tiny_config(folder, **changes), MESHES[mesh]).gradient()
    assert abs(got - want) <= TOLERANCE * abs(want)
    assert want_gradient["loss/log_temperature"] != 0
    assert_near(got_gradient, want_gradient)


def test_dropout_changes_the_loss(folder):
    plain, noisy = (reference_gradient(folder, *(FULL | extra).items())[0] for extra in ({}, DROPOUT))
    assert abs(plain - noisy) > 1e-3 * plain


@pytest.mark.parametrize("mesh", ["data 8", "fsdp 8", "data 2, fsdp 2, tensor 2"])
def test_twenty_adamw_steps_do_not_depend_on_the_mesh(folder, mesh):
    want, want_losses = reference_training(folder)
    got, got_losses = Bench(tiny_config(folder, **FULL), MESHES[mesh]).train(20)
    np.testing.assert_allclose(got_losses, want_losses, rtol=TOLERANCE)
    assert int(got.step) == 20
    got, want = (
        # Adam scales the rounding that is a key's bias's gradient up to whole steps; nothing else depends on it.
        {path: x for path, x in host(state.params).items() if not path.endswith(KEY_BIAS)}
        for state in (got, want)
    )
    assert_near(got, want)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize(("micro_batches", "mesh"), [(2, "data 1"), (4, "data 1"), (2, "data 2, fsdp 2, tensor 2")])
def test_gradient_caching_changes_nothing(folder, micro_batches, mesh, dropout):
    changes = FULL | (DROPOUT if dropout else {})
    want, want_gradient = reference_gradient(folder, *changes.items())
    config = tiny_config(folder, **changes, grad_cache=micro_batches)
    got, got_gradient = Bench(config, MESHES.get(mesh, ONE)).gradient()
    assert abs(got - want) <= TOLERANCE * abs(want)
    assert_near(got_gradient, want_gradient)


def test_a_loss_that_is_not_finite_changes_nothing_but_the_metrics(folder):
    bench = Bench(tiny_config(folder, optimizer__ema=0.9), ONE)
    state, _ = bench.step(bench.first, bench.batch(0))
    broken = bench.batch(1)
    weight = jnp.nan * broken.queries.weight
    broken = dataclasses.replace(broken, queries=dataclasses.replace(broken.queries, weight=weight))
    after, metrics = bench.step(state, broken)
    assert not np.isfinite(metrics["loss"])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), after, state))
    went_on, metrics = bench.step(after, bench.batch(1))
    assert np.isfinite(metrics["loss"]) and int(went_on.step) == 2


def test_the_average_is_that_of_the_weights_after_each_step(folder):
    decay = 0.7
    bench = Bench(tiny_config(folder, optimizer__ema=decay), ONE)
    state = bench.first
    want = {path: np.asarray(x, np.float64) for path, x in host(state.params["model"]).items()}
    for n in range(3):
        state, _ = bench.step(state, bench.batch(n))
        now = host(state.params["model"])
        want = {path: decay * old + (1 - decay) * now[path] for path, old in want.items()}
    for path, got in host(state.average).items():
        np.testing.assert_allclose(got, want[path], rtol=1e-6, atol=1e-7, err_msg=path)
    assert state.served is state.average and bench.first.average.keys() == state.params["model"].keys()
    assert on_one_device(folder, *FULL.items()).first.served is not state.average


def test_frozen_parameters_stay_to_the_bit_and_have_no_moments(folder):
    rules = (("embeddings/", 0.0), ("mlp/up", 0.0), ("embeddings/norm", 0.5))
    bench = Bench(tiny_config(folder, optimizer__by_regex=rules), ONE)
    state, _ = bench.train(3)
    frozen = lambda path: ("embeddings/" in path or "mlp/up" in path) and "embeddings/norm" not in path  # noqa: E731
    before, after = host(bench.first.params), host(state.params)
    assert sum(map(frozen, before)) == 5
    for path in before:
        assert (before[path] == after[path]).all() == frozen(path), path
    leaves = jax.tree_util.tree_leaves_with_path(state.optimizer)
    moments = ["/".join(str(getattr(k, "key", k)) for k in path) for path, leaf in leaves if leaf.ndim > 0]
    assert len(moments) == 2 * sum(not frozen(path) for path in before)
    assert not any("token/embedding" in name or "mlp/up" in name for name in moments)


def test_every_leaf_of_the_state_lies_on_the_mesh(folder):
    bench = Bench(tiny_config(folder, **FULL, optimizer__ema=0.9), MESHES["data 2, fsdp 2, tensor 2"])
    state, _ = bench.step(bench.first, bench.batch(0))
    for tree in (bench.first, state):
        assert all(isinstance(x.sharding, jax.sharding.NamedSharding) for x in jax.tree.leaves(tree))
        assert {x.sharding.mesh.size for x in jax.tree.leaves(tree)} == {8}
    split = [x for x in jax.tree.leaves(state.params["model"]) if not x.sharding.is_fully_replicated]
    assert len(split) >= 8
