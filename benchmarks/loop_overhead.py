"""What the training loop itself costs: Python time of a step, and the wait for data beside a step of 100 ms.

    python -m benchmarks.loop_overhead [--batch=1024] [--devices=1,8] [--steps=60]

The real loop runs, with its batches, lines of metrics, TensorBoard and progress, but the compiled step is one that
returns at once or, as an accelerator does, runs beside Python and is done 100 ms after the step before. Python: with
the step that returns at once and a batch made beforehand, all that a step takes; and beside the thread that makes
batches, with the step of 100 ms, all but the wait for that step. Wait for data: with the step of 100 ms, how long the
loop waits for a batch; the thread must make one and lay it onto the devices in less than a step. Pairs have a hard
negative; texts have 5 to 120 words, rows 512 tokens. Medians over the steps, each of which writes a line. The last line
is JSON: the figures of the most devices.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from jaxembed import config as config_lib
from jaxembed import loop, model_source, sharding
from jaxembed.config import Config
from jaxembed.data.loader import prefetch
from jaxembed.evaluation.tasks import Tasks
from jaxembed.loggers import open_loggers
from jaxembed.metrics import MetricsWriter, read_metrics
from jaxembed.observing.observer import Observer
from jaxembed.preemption import StopSignal
from jaxembed.progress import Progress
from jaxembed.training_data import TrainingData, open_data

STEP_SECONDS = 0.1
WARM_UP = 5
WORDS, RECORDS = 4000, 20_000
METRICS = ("loss", "grad_norm", "learning_rate", "temperature", "accuracy", "loss/full", "loss/dim64")


class Pending:
    """A number that is ready at some time, such as a step's loss on a busy device."""

    def __init__(self, done_at: float) -> None:
        self._done_at = done_at

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        time.sleep(max(self._done_at - time.perf_counter(), 0.0))
        return np.float32(1.0)


class FakeStep:
    """Stands in for a jitted step, and for what it is lowered and compiled to."""

    def __init__(self, mesh: jax.sharding.Mesh, seconds: float) -> None:
        self._seconds, self._done_at = seconds, 0.0
        one = jax.device_put(np.float32(1.0), NamedSharding(mesh, P()))
        self._ready = {name: one + i for i, name in enumerate(METRICS)}

    def lower(self, *_: Any) -> "FakeStep":
        return self

    def compile(self) -> "FakeStep":
        return self

    def memory_analysis(self) -> None:
        return None

    def __call__(self, state: Any, *_: Any) -> tuple[Any, dict[str, Any]]:
        if not self._seconds:
            return state, self._ready
        self._done_at = max(time.perf_counter(), self._done_at) + self._seconds
        return state, dict.fromkeys(METRICS, Pending(self._done_at))


class NoCheckpoints:
    """Saves nothing."""

    def save(self, *_: Any) -> None: ...


