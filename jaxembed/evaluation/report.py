"""Scores as metrics and as tables.

Results are a dict by task, 'KIND/NAME' or, of what stands beside the model, 'bm25/KIND/NAME' and 'hybrid/KIND/NAME', of
that kind's metrics, each times 100; but those of texts that are predicted, 'texts/NAME', are as they are: nats, and
parts of 1.
"""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from jaxembed.evaluation.mteb_tasks import MtebScore

BM25, HYBRID = "bm25/", "hybrid/"  # before the names of their results
_BESIDE = {BM25: "  BM25", HYBRID: "  hybrid"}  # rows below the model's
# kind of task → the metric that stands for it
MAIN_METRIC = {
    "sts": "spearman",
    "retrieval": "ndcg@10",
    "pairs": "ndcg@10",
    "classification": "accuracy",
    "texts": "elbo",
}
_DECIMALS = {"texts": 4}  # 2 of the others
_TITLES = {
    "sts": "Similarity",
    "retrieval": "Retrieval",
    "pairs": "Retrieval among pairs",
    "classification": "Classification",
    "texts": "Texts predicted (nats per word)",
}

Results = dict[str, dict[str, float]]  # task → metric → score


def main_scores(results: Results) -> dict[str, float]:
    """Returns one score per task, as 'eval/KIND/NAME', 'bm25/KIND/NAME' or 'hybrid/KIND/NAME'."""
    return {_metric_name(task): scores[_main_metric(task)] for task, scores in results.items()}


def flat_scores(results: Results) -> dict[str, float]:
    """Returns all scores by metric name: the main ones as in `main_scores`, the others with '/METRIC' behind."""
    flat: dict[str, float] = {}
    for task, scores in results.items():
        flat |= main_scores({task: scores})
        others = {name: score for name, score in scores.items() if name != _main_metric(task)}
        flat |= {f"{_metric_name(task)}/{name}": score for name, score in others.items()}
    return flat


def scores_tables(results: Results, baselines: Results) -> list[Table]:
    """Lays the scores out: a table per kind of task, a row per task, a column per metric.

    Below the model's row stand BM25's and that of both fused.

    Args:
      results: the model's, and those of it and BM25.
      baselines: BM25's, on some of the same sets.
    """
    tables: dict[str, Table] = {}
    own = {task: scores for task, scores in results.items() if not task.startswith(HYBRID)}
    for task, scores in own.items():
        kind, _, name = task.partition("/")
        if kind not in tables:
            tables[kind] = _table(_TITLES[kind])
            for metric in scores:
                tables[kind].add_column(metric, justify="right", no_wrap=True)
        tables[kind].add_row(name, *_cells(scores, _DECIMALS.get(kind, 2)))
        for prefix, name in _BESIDE.items():
            if beside := (results | baselines).get(prefix + task):
                tables[kind].add_row(name, *_cells(beside), style="dim")
    return list(tables.values())


def mteb_table(scores: Sequence[MtebScore]) -> Table:
    """Lays MTEB's main scores out, a row per task."""
    table = _table("MTEB")
    table.add_column("type", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    for score in scores:
        table.add_row(score.task, score.kind, score.metric, f"{score.score:.2f}")
    return table


def _table(title: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column(title, overflow="fold")
    return table


def _cells(scores: dict[str, float], decimals: int = 2) -> list[str]:
    return [f"{score:.{decimals}f}" for score in scores.values()]


def _metric_name(task: str) -> str:
    return task if task.startswith((BM25, HYBRID)) else f"eval/{task}"


def _main_metric(task: str) -> str:
    return MAIN_METRIC[task.removeprefix(BM25).removeprefix(HYBRID).split("/")[0]]
