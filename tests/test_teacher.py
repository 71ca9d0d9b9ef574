"""A teacher in the loop: its vectors of a batch are those it gives alone, whatever its tokenizer, mesh and batches."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from test_embedder import changed, make
from test_trainer import assert_same_bits, repeatable, saved
from tiny_run import SHALLOW, SHAPE, WORDS, tiny_config, train_on, write_tokenizer

from jaxembed import model_source, sharding
from jaxembed.config import Config, MeshConfig, TeacherConfig
from jaxembed.data.batch import VOID, PairShape
from jaxembed.data.rungs import worst_case_rows
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.models.text_encoder import flatten
from jaxembed.step import encode
from jaxembed.training_data import TrainingData, open_data

MESHES = {"one": MeshConfig(1), "data 2, fsdp 2, tensor 2": MeshConfig(2, 2, 2)}
GUIDED = {"loss__false_negatives": "teacher", "loss__false_negative_margin": 0.0}
PROMPTS = {"query": "find: ", "document": "text, "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("teacher")


def write_spelling_tokenizer(path):
    """Writes a tokenizer.json that knows no words and spells all of them; returns its path."""
    said = json.loads(write_tokenizer(path).read_text())
    pieces = [piece for piece in said["model"]["vocab"] if piece not in WORDS]
    said["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    path.write_text(json.dumps(said))
    return path


@pytest.fixture(scope="module")
def teachers(folder):
    """Exported folders: one that reads as the model does, one with tokens, prompts, lengths and a width of its own."""
    make(folder, model__shape=SHALLOW).save(folder / "alike")
    (folder / "spelling").mkdir()
    spelling = {
        "tokenizer": f"file:{write_spelling_tokenizer(folder / 'spelling' / 'tokenizer.json')}",
        "model__shape": SHAPE | {"hidden_size": 16, "max_position_embeddings": 60},
        "model__projection": 24,
        "prompts": PROMPTS,
    }
    model = make(folder, **spelling)
    changed(model, max_length=50).save(folder / "other")
    return {name: folder / name for name in ("alike", "other")}


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a run with a teacher opens."""

    config: Config
    mesh: jax.sharding.Mesh
    teacher: model_source.Teacher
    data: TrainingData


def opened(folder, teacher, mesh="one", meta=None, **changes):
    config = tiny_config(folder, teacher__init=f"hf:{teacher}", **GUIDED, **changes)
    devices = int(np.prod(dataclasses.astuple(MESHES[mesh])))
    device_mesh = sharding.make_mesh(MESHES[mesh], jax.devices()[:devices])
    blueprint, _ = model_source.open_source(config, folder)
    found = model_source.open_teacher(config.teacher)
    return Opened(config, device_mesh, found, open_data(config, blueprint, device_mesh, meta or {}, found.blueprint))


def texts_of(config):
    """The texts of each source, numbered as its cache numbers them."""
    paths = (pathlib.Path(source.path) for source in config.data.train)
    records = [list(map(json.loads, path.read_text().splitlines())) for path in paths]
    return [[text for r in rows for text in (r["query"], *r["positive"], *r["negative"])] for rows in records]


