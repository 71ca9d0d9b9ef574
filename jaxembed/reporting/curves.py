"""The curves of a run as one picture."""

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from jaxembed.errors import UserError
from jaxembed.reporting.history import History, Scores, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

NAME = "curves.png"
PART = "loss/"  # begins the names of the loss's parts
INCHES, DPI = (12.8, 8.0), 125  # 1600 × 1000 pixels
BINS = 800  # about as many as a panel has pixels across: a curve of more points is thinned out
WINDOWS = 40  # the smoothed line is a mean over this part of a curve's points
# Okabe and Ito, "Color Universal Design" (2008): told apart with every kind of colour vision. Yellow is left out, as it
# is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT, GRID = "#333333", "#777777", "#DDDDDD"
LOG_FROM = 12.0  # a curve whose largest value is this many times its median is drawn on a log scale
SHOWN_TASKS, LABEL = 8, 28  # tasks in the legend, letters of a name
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": FAINT,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
}


def draw(history: History, title: str) -> bytes:
    """Draws loss, evaluation, gradient norm, learning rate, speed and padding waste over the steps.

    The same history gives the same picture.

    Args:
      history: what to draw; a panel whose metric was not logged stays empty and says so.
      title: above all panels.

    Returns:
      A PNG of 1600 × 1000 pixels.

    Raises:
      UserError: matplotlib is missing or fails.
    """
    with drawing("curves"):
        return _draw(history, title)


@contextlib.contextmanager
def drawing(what: str) -> Iterator[None]:
    """Makes one line of whatever a drawing library may raise: it is not worth a training run."""
    try:
        yield
    except Exception as error:
        raise UserError(f"the {what} cannot be drawn: {error!r}") from error


def _draw(history: History, title: str) -> bytes:
    return render(title, lambda figure: _panels(figure, history))


