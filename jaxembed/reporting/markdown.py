"""What reports and model cards say in the same words: tables of scores, data and settings, in Markdown."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from jaxembed.config import Config, LossConfig
from jaxembed.hf.hub import REPOSITORY
from jaxembed.losses.table import ENGINE, LOSSES
from jaxembed.reporting.history import History, Scores
from jaxembed.reporting.record import RunRecord, Source
from jaxembed.stages import stages_of

UNKNOWN = "unknown"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """Returns a Markdown table; the first `left` columns are set flush left, the others right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    cells = ([str(cell).replace("\n", " ").replace("|", "\\|") for cell in row] for row in (header, rule, *rows))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def code(text: str) -> str:
    """Returns a text as inline code; line breaks and quotes as JSON writes them."""
    quoted = json.dumps(text, ensure_ascii=False)
    return f"`` {quoted} ``" if "`" in quoted else f"`{quoted}`"


def duration(seconds: float) -> str:
    """Returns a time as people say it: '42 s', '3 min 41 s', '2 h 5 min'."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def start_of(config: Config) -> str:
    """Returns what the weights started from, without a path of the machine that trained them."""
    kind, _, where = config.model.init.partition(":")
    on_hub = REPOSITORY.fullmatch(where) and not pathlib.Path(where).is_dir()
    name = where if on_hub else where.rstrip("/").rsplit("/", 1)[-1]
    return {"scratch": "from scratch", "hf": f"from `{name}`", "run": f"from the run `{name}`"}[kind]


def score(value: float | None) -> str:
    """Returns a score as tables show it."""
    return "" if value is None else f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.4f}"


def data_table(sources: Sequence[Source]) -> str:
    """Lists the training data: what each source holds, and its licence, 'unknown' where it is."""
    staged = len({source.stage for source in sources}) > 1
    header = ["source", "licence", "records", "texts", "tokens", "cut to the limit", "bad, skipped", "weight"]
    rows = [
        (
            f"`{source.source}`",
            source.licence or UNKNOWN,
            f"{source.records:,}",
            f"{source.texts:,}",
            f"{source.tokens:,}",
            f"{source.truncated / max(source.texts, 1):.1%}",
            f"{source.skipped:,}",
            f"{source.weight:g}",
        )
        for source in sources
    ]
    if staged:
        return table(["stage", *header], [(source.stage, *row) for source, row in zip(sources, rows)], left=3)
    return table(header, rows, left=2)


def scores_table(scores: Sequence[Scores]) -> str:
    """Shows how scores went, with the steps at which they were measured, and BM25 where it was."""
    baseline = any(row.bm25 is not None for row in scores)
    rows = [
        (
            row.task,
            row.metric,
            f"{score(row.first)} ({row.first_step:,})",
            f"{score(row.best)} ({row.best_step:,})",
            f"**{score(row.last)}** ({row.last_step:,})",
            *([score(row.bm25)] if baseline else []),
        )
        for row in scores
    ]
    return table(
        ["task", "metric", "first (step)", "best (step)", "last (step)", *(["BM25"] if baseline else [])], rows, left=2
    )


def settings_table(record: RunRecord) -> str:
    """Shows how a run was trained: a column per stage that it reached."""
    parts = record.history.by_stage()
    configs = {stage.name: stage.config for stage in stages_of(record.config)}
    columns = [_settings(configs[name], *steps) for (name, _), steps in zip(parts, _steps(parts))]
    header = ["", *(name for name, _ in parts)] if len(parts) > 1 else ["setting", "value"]
    return table(header, [(key, *(column[key] for column in columns)) for key in columns[0]], left=len(header))


def changed_fields(config: Config) -> list[tuple[str, Any]]:
    """Returns the fields, by their whole names, in which a config differs from the defaults."""
    return list(_changes("", dataclasses.asdict(config), dataclasses.asdict(Config())))


def _steps(parts: Sequence[tuple[str, History]]) -> list[tuple[int, int]]:
    """Returns the steps that each part began after and ended with."""
    ends = [part.last_step for _, part in parts]
    return list(zip([0, *ends[:-1]], ends))


def _settings(config: Config, first: int, last: int) -> dict[str, str]:
    data, optimizer = config.data, config.optimizer
    said = {
        "steps": f"{last - first:,}",
        "batch": f"{config.batch_size:,} pairs"
        + (f" in {config.grad_cache} micro-batches (gradient cache)" if config.grad_cache > 1 else ""),
        "loss": _losses(config.all_losses),
        "optimizer": _named(optimizer, () if optimizer.ema else ("ema",)),
        "in a step, per query": f"up to {data.positives} positives and {data.used_negatives} hard negatives",
        "computation": f"{config.model.dtype}, master weights {config.model.param_dtype}",
        "seed": str(config.seed),
    }
    return said


def _losses(losses: Sequence[LossConfig]) -> str:
    """Returns the losses: each one's temperature, and what else was changed."""
    shown = []
    for loss in losses:
        always = {"name", "temperature"} & {"name", *LOSSES[loss.name].takes} | (
            {"weight"} if len(losses) > 1 else set()
        )
        fields = [field.name for field in dataclasses.fields(loss)]
        alike = [field for field in fields if getattr(loss, field) == getattr(LossConfig(), field)]
        shown.append(_named(loss, [field for field in (*alike, *ENGINE) if field not in always]))
    return "; ".join(shown)


def _named(settings: Any, hidden: Sequence[str]) -> str:
    """Returns a loss's or an optimizer's name and its settings."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    shown = {key: value for key, value in values.items() if key not in ("name", *hidden) and value not in ({}, ())}
    said = ", ".join(f"{key} {_plain(value)}" for key, value in shown.items())
    return f"`{values['name']}`: {said}" if said else f"`{values['name']}`"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _changes(where: str, value: Any, default: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and isinstance(default, dict) and value.keys() <= default.keys():
        for key in value:
            yield from _changes(f"{where}.{key}".lstrip("."), value[key], default[key])
    elif where == "data.train":
        for i, source in enumerate(value):
            yield from _changes(f"{where}[{i}]", source, default[0])
    elif value != default:
        yield where, value
