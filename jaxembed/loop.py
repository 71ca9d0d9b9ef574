"""The training loop of one stage.

Its order is a contract: with a state that has done `step` steps, evaluate → save → next batch → step → write. Metrics
are read one step late, so that the device never waits for the host; before an evaluation or a checkpoint they are
caught up with, so that nothing is saved whose step was not found finite.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxembed import sharding
from jaxembed.blueprint import Blueprint
from jaxembed.checkpoint import Checkpoints
from jaxembed.compile_cache import not_kept
from jaxembed.config import Config
from jaxembed.data.batch import Batch
from jaxembed.data.loader import StepInfo, prefetch
from jaxembed.embedder import Embedder
from jaxembed.errors import TrainingStopped, UserError
from jaxembed.evaluation.report import flat_scores
from jaxembed.evaluation.tasks import Tasks
from jaxembed.metrics import MetricsWriter
from jaxembed.models.flops import StepFlops
from jaxembed.models.text_encoder import ModelFactory, join
from jaxembed.observing.clock import Phase
from jaxembed.observing.observer import Observer
from jaxembed.observing.speed import Meter, peak_flops
from jaxembed.preemption import StopSignal
from jaxembed.progress import Progress
from jaxembed.reading import passes
from jaxembed.step import Given, TrainState
from jaxembed.storage import AnyPath
from jaxembed.training_data import TrainingData


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
      workdir: its folder.
      mesh: its devices.
      blueprint: the model's.
      teacher: the teacher's maker, where there is one.
      given: parameters that every step reads and leaves as they are.
      tasks: evaluations.
      checkpoints, writer, progress: where to save, to write metrics, and to tell a person.
      stop: whether the process was told to.
      observer: what watches it.
    """

    workdir: AnyPath
    mesh: jax.sharding.Mesh
    blueprint: Blueprint
    teacher: ModelFactory | None
    given: Given
    tasks: Tasks
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: Progress
    stop: StopSignal
    observer: Observer