def render(title: str, fill: Callable[["Figure"], None]) -> bytes:
    """Returns a figure in our style as a PNG of 1600 × 1000 pixels; `fill` draws below the title."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
        figure.suptitle(title, x=0.008, ha="left", fontsize=14, fontweight="bold")
        fill(figure)
        picture = io.BytesIO()
        FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    return picture.getvalue()


def _panels(figure: "Figure", history: History) -> None:
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    wide = top.subplots(1, 2 if history.tasks else 1, squeeze=False)[0]
    grid = bottom.add_gridspec(2, 4)
    gradient, rate, waste = (bottom.add_subplot(grid[:, column]) for column in (0, 1, 3))
    tokens, pairs = (bottom.add_subplot(grid[row, 2]) for row in (0, 1))
    curve(wide[0], history, "loss", "Loss")
    _parts(wide[0], history)
    if history.tasks:
        _evaluation(wide[1], history)
    curve(gradient, history, "grad_norm", "Gradient norm")
    curve(rate, history, "learning_rate", "Learning rate", smooth=False, floor=0.0)
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for panel, unit in ((tokens, "tokens"), (pairs, "pairs")):
        curve(panel, history, f"{unit}_per_s", f"Throughput ({unit}/s)", floor=0.0)
        panel.yaxis.set_major_formatter(_thousands())
    curve(waste, history, "padding_waste", "Padding waste (% of tokens)", scale=100.0, floor=0.0)
    panels = (*wide, gradient, rate, tokens, pairs, waste)
    for panel in panels:
        step_axis(panel, history)
    tokens.set_xlabel("")
    tokens.tick_params(labelbottom=False)
    for i, (name, step) in enumerate(history.stages):
        for panel in panels if i else ():
            panel.axvline(step, color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1.5)
        for panel in wide:
            panel.annotate(
                name,
                (step, 1.0),
                (3, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                fontsize=8.5,
                color=FAINT,
            )


def curve(
    axes: "Axes",
    history: History,
    name: str,
    title: str,
    scale: float = 1.0,
    smooth: bool = True,
    floor: float | None = None,
) -> None:
    """Draws a metric: faint as it was, and its running mean over it. `floor` is the least value of the axis."""
    axes.set_title(title)
    if name not in history.series:
        return _say(axes, "not logged")
    steps, values = history.series[name]
    line(axes, Series(steps, values * scale), COLOURS[0], smooth)
    _limit(axes, values * scale, floor)


def _parts(axes: "Axes", history: History) -> None:
    """Draws what the loss is made of, where it has parts: several losses, or sizes of the vectors."""
    parts = [name for name in history.series if name.startswith(PART)]
    for name, colour in zip(parts, itertools.cycle(COLOURS[1:])):
        series = history.series[name]
        axes.plot(*thin(running_mean(series)), color=colour, linewidth=1.1, label=name.removeprefix(PART))
    if parts:
        axes.legend(loc="upper right", ncols=1 + len(parts) // SHOWN_TASKS)
        _limit(axes, np.concatenate([history.series[name].values for name in ("loss", *parts)]), None)


def line(axes: "Axes", series: Series, colour: str, smooth: bool, label: str = "") -> None:
    if len(series.steps) == 1:
        axes.plot(*series, color=colour, marker="o", linestyle="none", label=label)
    elif smooth and len(series.steps) >= WINDOWS:
        axes.plot(*thin(series), color=colour, linewidth=0.7, alpha=0.3)
        axes.plot(*thin(running_mean(series)), color=colour, linewidth=1.9, label=label)
    else:
        marker = "o" if len(series.steps) < WINDOWS else None
        axes.plot(*thin(series), color=colour, linewidth=1.6, marker=marker, markersize=3, label=label)


def _limit(axes: "Axes", values: np.ndarray, floor: float | None) -> None:
    """Sets scale and range of the y axis, so that neither a spike nor a hair's breadth of change fills it."""
    if floor is None and values.min() > 0 and values.max() > LOG_FROM * np.median(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    elif floor is not None:
        axes.set_ylim(floor, float(values.max()) * 1.08 or 1.0)
    elif np.ptp(values) < 1e-3 * abs(values.mean()):
        middle = float(values.mean())
        axes.set_ylim(middle - 0.05 * abs(middle) - 1e-9, middle + 0.05 * abs(middle) + 1e-9)


def _evaluation(axes: "Axes", history: History) -> None:
    """Draws each task's main score: BM25 as a dashed line of its colour, a ring around the best."""
    dashed = ", BM25 dashed" if any(history.bm25(task) is not None for task in history.tasks) else ""
    axes.set_title(f"Evaluation (best ringed{dashed})")
    for i, task in enumerate(history.tasks):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
        scores, series = history.scores(task)[0], history.series[f"eval/{task}"]
        style = {"marker": marker, "markersize": 4} if len(series.steps) < WINDOWS else {}
        label = _label(scores) if i < SHOWN_TASKS else None
        axes.plot(*thin(series), color=colour, linewidth=1.7, label=label, **style)
        if scores.bm25 is not None:
            axes.axhline(scores.bm25, color=colour, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.plot(scores.best_step, scores.best, "o", color=colour, markersize=10, fillstyle="none")
    if len(history.tasks) > SHOWN_TASKS:
        axes.plot([], [], " ", label=f"and {len(history.tasks) - SHOWN_TASKS} more, see the table")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), labelspacing=0.8, handlelength=1.6)


def _label(scores: Scores) -> str:
    name = scores.task if len(scores.task) <= LABEL else scores.task[: LABEL - 1] + "…"
    went = f"{scores.first:.1f} → {scores.last:.1f}" if scores.last_step > scores.first_step else f"{scores.last:.1f}"
    beside = "" if scores.bm25 is None else f", BM25 {scores.bm25:.1f}"
    return f"{name}\n{scores.metric} {went}{beside}"


def step_axis(axes: "Axes", history: History) -> None:
    """Makes the x axis: the same for all panels."""
    from matplotlib.ticker import MaxNLocator

    last = max(history.last_step, 1)
    axes.set_xlim(-0.015 * last, 1.02 * last)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(_thousands())
    axes.set_xlabel("step")


def _thousands() -> "EngFormatter":
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=FAINT)
    axes.set_yticks([])


def thin(series: Series) -> Series:
    """Returns the extremes of each of BINS equal parts of a long series, first and last point too: the same outline."""
    n = len(series.steps)
    if n <= 4 * BINS:
        return series
    edges = np.linspace(0, n, BINS + 1).astype(int)
    parts = [(low, series.values[low:high]) for low, high in itertools.pairwise(edges)]
    kept = {0, n - 1} | {low + int(at) for low, part in parts for at in (part.argmin(), part.argmax())}
    chosen = np.array(sorted(kept))
    return Series(series.steps[chosen], series.values[chosen])


def running_mean(series: Series) -> Series:
    """Returns the mean around each point, over what there is of the window at the ends."""
    n = len(series.steps)
    half = max(n // (2 * WINDOWS), 3)
    sums = np.concatenate(([0.0], np.cumsum(series.values)))
    low, high = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    return Series(series.steps, (sums[high] - sums[low]) / (high - low))
