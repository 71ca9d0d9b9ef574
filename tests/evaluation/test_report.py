"""Metric names and the table of scores."""

import io

from rich.console import Console

from jaxembed.evaluation.report import flat_scores, main_scores, scores_tables

RESULTS = {
    "sts/stsb-dev": {"spearman": 86.716, "pearson": 86.0},
    "retrieval/scifact": {"ndcg@10": 64.5, "recall@100": 92.5},
}


def test_metric_names():
    assert main_scores(RESULTS) == {"eval/sts/stsb-dev": 86.716, "eval/retrieval/scifact": 64.5}
    assert flat_scores(RESULTS) == {
        "eval/sts/stsb-dev": 86.716,
        "eval/sts/stsb-dev/pearson": 86.0,
        "eval/retrieval/scifact": 64.5,
        "eval/retrieval/scifact/recall@100": 92.5,
    }


def test_tables():
    console = Console(width=100, file=io.StringIO())
    console.print(*scores_tables(RESULTS))
    lines = console.file.getvalue().replace("┃", "│").splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    for row in (
        ["sts", "spearman", "pearson"],
        ["stsb-dev", "86.72", "86.00"],
        ["retrieval", "ndcg@10", "recall@100"],
        ["scifact", "64.50", "92.50"],
    ):
        assert row in rows
