"""Goodput: which part of the time since a run first began went into steps that it kept.

As in Google's ml-goodput-measurement (github.com/AI-Hypercomputer/ml-goodput-measurement), what is lost is start-up,
compiling and the first call of each program, evaluating, saving, the time between a kill and the next start, and steps
done again after it. A wait for data between steps counts as part of the step, and has a field of its own
(`data_wait_s`).
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from jaxembed.observing.clock import STEP, Clock
from jaxembed.run_folder import write_json
from jaxembed.storage import AnyPath

STARTED = "started.json"  # in the work directory: when the run first began
KEY = "productive_s"  # in a checkpoint's meta


def first_start(workdir: AnyPath, this: float, write: bool) -> float:
    """Returns when the run first began, in seconds since 1970; with this start, where the folder does not say.

    Args:
      workdir: the run's.
      this: when this start of it began.
      write: whether to make a note of it there.
    """
    path = workdir / STARTED
    if path.exists():
        return json.loads(path.read_text())["unix_s"]
    if write:
        write_json(path, {"unix_s": this})
    return this


class Goodput:
    """Counts the seconds of steps over all starts of a run.

    A checkpoint keeps the count as it was then, so steps that a kill undid are not counted, nor twice when done again.
    """

    def __init__(self, clock: Clock, began: float, meta: Mapping[str, Any]) -> None:
        """Goes on counting.

        Args:
          clock: of this process.
          began: when the run first began, in seconds since 1970.
          meta: of the checkpoint that the run goes on from; {} for a fresh run.
        """
        self._clock, self._began, self._before = clock, began, meta.get(KEY, 0.0)

    @property
    def meta(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        spent = self._clock.spent()
        return {KEY: self._before + sum(spent[phase] for phase in STEP)}

    def value(self) -> float:
        """Returns the part of the time, between 0 and 1, also where clocks of several machines differ."""
        productive = self.meta[KEY]
        return productive / max(time.time() - self._began, productive, 1e-9)
