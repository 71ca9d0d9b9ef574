"""The train step: the same loss, gradient and weights on every mesh, for every number of micro-batches."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_config

from jaxembed import model_source, sharding
from jaxembed.config import Config, MeshConfig
from jaxembed.data.batch import HARD_NEGATIVE, NO_GROUP, VOID, PairShape
from jaxembed.data.loader import BatchBuilder
from jaxembed.losses.objective import loss_params
from jaxembed.models.text_encoder import flatten
from jaxembed.optimizer import make_optimizer
from jaxembed.step import TrainState, init_state, make_loss, make_step
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
        blueprint, load = model_source.open_source(self.config, pathlib.Path(self.config.data.cache_dir))
        self.data = open_data(self.config, blueprint, self.mesh, {})
        self.factory = blueprint.factory(model_source.options(self.config.model), self.config.seed)
        with jax.set_mesh(self.mesh):
            widths = self.factory.width, 0
            of_loss = jax.eval_shape(lambda: loss_params(self.config, *widths))
            abstract = {"model": self.factory.abstract(), "loss": of_loss}
            self.optimizer = make_optimizer(self.config.optimizer, self.config.steps, abstract)
            make_state = jax.jit(lambda model: init_state(self.config, self.optimizer, model, *widths))
            self.first = make_state(load(self.factory))
            self._step = jax.jit(self._make_step())

        # One shape, the largest, so that one program is compiled.
        self.builder = BatchBuilder(self.data.plan, **self.data.meta["layout"], rungs=self.data.builder.rungs[-1:])

    def _make_step(self) -> Any:
        return make_step(self.config, self.factory, self.optimizer, self.pair, self.config.steps)

    @property
    def pair(self) -> PairShape:
        return PairShape(self.data.plan.positives, self.data.plan.negatives)

    def batch(self, n: int) -> Any:
        return self.data.to_device(self.builder.build(n)[0], self.mesh)

    def gradient(self, n: int = 0) -> tuple[float, dict[str, np.ndarray]]:
        """The loss of step n and its gradient, dropout on where the config has it."""
        loss = make_loss(self.config, self.factory, self.pair)
        with jax.set_mesh(self.mesh):
            (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
                self.first.params, self.batch(n), jnp.int32(n), {}
            )
        return float(value), host(gradient)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, float]]:
        with jax.set_mesh(self.mesh):
            state, metrics = self._step(state, batch, {})
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


FULL = {"loss__learn_temperature": True, "loss__blocks": ("qd", "dq"), "optimizer__ema": 0.7}
DROPOUT = {"model__dropout": 0.1, "model__attention_dropout": 0.1, "model__attention_kernel": "xla"}


@functools.cache
def bench(folder, mesh: str = "one", dropout: bool = False, **changes: Any) -> Bench:
    """The full set-up on a mesh, made and compiled once."""
    config = tiny_config(folder, **FULL, **(DROPOUT if dropout else {}), **changes)
    return Bench(config, MESHES.get(mesh, ONE))


@functools.cache
def reference_gradient(folder, dropout: bool) -> tuple[float, dict[str, np.ndarray]]:
    return bench(folder, dropout=dropout).gradient()


@functools.cache
def reference_training(folder) -> tuple[TrainState, list[float]]:
    return bench(folder).train(20)


def test_the_batch_holds_every_turn_of_the_relation(folder):
    """What the comparisons below rest on."""
    batch, _ = bench(folder).builder.build(0)
    q, d = batch.queries, batch.documents
    assert set(q.source) == {0, 1} and len(set(q.scope)) == 2
    assert (d.pair == VOID).any()
    assert ((d.rank == HARD_NEGATIVE) & (d.pair != VOID)).any() and (d.rank == 1).any()
    groups, counts = np.unique(q.group[q.group != NO_GROUP], return_counts=True)
    assert len(groups) > 1 and counts.max() > 1
    real = d.text[d.pair != VOID]
    assert len(np.unique(real)) < len(real) and np.isin(q.text, real).any()


@pytest.mark.parametrize(("mesh", "dropout"), [(mesh, "tensor" in mesh or "sequence" in mesh) for mesh in MESHES])
def test_loss_and_gradient_do_not_depend_on_the_mesh(folder, mesh, dropout):
    want, want_gradient = reference_gradient(folder, dropout)
    got, got_gradient = bench(folder, mesh, dropout).gradient()
    assert abs(got - want) <= TOLERANCE * abs(want)
    assert want_gradient["loss/infonce/log_temperature"] != 0
    assert_near(got_gradient, want_gradient)


def test_dropout_changes_the_loss(folder):
    plain, noisy = (reference_gradient(folder, dropout)[0] for dropout in (False, True))
    assert abs(plain - noisy) > 1e-3 * plain


@pytest.mark.parametrize("mesh", ["fsdp 8", "data 2, fsdp 2, tensor 2"])
def test_twenty_adamw_steps_do_not_depend_on_the_mesh(folder, mesh):
    want, want_losses = reference_training(folder)
    got, got_losses = bench(folder, mesh).train(20)
    np.testing.assert_allclose(got_losses, want_losses, rtol=TOLERANCE)
    assert int(got.step) == 20
    got, want = (
        # Adam scales the rounding that is a key's bias's gradient up to whole steps; nothing else depends on it.
        {path: x for path, x in host(state.params | {"average": state.average}).items() if not path.endswith(KEY_BIAS)}
        for state in (got, want)
    )
    assert_near(got, want)


EVERYTHING = {
    "losses": (
        {
            "blocks": ("qd", "dq", "qq", "dd"),
            "learn_temperature": True,
            "false_negatives": "absolute",
            "mixed_negatives": 2,
        },
        {"name": "sigmoid", "bias": -3.0, "weight": 0.1},
        {"name": "spread_out"},
    ),
    "matryoshka": {"dims": (16,), "layers": (1,), "pairs": "zip", "kl": 0.5},
}


@pytest.mark.parametrize(("micro_batches", "mesh"), [(16, "one"), (4, "data 2, fsdp 2, tensor 2")])
def test_gradient_caching_changes_nothing(folder, micro_batches, mesh):
    """Several losses at several sizes, dropout on."""
    want, want_gradient = everything_at_once(folder)
    got, got_gradient = Bench(everything(folder, micro_batches), MESHES.get(mesh, ONE)).gradient()
    assert abs(got - want) <= TOLERANCE * abs(want)
    for name in ("infonce/log_temperature", "sigmoid/bias"):
        assert want_gradient[f"loss/{name}"] != 0
    assert_near(got_gradient, want_gradient)


def everything(folder, micro_batches: int) -> Config:
    return tiny_config(folder, grad_cache=micro_batches, **EVERYTHING, **DROPOUT)


@functools.cache
def everything_at_once(folder) -> tuple[float, dict[str, np.ndarray]]:
    return Bench(everything(folder, 1), ONE).gradient()


def test_a_loss_that_is_not_finite_changes_nothing_but_the_metrics(folder):
    b = bench(folder)
    state, _ = b.step(b.first, b.batch(0))
    good = b.batch(1)
    weight = jnp.nan * good.queries.weight
    broken = dataclasses.replace(good, queries=dataclasses.replace(good.queries, weight=weight))
    after, metrics = b.step(state, broken)
    assert not np.isfinite(metrics["loss"])
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), after, state))
    went_on, metrics = b.step(after, good)
    assert np.isfinite(metrics["loss"]) and int(went_on.step) == 2


def test_the_average_is_that_of_the_weights_after_each_step(folder):
    b, decay = bench(folder), FULL["optimizer__ema"]
    state = b.first
    want = {path: np.asarray(x, np.float64) for path, x in host(state.params["model"]).items()}
    for n in range(3):
        state, _ = b.step(state, b.batch(n))
        now = host(state.params["model"])
        want = {path: decay * old + (1 - decay) * now[path] for path, old in want.items()}
    for path, got in host(state.average).items():
        np.testing.assert_allclose(got, want[path], rtol=1e-6, atol=1e-7, err_msg=path)
    assert state.served is state.average and b.first.average.keys() == state.params["model"].keys()


def test_frozen_parameters_stay_to_the_bit_and_have_no_moments(folder):
    rules = (("embeddings/", 0.0), ("mlp/up", 0.0), ("embeddings/norm", 0.5))
    b = Bench(tiny_config(folder, optimizer__by_regex=rules), ONE)
    state, _ = b.train(3)
    assert state.served is state.params["model"]  # no average was asked for
    frozen = lambda path: ("embeddings/" in path or "mlp/up" in path) and "embeddings/norm" not in path  # noqa: E731
    before, after = host(b.first.params), host(state.params)
    assert sum(map(frozen, before)) == 5
    for path in before:
        assert (before[path] == after[path]).all() == frozen(path), path
    leaves = jax.tree_util.tree_leaves_with_path(state.optimizer)
    moments = ["/".join(str(getattr(k, "key", k)) for k in path) for path, leaf in leaves if leaf.ndim > 0]
    assert len(moments) == 2 * sum(not frozen(path) for path in before)
    assert not any("token/embedding" in name or "mlp/up" in name for name in moments)


def test_every_leaf_of_the_state_lies_on_the_mesh(folder):
    b = bench(folder, "data 2, fsdp 2, tensor 2")
    state, _ = b.step(b.first, b.batch(0))
    for tree in (b.first, state):
        assert all(isinstance(x.sharding, jax.sharding.NamedSharding) for x in jax.tree.leaves(tree))
        assert {x.sharding.mesh.size for x in jax.tree.leaves(tree)} == {8}
    split = [x for x in jax.tree.leaves(state.params["model"]) if not x.sharding.is_fully_replicated]
    assert len(split) >= 8