@pytest.mark.parametrize(
    ("name", "mesh", "micro_batches"),
    [
        ("alike", "data 2, fsdp 2, tensor 2", 2),
        ("other", "one", 1),
        ("other", "one", 2),
        ("other", "data 2, fsdp 2, tensor 2", 1),
        ("other", "data 2, fsdp 2, tensor 2", 2),
    ],
)
def test_vectors_of_a_batch_are_those_of_the_teacher_alone(folder, teachers, name, mesh, micro_batches):
    at = opened(folder, teachers[name], mesh, grad_cache=micro_batches, data__max_length__query=30)
    plan, (batch, _) = at.data.plan, at.data.builder.build(3)
    assert (batch.teacher_rows is None) == (name == "alike")
    pair = PairShape(plan.positives, plan.negatives, plan.negative_queries)
    with jax.set_mesh(at.mesh):
        params = at.teacher.load(at.teacher.factory)
        on_mesh = at.data.to_device(batch, at.mesh)
        rows = on_mesh.rows if on_mesh.teacher_rows is None else on_mesh.teacher_rows
        run = jax.jit(lambda params, rows: encode(at.teacher.factory, params, rows, plan.batch_size, pair.texts))
        queries, documents = (np.asarray(x)[0] for x in run(params, rows)[0])

    step, texts = plan.step(3), texts_of(at.config)
    numbers, source = step.texts_BxT[batch.queries.pair], step.source_B[batch.queries.pair]
    real = batch.documents.pair != VOID
    np.testing.assert_array_equal(real, numbers[:, 1 : 1 + pair.documents] >= 0)
    alone = Embedder.load(teachers[name], mesh=at.mesh)
    short = changed(alone, max_length=30)  # config.data.max_length.query
    want = short.encode_query([texts[s][n] for s, n in zip(source, numbers[:, 0])])
    assert np.abs(queries - want).max() <= 1e-5
    want = alone.encode_document([texts[source[i]][numbers[i, 1 + j]] for i, j in np.argwhere(real)])
    assert np.abs(documents[real] - want).max() <= 1e-5
    assert real.sum() > 50 and want.std(0).min() > 0.01


def test_rungs_of_both_go_together(folder, teachers):
    data = opened(folder, teachers["other"], data__row_length="48").data
    builder, teacher = data.builder, data.builder.teacher
    assert teacher.row_length == 56 and len(builder.rungs) == len(teacher.rungs) <= 7
    assert list(builder.rungs) == sorted(builder.rungs) and list(teacher.rungs) == sorted(teacher.rungs)
    texts = 32 * data.plan.texts_per_pair
    assert builder.rungs[-1] == worst_case_rows(texts, 48, data.plan.max_length)
    assert teacher.rungs[-1] == worst_case_rows(texts, 56, teacher.plan.max_length)
    built = [builder.build(n)[0] for n in range(300, 340)]
    used = {(b.rows.tokens.shape[1], b.teacher_rows.tokens.shape[1]) for b in built}
    assert used <= set(zip(builder.rungs, teacher.rungs)) and len(used) > 1
    filled = [(b.teacher_rows.segment_ids[0] > 0).any(1).mean() for b in built]
    assert np.mean(filled) > 0.9  # and are no longer than needed


def test_a_run_that_goes_on_keeps_its_rungs(folder, teachers):
    kept = opened(folder, teachers["other"]).data.meta
    kept |= {"rungs": [70, 80, 200], "teacher_rungs": [150, 160, 300]}
    builder = opened(folder, teachers["other"], meta=kept).data.builder
    assert builder.rungs == (70, 80, 200) and builder.teacher.rungs == (150, 160, 300)
    for other in (kept | {"teacher_row_length": 8}, kept | {"layout": {}}):
        builder = opened(folder, teachers["other"], meta=other).data.builder
        assert builder.rungs != (70, 80, 200) and len(builder.teacher.rungs) == len(builder.rungs)
    assert opened(folder, teachers["alike"]).data.meta["teacher_rungs"] == []


