"""metrics.jsonl: one JSON object per logged step, in order, every step once, also after a restart."""

import json
import math
import os
import pathlib
from typing import Any

NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends lines to a run's metrics.jsonl. Only process 0 writes."""

    def __init__(self, workdir: pathlib.Path, resumed_at: int | None, active: bool = True) -> None:
        """Opens the file.

        Args:
          workdir: the run's.
          resumed_at: step of the checkpoint that the run goes on from: later lines are cut off; None: a new file.
          active: False writes nothing.
        """
        self._file = None
        if not active:
            return
        path = workdir / NAME
        kept = [] if resumed_at is None else [line for line in read_metrics(workdir) if line["step"] <= resumed_at]
        whole = path.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(whole, path)
        self._file = path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line and flushes it."""
        if self._file:
            self._file.write(json.dumps({k: _plain(v) for k, v in line.items()}) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Makes sure that the lines are on disk, before a checkpoint of their step is."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a run's metrics; a last line that a killed run left cut off is left out."""
    path = workdir / NAME
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
