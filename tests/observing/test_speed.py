"""Where a step's time goes: by a clock of our own, and in the lines of a real run that stops and goes on."""

import json
import shutil
import time
import types

import jax
import numpy as np
import pytest
from test_profiling import traced
from test_trainer import train_on
from tiny_run import sentence, tiny_config, write_lines, write_pairs

from jaxembed.checkpoint import Checkpoints
from jaxembed.data.loader import StepInfo
from jaxembed.errors import UserError
from jaxembed.hardware import chip_of
from jaxembed.metrics import read_metrics
from jaxembed.observing import clock as clock_module
from jaxembed.observing import fields, rest
from jaxembed.observing.clock import Clock, Phase
from jaxembed.observing.goodput import KEY, STARTED
from jaxembed.observing.memory import peak_bytes
from jaxembed.observing.speed import Meter, peak_flops
from jaxembed.reporting.history import History
from jaxembed.reporting.time_spent import seconds_by_part

STEPS, SAVED_EVERY, LOGGED_EVERY = 12, 4, 3


@pytest.fixture
def now(monkeypatch):
    """A clock that is set by hand: `now.at`, seconds."""
    hand = types.SimpleNamespace(at=100.0)
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: hand.at)
    return hand


def test_every_moment_belongs_to_the_innermost_phase(now):
    clock = Clock()
    now.at += 1
    with clock.during(Phase.HOST):
        now.at += 2
        with clock.during(Phase.EVAL):
            now.at += 4
            with clock.during(Phase.COMPUTE):
                now.at += 8
            now.at += 16
        now.at += 32
        assert clock.phase == Phase.HOST and clock.spent()[Phase.HOST] == 34
    with pytest.raises(KeyError), clock.during(Phase.DATA):
        now.at += 64
        raise KeyError
    now.at += 128
    spent = {phase: seconds for phase, seconds in clock.spent().items() if seconds}
    assert spent == {Phase.OUTSIDE: 129, Phase.HOST: 34, Phase.EVAL: 20, Phase.COMPUTE: 8, Phase.DATA: 64}
    assert clock.since == now.at


class Flops:
    """Stands in for a model's count."""

    def training(self, lengths):
        return 1e12 * float(lengths.sum())


def info(step, tokens):
    return StepInfo(step, 16, tokens, 64, 4, 1 - tokens / 64, np.array([[tokens, 0]]))


def test_a_line_is_of_all_steps_since_the_line_before(now):
    clock = Clock()
    observer = types.SimpleNamespace(clock=clock, goodput=types.SimpleNamespace(value=lambda: 0.5))
    mesh = types.SimpleNamespace(size=4, local_devices=jax.devices()[:1])
    meter = Meter(observer, mesh, Flops(), peak=50e12)
    now.at += 1000  # start-up is no part of a step
    for step, tokens in enumerate((40, 60)):
        for phase, seconds in ((Phase.DATA, 0.25), (Phase.COMPILE, 9.0), (Phase.COMPUTE, 1.5), (Phase.HOST, 0.25)):
            with clock.during(phase):
                now.at += seconds
        meter.add(info(step, tokens))
    rates = meter.rates()
    with clock.during(Phase.CHECKPOINT):
        now.at += 3
    line = meter.lap()
    assert line["memory_peak_bytes"] > 1e7
    del line["memory_peak_bytes"]
    assert line == {
        **{"pairs_per_s": 8.0, "tokens_per_s": 25.0, "padded_tokens_per_s": 32.0},
        **{"tokens_per_s_per_chip": 6.25, "padded_tokens_per_s_per_chip": 8.0, "mfu": 0.5},
        **{"step_s": 2.0, "data_wait_s": 0.25, "compute_s": 1.5, "host_s": 0.25},
        **{"compile_s": 18.0, "checkpoint_s": 3.0, "goodput": 0.5},
    }
    assert rates.items() <= line.items() and line.keys() | {"memory_peak_bytes"} <= fields.READINGS
    with clock.during(Phase.EVAL):
        now.at += 5
    assert meter.lap().keys() == {"eval_s", "memory_peak_bytes", "goodput"}  # of no step
    with clock.during(Phase.COMPUTE):
        now.at += 4
    meter.add(info(2, 10))
    assert meter.lap()["tokens_per_s"] == 2.5


def test_saving_after_a_stage_is_told_by_the_next_line(now, tmp_path):
    """Of the next stage, which has a meter of its own; after the run, by the file of the rest."""
    clock = Clock()
    observer = types.SimpleNamespace(clock=clock, goodput=types.SimpleNamespace(value=lambda: 0.5))
    mesh = types.SimpleNamespace(size=4, local_devices=jax.devices()[:1])
    lines = []
    for stage in range(2):
        meter = Meter(observer, mesh, Flops(), peak=0)
        with clock.during(Phase.COMPUTE):
            now.at += 2
        meter.add(info(stage, 40))
        lines.append(meter.lap())
        with clock.during(Phase.CHECKPOINT):
            now.at += 3 + stage
    assert "checkpoint_s" not in lines[0] and lines[1]["checkpoint_s"] == 3 and lines[1]["step_s"] == 2
    clock.step = 2
    for _ in range(2):  # what is told once is told no more
        rest.write(tmp_path, clock)
    assert rest.read(tmp_path) == {"checkpoint_s": 4} and rest.read(tmp_path, until=1) == {}


