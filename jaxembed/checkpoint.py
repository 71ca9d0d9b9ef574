"""Checkpoints by orbax: the newest ones and the best one, written in the background, restored onto any mesh."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxembed.checkpoint_mirror import Mirror, complete_steps, is_mirrored
from jaxembed.errors import UserError
from jaxembed.step import TrainState
from jaxembed.storage import AnyPath, local, path_of

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint has four parts: `model` (parameters), `average` (their moving average, where there is one), `rest`
    (loss parameters, optimizer, step) and `meta` (a small JSON). So another run can take the weights alone.
    """

    def __init__(self, workdir: AnyPath, keep: int = 2, best: str = "") -> None:
        """Opens or creates the folder.

        Args:
          workdir: the run's.
          keep: how many of the newest to keep.
          best: also keep the checkpoint with the highest value of this metric.
        """
        policies = [LatestN(keep)]
        score = (lambda metrics: metrics.get(best, -math.inf)) if best else None  # one may lack it
        if score:
            policies.append(BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            best_fn=score,  # else metrics are not saved, and after a restart no older checkpoint is the best
            cleanup_tmp_directories=True,
        )
        folder = workdir / FOLDER
        self._mirror = Mirror(folder) if is_mirrored(folder) else None
        place = self._mirror.folder if self._mirror else folder.absolute()
        self._manager = ocp.CheckpointManager(str(place), options=options)

    def latest(self) -> int | None:
        """Returns the newest complete checkpoint's step."""
        self._settle()
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, meta: dict[str, Any], metrics: dict[str, float]) -> None:
        """Starts to save; returns once the arrays may be donated."""
        parts = {"model": ocp.args.StandardSave(state.params["model"]), "meta": ocp.args.JsonSave(meta)}
        parts["rest"] = ocp.args.StandardSave(_rest(state))
        if state.average:
            parts["average"] = ocp.args.StandardSave(state.average)
        self._settle()
        self._manager.save(step, args=ocp.args.Composite(**parts), metrics=metrics, force=True)
        if self._mirror:
            self._mirror.follow(self._manager.wait_until_finished)

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the JSON part of a checkpoint."""
        self._fetch(step)
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores a whole state, laid onto the mesh that is set as `like` (arrays or ShapeDtypeStructs) is."""
        self._fetch(step)
        like = jax.tree.map(_target, like)
        parts = {"model": ocp.args.StandardRestore(like.params["model"]), "rest": ocp.args.StandardRestore(_rest(like))}
        if like.average:
            parts["average"] = ocp.args.StandardRestore(like.average)
        got = self._manager.restore(step, args=ocp.args.Composite(**parts))
        rest = got["rest"]
        params = {"model": got["model"], "loss": rest["loss"]}
        return TrainState(rest["step"], params, rest["optimizer"], got["average"] if like.average else {})

    def wait(self) -> None:
        """Waits until what is being saved is complete."""
        self._settle()
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and gives up the folder."""
        self._settle()
        self._manager.close()
        if self._mirror:
            self._mirror.close()

    def _settle(self) -> None:
        if self._mirror:
            self._mirror.settle()

    def _fetch(self, step: int) -> None:
        self._settle()
        if self._mirror:
            self._mirror.fetch(step)


def restore_model(spec: str, like: Any) -> Any:
    """Restores the model parameters that a run serves: its moving average where it has one.

    Args:
      spec: 'DIR', 'DIR@STEP' or 'DIR@best'; what lies in a store that orbax cannot read is copied first.
      like: parameters as ShapeDtypeStructs with shardings, which are taken to be over the mesh that is set.

    Raises:
      UserError: no such run, step or best checkpoint.
    """
    step_folder = find(spec)
    part = "average" if (step_folder / "average").exists() else "model"
    place = local(step_folder / part) if is_mirrored(step_folder) else step_folder / part
    if part == "average":  # kept in float32, whatever the parameters' type
        like = jax.tree.map(lambda x: x.update(dtype=jnp.float32), like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(str(place), jax.tree.map(_target, like))


def split(spec: str) -> tuple[AnyPath, str]:
    """Cuts 'DIR[@STEP|@best]' into the folder and '', the step or 'best'."""
    match = re.fullmatch(r"(.+?)(?:@(\d+|best))?", spec)
    return path_of(match[1]), match[2] or ""


def find(spec: str) -> AnyPath:
    """Returns the folder of the checkpoint that 'DIR[@STEP|@best]' names."""
    workdir, which = split(spec)
    folder = (workdir / FOLDER).absolute()
    steps = complete_steps(folder)
    if not steps:
        raise UserError(f"run:{spec}: {workdir} holds no complete checkpoint")
    if which == "best":
        return folder / str(_best(workdir, steps))
    if which and int(which) not in steps:
        raise UserError(f"run:{spec}: no checkpoint of step {which}; there are {', '.join(map(str, steps))}")
    return folder / (which or str(steps[-1]))


def _best(workdir: AnyPath, steps: list[int]) -> int:
    from jaxembed.metrics import read_metrics
    from jaxembed.run_folder import read_config

    name = read_config(workdir).checkpoint.best
    if not name:
        raise UserError(f"run:{workdir}@best: that run kept no best checkpoint (its config.checkpoint.best is empty)")
    scores = {line["step"]: line[name] for line in read_metrics(workdir) if name in line}
    scored = [step for step in steps if step in scores]
    if not scored:
        raise UserError(f"run:{workdir}@best: no kept checkpoint has the metric {name!r}")
    return max(scored, key=lambda step: scores[step])


def _rest(state: TrainState) -> dict[str, Any]:
    return {"loss": state.params["loss"], "optimizer": state.optimizer, "step": state.step}


def _target(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Describes an array to restore; what `jax.eval_shape` gives lies on an abstract mesh, scalars on none."""
    spec = x.sharding.spec if x.sharding else P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(jax.sharding.get_mesh(), spec))
