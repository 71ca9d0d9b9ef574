"""Training adapters: what is trained, kept and given, on every mesh; resumed, served, exported."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_embedder import make
from test_step import assert_near, host
from test_trainer import assert_same_bits, repeatable, saved
from tiny_run import SHAPE, sentence, tiny_config, train_on, write_lines, write_pairs

from jaxembed import model_source, sharding
from jaxembed.checkpoint import find
from jaxembed.config import LoraConfig, MeshConfig
from jaxembed.data.batch import PairShape
from jaxembed.data.loader import BatchBuilder
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.hf.safetensors_io import open_tensors, write_tensors
from jaxembed.model_source import open_source
from jaxembed.models.text_encoder import flatten, join, split, unflatten
from jaxembed.optimizer import make_optimizer
from jaxembed.step import init_state, make_loss, make_step
from jaxembed.training_data import open_data

ONE, SHARDED = MeshConfig(1), MeshConfig(1, 4, 2)
LORA = {"model__lora__rank": 4, "model__lora__alpha": 8.0, "model__lora__targets": r"query|output\.dense"}
OFF = {"model__lora__rank": 0, "model__lora__alpha": LoraConfig.alpha, "model__lora__targets": ""}
TARGETS = ("attention/out", "attention/query", "mlp/down")
WIDTHS = {"attention/query": (32, (4, 8)), "attention/out": ((4, 8), 32), "mlp/down": (48, 32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def base(folder):
    """A checkpoint's folder."""
    make(folder).save(folder / "base")
    return folder / "base"


def small(folder, base, **changes):
    """A short run over plain pairs that starts from a checkpoint."""
    source = {"path": str(write_pairs(folder / "pairs.jsonl", 100, 7))}
    same = {"model__arch": "auto", "model__shape": {}, "tokenizer": "auto", "steps": 6, "batch_size": 16}
    return tiny_config(folder, **{"model__init": f"hf:{base}", "data__train": (source,)} | same | LORA | changes)


@pytest.fixture(scope="module")
def config(folder, base):
    """Two stages, the second of which moves nothing: it keeps what the first one served."""
    rng = np.random.default_rng(5)
    rows = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": float(i % 6)} for i in range(20)]
    return small(
        folder,
        base,
        steps=0,
        stages=({"name": "one", "steps": 4}, {"name": "two", "steps": 2, "optimizer": {"learning_rate": 0.0}}),
        grad_cache=2,
        checkpoint__every=2,
        checkpoint__keep=3,
        eval__every=6,
        eval__sts=(str(write_lines(folder / "dev.jsonl", rows)),),
        optimizer__ema=0.5,
        optimizer__learning_rate=3e-3,
        optimizer__by_regex=(("adapter/b$", 4.0),),
        model__lora__dropout=0.1,
        model__projection=16,
        model__dtype="bfloat16",
        model__unroll=1,
        log_to=(),
    )


@pytest.fixture(scope="module")
def run(folder, config):
    train_on(2, config, folder / "run")
    return folder / "run"


def stored(workdir, step, part):
    with ocp.StandardCheckpointer() as checkpointer:
        return flatten(checkpointer.restore(find(f"{workdir}@{step}") / part))


def test_checkpoints_hold_adapters_and_head_alone(run):
    """The list of a checkpoint's arrays."""
    shapes = {"projection/kernel": (32, 16)}
    for name in TARGETS:
        inputs, outputs = (tuple(np.ravel(size)) for size in WIDTHS[name])
        shapes[f"backbone/layers/{name}/adapter/a"] = (2, *inputs, 4)
        shapes[f"backbone/layers/{name}/adapter/b"] = (2, 4, *outputs)
    for part in ("model", "average"):
        leaves = stored(run, 4, part)
        assert {path: leaf.shape for path, leaf in leaves.items()} == shapes
        assert {leaf.dtype.name for leaf in leaves.values()} == {"float32"}
        assert all(np.asarray(leaf).any() for leaf in leaves.values())
    moments = [leaf.size for path, leaf in saved(run, 4).items() if "optimizer" in path and leaf.size > 1]
    assert sum(moments) == 2 * sum(np.prod(shape) for shape in shapes.values())


def test_a_stage_goes_on_with_the_adapters_of_the_one_before(run):
    served, kept = stored(run, 4, "average"), stored(run, 6, "model")
    for path, leaf in served.items():
        np.testing.assert_array_equal(kept[path], leaf)


def test_a_run_that_goes_on_gives_the_same_bits(folder, config, run):
    again = folder / "again"
    shutil.copytree(run, again)
    for step in ("4", "6"):
        shutil.rmtree(again / "checkpoints" / step)
    train_on(2, config, again)
    assert repeatable(again) == repeatable(run) and len(repeatable(again)) == 7
    assert_same_bits(saved(again), saved(run))


TEXTS = ["kalo miru", "seto " * 8, "vuni pa", "loka"]


