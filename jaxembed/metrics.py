"""metrics.jsonl: one JSON object per logged step, in order, every step once, also after a restart."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jaxembed.storage import AnyPath, publish, staged

NAME = "metrics.jsonl"
DIGITS = 3  # behind the point, of arrays: thousands of numbers in every line


class Logger(Protocol):
    """Another place that metrics go to; see `jaxembed.loggers`."""

    def write(self, line: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends lines to a run's metrics.jsonl, and hands them on to loggers. Only process 0 writes.

    In a store, where nothing can be appended, the file is written anew at every checkpoint and at the end.
    """

    def __init__(
        self, workdir: AnyPath, resumed_at: int | None, active: bool = True, loggers: Sequence[Logger] = ()
    ) -> None:
        """Opens the file.

        Args:
          workdir: the run's.
          resumed_at: step of the checkpoint that the run goes on from: later lines are cut off; None: a new file.
          active: False writes nothing.
          loggers: are given each line too, and closed with the file.
        """
        self._file, self._loggers = None, loggers
        if not active:
            return
        self._path = workdir / NAME
        path = staged(self._path)
        whole = path.with_suffix(".tmp")
        with whole.open("w") as file:
            for line in iter_metrics(workdir) if resumed_at is not None else ():
                if line["step"] > resumed_at:
                    break
                file.write(json.dumps(line) + "\n")
        os.replace(whole, path)
        publish(self._path)
        self._file = path.open("a")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line and flushes it."""
        if not self._file:
            return
        plain = {key: _plain(value) for key, value in line.items()}
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()
        for logger in self._loggers:
            logger.write(plain)

    def sync(self) -> None:
        """Makes sure that the lines are on disk or in the store, before a checkpoint of their step is."""
        if self._file:
            os.fsync(self._file.fileno())
            publish(self._path)
            for logger in self._loggers:
                logger.sync()

    def close(self) -> None:
        """Closes the file and the loggers."""
        if self._file:
            self._file.close()
            publish(self._path)
        for logger in self._loggers:
            logger.close()


def iter_metrics(workdir: AnyPath) -> Iterator[dict[str, Any]]:
    """Reads a run's metrics line by line; a last line that a killed run left cut off is left out."""
    path = workdir / NAME
    if not path.exists():
        return
    with path.open("rb") as file:
        for text in file:
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                return


def read_metrics(workdir: AnyPath) -> list[dict[str, Any]]:
    """Reads all of a run's metrics."""
    return list(iter_metrics(workdir))


def _plain(value: Any) -> Any:
    """Returns what JSON can say of a value: None of a number that is not finite; arrays as nested lists."""
    if np.ndim(value):
        return [_plain(part) for part in np.round(np.asarray(value, np.float64), DIGITS).tolist()]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
