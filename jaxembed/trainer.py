"""The training loop.

Its order is a contract: with a state that has done `step` steps, evaluate → save → next batch → step → write. Metrics
are read one step late, so that the device never waits for the host; before an evaluation or a checkpoint they are
caught up with, so that nothing is saved whose step was not found finite.

The state comes from, in this order: the newest checkpoint in the work directory (resume), else `config.model.init`.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxembed import model_source, run_folder, sharding
from jaxembed.checkpoint import Checkpoints
from jaxembed.config import Config
from jaxembed.data.batch import Batch
from jaxembed.data.loader import StepInfo, prefetch
from jaxembed.embedder import Embedder
from jaxembed.errors import TrainingStopped, UserError
from jaxembed.evaluation.report import flat_scores
from jaxembed.evaluation.tasks import Tasks
from jaxembed.metrics import MetricsWriter, read_metrics
from jaxembed.model_source import Blueprint
from jaxembed.optimizer import make_optimizer
from jaxembed.preemption import StopSignal
from jaxembed.progress import Progress
from jaxembed.step import TrainState, init_state, loss_params, make_step
from jaxembed.training_data import TrainingData, open_data


@dataclasses.dataclass
class Run:
    """What stays the same from step to step."""

    config: Config
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    blueprint: Blueprint
    data: TrainingData
    tasks: Tasks
    factory: Any
    steps: int


def train(config: Config, workdir: pathlib.Path) -> dict[str, float]:
    """Trains, from where the work directory left off, and exports.

    Args:
      config: the run's.
      workdir: its folder; made where there is none.

    Returns:
      The last line of metrics.

    Raises:
      UserError: something about the set-up.
      TrainingStopped: a loss or gradient that is not finite.
    """
    main_process = jax.process_index() == 0
    mesh = sharding.make_mesh(config.mesh)
    tasks = Tasks.read(config.eval.sts, config.eval.retrieval)  # before anything slow: a missing file shows at once
    blueprint, load = model_source.open_source(config)
    run_folder.claim(workdir, config, write=main_process)
    if main_process:
        blueprint.save(workdir / model_source.FOLDER)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.best)
    start = checkpoints.latest()
    data = open_data(config, blueprint, mesh, checkpoints.meta(start) if start is not None else {})
    steps = config.steps or math.ceil(config.epochs * data.plan.steps_per_epoch)
    if start is not None and start > steps:
        raise UserError(f"{workdir} has done {start} steps, more than the {steps} asked for: raise config.steps")
    factory = blueprint.factory(model_source.options(config.model), config.seed)
    run = Run(config, workdir, mesh, blueprint, data, tasks, factory, steps)
    with jax.set_mesh(mesh):
        step_function, state = _prepare(run, load, checkpoints, start)
        writer = MetricsWriter(workdir, start, main_process)
        with Progress(steps, config.batch_size, active=main_process) as progress:
            loop = _Loop(run, checkpoints, writer, progress, step_function)
            state, line = loop.run(state, start)
        checkpoints.close()
        writer.close()
        if config.export and int(state.step) == steps:
            Embedder(blueprint, factory, state.served, mesh).save(workdir / "export")
    return line or next(reversed(read_metrics(workdir)), {})


def _prepare(
    run: Run, load: model_source.Loader, checkpoints: Checkpoints, start: int | None
) -> tuple[Any, TrainState]:
    """Builds the optimizer and the first state, born on the mesh or restored."""
    config, factory = run.config, run.factory
    abstract = {"model": factory.abstract(), "loss": jax.eval_shape(lambda: loss_params(config))}
    optimizer = make_optimizer(config.optimizer, run.steps, abstract)
    make_state = jax.jit(lambda model: init_state(config, optimizer, model), donate_argnums=0)
    if start is None:
        state = make_state(load(factory))
    else:
        state = checkpoints.restore(start, jax.eval_shape(make_state, factory.abstract()))
    step = make_step(config, factory, optimizer, run.data.plan.positives, run.steps)
    return jax.jit(step, donate_argnums=0), state


class _Loop:
    """The loop's moving parts."""

    def __init__(
        self, run: Run, checkpoints: Checkpoints, writer: MetricsWriter, progress: Progress, step_function: Any
    ) -> None:
        self.run_, self.checkpoints, self.writer, self.progress = run, checkpoints, writer, progress
        self.compiled: dict[tuple[int, ...], Any] = {}
        self.step_function = step_function
        self.pending: tuple[StepInfo, dict[str, jax.Array]] | None = None
        self.line: dict[str, Any] | None = None  # the open one
        self.last_line: dict[str, Any] = {}
        self.clock = time.perf_counter()

    def run(self, state: TrainState, start: int | None) -> tuple[TrainState, dict[str, Any]]:
        """Runs from step `start` (None: a fresh run) to the end, or until the process is told to stop."""
        run, config = self.run_, self.run_.config
        step = start or 0
        if start is not None:
            done = f"{start} of {run.steps} steps are done"
            self.progress.say(f"{done}: going on" if start < run.steps else f"{done}: nothing left to train")
        batches = prefetch(run.data.builder, step, run.steps, config.data.prefetch)
        with StopSignal() as stop:
            while True:
                last = step == run.steps or stop.requested(step)
                evaluate = bool(config.eval.every) and (step % config.eval.every == 0 or step == run.steps)
                save = last or step % config.checkpoint.every == 0 or (evaluate and bool(config.checkpoint.best))
                if step == start:  # this state was evaluated and saved before
                    evaluate = save = False
                if evaluate or save:
                    self._catch_up(hold=True)
                if evaluate:
                    self._evaluate(state, step)
                self._flush()
                if save and step > 0:
                    self.writer.sync()
                    self.checkpoints.save(state, step, run.data.meta, self._scores())
                if last:
                    break
                state = self._step(state, batches)
                step += 1
        return state, self.last_line

    def _step(self, state: TrainState, batches: Iterator[tuple[Batch, StepInfo]]) -> TrainState:
        batch, info = next(batches)
        batch = self.run_.data.to_device(batch, self.run_.mesh)
        shape = batch.rows.tokens.shape
        if shape not in self.compiled:
            self.compiled[shape] = self._compile(state, batch)
        state, metrics = self.compiled[shape](state, batch)
        self._catch_up()
        self.pending = info, metrics
        return state

    def _compile(self, state: TrainState, batch: Batch) -> Any:
        self.progress.say(f"compiling for {batch.rows.tokens.shape} tokens …")
        compiled = self.step_function.lower(state, batch).compile()
        memory = compiled.memory_analysis()
        if memory:
            gigabytes = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9
            self.progress.say(f"compiled for {batch.rows.tokens.shape} tokens: {gigabytes:.2f} GB per device")
        return compiled

    def _catch_up(self, hold: bool = False) -> None:
        """Reads the metrics of the step before and makes its line; `hold` keeps the line open for scores."""
        if self.pending is None:
            return
        (info, metrics), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._require_finite(info, values)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        line = {"step": info.step + 1, **values, **_counts(info)}
        line |= {
            "pairs_per_s": info.pairs / seconds,
            "tokens_per_s": info.real_tokens / seconds,
            "padded_tokens_per_s": info.padded_tokens / seconds,
        }
        self.progress.update(line)
        self.line = line
        if not hold:
            self._flush()

    def _flush(self) -> None:
        """Writes the open line, if its step is one that is logged or it carries scores."""
        line, self.line = self.line, None
        if line is None:
            return
        due = line["step"] % self.run_.config.log_every == 0 or line["step"] == self.run_.steps
        if due or any(name.startswith("eval/") for name in line):
            self.writer.write(line)
        self.last_line = line

    def _evaluate(self, state: TrainState, step: int) -> None:
        run = self.run_
        embedder = Embedder(run.blueprint, run.factory, state.served, run.mesh)
        scores = flat_scores(run.tasks.evaluate(embedder))
        best = run.config.checkpoint.best
        if best and best not in scores:
            raise UserError(f"config.checkpoint.best = {best!r}: the evaluation gives {', '.join(scores)}")
        self.line = (self.line or {"step": step}) | scores
        self.progress.scores(step, scores)
        self.clock = time.perf_counter()

    def _scores(self) -> dict[str, float]:
        return {name: value for name, value in self.last_line.items() if name.startswith("eval/")}

    def _require_finite(self, info: StepInfo, values: dict[str, float]) -> None:
        if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
            return
        self.checkpoints.wait()
        kept = self.checkpoints.latest()
        records = self.run_.data.record_names(info.step)
        shown = ", ".join(records[:4]) + (f" and {len(records) - 4} more" if len(records) > 4 else "")
        raise TrainingStopped(
            f"step {info.step + 1}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}: not finite. Its "
            f"records: {shown}. The newest checkpoint{f' (step {kept})' if kept else ''} is intact; lower the learning "
            "rate, clip the gradient, or look at these records"
        )


def _counts(info: StepInfo) -> dict[str, Any]:
    return {
        "pairs": info.pairs,
        "tokens": info.real_tokens,
        "padded_tokens": info.padded_tokens,
        "padding_waste": info.waste,
    }
