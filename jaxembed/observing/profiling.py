"""`--profile=START:END`: a trace of some steps, for xprof."""

import re
from collections.abc import Callable
from typing import Any

import jax

from jaxembed.errors import UserError
from jaxembed.observing.clock import Clock, Phase
from jaxembed.storage import AnyPath, publish, staged

FOLDER = "profile"  # in the work directory


def parse(text: str) -> range:
    """Returns the steps, as numbers of steps done before each, that '--profile=START:END' asks for; none for ''.

    Raises:
      UserError: it is not START:END, or holds no step.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(
            f"--profile={text}: wants START:END with START below END, such as 10:15, which traces steps 11 to 15"
        )
    return range(int(match[1]), int(match[2]))


def require(asked: range, steps: int) -> None:
    """Refuses steps to trace that the run does not have.

    Args:
      asked: the steps; see `parse`.
      steps: of the whole run.

    Raises:
      UserError: the run ends before these steps.
    """
    if asked and asked.stop > steps:
        raise UserError(f"--profile={asked.start}:{asked.stop}: the run has {steps:,} steps only")


class Profile:
    """Traces steps START + 1 … END of a run, once. Every process does, into WORKDIR/profile/process-N.

    A run that goes on from a later step than START traces those of its steps that are left, if any.
    """

    def __init__(self, workdir: AnyPath, asked: range, clock: Clock, say: Callable[[str], None]) -> None:
        """Traces nothing yet.

        Args:
          workdir: the run's folder.
          asked: the steps; see `parse` and `require`.
          clock: is told when no step runs because of a trace.
          say: shows a line to the user.
        """
        self._asked, self._clock, self._say = asked, clock, say
        self._folder = workdir / FOLDER / f"process-{jax.process_index()}"
        self._mark: jax.profiler.StepTraceAnnotation | None = None  # while tracing

    def before(self, step: int, results: Any) -> None:
        """To be called before a step is dispatched.

        Args:
          step: how many steps the run has done.
          results: arrays that the step before gives: they are waited for, so that the trace does not begin amid it.
        """
        if step not in self._asked:
            return
        if self._mark is None:
            self._wait(results)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow down the steps that the trace is to show
            with self._clock.during(Phase.TRACE):
                jax.profiler.start_trace(str(staged(self._folder)), profiler_options=options)
        self._mark = jax.profiler.StepTraceAnnotation("train", step_num=step + 1)
        self._mark.__enter__()

    def after(self, step: int, results: Any) -> None:
        """To be called after a step is dispatched.

        Args:
          step: how many steps the run has done with it.
          results: arrays that it gives: after the last one they are waited for, so that the trace is whole.
        """
        if self._mark is None:
            return
        if step == self._asked.stop:
            self._wait(results)
        self._mark.__exit__(None, None, None)
        if step == self._asked.stop:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is being made: also where a run stops before END."""
        if self._mark is None:
            return
        self._mark, self._asked = None, range(0)
        with self._clock.during(Phase.TRACE):
            jax.profiler.stop_trace()
            publish(self._folder)
        self._say(
            f"trace in {self._folder}: pip install xprof; xprof {self._folder}; or open its trace.json.gz at "
            "ui.perfetto.dev"
        )

    def _wait(self, results: Any) -> None:
        with self._clock.during(Phase.COMPUTE):
            jax.block_until_ready(results)
