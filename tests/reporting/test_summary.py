"""What a person reads when training is over."""

import io

import pytest
from rich.console import Console
from written_run import write_run

from jaxembed.errors import UserError
from jaxembed.reporting.summary import summary


def shown(workdir, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(summary(workdir))
    return console.file.getvalue()


def test_scores_before_and_after_with_bm25_and_where_things_are(tmp_path):
    run = write_run(tmp_path / "run", 20, 5)
    (run / "export").mkdir()
    text = shown(run, width=200)
    row = next(line for line in text.splitlines() if "pairs/held-out" in line)
    assert row.split() == ["pairs/held-out", "ndcg@10", "20.00", "35.00", "35.00", "(15)", "52.50"]
    assert "20 in 2 s" in text and "5.0% padding" in text
    assert f"{run}/export" in text and f"{run}/metrics.jsonl" in text and "report" not in text


def test_eighty_columns_serve(tmp_path):
    lines = shown(write_run(tmp_path / "run", 20, 5)).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("20.00" in line and "35.00" in line and "52.50" in line for line in lines)


def test_a_run_without_evaluation_has_no_table(tmp_path):
    text = shown(write_run(tmp_path / "run", 3))
    assert "task" not in text and "loss" in text


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json here"):
        summary(tmp_path)
