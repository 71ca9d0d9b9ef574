"""The report's page and its command."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from written_run import write_run

from jaxembed import report
from jaxembed.errors import UserError
from jaxembed.report import write_report
from jaxembed.reporting import curves
from jaxembed.reporting.markdown import code, duration, table

ROOT = pathlib.Path(__file__).resolve().parent.parent


def page(workdir):
    write_report(workdir)
    return (workdir / "report" / "README.md").read_text()


def rows(text, start):
    """The cells of a page's lines that begin with a cell."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_tells_scores_speed_data_and_settings(tmp_path):
    text = page(write_run(tmp_path / "run", 20, 5))
    assert text.startswith("# run: bert, infonce, batch 32, 20 steps\n")
    assert "trained from scratch: 20 steps in 2 s of training, loss 4.284 → 0.4913." in text
    assert rows(text, "pairs/held-out")[0][2:] == ["20.00 (0)", "35.00 (15)", "**35.00** (20)", "52.50"]
    assert rows(text, "sts/dev")[0][-1] == ""
    assert rows(text, "`source-0.jsonl`")[0][1:4] == ["Apache-2.0", "1,500", "5,000"]
    assert rows(text, "`source-1.jsonl`")[0][1] == "unknown"
    assert rows(text, "all")[0][5] == "5.0%"
    assert rows(text, "loss")[0][1].startswith("`infonce`: temperature 0.05")
    assert rows(text, "`data.train[1].weight`") == [["`data.train[1].weight`", "`2.0`"]]
    assert "`model.pooling`" not in text
    assert (tmp_path / "run" / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_stages_have_a_column_each(tmp_path):
    text = page(write_run(tmp_path / "run", 20, 5, ("weak", "hard")))
    assert rows(text, "steps") == [["steps", "10", "10"]]
    assert [row[0] for row in rows(text, "weak") + rows(text, "hard")] == ["weak"] * 3 + ["hard"] * 3


def test_no_training_text_is_in_it(tmp_path):
    run = write_run(tmp_path / "run", 20, 5)
    text = page(run)
    for line in (run / "a.jsonl").read_text().splitlines():
        assert json.loads(line)["query"] not in text


def test_it_is_made_anew_and_leaves_nothing_else(tmp_path):
    run = write_run(tmp_path / "run", 20, 5)
    first = page(run)
    assert page(run) == first
    assert sorted(path.name for path in (run / "report").iterdir()) == ["README.md", "curves.png"]


def test_a_run_that_has_logged_nothing_is_refused(tmp_path):
    run = write_run(tmp_path / "run", 20, 5)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="no metrics in it yet"):
        write_report(run)


def test_a_picture_that_fails_does_not_reach_training_as_a_traceback(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", 20, 5)
    page(run)

    def fail(*_):
        raise ZeroDivisionError("in a library")

    monkeypatch.setattr(curves, "_draw", fail)
    with pytest.raises(UserError, match="cannot be drawn: ZeroDivisionError"):
        write_report(run)
    assert sorted(path.name for path in (run / report.FOLDER).iterdir()) == ["README.md", "curves.png"]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "jaxembed.report", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command(tmp_path):
    run = write_run(tmp_path / "run", 20, 5)
    result = command(f"--workdir={run}")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"report": f"{run}/report"}
    assert "pairs/held-out" in result.stderr and (run / "report" / "curves.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "--workdir is missing"), (["--workdir={folder}"], "no config.json here"), (["--workdr=x"], "workdr")],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    result = command(*(argument.format(folder=tmp_path) for argument in arguments))
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1


def test_cells_cannot_break_a_table():
    assert table(["a", "b"], [("x|y", "two\nlines")]) == "| a | b |\n| --- | ---: |\n| x\\|y | two lines |\n"
    assert code('say "a"\n') == '`"say \\"a\\"\\n"`' and code("a`b") == '`` "a`b" ``'


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (221, "3 min 41 s"), (7500, "2 h 5 min")]
)
def test_times_are_said_as_people_do(seconds, said):
    assert duration(seconds) == said
