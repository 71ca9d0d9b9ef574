"""The report of a run: one page of Markdown beside its curves."""

import json

from jaxembed.reporting import curves, routers
from jaxembed.reporting.history import History
from jaxembed.reporting.markdown import (
    changed_fields,
    data_table,
    duration,
    scores_table,
    settings_table,
    start_of,
    table,
)
from jaxembed.reporting.record import RunRecord
from jaxembed.reporting.time_spent import goodput_in_words, memory_in_words, time_in_words


def report(record: RunRecord) -> str:
    """Returns the page: no training text is in it.

    Args:
      record: of the run; its history is not empty.
    """
    history = record.history
    main = [history.scores(task)[0] for task in history.tasks]
    others = [scores for task in history.tasks for scores in history.scores(task)[1:]]
    parts = [
        f"# {record.title}\n",
        _in_words(record),
        f"![Curves of the run]({curves.NAME})\n",
        "## Evaluation\n",
        scores_table(main) if main else "None during this training.\n",
        f"<details><summary>All metrics</summary>\n\n{scores_table(others)}\n</details>\n" if others else "",
        _experts(history),
        "## Speed\n",
        _speed_table(history),
        _time(history),
        "## Training data\n",
        data_table(record.sources) if record.sources else "Not recorded.\n",
        "## Training\n",
        settings_table(record),
        "## Fields that differ from the defaults\n",
        table(
            ["field", "value"],
            ((f"`{key}`", f"`{json.dumps(value)}`") for key, value in changed_fields(record.config)),
            2,
        ),
    ]
    return "\n".join(filter(None, parts))


def _in_words(record: RunRecord) -> str:
    history = record.history
    said = f"A `{record.architecture}` encoder, trained {start_of(record.config)}"
    if "loss" not in history.series:
        return said + "; no step is logged yet.\n"
    loss = history.series["loss"].values
    took = duration(history.seconds())
    return f"{said}: {history.last_step:,} steps in {took} of training, loss {loss[0]:.4g} → {loss[-1]:.4g}.\n"


def _experts(history: History) -> str:
    """Shows what routers did at the end, where there are any."""
    figures = routers.figures(history)
    if not figures:
        return ""
    shown = table(list(figures), [list(figures.values())], left=0)
    note = (
        f"Means over the last {routers.END:.0%} of the steps. Balance: 1 where all experts are alike. Entropy: of the "
        "routers' probabilities, by the highest there can be. Busiest, idlest: the expert that the most or the fewest "
        "tokens of a step took, in any layer, by the mean of that layer. Dropped: tokens that no expert took.\n"
    )
    return f"## Experts\n\n{shown}\n{note}\n![What the routers did]({routers.NAME})\n"


def _speed_table(history: History) -> str:
    """Shows each stage's medians, after the first steps."""
    rows = []
    for name, part in history.by_stage():
        if "loss" not in part.series:
            continue
        keys = ("pairs_per_s", "tokens_per_s", "tokens_per_s_per_chip", "mfu", "padding_waste")
        pairs, tokens, per_chip, mfu, waste = (part.typical(key) for key in keys)
        rates = (f"{pairs:,.0f}", f"{tokens:,.0f}", "" if per_chip is None else f"{per_chip:,.0f}")
        parts = ("" if mfu is None else f"{mfu:.1%}", f"{waste:.1%}")
        rows.append((name or "all", *rates, *parts, duration(part.seconds())))
    header = ["stage", "pairs/s", "tokens/s", "tokens/s per chip", "MFU", "padding waste", "time"]
    note = (
        "Medians, the first tenth of the steps left out; time of the steps alone, without compiling, evaluating and "
        "saving. MFU: the model's operations on real tokens by the peak of the chips, where that is known.\n"
    )
    return table(header, rows) + "\n" + note


def _time(history: History) -> str:
    """Lists what the time went into, goodput and memory, each where it was logged."""
    said = {"Time": time_in_words, "Goodput": goodput_in_words, "Memory": memory_in_words}
    return "".join(f"- {name}: {in_words(history)}.\n" for name, in_words in said.items() if in_words(history))
