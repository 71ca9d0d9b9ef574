"""A training run: opens what it needs, walks through its stages, exports.

The state comes from, in this order: the newest checkpoint in the work directory (resume), the stage before, else
`config.model.init`.
"""

import contextlib
import dataclasses
import math
import time
from typing import Any

import jax

from jaxembed import model_source, run_folder, sharding
from jaxembed.blueprint import Blueprint
from jaxembed.checkpoint import Checkpoints
from jaxembed.config import Config
from jaxembed.data.batch import PairShape
from jaxembed.distributed import Peers
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.evaluation.tasks import Tasks
from jaxembed.loggers import open_loggers
from jaxembed.loop import Loop, Run, StageRun
from jaxembed.metrics import MetricsWriter, read_metrics
from jaxembed.models.lora import Lora
from jaxembed.models.text_encoder import Params, split
from jaxembed.observing import profiling
from jaxembed.observing.clock import Phase
from jaxembed.observing.observer import Observer
from jaxembed.preemption import StopSignal
from jaxembed.progress import Progress
from jaxembed.report import write_report
from jaxembed.reporting.summary import summary
from jaxembed.stages import stages_of
from jaxembed.step import TrainState, build
from jaxembed.storage import AnyPath
from jaxembed.training_data import open_data

SEEN_WITHIN = 60.0  # seconds in which a shared file system shows a new file everywhere


def train(config: Config, workdir: AnyPath, peers: Peers | None = None, profile: range = range(0)) -> dict[str, Any]:
    """Trains, from where the work directory left off, and exports.

    Args:
      config: the run's.
      workdir: its folder; made where there is none. All processes see it.
      peers: the processes that call this, each with the same arguments; None: this one alone.
      profile: steps to trace.

    Returns:
      The last line of metrics.

    Raises:
      UserError: something about the set-up, or the disk.
      TrainingStopped: a loss or gradient that is not finite.
    """
    peers = peers or Peers()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())  # also while tokenising and exporting, which are then finished
        tasks = Tasks.read(config.eval, "config.eval.")  # before anything slow: a missing file shows at once
        blueprint, load = model_source.open_source(config, workdir)
        mesh = sharding.make_mesh(config.mesh)
        lora = blueprint.lora(config.model.lora)
        teacher = model_source.open_teacher(config.teacher)
        _check_sizes(config, blueprint, mesh)
        experts, parallel = teacher.blueprint.experts if teacher else None, mesh.shape["expert"]
        if experts and experts.count % parallel:
            raise UserError(f"config.mesh.expert = {parallel} does not divide the teacher's {experts.count} experts")
        _agree_on_model(peers, config, blueprint, teacher.blueprint if teacher else None)
        run_folder.claim(workdir, config, write=peers.main)
        stack.enter_context(run_folder.disk_errors(workdir))
        _require_shared(peers, workdir)
        observer = stack.enter_context(Observer(workdir, config.stall_seconds))
        checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.best)
        start = peers.of_main(checkpoints.latest())  # a shared file system may show the others an older one
        if start is not None and lora:
            model_source.require_base(workdir, config.model.init, blueprint.base)
        if peers.main and start is None:
            blueprint.save(workdir / model_source.FOLDER)
        meta = checkpoints.meta(start) if start is not None else {}
        with observer.clock.during(Phase.PREPARE):
            stages = _open_stages(config, blueprint, lora, mesh, meta, teacher.blueprint if teacher else None)
        _agree_on_data(peers, stages)
        steps = stages[-1].last
        if start is not None and start > steps:
            raise UserError(f"{workdir} has done {start} steps, more than the {steps} asked for: raise config.steps")
        profiling.require(profile, steps)
        if peers.main:
            run_folder.write_json(workdir / run_folder.DATA, [row for stage in stages for row in _said_of_data(stage)])
        loggers = open_loggers(config, workdir, start, peers.main)
        writer = stack.enter_context(MetricsWriter(workdir, start, peers.main, loggers))
        stack.enter_context(jax.set_mesh(mesh))
        with contextlib.ExitStack() as watched:
            progress = watched.enter_context(Progress(steps, start or 0, active=peers.main))
            watched.enter_context(observer.begin(meta, profile, progress.say))
            if start is not None:
                done = f"{start} of {steps} steps are done"
                progress.say(f"{done}: going on" if start < steps else f"{done}: nothing left to train")
            given = {"teacher": teacher.load(teacher.factory)} if teacher else {}
            fresh: Params = {}
            if start is None or lora:  # no checkpoint holds what adapters stand on
                fresh, given["base"] = split(load(stages[0].factory))
            if lora:
                trained, held = (sum(x.size for x in jax.tree.leaves(part)) for part in (fresh, given["base"]))
                progress.say(f"adapters: {trained:,} parameters are trained, {held:,} stay as they are")
            taught = teacher.factory if teacher else None
            run = Run(workdir, mesh, blueprint, taught, given, tasks, checkpoints, writer, progress, stop, observer)
            state, step = _walk(run, stages, fresh, start, meta.get("stage", 0))
        with observer.clock.during(Phase.CHECKPOINT):
            checkpoints.close()
        if step < steps:
            progress.say(f"told to stop: saved after step {step} of {steps}; started again, the run goes on there")
        if config.export and step == steps:
            with observer.clock.during(Phase.EXPORT):
                run_step = run_folder.RunStep(workdir, step)
                if lora:  # merged in float32, whatever the dtype of the computation
                    given.clear()
                    embedder = Embedder.load(f"{workdir}@{step}", mesh=mesh)
                else:
                    embedder = Embedder(blueprint, stages[-1].factory, state.served, mesh, run_step)
                embedder.save(workdir / "export", config.export_dtype)
        observer.end()
        if peers.main:
            _report(workdir, progress)
    return next(reversed(read_metrics(workdir)), {})


