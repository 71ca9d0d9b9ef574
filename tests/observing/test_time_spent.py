"""What a run's time went into, as reports say it."""

import io
import json

import pytest
from rich.console import Console
from written_run import write_run

from jaxembed.reporting.history import History
from jaxembed.reporting.record import RunRecord
from jaxembed.reporting.run_report import report
from jaxembed.reporting.summary import summary
from jaxembed.reporting.time_spent import goodput_in_words, memory_in_words, seconds_by_part, time_in_words

STEP = {"data_wait_s": 0.25, "compute_s": 1.5, "host_s": 0.25, "mfu": 0.4}


@pytest.fixture
def workdir(tmp_path):
    """A run of 10 steps, of which a line says the mean of five."""
    folder = write_run(tmp_path / "run", 10)
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    five, ten = lines[4] | STEP, lines[9] | STEP
    five |= {"compile_s": 15.0, "goodput": 0.2, "memory_peak_bytes": 3e9}
    ten |= {"eval_s": 3.0, "checkpoint_s": 2.0, "compute_s": 2.5, "goodput": 0.55, "memory_peak_bytes": 2e9}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in (five, ten)))
    return folder


def test_means_are_of_all_steps_since_the_line_before(workdir):
    history = History.read(workdir)
    assert seconds_by_part(history) == {
        **{"computing": 20.0, "waiting for data": 2.5, "the loop's own code": 2.5},
        **{"compiling": 15.0, "evaluating": 3.0, "saving": 2.0},
    }
    words = time_in_words(history)
    assert words.startswith("computing 44.4%, compiling 33.3%, evaluating 6.7%, ") and "saving 4.4%" in words
    assert goodput_in_words(history).startswith("55.0% of the time since the run first began")
    assert memory_in_words(history).startswith("3.00 GB")


def test_report_and_summary_show_them(workdir):
    console = Console(file=io.StringIO(), width=200)
    console.print(summary(workdir))
    page = report(RunRecord.read(workdir))
    for text in (console.file.getvalue(), page):
        assert "computing 44.4%, compiling 33.3%" in text and "55.0% of the time" in text and "3.00 GB" in text
    assert " | 40.0% | " in page


def test_a_run_that_did_not_log_them_is_reported_without(tmp_path):
    folder = write_run(tmp_path / "run", 10)
    history = History.read(folder)
    assert not time_in_words(history) and not goodput_in_words(history) and not memory_in_words(history)
    assert "Goodput" not in report(RunRecord.read(folder))


def test_steps_of_code_that_did_not_log_them_are_left_out(workdir):
    """A run that went on with newer code: the first line with such fields is of the steps since the line before it."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines[0] = {name: value for name, value in lines[0].items() if name not in (*STEP, "compile_s")}
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spent = seconds_by_part(History.read(workdir))
    assert spent["computing"] == 5 * 2.5 and spent["waiting for data"] == 5 * 0.25


def test_a_save_after_the_last_line_is_reported(workdir):
    """Also where there was no other, and of each time that the run was told to stop."""
    metrics = workdir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"checkpoint_s"', '"other"'))
    (workdir / "rest.jsonl").write_text('{"step": 5, "checkpoint_s": 2.0}\n{"step": 10, "checkpoint_s": 5.0}\n')
    assert seconds_by_part(History.read(workdir))["saving"] == 7
    assert seconds_by_part(History.read(workdir, until=9))["saving"] == 2
    assert "saving 14.0%" in report(RunRecord.read(workdir))