def test_only_the_named_shards_of_a_teachers_rows_are_filled(folder, teachers):
    builder = opened(folder, teachers["other"], "data 2, fsdp 2, tensor 2").data.builder
    whole, part = builder.build(0)[0].teacher_rows, builder.build(0, shards=(1, 2))[0].teacher_rows
    own = np.isin(np.arange(whole.tokens.shape[1]) * 4 // whole.tokens.shape[1], (1, 2))
    np.testing.assert_array_equal(part.tokens[:, own], whole.tokens[:, own])
    assert whole.tokens[:, ~own].any() and not part.tokens[:, ~own].any()


def test_records_that_only_one_of_them_can_read(folder, teachers, tmp_path):
    """Without special tokens a text of control characters has no token, and its record is skipped."""
    at = opened(folder, teachers["alike"])
    said = json.loads(write_tokenizer(tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(said | {"post_processor": None}))
    bare = dataclasses.replace(
        at.teacher.blueprint, tokenizer=Tokenizer.load(f"file:{tmp_path / 'tokenizer.json'}"), max_length=40
    )
    rows = [{"query": "kaka", "positive": "lolo"}, {"query": "\x01", "positive": "mimi"}]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(tmp_path, data__train=({"path": str(tmp_path / "odd.jsonl")},), data__on_bad_record="skip")
    blueprint, _ = model_source.open_source(config, tmp_path)
    message = (
        r"train\[0\]: the model reads 2 records of odd.jsonl, the teacher 1: remove .*odd.jsonl:2: a text has no tok"
    )
    with pytest.raises(UserError, match=message):
        open_data(config, blueprint, at.mesh, {}, bare)


def test_a_teacher_is_held_in_the_dtype_of_its_computation(teachers):
    found = model_source.open_teacher(TeacherConfig(f"hf:{teachers['other']}", "bfloat16"))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1), jax.devices()[:1])):
        params = flatten(found.load(found.factory))
        assert {leaf.dtype.name for leaf in params.values()} == {"bfloat16"}
        assert (found.factory.width, found.factory.depth) == (24, 2)
    assert model_source.open_teacher(TeacherConfig()) is None


@pytest.fixture(scope="module")
def taught(folder, teachers):
    """The config of a short guided run, and its workdir; the teacher is a run's folder of the other kind."""
    config = tiny_config(
        folder,
        teacher__init=f"hf:{teachers['other']}",
        **GUIDED,
        steps=6,
        batch_size=16,
        model__shape=SHALLOW,
        data__row_length="40",
        checkpoint__every=3,
        export=False,
        grad_cache=2,
    )
    train_on(2, config, folder / "taught")
    return config, folder / "taught"


def test_a_guided_run_goes_on_with_the_same_bits(folder, taught):
    config, workdir = taught
    again = folder / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "6")
    train_on(2, config, again)
    assert repeatable(again) == repeatable(workdir) and len(repeatable(again)) == 6
    assert_same_bits(saved(again), saved(workdir))


def test_a_teacher_guides_and_is_in_no_checkpoint(folder, taught):
    config, workdir = taught
    alone = dataclasses.replace(
        config,
        teacher=TeacherConfig(),
        loss=dataclasses.replace(config.loss, false_negatives="keep", false_negative_margin=0.1),
    )
    train_on(2, alone, folder / "alone")
    theirs, ours = saved(folder / "alone"), saved(workdir)
    assert {path: x.shape for path, x in theirs.items()} == {path: x.shape for path, x in ours.items()}
    assert repeatable(folder / "alone")[0]["loss"] > repeatable(workdir)[0]["loss"]  # fewer negatives are left


def test_a_run_can_be_the_teacher(folder, taught):
    _, workdir = taught
    found = model_source.open_teacher(TeacherConfig(f"run:{workdir}@3"))
    mesh = sharding.make_mesh(MeshConfig(1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = flatten(found.load(found.factory))
    want = flatten(Embedder.load(f"{workdir}@3", mesh=mesh).params)
    newest = flatten(Embedder.load(workdir, mesh=mesh).params)
    assert params.keys() == want.keys()
    for path, leaf in params.items():
        np.testing.assert_array_equal(leaf, want[path])
    assert any((leaf != newest[path]).any() for path, leaf in params.items())


def test_a_teacher_that_is_not_there_is_missed_before_anything_is_written(folder):
    with pytest.raises(UserError, match="hf:nowhere"):
        train_on(1, tiny_config(folder, teacher__init="hf:nowhere", **GUIDED), folder / "missed")
    assert not (folder / "missed").exists()
