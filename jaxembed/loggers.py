"""Where metrics go beside metrics.jsonl: TensorBoard and Weights & Biases."""

import importlib.util
import json
import pathlib
from typing import Any

from jaxembed import config as config_lib
from jaxembed.config import Config
from jaxembed.errors import UserError
from jaxembed.metrics import Logger
from jaxembed.run_folder import write_json

TENSORBOARD = "tensorboard"  # the folder in the work directory
WANDB = "wandb.json"  # keeps the run's id there, so that a resumed run goes on in the same place
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}

# The groups under which scalars are shown; what has none is of training.
GROUPS = {
    "pairs": "data",
    "tokens": "data",
    "padded_tokens": "data",
    "padding_waste": "data",
    "pairs_per_s": "speed",
    "tokens_per_s": "speed",
    "padded_tokens_per_s": "speed",
}


def require_packages(log_to: tuple[str, ...]) -> None:
    """Makes sure that the loggers' packages are there, without importing them.

    Raises:
      UserError: one is not.
    """
    for name in log_to:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"config.log_to: {name!r} needs a package that is not installed: pip install {PACKAGES[name]}"
            )


def open_loggers(
    config: Config, workdir: pathlib.Path, resumed_at: int | None, active: bool = True
) -> tuple[Logger, ...]:
    """Opens the loggers that `config.log_to` names.

    Args:
      config: the run's.
      workdir: its folder.
      resumed_at: step of the checkpoint that the run goes on from; None for a fresh run.
      active: False opens none: only process 0 logs.

    Raises:
      UserError: a logger does not start.
    """
    kinds = {"tensorboard": TensorBoard, "wandb": Wandb}
    return tuple(kinds[name](config, workdir, resumed_at) for name in config.log_to) if active else ()


class TensorBoard:
    """Writes scalars to WORKDIR/tensorboard."""

    def __init__(self, config: Config, workdir: pathlib.Path, resumed_at: int | None) -> None:
        """Opens a file of events, before which TensorBoard forgets all later than `resumed_at`."""
        from tensorboardX import SummaryWriter

        first = 0 if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(workdir / TENSORBOARD), purge_step=first)

    def write(self, line: dict[str, Any]) -> None:
        """Writes a line's numbers."""
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """Hands what was written to the file."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class Wandb:
    """Sends metrics to Weights & Biases; where to, and whether at all, is said by its environment variables."""

    def __init__(self, config: Config, workdir: pathlib.Path, resumed_at: int | None) -> None:
        """Starts a run there, or goes on in the one that this work directory had before.

        Raises:
          UserError: wandb does not start, for want of a key, say.
        """
        import wandb

        kept = workdir / WANDB
        run_id = json.loads(kept.read_text())["id"] if resumed_at is not None and kept.exists() else None
        try:
            self._run = wandb.init(
                project="jaxembed",
                name=workdir.resolve().name,
                dir=str(workdir),
                config=config_lib.to_json(config),
                id=run_id,
                resume="allow",
            )
        except Exception as error:  # its own classes, of which each version has others
            raise UserError(f"config.log_to: wandb does not start: {error}") from error
        write_json(kept, {"id": self._run.id})

    def write(self, line: dict[str, Any]) -> None:
        """Sends a line; one that was sent before the run was killed is not sent again."""
        if line["step"] >= self._run.starting_step:
            self._run.log(scalars(line), step=line["step"])

    def sync(self) -> None:
        """Does nothing: what was sent is on its way."""

    def close(self) -> None:
        """Sends the rest and ends the run."""
        self._run.finish()


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """Returns a line's numbers by the names under which they are shown, such as 'train/loss' and 'eval/sts/NAME'."""
    numbers = {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
    return {key if "/" in key else f"{GROUPS.get(key, 'train')}/{key}": value for key, value in numbers.items()}