def test_the_first_call_of_a_program_is_compiling(now):
    """It is in no part of the step, but in the speed: a line of that step alone has no other."""
    clock = Clock()
    observer = types.SimpleNamespace(clock=clock, goodput=types.SimpleNamespace(value=lambda: 0.5))
    meter = Meter(observer, types.SimpleNamespace(size=4, local_devices=jax.devices()[:1]), Flops(), peak=0)
    for phase, seconds in ((Phase.COMPILE, 9), (Phase.FIRST, 3), (Phase.HOST, 1)):
        with clock.during(phase):
            now.at += seconds
    meter.add(info(0, 40))
    line = meter.lap()
    assert (line["compile_s"], line["compute_s"], line["host_s"]) == (12, 0, 1)
    assert line["tokens_per_s"] == 10 and line["step_s"] == 4


def test_utilisation_needs_the_chips_peak():
    kind = lambda name: np.array([types.SimpleNamespace(device_kind=name)] * 8)  # noqa: E731
    mesh = types.SimpleNamespace(size=8, devices=kind("NVIDIA H200").reshape(2, 4))
    assert peak_flops(mesh, "bfloat16") == 8 * chip_of("NVIDIA H200").flops["bfloat16"] > 7e15
    assert peak_flops(types.SimpleNamespace(size=8, devices=kind("cpu")), "float32") == 0


def test_memory_of_the_fullest_device_or_of_the_process():
    chips = [types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (5, 7, 6)]
    assert peak_bytes(chips) == 7
    before = peak_bytes(jax.local_devices())
    held = np.ones(before // 8 + 10_000_000)  # more than all before
    assert peak_bytes(jax.local_devices()) > before and held.nbytes > before


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    rng = np.random.default_rng(5)
    rows = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": float(i % 6)} for i in range(40)]
    return tiny_config(
        folder,
        steps=STEPS,
        batch_size=16,
        data__train=({"path": str(write_pairs(folder / "pairs.jsonl", 100, 7))},),
        log_every=LOGGED_EVERY,
        checkpoint__every=SAVED_EVERY,
        eval__every=6,
        eval__sts=(str(write_lines(folder / "tiny-dev.jsonl", rows)),),
        export=False,
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run's folder, and the seconds that it took; two of its steps were traced."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    began = time.time()
    train_on(2, config, workdir, profile=range(1, 3))
    return workdir, time.time() - began


def test_a_real_run_says_where_its_time_went(run):
    workdir, took = run
    lines = {line["step"]: line for line in read_metrics(workdir)}
    assert list(lines) == [0, 3, 6, 9, 12]
    assert lines[0]["eval_s"] > 0 and "step_s" not in lines[0]
    of_steps = [line for step, line in lines.items() if step]
    for line in of_steps:
        parts = sum(line[name] for name in ("data_wait_s", "compute_s", "host_s"))
        first = "compile_s" in line  # the first call is in the speed, but in no part
        assert (parts < line["step_s"]) if first else (parts == pytest.approx(line["step_s"], rel=1e-6))
        assert min(line["compute_s"], line["host_s"]) > 0
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["step_s"])  # every batch is alike
        assert line["tokens_per_s_per_chip"] == line["tokens_per_s"] / 2
        assert 0 < line["goodput"] < 1 and "mfu" not in line
    assert [step for step, line in lines.items() if "compile_s" in line] == [3]
    assert [step for step, line in lines.items() if "checkpoint_s" in line] == [6, 9]  # after the last one comes none
    assert rest.read(workdir).keys() == {"checkpoint_s"}
    assert [step for step, line in lines.items() if "eval_s" in line] == [0, 6, 12]
    whole = sum(seconds_by_part(History.read(workdir)).values())
    parts = ("data_wait_s", "compute_s", "host_s")
    productive = LOGGED_EVERY * sum(line[name] for line in of_steps for name in parts)
    assert productive < whole < took
    assert 0.99 * productive / took < lines[12]["goodput"] < 1.01 * productive / whole


def test_steps_to_trace_that_the_run_lacks_are_refused_first(config, tmp_path):
    with pytest.raises(UserError, match="--profile=2:400: the run has 12 steps only"):
        train_on(2, config, tmp_path / "run", profile=range(2, 400))
    assert not {"data.json", "metrics.jsonl", STARTED} & {path.name for path in (tmp_path / "run").iterdir()}


def test_its_steps_are_in_the_trace(run):
    assert traced(run[0] / "profile") == [[2, 3]]


def productive_at(workdir, step):
    checkpoints = Checkpoints(workdir)
    try:
        return checkpoints.meta(step)[KEY]
    finally:
        checkpoints.close()


def test_goodput_goes_on_where_the_checkpoint_was(run, config, tmp_path):
    """The steps after it, lost and done again, count once; the time since the first start counts whole."""
    workdir = tmp_path / "killed"
    shutil.copytree(run[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    kept, lost = productive_at(workdir, 8), productive_at(run[0], 12)
    assert 0 < kept < lost
    began = json.loads((workdir / STARTED).read_text())["unix_s"]
    again_at = time.time()
    train_on(2, config, workdir)
    ended = time.time()
    assert json.loads((workdir / STARTED).read_text())["unix_s"] == began
    line = read_metrics(workdir)[-1]
    done = productive_at(workdir, 12)
    again = line["step_s"] * LOGGED_EVERY  # of steps 10 to 12, a part of those done again
    assert kept + again < done < kept + 20 * again
    assert 0.9 * done / (ended - began) < line["goodput"] < done / (again_at - began)
