"""What a person reads when training is over: scores before and after, speed, where things are."""

import pathlib
from typing import TYPE_CHECKING

from jaxembed.reporting.history import History
from jaxembed.reporting.markdown import duration, score
from jaxembed.reporting.record import RunRecord
from jaxembed.reporting.routers import in_words as experts_in_words
from jaxembed.reporting.time_spent import goodput_in_words, memory_in_words, time_in_words
from jaxembed.storage import AnyPath

if TYPE_CHECKING:
    from rich.console import RenderableType

PLACES = ("export", "report/README.md", "metrics.jsonl")  # in the work directory, shown where they are


def summary(workdir: AnyPath) -> "RenderableType":
    """Returns a few lines on a run, for `rich.console.Console.print`.

    Raises:
      UserError: not a run's folder.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table

    record = RunRecord.read(workdir)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for name, value in _facts(record.history):
        facts.add_row(name, value)
    for place in PLACES:
        if (workdir / place).exists():
            facts.add_row(pathlib.PurePath(place).parts[0].removesuffix(".jsonl"), str(workdir / place))
    return Group(*([_scores(record.history)] if record.history.tasks else []), Padding(facts, (0, 2)))


def _scores(history: History) -> "RenderableType":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = [history.scores(task)[0] for task in history.tasks]
    baseline = any(row.bm25 is not None for row in rows)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("task", overflow="fold")
    table.add_column("metric")
    for name in ("before", "after", "best (step)", *(["BM25"] if baseline else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        best = f"{score(row.best)} ({row.best_step:,})"
        beside = [score(row.bm25)] if baseline else []
        table.add_row(row.task, row.metric, score(row.first), f"[bold]{score(row.last)}[/]", best, *beside)
    return table


def _facts(history: History) -> list[tuple[str, str]]:
    if "loss" not in history.series:
        return []
    loss = history.series["loss"].values
    pairs, tokens, waste = (history.typical(name) for name in ("pairs_per_s", "tokens_per_s", "padding_waste"))
    mfu = history.typical("mfu")
    of_peak = "" if mfu is None else f", MFU {mfu:.1%}"
    facts = [
        ("loss", f"{loss[0]:.4f} → {loss[-1]:.4f}"),
        ("steps", f"{history.last_step:,} in {duration(history.seconds())}"),
        ("speed", f"{pairs:,.0f} pairs/s, {tokens:,.0f} tokens/s, {waste:.1%} padding{of_peak}"),
        ("experts", experts_in_words(history)),
        ("time", time_in_words(history)),
        ("goodput", goodput_in_words(history)),
        ("memory", memory_in_words(history)),
    ]
    return [(name, value) for name, value in facts if value]
