"""The bound of held-out texts' likelihood, against all masks in NumPy; its error; the files it reads."""

import gzip
import io
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from word_models import all_scores, log_softmax, make, sentences, without

from jaxembed.config import EvalConfig
from jaxembed.errors import UserError
from jaxembed.evaluation import likelihood
from jaxembed.evaluation.likelihood import Reading, answer, bounds_of, evaluate_likelihood, mean_bound, read_texts
from jaxembed.evaluation.report import flat_scores, scores_tables
from jaxembed.evaluation.sets import require_sets
from jaxembed.evaluation.tasks import Tasks


def bound_by_all_masks(embedder, text: str) -> float:
    """∫ Σ over masks t^m (1 - t)^(n - m) / t Σ masked log p dt: of a mask of m words B(m, n - m + 1)."""
    ids = embedder.blueprint.tokenizer.encode([text], 32)[0].astype(np.int64)
    places = np.arange(1, len(ids) - 1)
    masks = [mask for mask in itertools.product((False, True), repeat=len(places)) if any(mask)]
    read = np.tile(ids, (len(masks), 1))
    chosen = np.zeros(read.shape, bool)
    chosen[:, places] = masks
    of_right = np.take_along_axis(log_softmax(all_scores(embedder, np.where(chosen, 4, read))), read[..., None], -1)
    n, m = len(places), chosen.sum(1)
    weights = [math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n) for k in m]
    return float(np.array(weights) @ np.where(chosen, of_right[..., 0], 0).sum(1))


@pytest.mark.parametrize("kind", ["bert", "llama both ways"])
def test_the_bound_is_that_of_all_masks(kind):
    embedder, texts, draws = make(kind), sentences(3, 6), 600
    found = bounds_of(texts, embedder, draws, "texts/x")
    assert found.words_N.tolist() == [6, 6, 6]
    want = np.array([bound_by_all_masks(embedder, text) for text in texts])
    errors = found.bounds_NxK.std(1, ddof=1) / np.sqrt(draws)
    assert (np.abs(found.bounds_NxK.mean(1) - want) < 4 * errors).all()
    assert (errors < 0.03 * np.abs(want)).all()  # else that would say little
    assert np.abs(want[0] - want[1]) > 4 * errors.max()


def test_draws_are_spread_over_the_parts_of_a_text():
    """Of as many draws as words, each number of masked words occurs once, whatever the start."""
    ids = np.array([2, 7, 8, 9, 10, 11, 12, 3])
    language = make("bert").blueprint.language
    for number in range(20):
        readings = likelihood._readings(ids, language, 6, (1, number))
        assert sorted(reading.asked.sum() for reading in readings) == [1, 2, 3, 4, 5, 6]
        assert all(((reading.ids == 4) == reading.asked).all() for reading in readings)
    starts = {int(likelihood._readings(ids, language, 1, (1, number))[0].asked.sum()) for number in range(40)}
    assert starts == {1, 2, 3, 4, 5, 6}


def test_neither_packing_nor_mesh_change_it(monkeypatch):
    texts = [*sentences(12, 6, 1), *sentences(4, 25, 2), *sentences(4, 1, 3)]
    one, eight = (make("bert", devices) for devices in (1, 8))
    want = bounds_of(texts, one, 3, "texts/x")
    got = bounds_of(texts, eight, 3, "texts/x")
    np.testing.assert_allclose(got.bounds_NxK, want.bounds_NxK, rtol=2e-5)
    assert got.right == want.right
    monkeypatch.setattr(likelihood, "WINDOW", 7)
    np.testing.assert_allclose(bounds_of(texts, one, 3, "texts/x").bounds_NxK, want.bounds_NxK, rtol=2e-5)
    readings = [r for i, ids in enumerate(likelihood._tokens(texts[:4], one)) for r in draw(ids, one, i)]
    losses, rights = answer(one, readings)
    for i, reading in enumerate(readings):
        loss, right = answer(one, [reading])
        np.testing.assert_allclose(loss, losses[i], rtol=2e-5)
        assert right == rights[i]


def draw(ids: np.ndarray, embedder, number: int) -> list[Reading]:
    return likelihood._readings(ids, embedder.blueprint.language, 2, (0, number))


