"""Indexes of faiss and usearch: what they find beside exact search, their files, and what is refused."""

import importlib.util
import json

import numpy as np
import pytest
from stored_vectors import write_vectors

from jaxembed.errors import UserError
from jaxembed.vectors.exact import Compared, top_k
from jaxembed.vectors.indexes import Plan, build, load, save

K = 10


def some_vectors(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vectors(tmp_path_factory.mktemp("vectors") / "v", some_vectors(333, 0))


def similarities(queries: np.ndarray, documents: np.ndarray, similarity: str) -> np.ndarray:
    """By definition, in float64: [Q, N]."""
    if similarity == "euclidean":
        return -np.linalg.norm(queries[:, None].astype(np.float64) - documents, axis=2)
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(documents, axis=1)
    return queries.astype(np.float64) @ documents.T / (lengths if similarity == "cosine" else 1)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("kind", ["faiss", "usearch"])
def test_finds_what_exact_search_finds(folder, kind, similarity):
    documents, queries = Compared(folder, similarity), some_vectors(20, 1)
    wanted = similarities(queries, folder.vectors(), similarity)
    best = np.argsort(-wanted, axis=1)[:, :K]
    dots, numbers = top_k(documents.queries(queries), documents, K)
    index = build(Plan(kind, similarity=similarity), folder)
    assert (index.count, index.width) == (333, 12)
    found = index.search(queries, K, 0 if kind == "faiss" else 333)
    for scores, ours in ((documents.scores(dots, queries), numbers), found):
        np.testing.assert_array_equal(ours, best)
        np.testing.assert_allclose(scores, np.take_along_axis(wanted, best, 1), rtol=1e-5, atol=1e-5)


def test_equal_scores_by_number_and_few_documents():
    documents = np.ones((4, 12), np.float32)

    class Source:
        width = 12

        def __len__(self):
            return 4

        def blocks(self):
            yield 0, documents[:3]
            yield 3, documents[3:]

    for kind in ("faiss", "usearch"):
        index = build(Plan(kind, similarity="dot"), Source())
        for count in (1, 2):  # of queries
            scores, numbers = index.search(documents[:count], 9)
            assert numbers.tolist() == [[0, 1, 2, 3]] * count and (scores == 12).all()
        assert index.search(documents[:0], 9)[0].shape == (0, 4)


def test_indexes_that_learn_and_effort(folder):
    asked, index = some_vectors(20, 1), build(Plan("faiss", "IVF8,Flat"), folder)
    exact = np.argsort(-similarities(asked, folder.vectors(), "cosine"), axis=1)[:, :K]
    found = [np.mean([len(set(a) & set(b)) / K for a, b in zip(index.search(asked, K, n)[1], exact)]) for n in (1, 8)]
    assert found[0] < found[1] == 1
    one = index.search(asked, 333, 1)
    assert (one[1] == -1).any() and np.isneginf(one[0][one[1] == -1]).all() and np.isfinite(one[0][one[1] >= 0]).all()
    with pytest.raises(UserError, match="--effort: this index of faiss looks at everything"):
        build(Plan("faiss"), folder).search(asked, K, 3)
    with pytest.raises(UserError, match=r"faiss IVF999,Flat\): Number of training points \(333\)"):
        build(Plan("faiss", "IVF999,Flat"), folder)


@pytest.mark.parametrize("plan", [Plan("faiss", "HNSW8"), Plan("usearch", dtype="f16"), Plan("usearch", dtype="i8")])
def test_a_file_gives_the_same_index(folder, plan, tmp_path):
    asked, file, said = some_vectors(20, 1), tmp_path / "in" / "an.index", {"model": "a", "files": []}
    index = build(plan, folder)
    save(index, file, plan, said)
    assert sorted(path.name for path in file.parent.iterdir()) == ["an.index", "an.index.json"]
    for ours, kept in zip(index.search(asked, K, 50), load(file, plan, 333, said).search(asked, K, 50)):
        np.testing.assert_array_equal(ours, kept)
    scores, numbers = index.search(asked, K, 333)
    wanted = similarities(asked, folder.vectors(), "cosine")
    np.testing.assert_allclose(scores, np.take_along_axis(wanted, numbers, 1), atol=0.05)  # 8 bits
    assert np.mean([len(set(a) & set(b)) for a, b in zip(numbers, np.argsort(-wanted, axis=1)[:, :K])]) > 0.8 * K
    with pytest.raises(UserError, match=r"an.index is of something else .*model: 'a' → 'b'"):
        load(file, plan, 333, said | {"model": "b"})
    with pytest.raises(UserError, match=r"index: .* → 'faiss Flat'"):
        load(file, Plan("faiss"), 333, said)
    file.write_bytes(b"no index at all, but text")
    with pytest.raises(UserError, match=f"an.index: not an index of {plan.kind}"):
        load(file, plan, 333, said)
    (tmp_path / "in" / "an.index.json").unlink()
    with pytest.raises(UserError, match=r"no an.index.json that says what is in it"):
        load(file, plan, 333, said)


def test_what_cannot_be_built_is_refused(folder, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="could not parse index string Tree"):
        Plan("faiss", "Tree").require(12)
    Plan("faiss", "PQ6").require(12)
    with pytest.raises(UserError, match="should be a multiple of"):
        Plan("faiss", "PQ8").require(12)
    with pytest.raises(UserError, match="--usearch_dtype=i8 keeps no vector's length, and the model compares by dot"):
        Plan("usearch", dtype="i8", similarity="dot").require(12)
    index = build(Plan("usearch"), folder)
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"--index_file=.*cannot be written"):
        save(index, tmp_path / "file" / "x", Plan("usearch"), {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--index=faiss needs a package that is not installed: pip install faiss-cpu"):
        Plan("faiss").require(12)
