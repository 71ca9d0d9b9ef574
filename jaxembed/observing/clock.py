"""What the main thread is doing, and how long it has done each thing."""

import contextlib
import enum
import time
from collections.abc import Iterator


class Phase(enum.StrEnum):
    """What the main thread may be doing, in words for messages."""

    OUTSIDE = "starting or ending"  # all that is not the loop, and the wait for its first batch
    DATA = "waiting for data"
    COMPUTE = "computing"
    HOST = "in the loop's own code"
    COMPILE = "compiling"
    EVAL = "evaluating"
    CHECKPOINT = "saving a checkpoint"
    TRACE = "starting or writing a trace"


STEP = (Phase.DATA, Phase.COMPUTE, Phase.HOST)  # what a step's time consists of


class Clock:
    """Gives every moment to one phase.

    Attributes:
      phase: of now.
      since: when it began, of `time.perf_counter`. Each change is a sign of life.
      step: steps that the run has done, or begun.
    """

    def __init__(self) -> None:
        self.phase, self.since, self.step = Phase.OUTSIDE, time.perf_counter(), 0
        self._spent = dict.fromkeys(Phase, 0.0)

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Gives the time of a block to a phase; of a block inside it, to that one's."""
        before = self.phase
        self._turn(phase)
        try:
            yield
        finally:
            self._turn(before)

    def spent(self) -> dict[Phase, float]:
        """Returns the seconds of each phase until now."""
        self._turn(self.phase)
        return dict(self._spent)

    def _turn(self, phase: Phase) -> None:
        now = time.perf_counter()
        self._spent[self.phase] += now - self.since
        self.phase, self.since = phase, now