def _agree_on_model(peers: Peers, config: Config, *blueprints: Blueprint | None) -> None:
    """Makes sure that all processes start from the same model, and the same teacher."""
    if peers.count == 1:
        return
    for what, init, blueprint in zip(("model", "teacher"), (config.model.init, config.teacher.init), blueprints):
        if blueprint:
            said = {"config.json": blueprint.hf_config, "head": dataclasses.asdict(blueprint.head)}
            weights = "" if init == "scratch" else model_source.digest_of(init)
            peers.require_same(what, said | {"tokenizer": blueprint.tokenizer.fingerprint(), "weights": weights})


def _agree_on_data(peers: Peers, stages: tuple[StageRun, ...]) -> None:
    """Makes sure that all processes train on the same tokens: a cache's name is a digest of all that it comes from."""
    caches = [(stage.name, i, cache) for stage in stages for i, cache in enumerate(stage.data.caches)]
    peers.require_same("data", {f"{name} {i} {cache.label}".strip(): cache.path.name for name, i, cache in caches})


def _require_shared(peers: Peers, workdir: AnyPath) -> None:
    """Makes sure that every process sees what process 0 has written.

    Raises:
      UserError: the folder lies on a disk of process 0's machine.
    """
    peers.wait()
    until = time.monotonic() + SEEN_WITHIN
    while not (workdir / run_folder.CONFIG).exists():
        if time.monotonic() > until:
            raise UserError(
                f"--workdir={workdir}: process 0 has written {run_folder.CONFIG} there, but this process does not see "
                "it: it must lie on a file system that all processes share, or on an object store (gs://…)"
            )
        time.sleep(0.5)


def _report(workdir: AnyPath, progress: Progress) -> None:
    """Writes the run's report and shows its summary; a picture that cannot be drawn ends no training."""
    try:
        write_report(workdir)
        progress.console.print(summary(workdir))
    except (UserError, OSError) as error:
        progress.say(f"no report: {error}")


