"""metrics.jsonl: whole lines, in order, each step once."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed.metrics import MetricsWriter, read_metrics


def write(workdir, steps, resumed_at=None):
    writer = MetricsWriter(workdir, resumed_at)
    for step in steps:
        writer.write({"step": step, "loss": 1 / step})
    writer.close()


def steps_of(workdir):
    return [line["step"] for line in read_metrics(workdir)]


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    for step in (1, 2):
        writer.write({"step": step, "loss": 0.1 + step})
        assert read_metrics(tmp_path)[-1] == {"step": step, "loss": 0.1 + step}
    writer.sync()
    writer.close()


def test_arrays_become_numbers_and_what_is_not_finite_null(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.write({"step": np.int32(1), "loss": jnp.float32(0.5), "a": float("nan"), "b": np.float32("inf"), "c": "x"})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": 0.5,
        "a": None,
        "b": None,
        "c": "x",
    }


def test_arrays_become_lists_of_few_digits(tmp_path):
    load = np.array([[1.23456, 0.76544], [2, 0]], np.float32)
    with MetricsWriter(tmp_path, None) as writer:
        writer.write({"step": 1, "router/load": load, "a": jnp.array([np.inf, 0.1])})
    want = {"step": 1, "router/load": [[1.235, 0.765], [2.0, 0.0]], "a": [None, 0.1]}
    assert read_metrics(tmp_path) == [want]


def test_a_resumed_run_cuts_off_what_came_after_its_checkpoint(tmp_path):
    write(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write(tmp_path, range(5, 9), resumed_at=4)
    assert steps_of(tmp_path) == list(range(1, 9))
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:7] == before


def test_a_fresh_run_starts_anew(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, [1])
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "{", '{"step": 3'])
def test_a_line_that_a_killed_run_left_half_written_is_dropped(tmp_path, rest):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(rest)
    assert steps_of(tmp_path) == [1, 2]
    write(tmp_path, [3], resumed_at=2)
    assert steps_of(tmp_path) == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_text().endswith("\n")


def test_only_the_main_process_writes(tmp_path):
    writer = MetricsWriter(tmp_path, None, active=False)
    writer.write({"step": 1})
    writer.sync()
    writer.close()
    assert not list(tmp_path.iterdir()) and read_metrics(tmp_path) == []


class Recorder:
    """A logger that keeps what it is told."""

    def __init__(self):
        self.told = []

    def write(self, line):
        self.told.append(line)

    def close(self):
        self.told.append("close")


def test_loggers_get_the_same_plain_lines_and_are_closed(tmp_path):
    recorder = Recorder()
    with MetricsWriter(tmp_path, None, True, (recorder,)) as writer:
        writer.write({"step": 1, "loss": jnp.float32(0.5), "bad": float("nan")})
    assert recorder.told == [{"step": 1, "loss": 0.5, "bad": None}, "close"]
    assert read_metrics(tmp_path) == recorder.told[:1]
