"""Seconds that no line of metrics holds, since no step came after them: those of the last save, for reports."""

import collections
import json
import math

from jaxembed.observing.clock import Clock, beside
from jaxembed.run_folder import write_whole
from jaxembed.storage import AnyPath

NAME = "rest.jsonl"  # in the work directory: a line for each time that the run ended or was told to stop


def write(workdir: AnyPath, clock: Clock) -> None:
    """Adds the line of this start of the run, which ends."""
    path = workdir / NAME
    before = path.read_bytes() if path.exists() else b""
    line = {"step": clock.step, **beside(clock.lap())}
    write_whole(path, before + json.dumps(line).encode() + b"\n")


def read(workdir: AnyPath, until: int | None = None) -> dict[str, float]:
    """Returns the sums by field, such as {'checkpoint_s': 1.5}.

    Args:
      workdir: the run's.
      until: the last step to count; None for all.
    """
    path = workdir / NAME
    sums: dict[str, float] = collections.Counter()
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if line.pop("step") <= (math.inf if until is None else until):
            sums.update(line)
    return dict(sums)
