"""What a person sees of a running job: a progress bar in a terminal, plain lines in a log."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    """Shows loss, speed, padding waste and time left, on standard error."""

    def __init__(self, steps: int, batch_size: int, active: bool = True) -> None:
        """Starts the display.

        Args:
          steps: of the whole run.
          batch_size: pairs per step, for the rate.
          active: False shows nothing.
        """
        self.active = active
        self.steps, self.batch_size = steps, batch_size
        self.console = Console(file=sys.stderr, quiet=not active)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = RichProgress(*columns, console=self.console, disable=not (active and self.console.is_terminal))
        self.task = self.bar.add_task("", total=steps, status="")
        self.last_line = 0.0

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, highlight=False)

    def update(self, line: dict[str, Any]) -> None:
        """Shows a step's metrics."""
        status = (
            f"loss {line['loss']:.4f}  {line['pairs_per_s']:,.0f} pairs/s  {line['tokens_per_s']:,.0f} tokens/s  "
            f"waste {line['padding_waste']:.1%}"
        )
        self.bar.update(self.task, completed=line["step"], status=status)
        now = time.monotonic()
        due = now - self.last_line > LINE_EVERY or line["step"] in (1, self.steps)
        if not self.console.is_terminal and due:
            self.say(f"step {line['step']}/{self.steps}  {status}")
            self.last_line = now

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Prints evaluation scores."""
        main = {name: value for name, value in scores.items() if name.count("/") == 2}
        self.say(f"step {step}: " + "  ".join(f"{name} {value:.2f}" for name, value in main.items()))
