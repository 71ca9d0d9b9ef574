"""The evaluation sets of a run: names, prompts, and the evaluate command."""

import dataclasses
import json
import subprocess
import sys
import types

import numpy as np
import pytest
from tiny_run import tiny_config

from jaxembed.config import EvalConfig
from jaxembed.errors import UserError
from jaxembed.evaluation.report import flat_scores
from jaxembed.evaluation.tasks import Tasks


def write_sets(folder):
    sts = folder / "pairs.jsonl"
    rows = [("a cat sits", "a cat is sitting", 5), ("a cat sits", "stocks fell", 0), ("two dogs run", "dogs play", 3)]
    sts.write_text("".join(json.dumps(dict(zip(("sentence1", "sentence2", "score"), row))) + "\n" for row in rows))
    beir = folder / "mini"
    beir.mkdir()
    texts = {"d1": "the cat sits on the mat", "d2": "share prices fell", "d3": "dogs run in the park"}
    (beir / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": i, "title": "", "text": t}) + "\n" for i, t in texts.items())
    )
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "where is the cat"}) + "\n")
    (beir / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    return sts, beir


class Recorder:
    """An embedder that writes down by which method each text came."""

    mesh = None

    def __init__(self):
        self.calls = {}
        self.blueprint = types.SimpleNamespace(similarity="cosine")

    def _take(self, name, texts):
        self.calls.setdefault(name, []).extend(texts)
        return np.random.default_rng(len(texts)).normal(size=(len(texts), 4)).astype(np.float32)

    def encode(self, texts, show_progress_bar=False):
        return self._take("default", texts)

    def encode_query(self, texts, show_progress_bar=False):
        return self._take("query", texts)

    def encode_document(self, texts, show_progress_bar=False):
        return self._take("document", texts)


def test_each_kind_of_text_is_encoded_with_its_prompt(tmp_path):
    sts, beir = write_sets(tmp_path)
    recorder = Recorder()
    results = Tasks.read(EvalConfig(sts=(str(sts),), retrieval=(str(beir),)), "--").evaluate(recorder)
    assert set(results) == {"sts/pairs", "retrieval/mini"}
    assert recorder.calls["query"] == ["where is the cat"]
    assert sorted(recorder.calls["document"]) == [
        "dogs run in the park",
        "share prices fell",
        "the cat sits on the mat",
    ]
    assert set(recorder.calls["default"]) >= {"a cat sits", "dogs play"}


def test_bm25_is_scored_where_it_is_asked_for(tmp_path):
    _, beir = write_sets(tmp_path)
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"query": "two dogs", "positive": "dogs play", "negative": "stocks fell"}) + "\n")
    sets = EvalConfig(retrieval=(str(beir),), pairs=(str(records),))
    assert Tasks.read(sets, "--").baselines() == {}
    tasks = Tasks.read(dataclasses.replace(sets, bm25=True), "--")
    baselines = tasks.baselines()
    assert baselines["bm25/retrieval/mini"]["ndcg@10"] == baselines["bm25/pairs/records"]["recall@1"] == 100
    results = tasks.evaluate(Recorder())
    assert {f"bm25/{task}" for task in results} == set(baselines)
    assert results["pairs/records"].keys() == baselines["bm25/pairs/records"].keys()


def test_the_model_and_bm25_are_fused_where_it_is_asked_for(tmp_path):
    _, beir = write_sets(tmp_path)
    tasks, model = Tasks.read(EvalConfig(retrieval=(str(beir),), hybrid=True), "--"), Recorder()
    results = tasks.evaluate(model)
    assert set(results) == {"retrieval/mini", "hybrid/retrieval/mini"} and tasks.baselines() == {}
    assert len(model.calls["document"]) == 3  # encoded once
    # BM25 finds d1 alone; whatever the model thinks of the other two, no document is first in both.
    assert results["hybrid/retrieval/mini"]["ndcg@10"] == 100
    assert flat_scores(results)["hybrid/retrieval/mini/recall@1"] == 100


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval__hybrid": True}, "config.eval.hybrid searches the sets of config.eval.retrieval and .pairs"),
        ({"eval__bm25": True}, "config.eval.bm25 searches the sets of config.eval.retrieval and .pairs"),
        ({"checkpoint__best": "hybrid/retrieval/x"}, "config.checkpoint.best = 'hybrid/retrieval/x'"),
    ],
)
def test_configs_that_cannot_be_right(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        tiny_config(tmp_path, **changes)


def test_vectors_are_compared_as_the_model_says(tmp_path):
    sts, beir = write_sets(tmp_path)
    tasks, model = Tasks.read(EvalConfig(sts=(str(sts),), retrieval=(str(beir),)), "--"), Recorder()
    model.blueprint.similarity = "manhattan"
    with pytest.raises(UserError, match="by manhattan distance"):
        tasks.evaluate(model)
    model.blueprint.similarity = "euclidean"
    assert set(tasks.evaluate(model)) == {"sts/pairs", "retrieval/mini"}


def test_two_sets_of_one_name_are_refused(tmp_path):
    sts, _ = write_sets(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "pairs.jsonl").write_text(sts.read_text())
    with pytest.raises(UserError, match="pairs"):
        Tasks.read(EvalConfig(sts=(str(sts), str(other / "pairs.jsonl"))), "--")


def test_command_prints_tables_and_a_json_line_last(tmp_path, minilm_dir):
    sts, beir = write_sets(tmp_path)
    labelled = tmp_path / "labelled.jsonl"
    rows = [("a cat sits", "animal"), ("dogs play", "animal"), ("shares fell", "money"), ("prices rise", "money")]
    labelled.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    sets = [f"--sts={sts}", f"--retrieval={beir}", "--bm25", "--hybrid", f"--classification={labelled}:{labelled}"]
    command = [sys.executable, "-m", "jaxembed.evaluate", f"--model={minilm_dir}", *sets]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["eval/sts/pairs"] == pytest.approx(100) and figures["eval/retrieval/mini"] == 100
    assert figures["bm25/retrieval/mini"] == figures["eval/classification/labelled"] == 100
    assert figures["hybrid/retrieval/mini"] == 100
    assert all(word in done.stdout for word in ("spearman", "ndcg@10", "BM25", "hybrid", "accuracy"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--model is missing"),
        (["--model=x"], "nothing to evaluate on"),
        (["--model=x", "--bm25", "--sts=none.jsonl"], "--bm25 searches the sets of --retrieval and --pairs"),
        (["--model=x", "--hybrid", "--sts=none.jsonl"], "--hybrid searches the sets of --retrieval and --pairs"),
        (["--model=nowhere/at-all", "--sts=none.jsonl"], "--sts: no such file or folder: none.jsonl"),
        (["--model=x", "--retrieval=none"], "--retrieval: no such file or folder: none"),
        (["--model=x", "--pairs=none.jsonl"], "--pairs: no such file or folder: none.jsonl"),
        (["--model=x", "--classification=none.jsonl:also"], "--classification: no such file or folder: none.jsonl"),
        (["--model=x", "--mteb=none.py:Task"], "none.py"),
        (["--model=x", "--sts=x.jsonl", "--moee_weight=0.5"], "--moee_weight weighs the similarities"),
    ],
)
def test_mistakes_are_one_line_and_code_2(flags, said):
    done = subprocess.run([sys.executable, "-m", "jaxembed.evaluate", *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and said in done.stderr