@dataclasses.dataclass(frozen=True)
class StageRun:
    """A stage, ready to run.

    Attributes:
      index: its number.
      name: '' in a run without stages.
      config: as this stage sees it.
      data: its own.
      factory: the model's maker.
      first, last: the run's steps from `first`, which it begins with, to `last`, which it stops before.
    """

    index: int
    name: str
    config: Config
    data: TrainingData
    factory: ModelFactory
    first: int
    last: int

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps of the stage."""
        return {**self.data.meta, "stage": self.index}


class Loop:
    """The loop's moving parts."""

    def __init__(self, run: Run, stage: StageRun, step_function: Any) -> None:
        self.run_, self.stage, self.step_function = run, stage, step_function
        self.compiled: dict[tuple[tuple[int, ...], ...], Any] = {}  # by the shapes of the rows, and of a teacher's
        self.pending: tuple[StepInfo, dict[str, jax.Array]] | None = None
        self.line: dict[str, Any] | None = None  # the open one
        self.last_line: dict[str, Any] = {}
        self.observer, self.clock = run.observer, run.observer.clock
        config = stage.config.model
        flops = StepFlops.of(run.blueprint, stage.factory, run.blueprint.lora(config.lora), *passes(stage.config))
        self.meter = Meter(self.observer, run.mesh, flops, peak_flops(run.mesh, config.dtype))

    def run(self, state: TrainState, start: int | None) -> tuple[TrainState, int]:
        """Runs from step `start` (None: a fresh run) to the stage's end, or until the process is told to stop.

        Returns:
          The state, and the number of steps that the run has done.
        """
        with self.clock.during(Phase.HOST):
            return self._run(state, start)

    def _run(self, state: TrainState, start: int | None) -> tuple[TrainState, int]:
        run, stage, config = self.run_, self.stage, self.stage.config
        step = start or 0
        batches = self._batches(step)
        while True:
            self.clock.step = step
            last = step == stage.last or run.stop.requested()
            evaluate = bool(config.eval.every) and (step % config.eval.every == 0 or step == stage.last)
            save = last or step % config.checkpoint.every == 0 or (evaluate and bool(config.checkpoint.best))
            if step == start:  # this state was evaluated and saved before
                evaluate = save = False
            if evaluate or save:
                self._catch_up(hold=True)
            if evaluate:
                with self.clock.during(Phase.EVAL):
                    self._evaluate(state, step)
            self._flush()
            if save and step > 0:
                with self.clock.during(Phase.CHECKPOINT):
                    run.writer.sync()
                    meta = {**stage.meta, **self.observer.goodput.meta}
                    run.checkpoints.save(state, step, meta, self._scores())
            if last:
                break
            state = self._step(state, step, batches)
            step += 1
        return state, step

    def _batches(self, step: int) -> Iterator[tuple[Batch, StepInfo]]:
        """Yields the batches after `step` of the run, on the devices, each with this process's rows in it."""
        data, mesh, first = self.stage.data, self.run_.mesh, self.stage.first
        return prefetch(
            data.builder,
            step - first,
            self.stage.last - first,
            self.stage.config.data.prefetch,
            sharding.own_shards(mesh),
            lambda batch: data.to_device(batch, mesh),
        )

    def _step(self, state: TrainState, step: int, batches: Iterator[tuple[Batch, StepInfo]]) -> TrainState:
        run, profile = self.run_, self.observer.profile
        profile.before(step, self.pending)
        with self.clock.during(Phase.DATA if self.compiled else Phase.OUTSIDE):  # the first batch is start-up
            batch, info = next(batches)
        shapes = tuple(rows.tokens.shape for rows in (batch.rows, batch.teacher_rows) if rows is not None)
        if shapes not in self.compiled:
            self._catch_up()  # what is running counts as computing
            with self.clock.during(Phase.COMPILE):
                self.compiled[shapes] = self._compile(" + ".join(map(str, shapes)), state, batch)
            with self.clock.during(Phase.FIRST):
                state, metrics = jax.block_until_ready(self.compiled[shapes](state, batch, run.given))
        else:
            with self.clock.during(Phase.COMPUTE):
                state, metrics = self.compiled[shapes](state, batch, run.given)
        profile.after(step + 1, state)
        self._catch_up()
        self.pending = info, metrics
        return state

    def _compile(self, shapes: str, state: TrainState, batch: Batch) -> Any:
        say = self.run_.progress.say
        say(f"compiling for {shapes} tokens …")
        in_loops = self.run_.blueprint.experts is not None or self.run_.mesh.shape["sequence"] > 1  # also outside
        with not_kept(when=in_loops and sharding.platform() == "cpu" and self.run_.mesh.size > 1):
            compiled = self.step_function.lower(state, batch, self.run_.given).compile()
        memory = compiled.memory_analysis()
        if memory:
            gigabytes = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9
            say(f"compiled for {shapes} tokens: {gigabytes:.2f} GB per device")
        return compiled

    def _catch_up(self, hold: bool = False) -> None:
        """Reads the metrics of the step before and makes its line; `hold` keeps the line open for scores."""
        if self.pending is None:
            return
        (info, metrics), self.pending = self.pending, None
        with self.clock.during(Phase.COMPUTE):
            values = {name: value if value.ndim else float(value) for name, value in jax.device_get(metrics).items()}
        self._require_finite(info, values)
        self.meter.add(info)
        self.line = {"step": self._number(info), **self._stage_name(), **values, **info.counts}
        self.run_.progress.update(self.line | self.meter.rates())
        if not hold:
            self._flush()

    def _flush(self) -> None:
        """Writes the open line, if its step is one that is logged or it carries scores."""
        line, self.line = self.line, None
        if line is None:
            return
        due = line["step"] % self.stage.config.log_every == 0 or line["step"] == self.stage.last
        if due or any(name.startswith("eval/") for name in line):
            self.run_.writer.write(line | self.meter.lap())
        self.last_line = line

    def _evaluate(self, state: TrainState, step: int) -> None:
        run, config = self.run_, self.stage.config
        params = join(state.served, run.given.get("base", {}))
        embedder = Embedder(run.blueprint, self.stage.factory, params, run.mesh)
        scores = flat_scores(run.tasks.evaluate(embedder))
        best = config.checkpoint.best
        if best and best not in scores:
            raise UserError(f"config.checkpoint.best = {best!r}: the evaluation gives {', '.join(scores)}")
        if step == 0:  # what to compare with, once
            scores |= flat_scores(run.tasks.baselines())
        self.line = (self.line or {"step": step, **self._stage_name()}) | scores
        run.progress.scores(step, scores)

    def _scores(self) -> dict[str, float]:
        return {name: value for name, value in self.last_line.items() if name.startswith("eval/")}

    def _number(self, info: StepInfo) -> int:
        """Returns how many steps the run has done after this one."""
        return self.stage.first + info.step + 1

    def _stage_name(self) -> dict[str, str]:
        return {"stage": self.stage.name} if self.stage.name else {}

    def _require_finite(self, info: StepInfo, values: dict[str, Any]) -> None:
        if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
            return
        self.run_.checkpoints.wait()
        kept = self.run_.checkpoints.latest()
        records = self.stage.data.record_names(info.step)
        shown = ", ".join(records[:4]) + (f" and {len(records) - 4} more" if len(records) > 4 else "")
        raise TrainingStopped(
            f"step {self._number(info)}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}: not finite. "
            f"Its records: {shown}. The newest checkpoint{f' (step {kept})' if kept else ''} is intact; lower the "
            "learning rate, clip the gradient, or look at these records"
        )
