"""What watches a run, from its start to its end: clock, goodput, trace, watchdog."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxembed.hardware import chip_of
from jaxembed.observing import rest
from jaxembed.observing.clock import Clock
from jaxembed.observing.goodput import Goodput, first_start
from jaxembed.observing.profiling import Profile
from jaxembed.observing.watchdog import Watchdog
from jaxembed.storage import AnyPath


class Observer:
    """Watches a run, from when it is entered until it is left.

    Attributes:
      clock: what the main thread is doing.
      goodput: counts what was not in vain; from `begin` on.
      profile: traces steps; from `begin` on.
    """

    goodput: Goodput
    profile: Profile

    def __init__(self, workdir: AnyPath, stall_seconds: float) -> None:
        """Does not watch yet.

        Args:
          workdir: the run's folder, which exists.
          stall_seconds: after which a run without progress is reported; 0 = never.
        """
        self.clock = Clock()
        self._workdir, self._process, self._entered = workdir, jax.process_index(), time.time()
        self._watchdog = Watchdog(self.clock, workdir, self._process, stall_seconds)

    def __enter__(self) -> "Observer":
        self._watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.close()

    @contextlib.contextmanager
    def begin(self, meta: Mapping[str, Any], profile: range, say: Callable[[str], None]) -> Iterator[None]:
        """Counts and traces the steps of a block; process 0 notes when the run first began.

        Args:
          meta: of the checkpoint that the run goes on from; {} for a fresh run.
          profile: steps to trace, from `profiling.parse`.
          say: shows a line to the user.
        """
        device = jax.local_devices()[0]
        if device.platform != "cpu" and not chip_of(device.device_kind):
            say(f"MFU is not known for {device.device_kind!r}: jaxembed.hardware does not list this chip")
        began = first_start(self._workdir, self._entered, write=self._process == 0)
        self.goodput = Goodput(self.clock, began, meta)
        self.profile = Profile(self._workdir, profile, self.clock, say)
        try:
            yield
        finally:
            self.profile.close()

    def end(self) -> None:
        """Notes, for the report, what the time after the last line of metrics went into; process 0 does."""
        if self._process == 0:
            rest.write(self._workdir, self.clock)
