"""A run's metrics as columns: scores, stages, medians, time."""

import json

import numpy as np
import pytest
from written_run import BM25, write_run

from jaxembed.reporting.history import History


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("history") / "run", steps=20, every=5, stages=("weak", "hard"))


def test_columns_hold_the_steps_at_which_they_were_logged(workdir):
    history = History.read(workdir)
    steps, loss = history.series["loss"]
    np.testing.assert_array_equal(steps, np.arange(1, 21))
    assert loss[0] == 4 + 0.1 * np.sin(1) + 0.2
    np.testing.assert_array_equal(history.series["eval/sts/dev"].steps, [0, 5, 10, 15, 20])
    assert history.last_step == 20 and history.tasks == ["sts/dev", "pairs/held-out"]


def test_scores_are_first_best_and_last_with_bm25_beside(workdir):
    main, recall = History.read(workdir).scores("pairs/held-out")
    assert (main.metric, main.first, main.best, main.last) == ("ndcg@10", 20, 35, 35)
    assert (main.first_step, main.best_step, main.last_step, main.bm25) == (0, 15, 20, BM25)
    assert (recall.metric, recall.last, recall.bm25) == ("recall@1", 17.5, BM25 / 2)
    assert History.read(workdir).scores("sts/dev")[0].bm25 is None


def test_what_comes_after_a_step_can_be_left_out(workdir):
    history = History.read(workdir, until=7)
    assert history.last_step == 7 and history.stages == (("weak", 0),)
    assert history.scores("sts/dev")[0].last == 25


def test_stages_cut_the_history(workdir):
    (weak, first), (hard, second) = History.read(workdir).by_stage()
    assert (weak, hard) == ("weak", "hard")
    assert first.series["loss"].steps.tolist() == list(range(1, 11))
    assert second.series["loss"].steps.tolist() == list(range(11, 21))
    assert first.stages == (("weak", 0),) and second.stages == (("hard", 11),)


def test_compilation_is_left_out_of_medians_but_not_of_the_time(workdir):
    history = History.read(workdir)
    assert 1900 <= history.typical("pairs_per_s") <= 2100 and history.typical("none") is None
    rates = history.series["pairs_per_s"].values
    assert history.seconds() == pytest.approx(sum(32 / rates)) and history.seconds() > 32 / 20


def test_time_counts_steps_that_were_not_logged(tmp_path):
    lines = [{"step": step, "pairs": 10, "pairs_per_s": 5.0} for step in (4, 8, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert History.read(tmp_path).seconds() == 9 * 2


def test_the_stages_share_out_the_time(workdir, tmp_path):
    history = History.read(workdir)
    assert sum(part.seconds() for _, part in history.by_stage()) == pytest.approx(history.seconds())
    lines = [{"step": n, "stage": f"s{n > 8}", "pairs": 10, "pairs_per_s": 5.0} for n in (4, 8, 12, 16)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [part.seconds() for _, part in History.read(tmp_path).by_stage()] == [16, 16]


def test_a_run_without_metrics_has_no_history(tmp_path):
    history = History.read(tmp_path)
    assert not history.series and history.last_step == 0 and history.seconds() == 0 and history.tasks == []


def test_values_that_were_not_finite_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 3.0}\n')
    steps, values = History.read(tmp_path).series["loss"]
    assert steps.tolist() == [2] and values.tolist() == [3.0]
