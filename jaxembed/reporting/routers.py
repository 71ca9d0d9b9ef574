"""What the routers of a mixture of experts did in a run: a picture, and figures of the end."""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxembed.metrics import iter_metrics
from jaxembed.reporting import curves
from jaxembed.reporting.history import History, Series
from jaxembed.storage import AnyPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "routers.png"
LOAD = "router/load"  # in metrics.jsonl, [n, X]
POINTS = 400  # at least so many loads are kept of a long run, and less than twice as many
END = 0.1  # of a run, over which figures and heat map are means
WRITTEN = 16  # so many layers or experts at most have their loads written into the heat map
BUSY, IDLE, EACH = "#D55E00", "#0072B2", "#BBBBBB"


class Loads(NamedTuple):
    """How often experts were taken, as multiples of the mean: float32 [P, n, X], at increasing steps, int64 [P]."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def at_end(self) -> np.ndarray:
        """The mean over the end of the run, [n, X]."""
        return _end(self.values).mean(0)


def read_loads(workdir: AnyPath) -> Loads | None:
    """Reads a run's loads; None where it has no routers.

    A long run's are means over neighbouring lines, so that a million lines of thousands of numbers need no more than
    2 · POINTS of them in memory.
    """
    steps: list[int] = []
    means: list[np.ndarray] = []
    together, waiting = 1, []
    for line in iter_metrics(workdir):
        if LOAD not in line:
            continue
        waiting.append(np.array(line[LOAD], np.float32))
        if len(waiting) < together:
            continue
        steps.append(line["step"])
        means.append(np.mean(waiting, 0))
        waiting = []
        if len(means) == 2 * POINTS:
            steps, means = steps[1::2], [(a + b) / 2 for a, b in zip(means[::2], means[1::2])]
            together *= 2
    return Loads(np.array(steps), np.stack(means)) if means else None


def figures(history: History) -> dict[str, str]:
    """Returns what the routers did at the end of a run, by name; {} where it has none."""
    forms = {"balance": "{:.3f}", "entropy": "{:.1%}", "busiest": "{:.2f}", "idlest": "{:.2f}", "dropped": "{:.2%}"}
    logged = {name: history.series[f"router/{name}"] for name in forms if f"router/{name}" in history.series}
    return {name: forms[name].format(_end(series.values).mean()) for name, series in logged.items()}


def in_words(history: History) -> str:
    """Returns the same in one line; '' where there are no routers."""
    return ", ".join(f"{name} {figure}" for name, figure in figures(history).items())


def draw(history: History, loads: Loads, title: str) -> bytes:
    """Draws which experts were taken at the end, and how balance, entropy and loads went.

    Args:
      history: the run's.
      loads: the same run's.
      title: above all panels.

    Returns:
      A PNG of 1600 × 1000 pixels.

    Raises:
      UserError: matplotlib is missing or fails.
    """
    with curves.drawing("routers"):
        return curves.render(title, lambda figure: _panels(figure, history, loads))


def _panels(figure: "Figure", history: History, loads: Loads) -> None:
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    heat, each = top.subplots(1, 2, width_ratios=(1.25, 1))
    balance, entropy, spread = bottom.subplots(1, 3)
    _heat_map(heat, loads.at_end)
    _widest_layer(each, loads)
    curves.curve(balance, history, "router/balance", "Load balance (1 = even)")
    curves.curve(entropy, history, "router/entropy", "Entropy (part of the highest)")
    _spread(spread, history)
    for panel in (each, balance, entropy, spread):
        curves.step_axis(panel, history)


def _heat_map(axes: "Axes", load_nxX: np.ndarray) -> None:
    from matplotlib.colors import TwoSlopeNorm

    # Red and blue are told apart with every kind of colour vision; white is the mean.
    scale = TwoSlopeNorm(1.0, 0.0, max(2.0, float(load_nxX.max())))
    image = axes.imshow(load_nxX, cmap="RdBu_r", norm=scale, aspect="auto", interpolation="nearest")
    axes.set_title(f"Loads at the end (1 = the mean): {load_nxX.min():.2f} … {load_nxX.max():.2f}")
    axes.set_xlabel("expert")
    axes.set_ylabel("sparse layer")
    axes.grid(False)
    for axis, count in zip((axes.yaxis, axes.xaxis), load_nxX.shape):
        axis.set_ticks(np.arange(0, count, 2 ** max(0, math.ceil(math.log2(count / WRITTEN)))))
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)
    if max(load_nxX.shape) <= WRITTEN:
        for (layer, expert), load in np.ndenumerate(load_nxX):
            light = 0.4 < load < 1 + 0.6 * (scale.vmax - 1)
            colour = curves.INK if light else "white"
            axes.text(expert, layer, f"{load:.2f}", ha="center", va="center", fontsize=8, color=colour)


def _widest_layer(axes: "Axes", loads: Loads) -> None:
    """Draws each expert's load of the layer whose loads differ most at the end."""
    layer = int(np.ptp(loads.at_end, axis=1).argmax())
    at_end, series = loads.at_end[layer], loads.values[:, layer]
    busiest, idlest = int(at_end.argmax()), int(at_end.argmin())
    axes.set_title(f"Loads in sparse layer {layer}, the least even")
    smooth = len(loads.steps) >= curves.WINDOWS
    for expert in at_end.argsort()[::-1]:
        of_expert = Series(loads.steps, series[:, expert])
        of_expert = curves.running_mean(of_expert) if smooth else of_expert
        marked = {busiest: (BUSY, "busiest"), idlest: (IDLE, "idlest")}.get(expert)
        colour, label = (marked[0], f"{marked[1]} at the end: {expert}") if marked else (EACH, None)
        style = {"linewidth": 1.9, "zorder": 3} if marked else {"linewidth": 0.8}
        axes.plot(*of_expert, color=colour, label=label, marker="o" if len(series) == 1 else None, **style)
    _from_zero(axes)


def _spread(axes: "Axes", history: History) -> None:
    axes.set_title("Busiest and idlest load of any layer")
    for name, colour in (("busiest", BUSY), ("idlest", IDLE)):
        if f"router/{name}" in history.series:
            curves.line(axes, history.series[f"router/{name}"], colour, smooth=True, label=name)
    _from_zero(axes)


def _from_zero(axes: "Axes") -> None:
    axes.axhline(1.0, color=curves.INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set_ylim(0, axes.get_ylim()[1])
    axes.legend(loc="best")


def _end(values: np.ndarray) -> np.ndarray:
    return values[-max(1, round(END * len(values))) :]
