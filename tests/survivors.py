"""Runs of several processes that are killed or told to stop at random moments, under launch/local.sh."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import psutil
from pod import ROOT, environment
from safetensors.numpy import load_file
from tiny_run import write_pairs

from jaxembed import config as config_lib
from jaxembed.checkpoint import FOLDER
from jaxembed.metrics import read_metrics
from jaxembed.observing.fields import repeatable

PROCESSES, DEVICES = 2, 2


def write_config(folder: pathlib.Path, config: config_lib.Config, name: str = "run") -> pathlib.Path:
    """Writes a config file that gives this config; returns its path."""
    values = folder / f"{name}.json"
    values.write_text(json.dumps(config_lib.to_json(config)))
    file = folder / f"{name}.py"
    file.write_text(
        "import json\nimport ml_collections\n\n\ndef get_config(arg=None):\n"
        f"    return ml_collections.ConfigDict(json.load(open({str(values)!r})))\n"
    )
    return file


class Launched:
    """launch/local.sh at work."""

    def __init__(self, config: pathlib.Path, workdir: pathlib.Path, restarts: int) -> None:
        self.workdir, self.log = workdir, workdir.with_suffix(".log")
        command = ["launch/local.sh", str(PROCESSES), f"--devices={DEVICES}", f"--config={config}"]
        command += [f"--workdir={workdir}", f"--restarts={restarts}"]
        # Local devices and the timeout are set by the launcher, from its own flags and environment.
        surroundings = environment(DEVICES, timeout=9) | {"JAXEMBED_RESTART_PAUSE": "0", "PYTHON": sys.executable}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=surroundings, stdout=log, stderr=log)

    def children(self) -> list[psutil.Process]:
        """The processes of the run that are alive."""
        try:
            found = psutil.Process(self.process.pid).children()
            return [child for child in found if "jaxembed.train" in " ".join(child.cmdline())]
        except psutil.Error:
            return []

    def steps(self) -> int:
        """Steps that metrics.jsonl tells of."""
        if not (self.workdir / "metrics.jsonl").exists():
            return 0
        return max((line["step"] for line in read_metrics(self.workdir)), default=0)

    def wait_for(self, reached: int, seconds: float = 120) -> None:
        """Waits until that step is done, or the run is over."""
        until = time.monotonic() + seconds
        while self.process.poll() is None and self.steps() < reached:
            assert time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.002)

    def wait_for_words(self, words: str, times: int, seconds: float = 120) -> None:
        """Waits until the log has these words so often."""
        until = time.monotonic() + seconds
        while self.log.read_text().count(words) < times:
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def send(self, rng: random.Random, number: int) -> bool:
        """Sends a signal to one of the run's processes; returns whether there was one."""
        victims = self.children()
        if not victims:
            return False
        rng.choice(victims).send_signal(number)
        return True


def newest(workdir: pathlib.Path) -> int:
    """The newest complete checkpoint's step, 0 for none."""
    folder = workdir / FOLDER
    names = os.listdir(folder) if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def unbroken(folder: pathlib.Path, config: pathlib.Path) -> pathlib.Path:
    """A run that nobody disturbs."""
    launched = Launched(config, folder / "unbroken", 0)
    assert launched.process.wait(300) == 0, launched.log.read_text()[-3000:]
    return launched.workdir


def killed(folder: pathlib.Path, config: pathlib.Path, times: int, steps: int, seed: int) -> tuple[pathlib.Path, int]:
    """A run one of whose processes is killed so often; returns its folder, and how many of the kills hit."""
    rng, hits = random.Random(seed), 0
    launched = Launched(config, folder / "killed", times)
    for i in range(times):
        if i % 3 == 0:  # while it starts, also between two starts
            time.sleep(rng.uniform(0.5, 9))
        else:
            launched.wait_for(min(launched.steps() + rng.randint(1, steps // times), steps - 1))
            time.sleep(rng.uniform(0, 0.05))
        saved = newest(launched.workdir)
        hits += launched.send(rng, signal.SIGKILL)
        time.sleep(1)
        assert newest(launched.workdir) >= saved
    assert launched.process.wait(300) == 0, launched.log.read_text()[-3000:]
    goings = [int(n) for n in re.findall(rf"(\d+) of {steps} steps are done", launched.log.read_text())]
    assert goings == sorted(goings), goings  # no start began before the one before
    return launched.workdir, hits


def stopped(folder: pathlib.Path, config: pathlib.Path, times: int, steps: int, seed: int) -> pathlib.Path:
    """A run one of whose processes is told to stop so often, and that is started again each time.

    Every other time it is told before the first step of that start.
    """
    rng, workdir = random.Random(seed), folder / "stopped"
    for i in range(times):
        done = newest(workdir)
        launched = Launched(config, workdir, 0)
        if i % 2:
            launched.wait_for_words("steps are done: going on", i)
        else:
            launched.wait_for(done + rng.randint(1, steps // times))
        time.sleep(rng.uniform(0, 0.05))
        launched.send(rng, signal.SIGTERM)
        assert launched.process.wait(120) == 0, launched.log.read_text()[-3000:]
        assert newest(workdir) == launched.steps() > done  # not a step is lost
    launched = Launched(config, workdir, 0)
    assert launched.process.wait(300) == 0, launched.log.read_text()[-3000:]
    return workdir


def assert_same_run(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Every step once, the same numbers to the last bit."""
    lines = [repeatable(line) for line in read_metrics(workdir)]
    assert lines == [repeatable(line) for line in read_metrics(other)]
    weights = "export/model.safetensors"
    assert load_file(workdir / weights).keys() and (workdir / weights).read_bytes() == (other / weights).read_bytes()


def plain_pairs(folder: pathlib.Path) -> tuple[dict[str, str]]:
    """Training data of one shape."""
    return ({"path": str(write_pairs(folder / "pairs.jsonl", 100, 7))},)
