"""Layers fitted to a model's vectors, written as a folder: sentence-transformers' vectors, and the command."""

import dataclasses
import io
import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from rich.console import Console
from stored_vectors import write_vectors
from tiny_run import SHALLOW, sentence, tiny_config, write_lines

from jaxembed import head, model_source, sharding
from jaxembed.config import MeshConfig
from jaxembed.distributed import Peers
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.vectors import head_kinds
from jaxembed.vectors.heads import Affine, Sums, fit_pca, require_plain, with_layer

FLAGS = {
    "texts": "",
    "pairs": "",
    "vectors": "",
    "old": "",
    "prompt": "",
    "cache": "",
    "dim": 0,
    "centre": False,
    "rank": 4,
    "ridge": 0.01,
    "side": "both",
    "epochs": 4,
    "batch_size": 16,
    "learning_rate": 0.01,
    "temperature": 0.1,
    "held_out": 0.25,
    "patience": 4,
    "negatives": 1,
    "seed": 0,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("head")


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """All is computed on one device."""
    one = sharding.make_mesh(MeshConfig(1), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: one)
        yield one


def make(folder, mesh, seed=0, **changes):
    """A random tiny model, its biases too."""
    config = tiny_config(folder, model__shape=SHALLOW, prompts={"query": "kaka ", "document": "mimi "}, **changes)
    blueprint, load = model_source.open_source(config, folder)
    factory = blueprint.factory(model_source.options(config.model))
    with jax.set_mesh(mesh):
        rng = np.random.default_rng(seed)
        noisy = jax.tree.map(lambda x: x + rng.normal(scale=0.1, size=x.shape).astype(np.float32), load(factory))
        return Embedder(blueprint, factory, noisy, mesh)


@pytest.fixture(scope="module")
def plain(folder, mesh):
    """Of width 32, vectors of length 1."""
    make(folder, mesh).save(folder / "plain")
    return folder / "plain"


@pytest.fixture(scope="module")
def projected(folder, mesh):
    """With a linear layer to 8, compared by dot products."""
    raw = {"model__normalize": False, "loss__temperature": 1.0}
    model = make(folder, mesh, 1, model__projection=8, **raw)
    blueprint = dataclasses.replace(model.blueprint, similarity="dot")
    Embedder(blueprint, model.factory, model.params, mesh).save(folder / "projected")
    return folder / "projected"


@pytest.fixture(scope="module")
def texts(folder):
    rng = np.random.default_rng(0)
    return write_lines(folder / "texts.jsonl", [{"text": sentence(rng, 6, 8)} for _ in range(80)])


@pytest.fixture(scope="module")
def pairs(folder):
    """Records whose positives have most words of their queries."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(64):
        words = sentence(rng, 8, 8).split()
        kept = [*words[2:6], *sentence(rng, 4, 4).split()]
        rows.append({"query": " ".join(words), "positive": " ".join(rng.permutation(kept)), "negative": sentence(rng)})
    return write_lines(folder / "pairs.jsonl", rows)


def run(monkeypatch, capsys, **values):
    """What the command says: its JSON line, and its screen."""
    flag = types.SimpleNamespace(
        **FLAGS | {name: str(x) if name in ("model", "out") else x for name, x in values.items()}
    )
    monkeypatch.setattr(head.flags, "FLAGS", flag)
    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **said: Console(**{"file": screen, "width": 120, **said}))
    head._fit(Peers())
    return json.loads(capsys.readouterr().out.splitlines()[-1]), screen.getvalue()


def torch_vectors(folder, texts):
    """What sentence-transformers makes of texts, and its modules."""
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return model.encode(texts), [type(module).__name__ for module in model]


def lines(path, key):
    return [json.loads(line)[key] for line in path.read_text().splitlines()]


def test_pca_of_the_vectors_before_their_length(plain, texts, folder, mesh, monkeypatch, capsys):
    out, cache = folder / "pca", folder / "cache"
    said, screen = run(
        monkeypatch, capsys, model=plain, kind="pca", dim=6, texts=str(texts), out=out, cache=str(cache), centre=True
    )
    assert said["texts"] == 80 and said["after"]["dimensions"] == 6 and 0 < said["after"]["variance kept"] < 1
    assert "variance kept" in screen and "1.0000" in screen
    words = lines(texts, "text")
    raw = Embedder.load(plain, mesh=mesh).raw().encode_document(words)
    sums = Sums()
    sums.add(raw)
    layer, kept = fit_pca(sums, 6, True, "")
    assert said["after"]["variance kept"] == pytest.approx(kept)
    want = layer(raw) / np.linalg.norm(layer(raw), axis=1, keepdims=True)
    ours = Embedder.load(out, mesh=mesh)
    assert np.abs(ours.encode_document(words) - want).max() <= 2e-6
    theirs, modules = torch_vectors(out, ["mimi " + text for text in words])
    assert modules == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert np.abs(theirs - want).max() <= 1e-5
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(Embedder, "encode", None)  # a second fit does not encode
    monkeypatch.setattr("jaxembed.export.export_model", lambda *args, **kwargs: None)
    again, _ = run(monkeypatch, capsys, model=plain, kind="whiten", texts=str(texts), out=out, cache=str(cache))
    assert again["before"]["dimensions"] == 32 and abs(again["after"]["mean cosine of two texts"]) < 0.02


def test_a_layer_on_a_model_that_ends_with_one(projected, pairs, folder, mesh, monkeypatch, capsys):
    out = folder / "linear"
    said, screen = run(
        monkeypatch, capsys, model=projected, kind="residual", pairs=str(pairs), out=out, side="query", temperature=20.0
    )
    assert said["pairs"] == 48 and said["held_out"] == 16 and "held-out mrr" in screen
    assert said["best"] and said["after"]["held-out loss"] < said["before"]["held-out loss"]
    base, ours, words = Embedder.load(projected, mesh=mesh), Embedder.load(out, mesh=mesh), lines(pairs, "query")
    assert ours.width == 8 and ours.blueprint.similarity == "dot" and ours.blueprint.prompts == base.blueprint.prompts
    theirs, modules = torch_vectors(out, words)
    assert modules == ["Transformer", "Pooling", "Dense"]
    got = ours.encode(words)
    scale = np.abs(got).max()
    assert np.abs(got - theirs).max() <= 1e-5 * scale
    change, *_ = np.linalg.lstsq(np.float64(base.encode(words)), np.float64(got), rcond=None)
    assert np.linalg.matrix_rank(change - np.eye(8), tol=1e-4) == 4
    assert np.abs(got - base.encode(words)).max() > 1e-3 * scale


def test_layers_multiply(projected, plain, mesh):
    """One after the other is both at once, with and without a bias."""
    rng = np.random.default_rng(3)
    for path, width in ((projected, 8), (plain, 32)):
        model = Embedder.load(path, mesh=mesh).raw()
        first, second = Affine(rng.normal(size=(width, 5)), rng.normal(size=5)), Affine(rng.normal(size=(5, 4)))
        vectors = model.encode(["kaka lo", "mimi"])
        both = with_layer(with_layer(model, first, False, "cosine"), second, False, "cosine")
        np.testing.assert_allclose(both.encode(["kaka lo", "mimi"]), second(first(vectors)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["map", "drift"])
def test_queries_of_a_new_model_find_an_old_ones_vectors(
    kind, plain, projected, pairs, folder, mesh, monkeypatch, capsys
):
    """'map' from width 8 to 32; 'drift' between a model and the same with a shift behind it."""
    new = projected
    if kind == "drift":
        model = Embedder.load(plain, mesh=mesh).raw()
        length = np.linalg.norm(model.encode_query(lines(pairs, "query")), axis=1).mean()
        shift = np.random.default_rng(4).normal(scale=0.1 * length, size=32)
        new = folder / "shifted"
        with_layer(model, Affine(np.eye(32), shift), True, "cosine").save(new)
    out = folder / kind
    said, screen = run(
        monkeypatch, capsys, model=new, old=str(plain), kind=kind, pairs=str(pairs), out=out, ridge=0.001
    )
    nearer = "held-out cosine to the old vectors"
    assert said["held_out"] == 6 and nearer in screen
    ours, old = (Embedder.load(place, mesh=mesh) for place in (out, plain))
    words = lines(pairs, "query")
    got, want = ours.encode_query(words), old.encode_query(words)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)
    if kind == "drift":
        assert said["after"][nearer] > 0.999 > 0.95 > said["before"][nearer]
        assert (got * want).sum(1).min() > 0.99
    else:
        assert said["before"] == {} and ours.width == 32
        assert (got * want).sum(1).mean() > 0.9


def test_vectors_of_a_folder(plain, folder, mesh):
    vectors = np.random.default_rng(5).normal(size=(60, 32))
    own = model_source.fingerprint(str(plain), Embedder.load(plain, mesh=mesh).raw().blueprint)

    def fit(name, vectors, **said):
        write_vectors(folder / name, vectors, **{"weights": own} | said)
        flag = FLAGS | {"model": str(plain), "kind": "pca", "vectors": str(folder / name), "dim": 3}
        return head_kinds.fit(types.SimpleNamespace(**flag))

    fitted = fit("raw", vectors)
    assert fitted.said == {"texts": 60} and fitted.model.width == 3
    sums = Sums()
    sums.add(vectors)
    kept = fit_pca(sums, 3, False, "")[1]
    assert fitted.after["variance kept"] == pytest.approx(kept, rel=1e-6)
    for name, given, said, message in (
        ("signs", vectors, {"dtype": "binary"}, "only the signs were kept: encode without --precision=binary"),
        ("unit", vectors, {"normalized": True}, "these vectors were brought to length 1"),
        ("narrow", vectors[:, :8], {}, "vectors of 8 dimensions"),
        ("other", vectors, {"weights": "other"}, r"these are vectors of another model \(a-model\)"),
    ):
        with pytest.raises(UserError, match=message):
            fit(name, given, **said)


def test_models_behind_which_no_layer_can_stand(plain, projected, pairs, texts, mesh):
    blueprint = Embedder.load(plain, mesh=mesh).blueprint
    with pytest.raises(UserError, match="--model=x: its vectors are cut to 4 dimensions"):
        require_plain(dataclasses.replace(blueprint, truncate_dim=4), "--model=x")
    with pytest.raises(UserError, match="routing weights"):
        routed = dataclasses.replace(blueprint.head, moee="alone")
        require_plain(dataclasses.replace(blueprint, head=routed), "--model=x")
    flags = FLAGS | {"model": str(plain)}
    for changes, message in (
        (
            {"kind": "drift", "old": str(projected), "texts": str(texts)},
            "have 32 dimensions, of --old 8: take --kind=map",
        ),
        ({"kind": "pca", "dim": 33, "texts": str(texts)}, "--dim=33: the model's vectors have 32 dimensions"),
        ({"kind": "residual", "rank": 40, "pairs": str(pairs)}, "--rank=40: the model's vectors have 32"),
    ):
        with pytest.raises(UserError, match=message):
            head_kinds.fit(types.SimpleNamespace(**flags | changes))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kind=linear", "--texts=none.jsonl"], "--kind=linear wants --pairs, and nothing else"),
        (["--kind=map", "--texts=none.jsonl"], "--kind=map wants --old"),
        (["--kind=pca", "--texts=none.jsonl"], "--texts: no such file or folder: none.jsonl"),
    ],
)
def test_mistakes_are_one_line_and_code_2(flags, said):
    command = [sys.executable, "-m", "jaxembed.head", "--model=x", "--out=y", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and said in done.stderr
