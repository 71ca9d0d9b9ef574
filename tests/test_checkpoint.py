"""Checkpoints: what is kept, what comes back and onto which devices, and which one a spec names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_run import tiny_config

from jaxembed import run_folder, sharding
from jaxembed.checkpoint import Checkpoints, find, restore_model, split
from jaxembed.config import MeshConfig
from jaxembed.errors import UserError
from jaxembed.metrics import MetricsWriter
from jaxembed.step import TrainState

NAME = "eval/sts/dev"
MESHES = {8: MeshConfig(2, 2, 2), 1: MeshConfig(1)}


def mesh_of(devices):
    return sharding.make_mesh(MESHES[devices], jax.devices()[:devices])


def make_state(value: float, average: bool = True) -> TrainState:
    """A state with all parts, sharded over the mesh in use; to be called under jit."""
    kernel = jax.sharding.reshard(jnp.full((8, 4), value) + jnp.arange(4), P("fsdp", "tensor"))
    model = {"layer": {"kernel": kernel, "bias": jnp.full((3,), value, jnp.bfloat16)}}
    params = {"model": model, "loss": {"log_temperature": jnp.float32(value)}}
    averaged = jax.tree.map(lambda x: x.astype(jnp.float32) + 1, model) if average else {}
    return TrainState(jnp.int32(value), params, optax.adam(1e-3).init(params), averaged)


def state_on(devices, value, average=True):
    with jax.set_mesh(mesh_of(devices)):
        return jax.jit(make_state, static_argnums=(0, 1))(value, average)


def save(workdir, steps, keep=2, best="", scores=None, name=NAME):
    checkpoints = Checkpoints(workdir, keep, best)
    for step in steps:
        metrics = {name: scores[step]} if scores and step in scores else {}
        checkpoints.save(state_on(8, step), step, {"rungs": [step]}, metrics)
    checkpoints.close()


def kept(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("devices", [8, 1])
def test_a_state_comes_back_to_the_bit_on_any_mesh(tmp_path, devices, average):
    checkpoints = Checkpoints(tmp_path)
    saved = state_on(8, 7, average)
    checkpoints.save(saved, 7, {"rungs": [1, 2], "layout": {"shards": 8}}, {})
    checkpoints.wait()
    assert checkpoints.latest() == 7
    assert checkpoints.meta(7) == {"rungs": [1, 2], "layout": {"shards": 8}}
    with jax.set_mesh(mesh_of(devices)):
        got = checkpoints.restore(7, jax.eval_shape(lambda: make_state(0, average)))
    checkpoints.close()
    assert jax.tree.structure(got) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(saved)):
        assert a.dtype == b.dtype and (np.asarray(a) == np.asarray(b)).all()
        assert isinstance(a.sharding, NamedSharding) and a.sharding.mesh.size == devices
    assert got.params["model"]["layer"]["kernel"].sharding.spec == P("fsdp", "tensor")


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, [1, 2, 3, 4], keep=2)
    assert kept(tmp_path) == [3, 4]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    save(tmp_path, [1, 2, 3, 4, 5, 6], keep=1, best=NAME, scores={1: 10.0, 2: 30.0, 4: 20.0, 5: 25.0})
    assert kept(tmp_path) == [2, 6]


def test_the_best_is_known_after_a_restart(tmp_path):
    save(tmp_path, [1, 2], keep=1, best=NAME, scores={1: 30.0, 2: 10.0})
    save(tmp_path, [3, 4], keep=1, best=NAME, scores={3: 20.0})
    assert kept(tmp_path) == [1, 4]


def test_a_metric_that_older_checkpoints_lack_may_become_the_best(tmp_path):
    another = "eval/sts/another"
    save(tmp_path, [1, 2], keep=1, best=another, scores={1: 50.0, 2: 50.0}, name=another)
    save(tmp_path, [3, 4, 5], keep=1, best=NAME, scores={3: 2.0, 4: 1.0, 5: 1.5})
    assert kept(tmp_path) == [3, 5]


def test_a_folder_left_by_a_killed_save_is_no_checkpoint(tmp_path):
    save(tmp_path, [1, 2])
    (tmp_path / "checkpoints" / f"3{ocp.utils.TMP_DIR_SUFFIX}").mkdir()
    assert find(str(tmp_path)).name == "2"
    assert Checkpoints(tmp_path).latest() == 2
    save(tmp_path, [3])
    assert find(str(tmp_path)).name == "3"


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("runs/a", ("runs/a", "")),
        ("runs/a@12", ("runs/a", "12")),
        ("runs/a@best", ("runs/a", "best")),
        ("runs/me@home", ("runs/me@home", "")),
        ("runs/me@home@3", ("runs/me@home", "3")),
    ],
)
def test_specs_are_cut_at_the_last_at(spec, parts):
    folder, which = split(spec)
    assert (str(folder), which) == parts


@pytest.fixture
def run(tmp_path):
    """A folder of a run with checkpoints 1, 3, 4 and 5, scored at 1, 3 and 5; 2, the best, is gone."""
    scores = {1: 10.0, 2: 90.0, 3: 30.0, 5: 20.0}
    save(tmp_path, [1, 3, 4, 5], keep=9)
    config = tiny_config(tmp_path, checkpoint__best=NAME, eval__every=1, eval__sts=("dev.jsonl",), optimizer__ema=0.5)
    run_folder.claim(tmp_path, config)
    writer = MetricsWriter(tmp_path, None)
    for step, score in scores.items():
        writer.write({"step": step, NAME: score})
    writer.close()
    return tmp_path


@pytest.mark.parametrize(("which", "step"), [("", "5"), ("@1", "1"), ("@best", "3")])
def test_a_spec_names_a_checkpoint(run, which, step):
    assert find(f"{run}{which}").name == step


@pytest.mark.parametrize("devices", [8, 1])
def test_the_average_is_what_a_run_serves(run, devices):
    with jax.set_mesh(mesh_of(devices)):
        got = restore_model(f"{run}@3", jax.eval_shape(lambda: make_state(0).params["model"]))
    want = state_on(8, 3).average
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == jnp.float32 and (np.asarray(a) == np.asarray(b)).all()
        assert a.sharding.mesh.size == devices


def test_what_is_not_there_is_named(run, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of step 2; there are 1, 3, 4, 5"):
        find(f"{run}@2")
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        find(str(tmp_path / "elsewhere"))


def test_best_needs_a_run_that_kept_one(tmp_path):
    save(tmp_path, [1])
    run_folder.claim(tmp_path, tiny_config(tmp_path))
    with pytest.raises(UserError, match="that run kept no best checkpoint"):
        find(f"{tmp_path}@best")
