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


def scores_tables(results: dict[str, dict[str, float]]) -> list[Table]:
    """Lays the scores out: a table per kind of task, a row per task, a column per metric."""
    tables: dict[str, Table] = {}
    for task, scores in results.items():
        kind, _, name = task.partition("/")
        if kind not in tables:
            tables[kind] = Table(kind)
            for metric in scores:
                tables[kind].add_column(metric, justify="right")
        tables[kind].add_row(name, *(f"{score:.2f}" for score in scores.values()))
    return list(tables.values())


def _main_metric(task: str) -> str:
    return MAIN_METRIC[task.split("/")[0]]