def test_a_causal_model_says_the_likelihood_itself():
    embedder, texts = make("llama"), sentences(5, 6)
    found = bounds_of(texts, embedder, 8, "texts/x")
    ids = np.stack(embedder.blueprint.tokenizer.encode(texts, 32)).astype(np.int64)
    scores = all_scores(embedder, ids)
    of_right = np.take_along_axis(log_softmax(scores), ids[..., None], -1)[:, 1:-1, 0]
    np.testing.assert_allclose(found.bounds_NxK, of_right.sum(1, keepdims=True), rtol=1e-5)
    assert found.right == (scores.argmax(-1) == ids)[:, 1:-1].mean()
    results = evaluate_likelihood(likelihood.TextsData("x", texts), embedder, 8)
    assert results["elbo"] == pytest.approx(of_right.mean(), rel=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(-of_right.mean()), rel=1e-4)
    spread = of_right.sum(1).std(ddof=1) / math.sqrt(5) / 6  # texts of one length: the error of a mean
    assert results["elbo_stderr"] == pytest.approx(spread, rel=1e-4)


@pytest.mark.parametrize("texts", [sentences(1, 6) * 800, sentences(400, 3, 4) + sentences(400, 9, 5)])
def test_the_error_is_the_spread_over_texts_and_draws(texts):
    """Of 40 sets of 20 texts, each with its own masks: of one text again and again, and of texts of two lengths."""
    found = bounds_of(texts, make("bert"), 2, "texts/x")
    order = np.random.default_rng(0).permutation(len(texts)).reshape(40, 20)
    elbos, errors = zip(*(mean_bound(found.bounds_NxK[part], found.words_N[part]) for part in order))
    assert 0.75 < np.std(elbos, ddof=1) / np.sqrt(np.mean(np.square(errors))) < 1.33
    assert mean_bound(np.array([[-4.0, -2.0]]), np.array([2])) == (-1.5, pytest.approx(0.5))
    assert mean_bound(np.array([[-4.0]]), np.array([2])) == (-2, 0)


def write(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_texts_come_from_lines_texts_and_records(tmp_path):
    lines = write(tmp_path / "lines.txt", ["a b", "", " c ", "a b"])
    data = read_texts(lines, "--texts")
    assert (data.name, data.texts) == ("lines", ["a b", "c"])
    (tmp_path / "more.txt.gz").write_bytes(gzip.compress(b"d\n"))
    assert read_texts(str(tmp_path / "more.txt.gz"), "--texts") == likelihood.TextsData("more", ["d"])
    texts = write(tmp_path / "texts.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "a"}])
    assert read_texts(texts, "--texts").texts == ["a", "b"]
    records = [{"query": "q", "positive": ["a", "b"], "negative": "n"}, {"query": "r", "positive": "a"}]
    assert read_texts(write(tmp_path / "records.jsonl", records), "--texts").texts == ["q", "a", "b", "r"]


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"--texts: .*empty.txt: no line of it has text"):
        read_texts(write(tmp_path / "empty.txt", [" "]), "--texts")
    with pytest.raises(UserError, match=r"bad.jsonl:2: no 'text'"):
        read_texts(write(tmp_path / "bad.jsonl", [{"text": "a"}, {"word": "b"}]), "--texts")
    with pytest.raises(UserError, match=r"config.eval.texts: no such file or folder: none.txt"):
        require_sets(EvalConfig(texts=("none.txt",)), "config.eval.")
    require_sets(EvalConfig(texts=(write(tmp_path / "lines.txt", ["a"]),)), "config.eval.")


def test_a_task_of_its_own_and_a_table(tmp_path):
    path = write(tmp_path / "held.txt", sentences(4, 6))
    results = Tasks.read(EvalConfig(texts=(path,), draws=2), "--").evaluate(make("bert"))
    scores = flat_scores(results)
    assert list(scores) == [f"eval/texts/held{x}" for x in ("", "/elbo_stderr", "/perplexity", "/right")]
    assert scores["eval/texts/held/perplexity"] == pytest.approx(math.exp(-scores["eval/texts/held"]))
    console = Console(width=80, file=io.StringIO())
    console.print(*scores_tables({"texts/held": {"elbo": -2.50004, "right": 0.5}}, {}))
    assert "elbo" in console.file.getvalue() and "held -2.5000 0.5000" in " ".join(console.file.getvalue().split())


def test_what_cannot_be_measured_is_said():
    bert, texts = make("bert"), sentences(2, 3)
    for embedder, given, message in (
        (without(bert), texts, "texts/x: the model predicts no words: train it with a loss over tokens"),
        (without(bert, mask_id=-1), texts, "texts/x: the model is not causal, and has no mask token"),
        (bert, ["", "[CLS]"], "texts/x: no text has a word to predict"),
    ):
        with pytest.raises(UserError, match=message):
            bounds_of(given, embedder, 2, "texts/x")


def test_draws_without_texts_are_refused():
    command = [sys.executable, "-m", "jaxembed.evaluate", "--model=x", "--sts=x.jsonl", "--draws=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --draws are masks of the texts of --texts: give one\n"
