"""BM25 against its formula, and how words are told apart."""

import collections

import numpy as np
import pytest

from jaxembed.evaluation.bm25 import K1, B, _rank, rank_by_words, words
from jaxembed.evaluation.retrieval import RetrievalData, read_retrieval, score_rankings


def task(queries, documents, gains):
    ids = [f"d{i:04}" for i in range(len(documents))]
    return RetrievalData("hand", queries, queries, ids, documents, gains, [()] * len(queries))


def evaluate(data):
    return score_rankings(data, rank_by_words(data))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The cats, and a dog's classes!", ["cat", "dog", "s", "classe"]),
        ("readLine(fd)", ["read", "line", "readline", "fd"]),
        ("HTTPServer_v2", ["http", "server", "v", "2", "httpserver_v2"]),
        ("__init__ MAX_SIZE", ["init", "max", "size", "max_size"]),
        ("queries of bus glass trees", ["query", "bus", "glass", "tree"]),
        ("Größe 東京へ x", ["größe", "東", "京", "へ", "x"]),
        ("IS IT THE", []),
    ],
)
def test_words(text, wanted):
    assert words(text) == wanted


def reference(queries, documents):
    """Scores [Q, N], word by word."""
    counts = [collections.Counter(words(document)) for document in documents]
    lengths = np.array([sum(count.values()) for count in counts])
    scores = np.zeros((len(queries), len(documents)))
    for row, query in zip(scores, queries):
        for word in words(query):
            tf = np.array([count[word] for count in counts])
            n = (tf > 0).sum()
            idf = np.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            row += idf * tf / (tf + K1 * (1 - B + B * lengths / lengths.mean()))
    return scores


def test_ranks_by_the_formula_and_ties_by_number():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(40)]
    draw = lambda n: " ".join(rng.choice(vocabulary, n))  # noqa: E731
    documents = [draw(rng.integers(1, 30)) for _ in range(300)]
    documents[200:210] = documents[20:30]  # equal scores
    queries = [draw(4) for _ in range(20)] + [draw(1), "unheard of", ""]
    scores = reference(queries, documents)
    for depth in (5, 100, 1000):
        for row, got in zip(scores, _rank(queries, documents, depth), strict=True):
            wanted = np.argsort(-row.astype(np.float32), kind="stable")[:depth]
            np.testing.assert_array_equal(got, wanted[row[wanted] > 0])


def test_a_query_without_any_word_of_the_documents_finds_nothing():
    scores = evaluate(task(["zebra", "lion"], ["a lion", "a horse"], [{"d0001": 1.0}, {"d0000": 1.0}]))
    assert scores["recall@100"] == 50 and scores["ndcg@10"] == 50
    assert evaluate(task(["zebra"], ["...", ""], [{"d0000": 1.0}]))["recall@100"] == 0


def test_scifact(data_dir):
    """BEIR (arXiv:2104.08663) gives nDCG@10 66.5 on SciFact's 300 test queries; these are 809 training ones."""
    scores = evaluate(read_retrieval(data_dir / "retrieval" / "scifact"))
    assert scores["ndcg@10"] == pytest.approx(69.4, abs=0.1)
