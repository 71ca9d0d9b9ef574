"""The search command: runs of stored vectors and of texts, exact and by an index, and what it refuses."""

import functools
import gzip
import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from stored_vectors import write_vectors
from word_models import make

from jaxembed import cli
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.model_source import fingerprint
from jaxembed.vectors.exact import Compared
from jaxembed.vectors.folder import VectorFolder

DTYPES = ("float32", "float16", "int8", "uint8", "binary", "ubinary")


@pytest.fixture
def search(monkeypatch, capsys):
    """The command in this process: returns what its JSON line says, and its output."""

    def run(*arguments: object) -> tuple[dict, str]:
        values = flags.FlagValues()
        for kind in ("string", "integer", "float", "bool", "enum", "list"):
            define = functools.partial(getattr(flags, f"DEFINE_{kind}"), flag_values=values)
            monkeypatch.setattr(flags, f"DEFINE_{kind}", define)
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(cli, "run", lambda main, doc: (values(["search", *map(str, arguments)]), main()))
        runpy.run_module("jaxembed.search", run_name="__main__")
        out = capsys.readouterr().out
        return json.loads(out.splitlines()[-1]), out

    return run


def some_vectors(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 16)).astype(np.float32)


def ranked(queries: np.ndarray, documents: np.ndarray, similarity: str = "cosine") -> tuple[np.ndarray, np.ndarray]:
    """All documents' similarities, best first, and their numbers, in float64."""
    queries, documents = queries.astype(np.float64), documents.astype(np.float64)
    if similarity == "cosine":
        queries, documents = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents))
    scores = queries @ documents.T
    if similarity == "euclidean":
        scores = -np.linalg.norm(queries[:, None] - documents, axis=2)
    numbers = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, numbers, 1), numbers


