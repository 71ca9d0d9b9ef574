"""What a person sees of a running job: a progress bar in a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

LINE_EVERY = 30.0  # seconds between lines where there is no terminal
NAME_WIDTH = 20  # of a stage, in a terminal


class _Bar(RichProgress):
    """A progress bar with a line of figures below, which has room for all of them in 80 columns."""

    status = Text()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield self.status


class Progress:
    """Shows loss, speed, padding waste, utilisation and time left, on standard error."""

    def __init__(self, steps: int, done: int = 0, active: bool = True) -> None:
        """Starts the display.

        Args:
          steps: of the whole run.
          done: of these, before this start of the run: the time left is not reckoned from them.
          active: False shows nothing.
        """
        self.steps = steps
        self.console = Console(file=sys.stderr, quiet=not active)
        columns = (
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", max_width=NAME_WIDTH),
            ),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        shown = active and self.console.is_terminal
        self.bar = _Bar(*columns, console=self.console, disable=not shown, expand=True)
        self.task = self.bar.add_task("training", total=steps, completed=done)
        self.last_line = 0.0
        self.last_scores: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def update(self, line: dict[str, Any]) -> None:
        """Shows a step's metrics."""
        figures = (
            f"loss {line['loss']:.4f}  {short(line['pairs_per_s'])} pairs/s  {short(line['tokens_per_s'])} tokens/s  "
            f"waste {line['padding_waste']:.1%}  {line['step_s']:.3g} s/step"
        )
        if "mfu" in line:  # the chip's peak is known
            figures += f"  MFU {line['mfu']:.1%}"
        self.bar.status = Text(figures, style="cyan", no_wrap=True, overflow="ellipsis")
        self.bar.update(self.task, completed=line["step"], description=line.get("stage", "training"))
        now = time.monotonic()
        due = now - self.last_line > LINE_EVERY or line["step"] in (1, self.steps)
        if not self.console.is_terminal and due:
            stage = f"{line['stage']}: " if "stage" in line else ""
            self.say(f"{stage}step {line['step']:,}/{self.steps:,}  {figures}{self._left()}")
            self.last_line = now

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Prints each evaluation set's main score, its change since the time before, and BM25's where it is new."""
        main = {name.removeprefix("eval/"): scores[name] for name in scores if _is_main(name)}
        said = []
        for task, value in main.items():
            change = f" ({value - self.last_scores[task]:+.2f})" if task in self.last_scores else ""
            beside = f", BM25 {scores[f'bm25/{task}']:.2f}" if f"bm25/{task}" in scores else ""
            said.append(f"{task} {value:.2f}{change}{beside}")
        self.say(f"step {step:,}: " + "  ".join(said))
        self.last_scores = main

    def _left(self) -> str:
        seconds = self.bar.tasks[0].time_remaining
        return f"  {_clock(seconds)} left" if seconds else ""


class WorkBar:
    """Shows how far a long piece of work is, on standard error: a bar in a terminal, else a line now and then."""

    def __init__(self, name: str, total: int, active: bool = True) -> None:
        """Starts the display.

        Args:
          name: of the work.
          total: what `update`'s `done` comes to at the end, in whatever unit.
          active: False shows nothing.
        """
        self.name = name
        self.console = Console(file=sys.stderr, quiet=not active)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        shown = active and self.console.is_terminal
        self.bar = _Bar(*columns, console=self.console, disable=not shown, expand=True)
        self.task = self.bar.add_task(name, total=total)
        self.last_line = time.monotonic()

    def __enter__(self) -> "WorkBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, done: float, figures: str) -> None:
        """Shows how much is done, and figures beside it."""
        self.bar.status = Text(figures, style="cyan", no_wrap=True, overflow="ellipsis")
        self.bar.update(self.task, completed=done)
        if not self.console.is_terminal and time.monotonic() - self.last_line > LINE_EVERY:
            seconds = self.bar.tasks[0].time_remaining
            left = f"  {_clock(seconds)} left" if seconds else ""
            part = done / max(self.bar.tasks[0].total, 1)
            line = f"{self.name}: {part:.1%}  {figures}{left}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
            self.last_line = time.monotonic()


def _is_main(name: str) -> bool:
    return name.startswith("eval/") and name.count("/") == 2


def short(value: float) -> str:
    """Returns a number in five characters or so: 853, 2,312, 120k, 1.3M."""
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1e3:,.0f}k" if value < 1e6 else f"{value / 1e6:,.1f}M"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