def _check_sizes(config: Config, blueprint: Blueprint, mesh: jax.sharding.Mesh) -> None:
    """Refuses sizes that the model's vectors cannot be cut to.

    Raises:
      UserError: such a width or depth.
    """
    with jax.set_mesh(mesh):
        factory = blueprint.factory(model_source.options(config.model))
        width, depth = factory.width, factory.depth
    for sizes in (stage.config.matryoshka for stage in stages_of(config)):
        for name, asked, full in (("dims", sizes.dims, width), ("layers", sizes.layers, depth)):
            for size in asked:
                if not 0 < size < full:
                    raise UserError(
                        f"config.matryoshka.{name}: {size} is not in 1 … {full - 1}; the model's full size, {full}, is "
                        "trained anyway"
                    )
        if blueprint.experts and not blueprint.experts.by_source:  # a model of so few layers may have no experts
            arch = blueprint.architecture
            for size in sizes.layers:
                arch.config_from_hf(arch.with_layers(blueprint.hf_config, size), f"config.matryoshka.layers: {size}")


def _open_stages(
    config: Config,
    blueprint: Blueprint,
    lora: Lora | None,
    mesh: jax.sharding.Mesh,
    meta: dict[str, Any],
    teacher: Blueprint | None,
) -> tuple[StageRun, ...]:
    """Opens the data of all stages, so that what is wrong with a late one shows before the first one's first step."""
    opened: list[StageRun] = []
    for index, stage in enumerate(stages_of(config)):
        c = stage.config
        data = open_data(c, blueprint, mesh, meta if index == meta.get("stage", 0) else {}, teacher)
        first = opened[-1].last if opened else 0
        last = first + (c.steps or math.ceil(c.epochs * data.plan.steps_per_epoch))
        factory = blueprint.factory(model_source.options(c.model), config.seed, lora)
        opened.append(StageRun(index, stage.name, c, data, factory, first, last))
    return tuple(opened)


def _walk(
    run: Run, stages: tuple[StageRun, ...], fresh: Params, start: int | None, current: int
) -> tuple[TrainState, int]:
    """Trains stage after stage, from the checkpoint of step `start` of stage number `current`, else from `fresh`."""
    state, step = None, start
    for stage in stages[current:]:
        served = state.served if state else None
        state = None  # its optimizer goes before the next one comes
        step_function, state = _prepare(run, stage, fresh, served, step)
        if stage.name and step != stage.last:
            run.progress.say(f"stage {stage.name!r}: steps {(step or 0) + 1} … {stage.last}")
        state, step = Loop(run, stage, step_function).run(state, step)
        if step < stage.last:  # told to stop
            break
    return state, step


def _prepare(
    run: Run, stage: StageRun, fresh: Params, served: Params | None, start: int | None
) -> tuple[Any, TrainState]:
    """Builds a stage's step and its first state: from the stage before, restored, or fresh; born on the mesh."""
    config, factory, plan = stage.config, stage.factory, stage.data.plan
    pair = PairShape(plan.positives, plan.negatives, plan.negative_queries)
    first_state, step = build(config, factory, pair, stage.last - stage.first, run.teacher)
    trained, _ = split(factory.abstract())
    make_state = jax.jit(first_state, donate_argnums=0)
    if served is not None:
        state = make_state(jax.tree.map(lambda x, like: x.astype(like.dtype), served, trained))
    elif start is not None:
        state = run.checkpoints.restore(start, jax.eval_shape(make_state, trained))
    else:
        state = make_state(fresh)
    return jax.jit(step, donate_argnums=0), state


def _said_of_data(stage: StageRun) -> list[dict[str, Any]]:
    """What the model card and the report say of a stage's data: no text, no path of this machine."""
    return [
        {
            "stage": stage.name,
            "source": cache.label,
            "records": cache.n_records,
            "texts": cache.n_texts,
            "tokens": cache.total_tokens,
            "truncated": cache.truncated,
            "skipped": cache.skipped,
            "weight": source.weight,
            "licence": source.licence or cache.licence,
        }
        for source, cache in zip(stage.config.data.train, stage.data.caches)
    ]
