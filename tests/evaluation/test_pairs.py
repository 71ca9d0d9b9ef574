"""Retrieval sets made of records: which documents there are, and which are right, wrong or neither."""

import gzip
import json

import numpy as np
import pytest

from jaxembed.config import SourceConfig
from jaxembed.errors import UserError
from jaxembed.evaluation.pairs import read_pairs, set_name
from jaxembed.evaluation.retrieval import DEPTH, rank_by_vectors, ranking_depth, score_rankings
from jaxembed.vectors.exact import top_k


def evaluate(data, encode):
    return score_rankings(data, rank_by_vectors(data, encode, top_k, "cosine"))


def read(folder, *records):
    path = folder / "held-out.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    return read_pairs(str(path), "--pairs")


def test_distinct_texts_are_the_documents(tmp_path):
    data = read(
        tmp_path,
        {"query": "q1", "positive": ["b", "c"], "negative": ["n", "a"]},
        {"query": "q2", "positive": "a", "negative": "b"},
        {"query": "q1", "positive": "a"},
    )
    assert data.name == "held-out"
    assert data.documents == data.document_ids == ["a", "b", "c", "n"]
    assert data.queries == ["q1", "q2"]
    assert data.gains == [{"a": 1.0, "b": 1.0, "c": 1.0, "n": 0.0}, {"a": 1.0, "b": 0.0}]
    assert not any(set().union(*sets) for sets in data.left_out)


def left_out(data):
    return {
        query: set().union(*sets) - set(gains) for query, sets, gains in zip(data.queries, data.left_out, data.gains)
    }


def test_what_is_neither_right_nor_wrong(tmp_path):
    data = read(
        tmp_path,
        {"query": "q1", "positive": "a", "group": "g"},
        {"query": "q2", "positive": "b", "negative": "n", "group": "g"},
        {"query": "q3", "positive": "c", "label": "g"},  # another kind of group
        {"query": "q4", "positive": "d", "label": "g"},
        {"query": "a", "positive": "x", "negative": "a"},  # a query that is a document
        {"query": "x", "positive": "q5"},  # it answers `a`, which is hence no wrong answer to it
        {"query": "q5", "positive": "y"},
    )
    assert left_out(data) == {
        "q1": {"b", "n"},
        "q2": {"a"},
        "q3": {"d"},
        "q4": {"c"},
        "a": {"a"},
        "x": {"x", "a"},
        "q5": {"q5", "x"},
    }
    assert data.gains[data.queries.index("q2")] == {"b": 1.0, "n": 0.0}  # its own hard negative is wrong


def test_left_out_documents_take_no_place_in_the_ranking(tmp_path):
    group = [{"query": f"q{i}", "positive": f"near {i}", "group": "g"} for i in range(DEPTH + 20)]
    data = read(tmp_path, *group, {"query": "other", "positive": "far"})
    assert ranking_depth(data) == DEPTH + len(group)

    def encode(texts, prompt_name):  # all near ones are nearer to any query than the far one
        return np.array([[1.0, 5.0] if text == "far" else [1.0, 0.1 * len(text)] for text in texts])

    scores = evaluate(data, encode)
    found = len(group) / len(data.queries)
    assert scores["recall@1"] == pytest.approx(100 * found) == scores["ndcg@10"]
    assert scores["recall@100"] == pytest.approx(100 * found)  # `far` stands behind 120 others


def test_an_own_hard_negative_is_wrong_in_any_group(tmp_path):
    data = read(tmp_path, {"query": "q", "positive": "far", "negative": "near", "group": "g"})
    place = {"q": [1.0, 0.0], "near": [1.0, 0.1], "far": [1.0, 1.0]}
    scores = evaluate(data, lambda texts, _: np.array([place[text] for text in texts]))
    assert scores["mrr@10"] == 50 and scores["recall@10"] == 100


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"path": "/data/val.jsonl.gz"}, "val"),
        ({"path": "/data/py.v2.parquet"}, "py.v2"),
        ({"path": "/data/folder/"}, "folder"),
        ({"path": "/data/val-*.jsonl"}, "val"),
        ({"path": "/data/val/*.jsonl"}, "val"),
        ({"source": "tfds", "name": "py_docstrings", "split": "test"}, "py_docstrings-test"),
        ({"source": "tfds", "name": "glue/mrpc:2.0.0", "split": "train[:10%]"}, "glue-mrpc-train[:10%]"),
        ({"source": "tfds", "path": "/tfds/py_docstrings/1.0.0", "split": "test"}, "py_docstrings-test"),
        ({"source": "hf", "name": "org/set", "split": "test"}, "org-set-test"),
    ],
)
def test_names(fields, name):
    assert set_name(SourceConfig(**fields)) == name


def test_mistakes_name_file_and_line(tmp_path):
    with pytest.raises(UserError, match=r"held-out.jsonl.gz:2: no 'positive'"):
        read(tmp_path, {"query": "a", "positive": "b"}, {"query": "a"})
    with pytest.raises(UserError, match="no such file"):
        read_pairs(str(tmp_path / "none.jsonl"), "--pairs")
