"""Scores as metrics and as a table.

Results are a dict by task, 'sts/NAME' or 'retrieval/NAME', of what `evaluate_sts` or `evaluate_retrieval` returned.
"""

from rich.table import Table

MAIN_METRIC = {"sts": "spearman", "retrieval": "ndcg@10"}  # kind of task → the metric that stands for it


def main_scores(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns one score per task, as 'eval/sts/NAME' (Spearman) and 'eval/retrieval/NAME' (nDCG@10)."""
    return {f"eval/{task}": scores[_main_metric(task)] for task, scores in results.items()}


def flat_scores(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns all scores by metric name: the main ones as in `main_scores`, the others as 'eval/KIND/NAME/METRIC'."""
    flat: dict[str, float] = {}
    for task, scores in results.items():
        flat |= main_scores({task: scores})
        flat |= {f"eval/{task}/{name}": score for name, score in scores.items() if name != _main_metric(task)}
    return flat


def scores_table(results: dict[str, dict[str, float]]) -> Table:
    """Lays the scores out: a row per task, a column per metric, blank where a task has no such metric."""
    metrics = list(dict.fromkeys(name for scores in results.values() for name in scores))
    table = Table("task")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for task, scores in results.items():
        table.add_row(task, *(f"{scores[metric]:.2f}" if metric in scores else "" for metric in metrics))
    return table


def _main_metric(task: str) -> str:
    return MAIN_METRIC[task.split("/")[0]]