def read_trec(path) -> tuple[list[str], np.ndarray, np.ndarray, set[str]]:
    """Returns the queries, and of each the documents' numbers and scores, in the order of the ranks; and the tags."""
    rows = [line.split(" ") for line in path.read_text().splitlines()]
    queries = list(dict.fromkeys(row[0] for row in rows))
    shape = len(queries), -1
    assert [int(row[3]) for row in rows] == [*range(1, 1 + len(rows) // len(queries))] * len(queries)
    assert {row[1] for row in rows} == {"Q0"}
    numbers = np.array([int(row[2].removeprefix("d")) for row in rows]).reshape(shape)
    return queries, numbers, np.array([float(row[4]) for row in rows]).reshape(shape), {row[5] for row in rows}


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_a_run_in_trec_format(search, tmp_path, similarity):
    queries, documents = some_vectors(3, 0), some_vectors(47, 1)
    documents[30] = documents[3]  # a tie
    write_vectors(tmp_path / "q", queries, ["a", "b", "ü"], similarity=similarity)
    write_vectors(tmp_path / "d", documents, similarity=similarity, layout="parquet")
    out = tmp_path / "runs" / "run.trec"
    said, shown = search(f"--queries={tmp_path}/q", f"--corpus={tmp_path}/d", "--k=40", f"--out={out}", "--tag=mine")
    names, numbers, scores, tags = read_trec(out)
    wanted = ranked(queries, documents, similarity)
    assert names == ["a", "b", "ü"] and tags == {"mine"}
    np.testing.assert_array_equal(numbers, wanted[1][:, :40])
    np.testing.assert_allclose(scores, wanted[0][:, :40], rtol=1e-5, atol=1e-5)
    assert [file.name for file in out.parent.iterdir()] == ["run.trec"]
    assert (said["queries"], said["documents"], said["k"], said["index"]) == (3, 47, 40, "exact")
    assert said["bytes"] > 47 * 16 * 4 and said["queries_per_s"] > 0 and "queries/s" in shown


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_of_any_precision_are_searched_as_they_decode(search, tmp_path, dtype):
    queries = some_vectors(4, 0)
    write_vectors(tmp_path / "q", queries)
    folder = write_vectors(tmp_path / "d", some_vectors(60, 1), dtype=dtype)
    search(f"--queries={tmp_path}/q", f"--corpus={tmp_path}/d", "--k=9", f"--out={tmp_path}/run.trec")
    scores, numbers = ranked(queries, folder.vectors())
    found = read_trec(tmp_path / "run.trec")
    np.testing.assert_allclose(found[2], scores[:, :9], atol=1e-5)
    if dtype != "float16":
        np.testing.assert_array_equal(found[1], numbers[:, :9])


def test_signs_are_ranked_as_sentence_transformers_rescores_them(search, tmp_path):
    """With all documents for candidates, its rescoring is our search: floats of the queries, signs of the documents."""
    faiss_search = pytest.importorskip("sentence_transformers.quantization").semantic_search_faiss
    queries, folder = some_vectors(4, 0), write_vectors(tmp_path / "d", some_vectors(60, 1), dtype="ubinary")
    write_vectors(tmp_path / "q", queries)
    search(f"--queries={tmp_path}/q", f"--corpus={tmp_path}/d", "--k=10", f"--out={tmp_path}/run.trec")
    packed = np.packbits(folder.vectors() > 0, axis=1)
    theirs, _ = faiss_search(
        queries, corpus_embeddings=packed, corpus_precision="ubinary", top_k=10, rescore=True, rescore_multiplier=6
    )
    assert read_trec(tmp_path / "run.trec")[1].tolist() == [[hit["corpus_id"] for hit in hits] for hits in theirs]


@pytest.mark.parametrize("index", ["faiss", "usearch"])
def test_json_by_an_index_that_is_kept(search, tmp_path, index):
    queries, documents = some_vectors(2, 0), some_vectors(20, 1)
    write_vectors(tmp_path / "q", queries, ["a b", "c"])  # JSON can hold what TREC's format cannot
    write_vectors(tmp_path / "d", documents, similarity="dot")
    arguments = [f"--queries={tmp_path}/q", f"--corpus={tmp_path}/d", f"--index={index}"]
    arguments += [f"--index_file={tmp_path}/kept.index", "--k=200"]
    said = [search(*arguments, f"--out={tmp_path}/{i}.jsonl.gz")[0] for i in range(2)]
    assert "build_seconds" in said[0] and "build_seconds" not in said[1]
    files = [tmp_path / f"{i}.jsonl.gz" for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    scores, numbers = ranked(queries, documents, "dot")
    with gzip.open(files[0], "rt") as lines:
        for query, line, row, ids in zip(("a b", "c"), lines, scores, numbers, strict=True):
            found = json.loads(line)
            assert found["id"] == query and [hit["id"] for hit in found["documents"]] == [f"d{i}" for i in ids]
            np.testing.assert_allclose([hit["score"] for hit in found["documents"]], row, rtol=1e-5)
    write_vectors(tmp_path / "other", documents + 1, similarity="dot", weights="others")
    with pytest.raises(UserError, match=r"kept.index is of something else .*weights"):
        search(arguments[0], "--any_model", f"--corpus={tmp_path}/other", *arguments[2:], f"--out={tmp_path}/2.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model's folder, and one of vectors of 60 texts, cut to 8 dimensions."""
    folder = tmp_path_factory.mktemp("model")
    make("bert").save(folder / "model")
    embedder = Embedder.load(folder / "model")
    texts = [f"w{i} w{(7 * i) % 50} w{(i * i) % 50}" for i in range(60)]
    vectors = embedder.encode_document(texts, truncate_dim=8)
    said = {"weights": fingerprint(str(folder / "model"), embedder.blueprint), "compute_dtype": "float32"}
    write_vectors(folder / "d", vectors, similarity=embedder.blueprint.similarity, **said)
    return folder, embedder


def test_texts_are_encoded_as_the_corpus_was(search, tmp_path, model):
    folder, embedder = model
    texts = ["w1 w2", "w9", "w3 w4 w5"]
    lines = [{"_id": f"q{i}", "text": text} for i, text in enumerate(texts)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [f"--corpus={folder}/d", f"--model={folder}/model"]
    search(*given, f"--queries={tmp_path}/q.jsonl", f"--out={tmp_path}/run.trec", "--k=5")
    corpus = VectorFolder.open(folder / "d", "--")
    queries = embedder.encode_query(texts, truncate_dim=8)
    names, numbers, scores, _ = read_trec(tmp_path / "run.trec")
    wanted = ranked(queries, corpus.vectors(), corpus.similarity)
    assert names == ["q0", "q1", "q2"]
    np.testing.assert_allclose(scores, wanted[0][:, :5], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(numbers, wanted[1][:, :5])

    said, shown = search(*given, "--query=w9")
    assert [hit["id"] for hit in said["found"]] == [f"d{i}" for i in wanted[1][1][:10]]
    assert all(f"{hit['score']:.4f}" in shown for hit in said["found"]) and said["query"] == "w9"

    lines[2]["_id"] = "q0"
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="two of them have the id 'q0'"):
        search(*given, f"--queries={tmp_path}/q.jsonl", f"--out={tmp_path}/run.trec")
    write_vectors(tmp_path / "wide", some_vectors(20, 0)[:, :4], similarity=corpus.similarity, weights="others")
    with pytest.raises(UserError, match=r"model \(\w{8}\): --corpus is of a-model \(others\): take that model"):
        search(given[1], f"--corpus={tmp_path}/wide", "--query=w9")


def test_refusals(search, tmp_path):
    some = some_vectors(25, 0)
    for name, said in {
        "d": {},
        "unfinished": {"finished": False},
        "narrow": {"vectors_NxE": some[:, :8]},
        "other": {"weights": "others"},
        "manhattan": {"similarity": "manhattan"},
        "spaces": {"ids": [f"a {i}" for i in range(25)]},
    }.items():
        write_vectors(tmp_path / name, **{"vectors_NxE": some, **said})
    (tmp_path / "q.jsonl").write_text('{"text": "x"}\n')
    cases = [
        ("d", "unfinished", [], "--corpus=.*unfinished: not all vectors are there"),
        ("unfinished", "d", [], "--queries=.*unfinished: not all vectors are there"),
        ("d", "narrow", [], "--queries=.*vectors of 16 dimensions, --corpus=.*narrow of 8"),
        ("other", "d", [], r"vectors of a-model \(others\), --corpus of a-model \(\)"),
        ("d", "manhattan", [], "compares by manhattan distance"),
        ("spaces", "d", [], "--queries: the id 'a 0' has white space"),
        ("d", "spaces", [], "--corpus: the id 'a 0' has white space"),
        ("q.jsonl", "d", [], r"q.jsonl: no vectors that jaxembed.encode wrote; to encode texts give --model"),
        ("d", "d", ["--index=faiss", "--faiss_factory=Tree"], "could not parse index string Tree"),
    ]
    out = tmp_path / "run.trec"
    for queries, corpus, more, said in cases:
        with pytest.raises(UserError, match=said):
            search(f"--queries={tmp_path / queries}", f"--corpus={tmp_path / corpus}", f"--out={out}", *more)
    assert not list(tmp_path.glob("run*")) and not list(tmp_path.glob(".run*"))
    search(f"--queries={tmp_path}/other", f"--corpus={tmp_path}/d", f"--out={out}", "--any_model")
    assert out.exists()
    for more, said in (
        ([], "--corpus is missing"),
        (["--corpus=x"], "give either --queries, .* or --query"),
        (["--corpus=x", "--query=x", "--queries=y"], "give either --queries"),
        (["--corpus=x", "--query=x"], "give --model"),
        (["--corpus=x", "--queries=x"], "--out is missing"),
        (["--corpus=x", "--queries=x", "--out=y", "--recall=1.5"], "--recall=1.5"),
        (["--corpus=x", "--queries=x", "--out=y", "--faiss_factory=IVF8"], "--faiss_factory is of --index=faiss"),
        (["--corpus=x", "--queries=x", "--out=y", "--index=faiss", "--recall=0.9"], "--recall is of --index=exact"),
        (["--corpus=x", "--queries=x", f"--out={tmp_path}"], "is a folder, wants a file"),
        (["--corpus=x", "--queries=x", "--out=y", "--tag=a b"], "--tag='a b': wants one word"),
        (["--corpus=nowhere", "--queries=x", "--out=y"], "--corpus=nowhere: no manifest.json here"),
    ):
        with pytest.raises(UserError, match=said):
            search(*more)


def test_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxembed.search", f"--corpus={tmp_path}", "--queries=x", "--out=y"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no manifest.json here" in done.stderr


def test_scores_of_what_was_not_found_stay_so(tmp_path):
    folder = write_vectors(tmp_path / "d", some_vectors(5, 0))
    for similarity in ("cosine", "euclidean"):
        dots = np.array([[1.0, -np.inf]], np.float32)
        assert np.isneginf(Compared(folder, similarity).scores(dots, some_vectors(1, 1))[0, 1])
