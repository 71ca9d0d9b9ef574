"""Exports with fewer layers and shorter vectors: other programs give what the whole model gives at that size."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_models
from test_embedder import make
from tiny_run import SHAPE, sentence, tiny_config, train_on, write_pairs

from jaxembed import sharding, similarity
from jaxembed.config import MatryoshkaConfig, MeshConfig
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.export import _with_widths, export_model
from jaxembed.losses.objective import sizes_of
from jaxembed.verification import verify

sentence_transformers = pytest.importorskip("sentence_transformers")

DEEP = SHAPE | {"num_hidden_layers": 3}
LAYERS, DIM = 2, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smaller")


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(1), jax.devices()[:1])


@pytest.fixture(scope="module")
def whole(folder, mesh):
    return make(folder, mesh, model__shape=DEEP, model__projection=12)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(4)
    return [sentence(rng, 1, 20) for _ in range(12)]


def at_depth(model, texts, layers):
    """The vectors made of the states after so many layers, from `at_depths`."""
    packed = tiny_models.pack(model.blueprint.tokenizer.encode(texts, 40), tiny_models.alone(texts), 40)

    def encode(params, rows):
        return model.factory.bind(params).at_depths(rows, packed.slots, None, (layers,))[0][1]

    with jax.set_mesh(model.mesh):
        vectors = np.asarray(jax.jit(encode)(model.params, tiny_models.put_rows(packed.rows)))
    return vectors[packed.shard, packed.slot]


def there(folder):
    return sentence_transformers.SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"}
    )


@pytest.mark.parametrize("dim", [0, DIM], ids=["all dimensions", "fewer"])
def test_the_cut_folder_gives_the_vectors_of_that_depth(folder, mesh, whole, texts, dim):
    out = folder / f"cut-{dim}"
    export_model(whole, out, LAYERS, dim)
    want = similarity.unit(at_depth(whole, texts, LAYERS)[:, : dim or 12])
    ours, theirs = Embedder.load(out, mesh=mesh), there(out)
    for model in (ours, theirs):
        got = model.encode(texts, normalize_embeddings=True)
        assert got.shape == want.shape and np.abs(got - want).max() <= 1e-5
    assert np.abs(ours.encode(texts) - theirs.encode(texts)).max() <= 1e-5
    assert np.abs(want - similarity.unit(whole.encode(texts)[:, : dim or 12])).max() > 0.01  # than at full depth
    assert ours.blueprint.backbone.layers == theirs[0].auto_model.config.num_hidden_layers == LAYERS
    assert theirs.get_embedding_dimension() == (dim or 12)
    assert max(verify(out).values()) <= 1e-5


def test_the_code_of_a_cut_models_card_cuts_too(folder, mesh, whole, monkeypatch):
    out = folder / "card"
    export_model(whole, out, dim=DIM)
    card = (out / "README.md").read_text()
    assert f"| dimensions of a vector | {DIM} |" in card and "| length of a vector | 1 before it is cut |" in card
    assert f"the first 3 of 3 layers, and its vectors are cut to {DIM} of 12 dimensions" in card
    monkeypatch.chdir(out)
    made = {}
    exec(card.split("With transformers:\n\n```python\n")[1].split("```")[0], made)
    want = Embedder.load(out, mesh=mesh).encode_query(["What do bees make honey from?"])
    assert np.abs(np.asarray(made["queries"]) - want).max() <= 1e-5


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"layers": 4}, "--layers=4: the model has 3"), ({"dim": 13}, "--dim=13: the model has 12"), ({"dim": -1}, "-1")],
)
def test_a_model_cannot_grow(folder, whole, asked, message):
    with pytest.raises(UserError, match=message):
        export_model(whole, folder / "grown", **asked)
    assert not (folder / "grown").exists()


SOURCE = {"model__shape": DEEP, "batch_size": 8, "matryoshka__dims": (16, 8), "matryoshka__layers": (2, 1)}


def test_the_command_writes_the_sizes_that_were_trained(folder, mesh, texts):
    pairs = ({"path": str(write_pairs(folder / "pairs.jsonl", 40, 1))},)
    train_on(1, tiny_config(folder, steps=2, data__train=pairs, **SOURCE, matryoshka__pairs="zip"), folder / "run")
    command = [sys.executable, "-m", "jaxembed.export", f"--workdir={folder}/run", f"--out={folder}/small"]
    result = subprocess.run([*command, "--layers=1", "--dim=8"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    whole, small = (
        json.loads((out / "config.json").read_text()) for out in (folder / "run" / "export", folder / "small")
    )
    assert "matryoshka_dimensions" not in whole  # of the whole depth only the full width was trained
    assert small["matryoshka_dimensions"] == [8, 32] and small["num_hidden_layers"] == 1
    sizes = "3 layers and 32 dimensions; 2 layers and 16 dimensions; 1 layer and 8 dimensions."
    cut = "the first 1 of 3 layers, and its vectors are cut to 8 of 32 dimensions; scores and curves are those of"
    cards = [(out / "README.md").read_text() for out in (folder / "run" / "export", folder / "small")]
    assert all(sizes in card for card in cards) and [cut in card for card in cards] == [False, True]
    got = Embedder.load(folder / "small", mesh=mesh).encode(texts)
    assert np.abs(got - at_depth(Embedder.load(folder / "run", mesh=mesh), texts, 1)[:, :8]).max() <= 1e-5


def test_widths_are_those_trained_at_the_depth():
    sizes = sizes_of(MatryoshkaConfig(dims=(16, 8), layers=(2,)))
    inherited = {"model_type": "bert", "matryoshka_dimensions": [99]}
    for layers, want in ((0, [8, 16, 32]), (2, [8, 16, 32]), (1, None)):  # nothing was trained at depth 1
        assert _with_widths(inherited, sizes, layers, 32).get("matryoshka_dimensions") == want
    assert _with_widths(inherited, sizes_of(MatryoshkaConfig()), 0, 32) == {"model_type": "bert"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matryoshka__dims": (32,)}, r"config.matryoshka.dims: 32 is not in 1 … 31"),
        ({"matryoshka__layers": (3,)}, r"config.matryoshka.layers: 3 is not in 1 … 2"),
    ],
)
def test_sizes_that_the_model_does_not_have(folder, changes, message):
    pairs = ({"path": str(write_pairs(folder / "pairs.jsonl", 40, 1))},)
    with pytest.raises(UserError, match=message):
        train_on(1, tiny_config(folder, data__train=pairs, **SOURCE | changes), folder / "wrong")
    assert not (folder / "wrong").exists()
