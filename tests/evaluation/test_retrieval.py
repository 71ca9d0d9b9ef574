"""Retrieval against figures worked out by hand and sentence-transformers' evaluator."""

import gzip
import json

import numpy as np
import pytest

from jaxembed.errors import UserError
from jaxembed.evaluation.retrieval import RetrievalData, rank_by_vectors, read_retrieval, score_rankings
from jaxembed.vectors.exact import top_k


def evaluate(data, encode):
    return score_rankings(data, rank_by_vectors(data, encode, top_k, "cosine"))


class Table:
    """An encoder that looks vectors up by prompt and text."""

    def __init__(self, **tables):
        self.tables = tables

    def __call__(self, texts, prompt_name):
        return np.stack([self.tables[prompt_name][text] for text in texts])


def angles(**degrees):
    return {text: np.float32([np.cos(np.deg2rad(d)), np.sin(np.deg2rad(d))]) for text, d in degrees.items()}


def task(queries, documents, gains):
    return RetrievalData(
        "hand", list(queries), list(queries), list(documents), list(documents), gains, [()] * len(gains)
    )


def test_by_hand():
    documents = {f"d{i}": 5.0 * i for i in range(12)}
    encode = Table(query=angles(first=0.0, last=60.0), document=angles(**documents))
    # `first` ranks d0, d1, d2 ...; its answers stand at 2, 3 and 12. `last` ranks d11, d10 ...; its one answer is last.
    data = task(["first", "last"], documents, [{"d1": 1.0, "d2": 3.0, "d11": 2.0}, {"d0": 1.0}])
    scores = evaluate(data, encode)
    dcg = 1 / np.log2(3) + 3 / np.log2(4)
    ideal = 3 / np.log2(2) + 2 / np.log2(3) + 1 / np.log2(4)
    assert scores == pytest.approx(
        {
            "ndcg@10": 100 * (dcg / ideal + 0) / 2,
            "mrr@10": 100 * (1 / 2 + 0) / 2,
            "recall@1": 0.0,
            "recall@10": 100 * (2 / 3 + 0) / 2,
            "recall@100": 100.0,
            "map@100": 100 * ((1 / 2 + 2 / 3 + 3 / 12) / 3 + 1 / 12) / 2,
        }
    )


def test_an_answer_outside_the_corpus_is_never_found():
    encode = Table(query=angles(q=0.0), document=angles(a=0.0, b=9.0))
    scores = evaluate(task(["q"], ["a", "b"], [{"a": 1.0, "elsewhere": 1.0}]), encode)
    assert scores["recall@100"] == pytest.approx(50) and scores["mrr@10"] == pytest.approx(100)
    assert scores["ndcg@10"] == pytest.approx(100 / (1 + 1 / np.log2(3)))


def test_ranks_by_cosine_whatever_the_lengths():
    vectors = {"near": np.float32([1, 0.1]), "long": np.float32([50, 50])}
    encode = Table(query=angles(q=0.0), document=vectors)
    assert evaluate(task(["q"], vectors, [{"near": 1.0}]), encode)["mrr@10"] == 100


@pytest.mark.parametrize("relevant", [3, 130])
def test_equals_sentence_transformers_with_ties(relevant):
    pytest.importorskip("sentence_transformers")
    import torch
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    rng = np.random.default_rng(relevant)
    # Components +-1 of equal length: cosines are exact multiples of 1/8, so most documents are tied with others.
    signs = lambda n: np.sign(rng.normal(size=(n, 16))).astype(np.float32)  # noqa: E731
    queries = {f"q{i}": vector for i, vector in enumerate(signs(40))}
    ids = sorted(f"doc{i}" for i in rng.permutation(700))
    documents = dict(zip(ids, signs(len(ids))))
    gains = []
    for vector in queries.values():  # half of the answers near the query, so that they are found
        near = sorted(ids, key=lambda i: -documents[i] @ vector)[: 2 * relevant]
        chosen = [*rng.choice(near, relevant, replace=False), *rng.choice(ids, relevant, replace=False)]
        gains.append({str(document): 1.0 for document in chosen})
    ours = evaluate(task(queries, ids, gains), Table(query=queries, document=documents))

    evaluator = InformationRetrievalEvaluator(
        dict(zip(queries, queries)),
        dict(zip(ids, ids)),
        {query: set(gain) for query, gain in zip(queries, gains)},
        corpus_chunk_size=300,
        precision_recall_at_k=[1, 10, 100],
        score_functions={"cosine": cos_sim},
        write_csv=False,
    )
    tables = {"query": queries, "document": documents}
    evaluator.embed_inputs = lambda model, texts, encode_fn_name, **_: torch.tensor(
        np.stack([tables[encode_fn_name][text] for text in texts])
    )
    evaluator.store_metrics_in_model_card_data = lambda *_, **__: None
    theirs = evaluator(None)
    assert 0 < ours["ndcg@10"] < 100
    assert ours == pytest.approx({name: 100 * theirs[f"cosine_{name}"] for name in ours}, abs=1e-6)