def write_pairs(path: pathlib.Path) -> pathlib.Path:
    """Writes records of invented words; returns the path."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(WORDS)])
    text = lambda: " ".join(rng.choice(words, rng.integers(5, 121)))  # noqa: E731
    with path.open("w") as file:
        for _ in range(RECORDS):
            file.write(json.dumps({"query": text(), "positive": text(), "negative": text()}) + "\n")
    return path


def run_config(folder: pathlib.Path, batch: int, steps: int) -> Config:
    """Returns a run from scratch over these records."""
    c = config_lib.default_config()
    c.steps, c.batch_size = steps, batch
    c.checkpoint.every = steps
    c.model.arch, c.tokenizer = "bert", f"train:bpe:{WORDS}"
    c.model.shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    c.data.train[0].path = str(write_pairs(folder / "pairs.jsonl"))
    c.data.cache_dir, c.data.row_length, c.data.negatives = str(folder / "cache"), "512", 1
    return config_lib.load(c)


def lines_of(
    config: Config, data: TrainingData, blueprint: Any, mesh: jax.sharding.Mesh, seconds: float
) -> list[dict[str, Any]]:
    """Runs the loop with a step that takes so long; returns its lines of metrics after the first ones.

    A step of 0 seconds gets the same batch each time, made beforehand.
    """
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        workdir = pathlib.Path(folder)
        factory = blueprint.factory(model_source.options(config.model), config.seed)
        writer = MetricsWriter(workdir, None, True, open_loggers(config, workdir, None))
        progress = Progress(config.steps)
        observer = Observer(workdir, config.stall_seconds)
        with writer, progress, observer, observer.begin({}, range(0), progress.say), StopSignal() as stop:
            tasks = Tasks.read(config.eval, "")
            run = loop.Run(workdir, mesh, blueprint, None, {}, tasks, NoCheckpoints(), writer, progress, stop, observer)
            place = lambda batch: data.to_device(batch, mesh)  # noqa: E731
            stage = loop.StageRun(0, "", config, data, factory, 0, config.steps)
            made = itertools.repeat(next(prefetch(data.builder, 0, 1, 1, None, place))) if not seconds else None
            with mock.patch.object(loop, "prefetch", lambda *_: made) if made else mock.MagicMock():
                loop.Loop(run, stage, FakeStep(mesh, seconds)).run({}, None)
        return read_metrics(workdir)[WARM_UP:]


def median_ms(lines: list[dict[str, Any]], *names: str) -> float:
    """Returns the median over lines of the sum of these fields, in milliseconds."""
    return 1000 * statistics.median(sum(line[name] for name in names) for line in lines)


def batch_ms(data: TrainingData, mesh: jax.sharding.Mesh) -> float:
    """Returns what it takes to make a batch and lay it onto the devices, while nothing else is done."""
    times = []
    for n in range(10):
        begun = time.perf_counter()
        data.to_device(data.builder.build(n)[0], mesh)
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)


def measure(config: Config, scratch: pathlib.Path, devices: int) -> dict[str, Any]:
    """Returns the figures of a mesh of so many devices."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    blueprint, _ = model_source.open_source(config, scratch)
    data = open_data(config, blueprint, mesh, {})
    at_once, slow = (lines_of(config, data, blueprint, mesh, seconds) for seconds in (0.0, STEP_SECONDS))
    return {
        "devices": devices,
        "tokens": slow[-1]["tokens"],
        "python_ms_per_step": median_ms(at_once, "step_s"),
        "python_ms_beside_data": median_ms(slow, "host_s", "data_wait_s"),
        "batch_ms": batch_ms(data, mesh),
        "step_ms": median_ms(slow, "step_s"),
        "data_wait_ms": median_ms(slow, "data_wait_s"),
        "data_wait_fraction": median_ms(slow, "data_wait_s") / median_ms(slow, "step_s"),
        "data_wait_fraction_mean": sum(line["data_wait_s"] for line in slow) / sum(line["step_s"] for line in slow),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--devices", default="1,8", help="of virtual CPU devices, each a run")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.devices.split(",")]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(counts))
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(pathlib.Path(folder), arguments.batch, arguments.steps + WARM_UP)
        rows = [measure(config, pathlib.Path(folder), devices) for devices in counts]
    table = Table(title=f"{arguments.batch:,} pairs a step; medians of {arguments.steps} steps, in ms")
    for name in ("devices", "tokens", "Python", "beside data", "batch made in", "step", "wait for data"):
        table.add_column(name, justify="right")
    for row in rows:
        times = [
            row[name] for name in ("python_ms_per_step", "python_ms_beside_data", "batch_ms", "step_ms", "data_wait_ms")
        ]
        table.add_row(str(row["devices"]), f"{row['tokens']:,}", *(f"{value:.2f}" for value in times))
    Console().print(table)
    print(json.dumps({"pairs": arguments.batch, **rows[-1]}))


if __name__ == "__main__":
    main()
