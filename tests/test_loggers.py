"""TensorBoard and wandb: every step once, also after a restart."""

import json
import struct
import sys
import types

import pytest
from tiny_run import tiny_config

from jaxembed import loggers
from jaxembed.errors import UserError
from jaxembed.loggers import open_loggers, require_packages, scalars
from jaxembed.metrics import MetricsWriter

LINE = {
    "step": 3,
    "stage": "weak",
    "loss": 0.5,
    "pairs_per_s": 7.0,
    "tokens": 9,
    "eval/sts/dev": 80.0,
    "grad_norm": None,
    "router/balance": 1.5,
    "router/load": [[1.5, 0.5]],
}


def write(workdir, config, steps, resumed_at=None):
    """Writes a line per step, with the step as its loss, as a run would."""
    with MetricsWriter(workdir, resumed_at, True, open_loggers(config, workdir, resumed_at)) as writer:
        for step in steps:
            writer.write({**LINE, "step": step, "loss": float(step)})


def test_numbers_are_grouped_and_words_and_lists_left_out():
    want = {"train/loss": 0.5, "speed/pairs_per_s": 7.0, "data/tokens": 9, "eval/sts/dev": 80.0, "router/balance": 1.5}
    assert scalars(LINE) == want


def events(folder):
    """The events in TensorBoard's files, oldest file first: records of length, its checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]


def shown(folder):
    """What TensorBoard shows: tag → (step, value) …; a file's start makes it forget all from that step on."""
    points = {}
    for event in events(folder):
        if event.HasField("session_log"):
            points = {tag: [p for p in kept if p[0] < event.step] for tag, kept in points.items()}
        for value in event.summary.value:
            points.setdefault(value.tag, []).append((event.step, value.simple_value))
    return points


def test_tensorboard_shows_each_step_once_also_after_a_restart(tmp_path):
    config = tiny_config(tmp_path)
    assert config.log_to == ("tensorboard",)
    write(tmp_path, config, range(8))
    assert shown(tmp_path / "tensorboard")["train/loss"] == [(step, step) for step in range(8)]
    write(tmp_path, config, range(5, 10), resumed_at=4)
    points = shown(tmp_path / "tensorboard")
    assert points["train/loss"] == [(step, step) for step in range(10)]
    assert points.keys() == scalars(LINE).keys()
    write(tmp_path, config, range(3))  # killed before its first checkpoint: anew
    assert shown(tmp_path / "tensorboard")["train/loss"] == [(step, step) for step in range(3)]


def test_events_are_written_at_once(tmp_path):
    (logger,) = open_loggers(tiny_config(tmp_path), tmp_path, None)
    logger.write(LINE)
    assert shown(tmp_path / "tensorboard")["train/loss"] == [(3, 0.5)]
    logger.close()


def test_only_the_main_process_logs(tmp_path):
    assert open_loggers(tiny_config(tmp_path), tmp_path, None, active=False) == ()
    assert not (tmp_path / "tensorboard").exists()


class Server:
    """Stands in for wandb and what it keeps: (run id, step) → values."""

    def __init__(self):
        self.asked, self.log, self.open = [], {}, None

    def init(self, **asked):
        self.asked.append(asked)
        run = asked["id"] or f"run{len(self.asked)}"
        done = [step for name, step in self.log if name == run]
        self.open = types.SimpleNamespace(
            id=run, starting_step=max(done, default=-1) + 1, log=self._log, finish=lambda: setattr(self, "open", None)
        )
        return self.open

    def _log(self, values, step):
        assert (self.open.id, step) not in self.log, "steps may not go back"
        self.log[self.open.id, step] = values


@pytest.fixture
def server(monkeypatch):
    server = Server()
    module = types.ModuleType("wandb")
    module.init = server.init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return server


def test_wandb_goes_on_in_the_same_run(tmp_path, server):
    config = tiny_config(tmp_path, log_to=("wandb",))
    workdir = tmp_path / "first"
    workdir.mkdir()
    write(workdir, config, range(8))
    write(workdir, config, range(5, 10), resumed_at=4)
    assert [(step, values["train/loss"]) for (_, step), values in server.log.items()] == [(s, s) for s in range(10)]
    assert {run for run, _ in server.log} == {"run1"} and server.open is None
    first, second = server.asked
    assert first["id"] is None and second["id"] == "run1" and second["resume"] == "allow"
    assert first["name"] == "first" and first["config"]["loss"]["name"] == "infonce"
    assert json.loads((workdir / loggers.WANDB).read_text()) == {"id": "run1"}
    write(workdir, config, range(2))  # anew
    assert server.asked[-1]["id"] is None and ("run3", 1) in server.log


def test_wandb_that_does_not_start_is_one_line(tmp_path, server, monkeypatch):
    def fail(**_):
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(UserError, match=r"config\.log_to: wandb does not start: no API key"):
        open_loggers(tiny_config(tmp_path, log_to=("wandb",)), tmp_path, None)


def test_a_missing_package_is_said_before_anything_else(monkeypatch):
    require_packages(("tensorboard",))
    monkeypatch.setitem(loggers.PACKAGES, "wandb", "no_such_package_as_this")
    with pytest.raises(UserError, match=r"'wandb' needs a package .* pip install no_such_package_as_this"):
        require_packages(("tensorboard", "wandb"))
