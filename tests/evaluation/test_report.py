"""Metric names and the table of scores."""

import io

from rich.console import Console

from jaxembed.evaluation.report import flat_scores, main_scores, scores_tables

RESULTS = {
    "sts/stsb-dev": {"spearman": 86.716, "pearson": 86.0},
    "retrieval/scifact": {"ndcg@10": 64.5, "recall@100": 92.5},
    "retrieval/other": {"ndcg@10": 1.0, "recall@100": 2.0},
}
HYBRID = {"hybrid/retrieval/scifact": {"ndcg@10": 72.0, "recall@100": 94.0}}
BASELINES = {"bm25/retrieval/scifact": {"ndcg@10": 69.4, "recall@100": 92.0}}


def test_metric_names():
    assert main_scores(RESULTS | HYBRID | BASELINES) == {
        "eval/sts/stsb-dev": 86.716,
        "eval/retrieval/scifact": 64.5,
        "eval/retrieval/other": 1.0,
        "hybrid/retrieval/scifact": 72.0,
        "bm25/retrieval/scifact": 69.4,
    }
    assert flat_scores({"sts/stsb-dev": RESULTS["sts/stsb-dev"]} | BASELINES) == {
        "eval/sts/stsb-dev": 86.716,
        "eval/sts/stsb-dev/pearson": 86.0,
        "bm25/retrieval/scifact": 69.4,
        "bm25/retrieval/scifact/recall@100": 92.0,
    }


def test_tables():
    console = Console(width=80, file=io.StringIO())
    console.print(*scores_tables(RESULTS | HYBRID, BASELINES))
    rows = [line.split() for line in console.file.getvalue().splitlines() if line.strip(" ─")]
    assert rows == [
        ["Similarity", "spearman", "pearson"],
        ["stsb-dev", "86.72", "86.00"],
        ["Retrieval", "ndcg@10", "recall@100"],
        ["scifact", "64.50", "92.50"],
        ["BM25", "69.40", "92.00"],
        ["hybrid", "72.00", "94.00"],
        ["other", "1.00", "2.00"],
    ]
