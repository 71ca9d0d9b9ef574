"""STS against scipy and sentence-transformers, and what its files may hold."""

import gzip
import json

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from jaxembed.errors import UserError
from jaxembed.evaluation.sts import StsData, evaluate_sts, read_sts


class Table:
    """An encoder that looks vectors up, and notes how it was asked."""

    def __init__(self, texts, vectors):
        self.vectors = dict(zip(texts, vectors))
        self.prompts = set()

    def __call__(self, texts, prompt_name):
        self.prompts.add(prompt_name)
        return np.stack([self.vectors[text] for text in texts])


def random_task(n=400, width=12):
    rng = np.random.default_rng(0)
    texts = [f"text {i}" for i in range(2 * n)]
    vectors = rng.normal(size=(2 * n, width)).astype(np.float32) * rng.uniform(0.1, 5, (2 * n, 1)).astype(np.float32)
    scores = np.round(rng.uniform(0, 5, n) * 4) / 4  # with ties
    return StsData("random", texts[:n], texts[n:], scores), Table(texts, vectors)


def test_equals_scipy():
    data, encode = random_task()
    x, y = (np.stack([encode.vectors[t] for t in ts]).astype(np.float64) for ts in (data.sentences1, data.sentences2))
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    scores = evaluate_sts(data, encode, "cosine")
    assert scores["spearman"] == pytest.approx(100 * spearmanr(cosine, data.scores)[0], abs=0.01)
    assert scores["pearson"] == pytest.approx(100 * pearsonr(cosine, data.scores)[0], abs=1e-4)
    assert encode.prompts == {""}


def test_ranks_by_hand():
    # cosines 1, 0, -1 and sqrt(1/2): ranks 4, 2, 1, 3 against 3.5, 1, 2, 3.5
    vectors = np.float32([[1, 0], [1, 0], [1, 0], [1, 0], [3, 0], [0, 2], [-1, 0], [1, 1]])
    texts = list("abcdefgh")
    data = StsData("hand", texts[:4], texts[4:], np.array([5.0, 1.0, 2.0, 5.0]))
    assert evaluate_sts(data, Table(texts, vectors), "cosine")["spearman"] == pytest.approx(
        100 * 3.5 / np.sqrt(5 * 4.5)
    )


def test_equal_cosines_share_their_rank():
    # cosines 0, 0, 1, 1 exactly: ranks 1.5, 1.5, 3.5, 3.5 against 1, 2, 3, 4
    texts, vectors = list("abcdefgh"), np.float32([[1, 0]] * 4 + [[0, 2], [0, 3], [5, 0], [7, 0]])
    data = StsData("hand", texts[:4], texts[4:], np.array([0.1, 0.2, 0.3, 0.4]))
    assert evaluate_sts(data, Table(texts, vectors), "cosine")["spearman"] == pytest.approx(100 * 4 / np.sqrt(4 * 5))


def test_equals_sentence_transformers():
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    data, encode = random_task()
    evaluator = EmbeddingSimilarityEvaluator(
        data.sentences1, data.sentences2, data.scores, main_similarity="cosine", write_csv=False
    )
    evaluator.embed_inputs = lambda model, texts, **_: encode(texts, "")
    evaluator.store_metrics_in_model_card_data = lambda *_, **__: None
    wanted = evaluator(None)
    scores = evaluate_sts(data, encode, "cosine")
    assert scores["spearman"] == pytest.approx(100 * wanted["spearman_cosine"], abs=0.01)
    assert scores["pearson"] == pytest.approx(100 * wanted["pearson_cosine"], abs=1e-3)


def test_a_collapsed_model_scores_zero():
    data, _ = random_task()
    assert evaluate_sts(data, lambda texts, _: np.ones((len(texts), 4), np.float32), "cosine") == {
        "spearman": 0,
        "pearson": 0,
    }
    assert evaluate_sts(data, lambda texts, _: np.zeros((len(texts), 4), np.float32), "cosine")["spearman"] == 0


def test_vectors_that_are_not_finite():
    data, _ = random_task()
    with pytest.raises(UserError, match="800 of 800 vectors are not finite"):
        evaluate_sts(data, lambda texts, _: np.full((len(texts), 4), np.nan, np.float32), "cosine")


def row(**changes):
    return json.dumps({"sentence1": "a", "sentence2": "b", "score": 1} | changes)


@pytest.mark.parametrize("name", ["dev.jsonl", "dev.jsonl.gz"])
def test_reads(tmp_path, name):
    text = "\ufeff" + row() + "\r\n\n" + row(sentence1="Ω", score=2.5)
    raw = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    data = read_sts(tmp_path / name)
    assert (data.name, data.sentences1, data.sentences2) == ("dev", ["a", "Ω"], ["b", "b"])
    np.testing.assert_array_equal(data.scores, [1, 2.5])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(score="4"), "'score' wants a finite number, has '4'"),
        (row(score=True), "'score' wants a finite number"),
        (row(score=float("nan")), "'score' wants a finite number"),
        (row(sentence2=None), "'sentence2' wants a string"),
        (row(sentence2="\ud800"), "'sentence2' is not valid Unicode"),
        ('{"sentence1": "a"}', "there is no 'sentence2'; the row has 'sentence1'"),
        ("{", "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ("[1]", "wants a JSON object, has list"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_names_the_bad_line(tmp_path, bad, message):
    path = tmp_path / "dev.jsonl"
    path.write_bytes(row().encode() + b"\n\n" + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n")
    with pytest.raises(UserError, match=message) as error:
        read_sts(path)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_refuses_files_without_a_task(tmp_path):
    path = tmp_path / "dev.jsonl"
    with pytest.raises(UserError, match="there is no such file"):
        read_sts(path)
    path.write_text(f"{row()}\n{row()}\n")
    with pytest.raises(UserError, match="nothing to rank"):
        read_sts(path)
    broken = tmp_path / "dev.jsonl.gz"
    broken.write_bytes(gzip.compress(path.read_bytes() * 1000)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        read_sts(broken)


def test_real_file(data_dir):
    data = read_sts(data_dir / "sts" / "stsb-dev.jsonl.gz")
    assert data.name == "stsb-dev" and len(data.sentences1) == len(data.sentences2) == len(data.scores) == 1500
    assert 0 <= data.scores.min() < data.scores.max() == 5
