"""What watches a run while it trains: clock, goodput, trace, watchdog."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxembed.observing.clock import Clock
from jaxembed.observing.goodput import Goodput, first_start
from jaxembed.observing.profiling import Profile
from jaxembed.observing.watchdog import Watchdog
from jaxembed.storage import AnyPath


class Observer:
    """Watches a run, from when it is entered until it is left.

    Attributes:
      clock: what the main thread is doing.
      goodput: counts what was not in vain.
      profile: traces steps.
    """

    def __init__(
        self,
        workdir: AnyPath,
        meta: Mapping[str, Any],
        steps: int,
        profile: range,
        stall_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        """Does not watch yet; process 0 notes when the run first began.

        Args:
          workdir: the run's folder, which exists.
          meta: of the checkpoint that the run goes on from; {} for a fresh run.
          steps: of the whole run.
          profile: steps to trace, from `profiling.parse`.
          stall_seconds: after which a run without progress is reported; 0 = never.
          say: shows a line to the user.

        Raises:
          UserError: the run ends before the steps to trace.
        """
        process = jax.process_index()
        self.clock = Clock()
        self.profile = Profile(workdir, profile, steps, self.clock, say)
        self.goodput = Goodput(self.clock, first_start(workdir, write=process == 0), meta)
        self._watchdog = Watchdog(self.clock, workdir, process, stall_seconds)

    def __enter__(self) -> "Observer":
        self._watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.close()
        self.profile.close()