def test_runs_serve_their_base_with_the_adapters_merged(folder, run, base):
    merged = Embedder.load(run)
    assert not any("adapter" in path for path in flatten(merged.params))
    assert {leaf.dtype.name for leaf in flatten(merged.params).values()} == {"float32"}
    vectors = merged.encode(TEXTS)
    exported = Embedder.load(run / "export")
    readme = (run / "export" / "README.md").read_text()
    assert "| trained | low-rank adapters of rank 4 (scale 2), merged here, and the head: " in readme
    np.testing.assert_array_equal(exported.encode(TEXTS), vectors)
    assert flatten(exported.params).keys() == flatten(merged.params).keys()

    # The adapters beside the weights, in float32, by hand.
    model = dataclasses.replace(small(folder, base, model__projection=16).model, dtype="float32")
    blueprint, load = open_source(small(folder, base, model__projection=16), folder)
    factory = blueprint.factory(model_source.options(model), lora=blueprint.lora(model.lora))
    mesh = merged.mesh
    with jax.set_mesh(mesh):
        trained, given = split(load(factory))
        average = stored(run, 6, "average")
        assert flatten(trained).keys() == average.keys()
        leaves = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), unflatten(average), trained)
        unmerged = Embedder(blueprint, factory, join(leaves, given), mesh).encode(TEXTS)
        start = Embedder(blueprint, factory, join(trained, given), mesh).encode(TEXTS)
    assert np.abs(unmerged - vectors).max() <= 1e-5
    assert np.abs(start - vectors).max() > 0.01

    # Another run begins with the same model: with all weights trained, or fresh adapters to all.
    for rank in (0, 2):
        config = small(folder, base, model__init=f"run:{run}", **OFF | {"model__lora__rank": rank})
        blueprint, load = open_source(config, folder)
        lora = blueprint.lora(config.model.lora)
        factory = blueprint.factory(model_source.options(config.model), lora=lora)
        with jax.set_mesh(mesh):
            again = Embedder(blueprint, factory, load(factory), mesh)
        np.testing.assert_allclose(again.encode(TEXTS), vectors, atol=1e-6)
        assert sum("adapter/a" in path for path in flatten(again.params)) == (6 if rank else 0)


def test_a_base_that_is_gone_is_missed_in_one_line(folder, run, base):
    hidden = base.with_name("hidden")
    base.rename(hidden)
    try:
        with pytest.raises(UserError, match=r"run:.*run: its checkpoints hold adapters to .*hf:.*base.*no such folder"):
            Embedder.load(run)
    finally:
        hidden.rename(base)


def test_a_base_that_has_changed_is_refused(folder, config, run, base):
    """A folder's tensors; the step of a run; in training that goes on, too. Where its weights lie does not matter."""
    message = r"the weights of config.model.init = '{}' are not those that its adapters were trained on: put these back"
    second = small(folder, base, model__init=f"run:{run}", steps=1, export=False, log_to=())
    train_on(1, second, folder / "second")
    file, whole = base / "model.safetensors", (base / "model.safetensors").read_bytes()
    tensors = {name: tensor.copy() for name, tensor in open_tensors(base).items()}
    write_tensors(base, tensors, max_shard_bytes=20_000)
    file.unlink()
    Embedder.load(run)
    for name in (base / "model.safetensors.index.json", *base.glob("model-*.safetensors")):
        name.unlink()
    name = "encoder.layer.1.attention.self.value.weight"
    write_tensors(base, tensors | {name: tensors[name] * 1.01})
    try:
        for refused in (lambda: Embedder.load(run), lambda: train_on(2, config, run)):
            with pytest.raises(UserError, match=message.format("hf:.*base")):
                refused()
    finally:
        file.write_bytes(whole)

    Embedder.load(folder / "second")
    moved = folder / "moved"
    run.rename(moved)
    shutil.copytree(moved, run)
    try:
        Embedder.load(folder / "second")
        shutil.rmtree(run / "checkpoints" / "6")
        with pytest.raises(UserError, match=message.format("run:.*run")):
            Embedder.load(folder / "second")
        train_on(2, config, run)  # the same bits, but saved again: nobody can know
        with pytest.raises(UserError, match=message.format("run:.*run")):
            Embedder.load(folder / "second")
    finally:
        shutil.rmtree(run)
        moved.rename(run)


def random(leaf):
    """Numbers in the place of fresh ones: these end in B = 0, which leaves A without a gradient."""
    values = np.random.default_rng(leaf.size).normal(scale=0.2, size=leaf.shape).astype(np.float32)
    return jax.device_put(values, leaf.sharding)


