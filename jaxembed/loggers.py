"""Where metrics go beside metrics.jsonl: TensorBoard and Weights & Biases."""

import contextlib
import importlib.util
import json
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

from jaxembed import config as config_lib
from jaxembed.config import Config
from jaxembed.errors import UserError
from jaxembed.metrics import Logger
from jaxembed.observing.fields import READINGS
from jaxembed.run_folder import write_json
from jaxembed.storage import AnyPath, StorePath, publish, staged

TENSORBOARD = "tensorboard"  # the folder in the work directory
WANDB = "wandb.json"  # keeps the run's id there, so that a resumed run goes on in the same place
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}

# The groups under which scalars are shown; what has none is of training.
GROUPS = {
    "pairs": "data",
    "tokens": "data",
    "padded_tokens": "data",
    "padding_waste": "data",
    **dict.fromkeys(READINGS, "speed"),
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


def open_loggers(config: Config, workdir: AnyPath, resumed_at: int | None, active: bool = True) -> tuple[Logger, ...]:
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


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """Lets imports of a package fail that was not imported before."""
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]


class TensorBoard:
    """Writes scalars to WORKDIR/tensorboard.

    Its SummaryWriter leaves the writing to a thread, so that a killed run would lack points from before its checkpoint,
    and its EventsWriter waits for the disk, some milliseconds a line. So the records are framed here (length, its
    checksum, event, checksum: TensorFlow's TFRecord).
    """

    def __init__(self, config: Config, workdir: AnyPath, resumed_at: int | None) -> None:
        """Opens a file of events, at which TensorBoard forgets those of other files that come after `resumed_at`."""
        with _without("torch"):  # which tensorboardX imports where it can, for seconds, though scalars do not need it
            from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._checksum = masked_crc32c
        self._path = workdir / TENSORBOARD / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        place = staged(self._path)
        place.parent.mkdir(exist_ok=True)
        self._file = place.open("wb")
        self._write(Event(file_version="brain.Event:2"))
        first = 0 if resumed_at is None else resumed_at + 1
        self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def write(self, line: dict[str, Any]) -> None:
        """Writes a line's numbers."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(line).items()]
        self._write(Event(step=line["step"], summary=Summary(value=values)))

    def sync(self) -> None:
        """Sends the file to its store, where the work directory is in one."""
        publish(self._path)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        publish(self._path)

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        for part in (length, content):
            self._file.write(part + struct.pack("<I", self._checksum(part)))
        self._file.flush()


class Wandb:
    """Sends metrics to Weights & Biases; where to, and whether at all, is said by its environment variables."""

    def __init__(self, config: Config, workdir: AnyPath, resumed_at: int | None) -> None:
        """Starts a run there, or goes on in the one that this work directory had before.

        Raises:
          UserError: wandb does not start, for want of a key, say.
        """
        import wandb

        kept, own = workdir / WANDB, workdir
        if isinstance(workdir, StorePath):
            own = staged(workdir / "wandb")
            own.mkdir(exist_ok=True)
        run_id = json.loads(kept.read_text())["id"] if resumed_at is not None and kept.exists() else None
        try:
            self._run = wandb.init(
                project="jaxembed",
                name=workdir.resolve().name,
                dir=str(own),
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
        """Does nothing: lines are sent as they come."""

    def close(self) -> None:
        """Sends the rest and ends the run."""
        self._run.finish()


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """Returns a line's numbers by the names under which they are shown, such as 'train/loss' and 'eval/sts/NAME'."""
    numbers = {key: value for key, value in line.items() if key != "step" and isinstance(value, int | float)}
    return {key if "/" in key else f"{GROUPS.get(key, 'train')}/{key}": value for key, value in numbers.items()}
