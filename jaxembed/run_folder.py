"""What a run's folder says about the run: config.json, data.json, and model/ with what is needed to use its weights."""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from typing import Any

from jaxembed import config as config_lib
from jaxembed.config import Config
from jaxembed.errors import StoreLost, UserError
from jaxembed.storage import AnyPath, StorePath

CONFIG = "config.json"
DATA = "data.json"  # what the run was trained on: see `trainer`

# What is the disk's fault, by number, and as other libraries put it into words.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
STORE_WORDS = ("CURL error", "HTTP response", "kvstore")  # of tensorstore, which writes gs:// itself
DISK_WORDS = tuple(os.strerror(number) for number in DISK_ERRORS)

# Fields that may change between starts of one run: they do not enter the weights, or not by more than rounding.
FREE = (
    "steps",
    "epochs",
    "log_every",
    "stall_seconds",
    "mesh",
    "eval",
    "checkpoint",
    "export",
    "log_to",
    "data.cache_dir",
    "data.prefetch",
)


@dataclasses.dataclass(frozen=True)
class RunStep:
    """A run as it was after one of its steps."""

    workdir: AnyPath
    step: int


def read_config(workdir: AnyPath) -> Config:
    """Reads the resolved config of a run.

    Raises:
      UserError: there is none.
    """
    path = workdir / CONFIG
    try:
        return config_lib.load(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{workdir}: no {CONFIG} here, so this is not a run's folder") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: broken JSON: {error}") from error


def claim(workdir: AnyPath, config: Config, write: bool = True) -> None:
    """Makes the folder this run's, or makes sure that it already is.

    Raises:
      UserError: the folder cannot be written, or holds a run of another config: the message says what differs.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: is a file, wants a folder (it need not exist yet)")
    if (workdir / CONFIG).exists():
        different = differences(config_lib.to_json(read_config(workdir)), config_lib.to_json(config))
        if different:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(different)}): take another --workdir, "
                "or the same config"
            )
    if write:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(workdir / CONFIG, config_lib.to_json(config))
        except OSError as error:
            raise UserError(f"--workdir={workdir}: cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def disk_errors(workdir: AnyPath) -> Iterator[None]:
    """Turns a full or broken disk, or a lost store, into one clear line, whichever library runs into it.

    Raises:
      UserError: in the place of an error that is the disk's fault.
      StoreLost: in the place of one that is the store's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(workdir, StorePath) and any(word in str(error) for word in STORE_WORDS):
            raise StoreLost(f"{workdir}: cannot be reached: {str(error)[:300]}") from error
        said = next((words for words in DISK_WORDS if words in str(error)), None)
        if said is None and getattr(error, "errno", None) not in DISK_ERRORS:
            raise
        raise UserError(
            f"{workdir}: cannot be written: {said or error}. The newest complete checkpoint is intact: make room, and "
            "start again with the same --workdir"
        ) from error


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Returns 'field: old → new' for every field, but the free ones, in which two configs differ."""
    if where in FREE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            for line in differences(old.get(key, "absent"), new.get(key, "absent"), f"{where}.{key}".lstrip("."))
        ]
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        pairs = enumerate(zip(old, new))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    return [] if old == new else [f"{where}: {old!r} → {new!r}"]


def write_json(path: AnyPath, value: Any) -> None:
    """Writes JSON so that the file is whole or not there."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_whole(path: AnyPath, content: bytes) -> None:
    """Writes a file so that it is whole or not there."""
    if isinstance(path, StorePath):
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.write_bytes(content)
    os.replace(part, path)
