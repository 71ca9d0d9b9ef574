"""Checkpoints by orbax: the newest ones and the best one, written in the background, restored onto any mesh."""

import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxembed.errors import UserError
from jaxembed.step import TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint has four parts: `model` (parameters), `average` (their moving average, where there is one), `rest`
    (loss parameters, optimizer, step) and `meta` (a small JSON). So another run can take the weights alone.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 2, best: str = "") -> None:
        """Opens or creates the folder.

        Args:
          workdir: the run's.
          keep: how many of the newest to keep.
          best: also keep the checkpoint with the highest value of this metric.
        """
        policies = [LatestN(keep)]
        if best:
            score = lambda metrics: metrics.get(best, -math.inf)  # noqa: E731 (an older one may lack it)
            policies.append(BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager((workdir / FOLDER).absolute(), options=options)

    def latest(self) -> int | None:
        """Returns the newest complete checkpoint's step."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, meta: dict[str, Any], metrics: dict[str, float]) -> None:
        """Starts to save; returns once the arrays may be donated."""
        parts = {"model": ocp.args.StandardSave(state.params["model"]), "meta": ocp.args.JsonSave(meta)}
        parts["rest"] = ocp.args.StandardSave(_rest(state))
        if state.average:
            parts["average"] = ocp.args.StandardSave(state.average)
        self._manager.save(step, args=ocp.args.Composite(**parts), metrics=metrics or None, force=True)

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the JSON part of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores a whole state, laid onto the mesh that is set as `like` (arrays or ShapeDtypeStructs) is."""
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
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and gives up the folder."""
        self._manager.close()


def restore_model(spec: str, like: Any) -> Any:
    """Restores the model parameters that a run serves: its moving average where it has one.

    Args:
      spec: 'DIR', 'DIR@STEP' or 'DIR@best'.
      like: parameters as ShapeDtypeStructs with shardings, which are taken to be over the mesh that is set.

    Raises:
      UserError: no such run, step or best checkpoint.
    """
    step_folder = find(spec)
    part = "average" if (step_folder / "average").exists() else "model"
    if part == "average":  # kept in float32, whatever the parameters' type
        like = jax.tree.map(lambda x: x.update(dtype=jnp.float32), like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(step_folder / part, jax.tree.map(_target, like))


def split(spec: str) -> tuple[pathlib.Path, str]:
    """Cuts 'DIR[@STEP|@best]' into the folder and '', the step or 'best'."""
    match = re.fullmatch(r"(.+?)(?:@(\d+|best))?", spec)
    return pathlib.Path(match[1]).expanduser(), match[2] or ""


def find(spec: str) -> pathlib.Path:
    """Returns the folder of the checkpoint that 'DIR[@STEP|@best]' names."""
    workdir, which = split(spec)
    folder = (workdir / FOLDER).absolute()
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.is_dir() else []
    if not steps:
        raise UserError(f"run:{spec}: {workdir} holds no complete checkpoint")
    if which == "best":
        return folder / str(_best(workdir, steps))
    if which and int(which) not in steps:
        raise UserError(f"run:{spec}: no checkpoint of step {which}; there are {', '.join(map(str, steps))}")
    return folder / (which or str(steps[-1]))


def _best(workdir: pathlib.Path, steps: list[int]) -> int:
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