@dataclasses.dataclass
class Bench:
    """The parts of a run's steps on one mesh."""

    config: object
    mesh_config: MeshConfig

    def __post_init__(self):
        size = int(np.prod(dataclasses.astuple(self.mesh_config)))
        self.mesh = sharding.make_mesh(self.mesh_config, jax.devices()[:size])
        blueprint, load = open_source(self.config, pathlib.Path(self.config.data.cache_dir))
        self.data = open_data(self.config, blueprint, self.mesh, {})
        lora = blueprint.lora(self.config.model.lora)
        self.factory = blueprint.factory(model_source.options(self.config.model), self.config.seed, lora)
        self.pair = PairShape(self.data.plan.positives, self.data.plan.negatives)
        with jax.set_mesh(self.mesh):
            trained, base = split(load(self.factory))
            self.params = {"model": jax.tree.map(random, trained), "loss": {}}
            self.given = {"base": base}
        self.builder = BatchBuilder(self.data.plan, **self.data.meta["layout"], rungs=self.data.builder.rungs[-1:])

    def batch(self):
        return self.data.to_device(self.builder.build(0)[0], self.mesh)

    def gradient(self):
        loss = make_loss(self.config, self.factory, self.pair)
        with jax.set_mesh(self.mesh):
            (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
                self.params, self.batch(), jnp.int32(3), self.given
            )
        return float(value), host(gradient)


@functools.cache
def gradient(folder, base, mesh, micro_batches):
    changes = {"model__lora__dropout": 0.2, "model__unroll": 1, "loss__learn_temperature": False}
    return Bench(small(folder, base, grad_cache=micro_batches, **changes), mesh).gradient()


@pytest.mark.parametrize(("mesh", "micro_batches"), [(ONE, 4), (SHARDED, 1)])
def test_meshes_and_micro_batches_do_not_show(folder, base, mesh, micro_batches):
    """With dropout of the adapters' inputs."""
    (loss, got), (want_loss, want) = gradient(folder, base, mesh, micro_batches), gradient(folder, base, ONE, 1)
    assert len(want) == 6
    assert abs(loss - want_loss) <= 1e-5 * abs(want_loss)
    assert_near(got, want)


def test_no_gradient_of_the_base_ever_exists(folder):
    """A step's temporaries stay far below a gradient of the base; with all weights trained they are above."""
    shape = SHAPE | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    source = {"path": str(write_pairs(folder / "pairs.jsonl", 100, 7))}
    config = tiny_config(folder, model__shape=shape, model__unroll=1, batch_size=2, data__train=(source,))
    mesh = sharding.make_mesh(ONE, jax.devices()[:1])
    blueprint, _ = open_source(config, folder)
    data = open_data(config, blueprint, mesh, {})
    temporary = {}
    for rank in (0, 4):
        lora = blueprint.lora(LoraConfig(rank, targets=""))
        factory = blueprint.factory(model_source.options(config.model), lora=lora)
        with jax.set_mesh(mesh):
            trained, base = split(factory.abstract())
            optimizer = make_optimizer(config.optimizer, 6, {"model": trained, "loss": {}})
            state = jax.eval_shape(
                functools.partial(init_state, config, optimizer, width=512, teacher_width=0), trained
            )
            step = make_step(config, factory, optimizer, PairShape(1, 0), 6)
            batch = data.to_device(data.builder.build(0)[0], mesh)
            compiled = jax.jit(step, donate_argnums=0).lower(state, batch, {"base": base}).compile()
        leaves = flatten(join(trained, base)).items()
        kernels = sum(leaf.size * leaf.dtype.itemsize for path, leaf in leaves if path.endswith("kernel"))
        temporary[rank] = compiled.memory_analysis().temp_size_in_bytes / kernels
    assert temporary[4] < 0.6 and temporary[0] > 2


def test_what_cannot_be(folder, base):
    for changes, message in (
        ({"model__init": "scratch", "model__arch": "bert", "model__shape": SHAPE}, "lora.rank = 4: adapters stand on"),
        ({"model__lora__rank": -1}, "lora.rank = -1: must not be negative"),
        ({"model__lora__alpha": 0.0}, "lora.alpha = 0: must be above 0"),
        ({"model__lora__targets": "("}, "is not a regular expression"),
        ({"model__lora__rank": 0}, "lora.alpha = 8.0 is of no use with config.model.lora.rank = 0: set the rank"),
        (OFF | {"model__lora__targets": "q_proj"}, "lora.targets = 'q_proj' is of no use with .*: set the rank"),
        (OFF | {"model__lora__rslora": True}, "lora.rslora = True is of no use with .*: set the rank"),
        ({"model__pooling": "mean", "model__latents": 9}, "model.latents = 9 is of no use with .*pooling = 'mean'"),
        ({"model__pooling": "cls", "model__latent_heads": 2}, "latent_heads = 2 is of no use .*: set that to 'latent'"),
    ):
        with pytest.raises(UserError, match=message):
            small(folder, base, tokenizer=f"hf:{base}", **changes)
    for pooling in ("auto", "latent"):
        small(folder, base, model__pooling=pooling, model__latents=9, model__latent_heads=2)
    config = small(folder, base, model__lora__targets="q_proj")
    message = "config.model.lora.targets = 'q_proj' finds none .*: encoder.layer.attention.self.query; .*output.dense"
    with pytest.raises(UserError, match=message):
        train_on(1, config, folder / "none")
    assert not (folder / "none").exists()
