"""What the main thread is doing, and how long it has done each thing."""

import contextlib
import enum
import time
from collections.abc import Iterator, Mapping


class Phase(enum.StrEnum):
    """What the main thread may be doing, in words for messages."""

    OUTSIDE = "starting or ending"  # all that has no phase of its own, and the wait for the first batch
    PREPARE = "preparing the data"
    DATA = "waiting for data"
    COMPUTE = "computing"
    HOST = "in the loop's own code"
    COMPILE = "compiling"
    FIRST = "running a new program for the first time"  # collectives start, other processes may still compile
    EVAL = "evaluating"
    CHECKPOINT = "saving a checkpoint"
    TRACE = "starting or writing a trace"
    EXPORT = "exporting"


STEP = (Phase.DATA, Phase.COMPUTE, Phase.HOST)  # what a step's time consists of
BESIDE = {  # what lines of metrics hold of the time that is no step's
    "compile_s": (Phase.COMPILE, Phase.FIRST),
    "eval_s": (Phase.EVAL,),
    "checkpoint_s": (Phase.CHECKPOINT,),
}


def beside(spent: Mapping[Phase, float]) -> dict[str, float]:
    """Returns the seconds that are no step's, by the field of a line that holds them; without those that are 0."""
    seconds = {name: sum(spent[phase] for phase in phases) for name, phases in BESIDE.items()}
    return {name: value for name, value in seconds.items() if value}


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
        self._told = dict(self._spent)  # until the last lap

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

    def since_lap(self) -> dict[Phase, float]:
        """Returns the seconds of each phase since the last lap."""
        return {phase: seconds - self._told[phase] for phase, seconds in self.spent().items()}

    def lap(self) -> dict[Phase, float]:
        """Returns the seconds of each phase since the lap before, which are thereby told: no other lap has them."""
        since, self._told = self.since_lap(), dict(self._spent)
        return since

    def _turn(self, phase: Phase) -> None:
        now = time.perf_counter()
        self._spent[self.phase] += now - self.since
        self.phase, self.since = phase, now
