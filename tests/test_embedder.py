"""The embedder: texts in any form, vectors in order, whatever the batches and the mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_run import sentence, tiny_config

from jaxembed import embedder as embedder_module
from jaxembed import model_source, sharding
from jaxembed.config import MeshConfig
from jaxembed.data.batch import Rows
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError

PROMPTS = {"query": "kaka lolo: ", "passage": "mimi: "}
TOLERANCE = 1e-6


def make(folder, mesh=None, **changes):
    """A random tiny model, as a run would make it."""
    blueprint, load = model_source.open_source(tiny_config(folder, **changes), folder)
    factory = blueprint.factory(model_source.options(tiny_config(folder, **changes).model))
    mesh = mesh or sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        return Embedder(blueprint, factory, load(factory), mesh)


def changed(embedder, **fields):
    """The same model with another blueprint."""
    blueprint = dataclasses.replace(embedder.blueprint, **fields)
    return Embedder(blueprint, embedder.factory, embedder.params, embedder.mesh)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("embedder")


@pytest.fixture(scope="module")
def embedder(folder):
    return make(folder, prompts=PROMPTS)


@pytest.fixture(scope="module")
def texts():
    """Short and long ones, mixed, some twice, one empty, one longer than the model takes."""
    rng = np.random.default_rng(0)
    texts = [sentence(rng, 1, 30) for _ in range(60)]
    return [*texts, "", texts[3], " \t ", "vuvu " * 100, texts[3]]


@pytest.fixture(scope="module")
def vectors(embedder, texts):
    return embedder.encode(texts)


def near(got, want):
    assert got.shape == want.shape and got.dtype == np.float32
    assert np.abs(got - want).max() <= TOLERANCE


def test_vectors_come_in_the_order_given(embedder, texts, vectors):
    assert vectors.shape == (len(texts), embedder.width) == (65, 32)
    order = np.random.default_rng(1).permutation(len(texts))
    near(embedder.encode([texts[i] for i in order]), vectors[order])
    for i in (0, 17, 60, 62, 63):
        near(embedder.encode(texts[i]), vectors[i])
    assert len({tuple(v) for v in np.round(vectors[:60], 4)}) == 60
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_any_sequence_of_strings_serves(embedder, texts, vectors):
    near(embedder.encode(tuple(texts[:5])), vectors[:5])
    near(embedder.encode(np.array(texts[:5])), vectors[:5])
    assert embedder.encode([]).shape == (0, 32)
    assert embedder.encode("").shape == (32,)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batch_sizes_change_nothing(embedder, texts, vectors, batch_size):
    near(embedder.encode(texts, batch_size=batch_size), vectors)


def test_windows_change_nothing(embedder, texts, vectors, monkeypatch):
    monkeypatch.setattr(embedder_module, "WINDOW", 9)
    near(embedder.encode(texts), vectors)


@pytest.mark.parametrize("sizes", [(1,), (1, 8), (2, 2, 2), (2, 1, 1, 2, 2)], ids=str)
def test_the_mesh_changes_nothing(folder, texts, vectors, sizes):
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    near(make(folder, mesh, prompts=PROMPTS).encode(texts), vectors)


def test_a_progress_bar_only_where_asked(embedder, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # it is shown in terminals only
    embedder.encode(["kaka"])
    assert capfd.readouterr().err == ""
    embedder.encode(["kaka"], show_progress_bar=True)
    assert "encoding" in capfd.readouterr().err


def test_prompts_are_put_before_the_texts(embedder, texts, vectors):
    want = embedder.encode([PROMPTS["query"] + text for text in texts])
    assert np.abs(want - vectors).max() > 1e-2
    near(embedder.encode(texts, prompt_name="query"), want)
    near(embedder.encode(texts, prompt=PROMPTS["query"]), want)
    near(embedder.encode(texts, prompt_name="passage", prompt=PROMPTS["query"]), want)
    near(embedder.encode(texts[0], prompt_name="query"), want[0])
    near(embedder.encode(texts, prompt_name="document"), vectors)
    near(embedder.encode(texts, prompt_name=None, prompt=None, show_progress_bar=None, truncate_dim=None), vectors)
    with pytest.raises(UserError, match="prompt_name='task': the model's prompts are query, document, passage"):
        embedder.encode(texts, prompt_name="task")


def test_queries_and_documents_get_their_prompts(embedder, texts, vectors):
    near(embedder.encode_query(texts), embedder.encode(texts, prompt_name="query"))
    near(embedder.encode_document(texts), vectors)  # a prompt called 'passage' is not that of documents
    near(embedder.encode_document(texts[:4], prompt_name="query", batch_size=2), embedder.encode_query(texts[:4]))
    near(embedder.encode_document(texts[:4], prompt=PROMPTS["query"]), embedder.encode_query(texts[:4]))
    plain = changed(embedder, prompts={})
    near(plain.encode_query(texts), vectors)
    near(plain.encode_document(texts), vectors)
    both = changed(embedder, prompts={"passage": "pa ", "document": "do "})
    near(both.encode_document(texts), embedder.encode(texts, prompt="do "))


def test_the_default_prompt_is_that_of_the_model(embedder, texts, vectors):
    with_default = changed(embedder, default_prompt_name="query")
    near(with_default.encode(texts), embedder.encode_query(texts))
    near(with_default.encode(texts, prompt_name="passage"), embedder.encode(texts, prompt_name="passage"))
    near(with_default.encode(texts, prompt=""), vectors)
    near(with_default.encode_document(texts), vectors)


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": {}},
        {"prompts": PROMPTS},
        {"prompts": PROMPTS | {"document": "vuvu "}, "default_prompt_name": "passage"},
        {"prompts": {"corpus": "mimi "}, "default_prompt_name": "corpus"},
    ],
    ids=lambda settings: "-".join(settings["prompts"]) or "none",
)
def test_prompts_are_chosen_as_in_sentence_transformers(embedder, texts, tmp_path, settings):
    from sentence_transformers import SentenceTransformer

    ours = changed(embedder, **settings)
    ours.save(tmp_path / "model")
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert list(ours.prompts.items()) == list(theirs.prompts.items())
    texts = [text for text in texts[:8] if text.strip()]
    for method in ("encode", "encode_query", "encode_document"):
        for asked in ({}, {"prompt": ""}, {"prompt": "kaka "}, {"prompt_name": "query"}):
            got, want = (getattr(model, method)(texts, **asked) for model in (ours, theirs))
            assert np.abs(got - want).max() <= 1e-5, (method, asked)


def test_a_prompt_left_out_of_pooling(folder, texts):
    """The mean of the states of the text's own tokens and the closing one; the prompt is seen, not counted."""
    raw = {"model__normalize": False, "loss__temperature": 1.0}
    mesh = sharding.make_mesh(MeshConfig(1), jax.devices()[:1])
    whole, rest = make(folder, mesh, **raw), make(folder, mesh, **raw, model__pool_prompt=False)
    prompt = PROMPTS["query"]
    n_prompt = whole.blueprint.tokenizer.prompt_length(prompt)
    assert n_prompt == 4  # [CLS] kaka lolo :
    for text in texts[:3]:
        states_NxD = token_states(whole, prompt + text)
        assert np.abs(whole.encode(prompt + text) - states_NxD.mean(0)).max() <= 1e-5
        assert np.abs(rest.encode(text, prompt=prompt) - states_NxD[n_prompt:].mean(0)).max() <= 1e-5