def lines(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


FILES = {
    "corpus.jsonl": lines(
        {"_id": "d2", "title": "Title", "text": "text ", "metadata": {}},
        {"_id": "d10", "title": "", "text": "no title"},
        {"_id": 7, "text": "number"},
    ),
    "queries.jsonl": lines(
        {"_id": "q1", "text": "one", "title": "unused"}, {"_id": "q2", "text": "two"}, {"_id": "q3", "text": "three"}
    ),
    "qrels.tsv": "query-id\tcorpus-id\tscore\nq1\td2\t2\nq1\t7\t0\nq2\td10\t0\nq3\t7\t1\nq3\tgone\t1\nq4\td2\t1\n",
}


def write(folder, **changes):
    for name, text in (FILES | {k.replace("_", "."): v for k, v in changes.items()}).items():
        (folder / name).write_text(text)
    return folder


def check(data):
    assert data.query_ids == ["q1", "q3"] and data.queries == ["one", "three"]
    assert data.document_ids == ["7", "d10", "d2"] and data.documents == ["number", "no title", "Title text"]
    assert data.gains == [{"d2": 2.0}, {"7": 1.0, "gone": 1.0}]


def test_reads(tmp_path):
    check(read_retrieval(write(tmp_path)))
    (tmp_path / "qrels.tsv").write_text(FILES["qrels.tsv"].split("\n", 1)[1])  # without its header
    check(read_retrieval(tmp_path))


def test_reads_gzip_and_beir_layout(tmp_path):
    (tmp_path / "qrels").mkdir()
    for name, text in FILES.items():
        name = "qrels/test.tsv" if name == "qrels.tsv" else name
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    data = read_retrieval(str(tmp_path))
    check(data)
    assert data.name == tmp_path.name


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("corpus_jsonl", lines({"_id": "a", "text": "x"}, {"_id": "a", "text": "y"}), r":2: the _id 'a' was given"),
        ("corpus_jsonl", lines({"_id": "a"}), r"corpus.jsonl:1: there is no 'text'"),
        ("corpus_jsonl", lines({"_id": "a", "title": 3, "text": ""}), r"corpus.jsonl:1: 'title' wants a string"),
        ("corpus_jsonl", "", r"corpus.jsonl: the file is empty"),
        ("corpus_jsonl", lines({"_id": "other", "text": "x"}), r"none of its documents is in"),
        ("queries_jsonl", lines({"_id": None, "text": "x"}), r"queries.jsonl:1: '_id' wants a string"),
        ("queries_jsonl", lines({"_id": "other", "text": "x"}), r"no query of .* has a document of score > 0"),
        (
            "qrels_tsv",
            "query-id\tcorpus-id\tscore\nq1 d2 1\n",
            r"qrels.tsv:2: wants query-id, corpus-id and an integer",
        ),
        ("qrels_tsv", "q1\t0\td2\t1\n", r"qrels.tsv:1: wants query-id"),
        ("qrels_tsv", "q1\td2\t1\nq1\td2\thigh\n", r"qrels.tsv:2: wants query-id"),
    ],
)
def test_refuses(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        read_retrieval(write(tmp_path, **{name: text}))
    assert "\n" not in str(error.value)


def test_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_retrieval(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"there is no corpus\.jsonl in it"):
        read_retrieval(tmp_path)
    (write(tmp_path) / "qrels.tsv").unlink()
    with pytest.raises(UserError, match=r"no qrels\.tsv or qrels/test\.tsv in it \(also as \.gz\)"):
        read_retrieval(tmp_path)


def test_real_folder(data_dir):
    data = read_retrieval(data_dir / "retrieval" / "scifact")
    assert data.name == "scifact" and len(data.documents) == 5183
    assert len(data.queries) == len(data.gains) and sum(map(len, data.gains)) == 919
    assert data.documents[data.document_ids.index("5836")].startswith("Induction of myelodysplasia by myeloid-derived")
