"""What mining and cleaning say of themselves: tables for the terminal and README.md, and a picture of the scores."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from jaxembed.errors import UserError
from jaxembed.mining.tally import Tally
from jaxembed.reporting import curves
from jaxembed.reporting.markdown import table as markdown_table
from jaxembed.run_folder import write_whole
from jaxembed.storage import AnyPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "scores.png"
COLOURS = {"positives": "#0072B2", "negatives": "#D55E00", "dropped": "#777777"}
LABELS = {"positives": "positives", "negatives": "mined negatives", "dropped": "dropped candidates"}

Rows = Sequence[tuple[str, str, int, int]]  # what, setting, how many, of how many


def rich_table(title: str, what: str, rows: Rows) -> Table:
    """Lays rows out for the terminal."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column(what, no_wrap=True)
    table.add_column("setting", no_wrap=True)
    for column in ("count", "%"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def markdown(what: str, rows: Rows) -> str:
    """Lays rows out for README.md."""
    return markdown_table((what, "setting", "count", "%"), map(_cells, rows), left=2)


def _cells(row: tuple[str, str, int, int]) -> tuple[str, str, str, str]:
    name, setting, count, total = row
    return name, setting, f"{count:,}", f"{100 * count / total:.2f}" if total else ""


def draw(tally: Tally, title: str, unit: str) -> bytes:
    """Draws how the scores of positives, mined negatives and dropped candidates are spread, and what dropped them.

    Args:
      tally: of a miner that has looked at one record at least.
      title: above both panels.
      unit: what the scores are: 'cosine', …

    Returns:
      A PNG of 1600 × 1000 pixels.

    Raises:
      UserError: matplotlib is missing or fails.
    """
    with curves.drawing("scores"):
        return curves.render(title, lambda figure: _panels(figure, tally, unit))


def _panels(figure: "Figure", tally: Tally, unit: str) -> None:
    top, bottom = figure.subplots(2, 1, height_ratios=(1.5, 1))
    middles = (tally.edges[1:] + tally.edges[:-1]) / 2
    for name, colour in COLOURS.items():
        counts = tally.histograms[name]
        if not counts.sum():
            continue
        label = f"{LABELS[name]}: {int(counts.sum()):,}, mean {tally.mean(name):.3f}"
        share = 100 * counts / counts.sum()
        top.fill_between(middles, share, step="mid", color=colour, alpha=0.25, linewidth=0)
        top.step(middles, share, where="mid", color=colour, linewidth=1.4, label=label)
        top.axvline(tally.mean(name), color=colour, linewidth=1.0, linestyle=(0, (4, 3)))
    top.set_title("Scores (each kind's own share; means dashed)")
    top.set_xlabel(unit)
    top.set_ylabel("%")
    top.set_ylim(bottom=0)
    top.legend(loc="upper left", frameon=True, facecolor="white", framealpha=0.85, edgecolor="none")
    _became(bottom, tally)


def _became(axes: "Axes", tally: Tally) -> None:
    """Draws what became of the candidates."""
    rows = {name: count for name, count in tally.dropped.items() if count}
    kinds = [COLOURS["dropped"]] * len(rows) + ["#BBBBBB", COLOURS["negatives"]]
    rows |= {"left over": tally.left - tally.chosen, "taken": tally.chosen}
    names, counts = list(rows), np.array(list(rows.values()))
    bars = axes.barh(names, counts, color=kinds, height=0.7)
    share = [f" {count:,} ({100 * count / max(counts.sum(), 1):.1f} %)" for count in counts]
    axes.bar_label(bars, share, fontsize=9)
    axes.set_title("What became of the candidates")
    axes.set_xlim(0, 1.18 * max(counts.max(), 1))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def examples(title: str, lists: Mapping[str, Sequence[str]]) -> str:
    """Returns a section of examples, each a line, under a heading of its own; what has none is left out."""
    said = [
        f"### {name}\n\n" + "".join(f"- {_short(line)}\n" for line in lines) for name, lines in lists.items() if lines
    ]
    return f"\n## {title}\n\n" + "\n".join(said) if said else ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    line = line if len(line) <= 240 else line[:239] + "…"
    return line.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_").replace("`", "\\`")


def write(folder: AnyPath, files: Mapping[str, bytes]) -> None:
    """Writes a report's files, each whole or not at all.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