def token_states(embedder, text):
    """The states of a text's tokens, float32 [N, D]: every token a span of its own."""
    ids = embedder.blueprint.tokenizer.encode([text], 40)[0].astype(np.int32)[None]
    count = np.arange(ids.size, dtype=np.int32)[None]
    rows = Rows(ids, np.ones_like(ids), count, count, np.zeros(ids.shape, bool))
    with jax.set_mesh(embedder.mesh):
        rows = jax.tree.map(lambda x: sharding.put(x, embedder.mesh, sharding.ROWS), rows)
        return np.asarray(embedder.factory.encoder(embedder.params, rows, ids.size))[0]


def test_truncating_and_normalising(embedder, texts, vectors):
    near(embedder.encode(texts, truncate_dim=8), vectors[:, :8])
    near(embedder.encode(texts[0], truncate_dim=8), vectors[0, :8])
    unit = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    near(embedder.encode(texts, truncate_dim=8, normalize_embeddings=True), unit)
    cut = changed(embedder, truncate_dim=8)
    near(cut.encode(texts), vectors[:, :8])
    near(cut.encode(texts, truncate_dim=16), vectors[:, :16])
    for wrong in ({"truncate_dim": 0}, {"batch_size": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            embedder.encode(texts, **wrong)


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_is_that_of_sentence_transformers(embedder, kind):
    util = pytest.importorskip("sentence_transformers.util")
    peer = {
        "cosine": util.cos_sim,
        "dot": util.dot_score,
        "euclidean": util.euclidean_sim,
        "manhattan": util.manhattan_sim,
    }[kind]
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(5, 6)).astype(np.float32), rng.normal(size=(7, 6)).astype(np.float32)
    model = changed(embedder, similarity=kind)
    np.testing.assert_allclose(model.similarity(a, b), peer(a, b).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(a, b[:5]), np.diag(peer(a, b[:5])), rtol=1e-5, atol=1e-6)
    assert model.similarity(a[0], b).shape == (1, 7)
    assert model.similarity(a, b).dtype == np.float32


@pytest.fixture(scope="module")
def saved(embedder, folder):
    embedder.save(folder / "saved")
    return folder / "saved"


def test_saved_and_loaded_it_gives_the_same_vectors(saved, embedder, texts, vectors):
    loaded = Embedder.load(saved)
    near(loaded.encode(texts), vectors)
    near(loaded.encode_query(texts), embedder.encode_query(texts))
    near(Embedder.load(str(saved), mesh=sharding.make_mesh(MeshConfig(2, 2, 2))).encode(texts), vectors)


def test_what_load_takes_instead_of_the_models_own(saved, texts, vectors):
    rough = Embedder.load(saved, dtype="bfloat16").encode(texts)
    assert rough.dtype == np.float32 and 1e-5 < np.abs(rough - vectors).max() < 5e-2
    first = Embedder.load(saved, pooling="cls")
    assert np.abs(first.encode(texts) - vectors).max() > 1e-2
    assert first.blueprint.head.pooling == "cls"
    near(Embedder.load(saved, attention="bidirectional").encode(texts), vectors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "max"}, "pooling='max': .* takes auto, mean, cls, last, weighted_mean"),
        ({"dtype": "float16"}, "dtype='float16': .* takes float32, bfloat16"),
        ({"attention": "causal"}, "attention='causal': .* takes native, bidirectional"),
    ],
)
def test_load_refuses_what_does_not_serve(saved, arguments, message):
    with pytest.raises(UserError, match=message):
        Embedder.load(saved, **arguments)


def test_load_says_what_is_missing(folder, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        Embedder.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        Embedder.load(tmp_path)
