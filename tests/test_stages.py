"""Stages: what they may change, and that a run of stages is the same as runs one after the other."""

import json
import pathlib
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file
from test_cli import assert_refused, python
from tiny_run import SHALLOW, tiny_config, train_on, write_pairs, write_records

from jaxembed.checkpoint import find
from jaxembed.errors import UserError
from jaxembed.loop import Loop
from jaxembed.metrics import read_metrics
from jaxembed.observing import fields
from jaxembed.run_folder import DATA
from jaxembed.stages import stages_of

WEAK = {"name": "weak", "steps": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    write_pairs(folder / "pairs.jsonl", 60, 7)
    write_records(folder / "hard.jsonl", 60, 8)
    return folder


@pytest.fixture(scope="module")
def stages(folder):
    hard = {
        "name": "hard",
        "steps": 4,
        "batch_size": 8,
        "grad_cache": 2,
        "data": {"train": ({"path": str(folder / "hard.jsonl"), "licence": "CC0-1.0"},), "negatives": 2},
        "loss": {"temperature": 0.1},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "model": {"dropout": 0.1},
    }
    return (WEAK, hard)


def small(folder, **changes):
    source = {"path": str(folder / "pairs.jsonl")}
    same = {
        "steps": 0,
        "batch_size": 16,
        "log_to": (),
        "model__shape": SHALLOW,
        "checkpoint__every": 3,
        "optimizer__ema": 0.5,
        "data__train": (source,),
    }
    return tiny_config(folder, **same | changes)


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    return load_file(workdir / "export" / "model.safetensors")


def repeatable(workdir: pathlib.Path) -> list[dict]:
    return [fields.repeatable(line) for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def unbroken(folder, stages):
    workdir = folder / "unbroken"
    assert train_on(1, small(folder, stages=stages), workdir)["step"] == 9
    return workdir


def test_lines_go_on_from_stage_to_stage(unbroken):
    lines = read_metrics(unbroken)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["stage"] for line in lines] == ["weak"] * 5 + ["hard"] * 4
    assert [line["pairs"] for line in lines] == [16] * 5 + [8] * 4
    np.testing.assert_allclose([line["temperature"] for line in lines], [0.05] * 5 + [0.1] * 4, rtol=1e-6)
    assert lines[5]["learning_rate"] == 0 and lines[6]["learning_rate"] == pytest.approx(1e-3)  # its own warm-up


def test_what_each_stage_learned_from_is_written_down(unbroken):
    weak, hard = json.loads((unbroken / DATA).read_text())
    assert (weak["stage"], weak["source"], weak["records"], weak["licence"]) == ("weak", "pairs.jsonl", 60, "")
    assert (hard["stage"], hard["source"], hard["records"], hard["licence"]) == ("hard", "hard.jsonl", 60, "CC0-1.0")


def test_stages_are_runs_one_after_the_other(folder, stages, unbroken):
    """Each from what the one before exported: its averaged weights, a fresh optimizer, the next seed."""
    train_on(1, small(folder, steps=5), folder / "first")
    _, hard = stages
    second = small(
        folder,
        **{"model__init": f"run:{folder / 'first'}", "model__arch": "auto", "tokenizer": "auto", "model__shape": {}},
        **{"seed": 1, "steps": 4, "batch_size": 8, "grad_cache": 2, "model__dropout": 0.1, "loss__temperature": 0.1},
        **{"optimizer__learning_rate": 1e-3, "optimizer__warmup_steps": 1},
        data__train=hard["data"]["train"],
    )
    train_on(1, second, folder / "second")
    chained, staged = weights(folder / "second"), weights(unbroken)
    assert chained.keys() == staged.keys()
    for name in chained:
        np.testing.assert_array_equal(chained[name], staged[name], err_msg=name)
    assert any((staged[name] != x).any() for name, x in weights(folder / "first").items())


def test_a_run_goes_on_inside_any_stage(folder, stages, unbroken, monkeypatch):
    """In the middle of either stage between two checkpoints, and where one stage ends."""
    workdir = folder / "killed"
    take_step = Loop._step
    for killed_at in (4, 5, 8):

        def dying_step(self, state, step, batches, killed_at=killed_at):
            if step == killed_at:
                self.run_.checkpoints.wait()  # a process that is really killed does not write on beside the next one
                raise KeyboardInterrupt
            return take_step(self, state, step, batches)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Loop, "_step", dying_step)
            train_on(1, small(folder, stages=stages), workdir)
    train_on(1, small(folder, stages=stages), workdir)
    assert repeatable(workdir) == repeatable(unbroken)
    for name, array in weights(unbroken).items():
        np.testing.assert_array_equal(weights(workdir)[name], array, err_msg=name)


def test_a_finished_run_of_stages_has_nothing_left_to_do(folder, stages, unbroken, capfd):
    before = (unbroken / "metrics.jsonl").read_bytes()
    train_on(1, small(folder, stages=stages), unbroken)
    assert "9 of 9 steps are done: nothing left to train" in capfd.readouterr().err
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_the_last_state_of_a_stage_is_saved_with_its_own_optimizer(folder, unbroken, stages, tmp_path):
    """A checkpoint at a boundary belongs to the stage that ended, also where the optimizers differ."""
    workdir = tmp_path / "boundary"
    kinds = (WEAK, {"name": "plain", "steps": 2, "optimizer": {"name": "sgd", "weight_decay": 0.0}})
    config = small(folder, stages=kinds, checkpoint__every=100, checkpoint__keep=5)
    train_on(1, config, workdir)
    finished = weights(workdir)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["5", "7"]
    with ocp.StandardCheckpointer() as checkpointer:
        assert int(checkpointer.restore(find(f"{workdir}@5") / "rest")["step"]) == 5
        assert int(checkpointer.restore(find(f"{workdir}@7") / "rest")["step"]) == 2
    shutil.rmtree(workdir / "checkpoints" / "7")
    train_on(1, config, workdir)
    for name, array in weights(workdir).items():
        np.testing.assert_array_equal(finished[name], array, err_msg=name)


def test_another_stage_is_another_run(folder, stages, unbroken):
    changed = (WEAK | {"steps": 6}, stages[1])
    with pytest.raises(UserError, match=r"another config \(stages\[0\].steps: 5 → 6\)"):
        train_on(1, small(folder, stages=changed), unbroken)


def test_what_a_stage_sees(folder, stages):
    config = small(folder, stages=stages, epochs=2.0)
    weak, hard = (stage.config for stage in stages_of(config))
    assert (weak.steps, weak.epochs, weak.seed) == (5, 0.0, config.seed)
    assert (hard.steps, hard.epochs, hard.seed) == (4, 0.0, config.seed + 1)
    assert hard.data.max_length == config.data.max_length and hard.data.positives == config.data.positives
    assert weak.stages == hard.stages == ()
    assert stages_of(small(folder, epochs=1.0))[0].name == ""


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"mesh": {"data": 1}}, r"config.stages\[1\].mesh: no field that a stage can change"),
        ({"los": {}}, r"config.stages\[1\].los: .* did you mean 'loss'\?"),
        ({"model": {"init": "x"}}, r"config.stages\[1\].model.init: no field that a stage can change"),
        ({"model": 3}, r"config.stages\[1\].model: no field that a stage can change"),
        ({"loss": {"temprature": 1.0}}, r"config.stages\[1\]: config.loss.temprature: no such field, did you mean"),
        ({"batch_size": "8"}, r"config.stages\[1\]: config.batch_size: wants int, got '8'"),
        ({"steps": 0}, r"config.stages\[1\] \(stage 2\): config.steps = 0 and config.epochs = 0"),
        ({"steps": 3, "loss": {"temperature": -1.0}}, r"config.stages\[1\] \(stage 2\): config.loss.temperature = -1"),
        ({"name": "weak", "steps": 3}, r"config.stages\[1\].name = 'weak': wants a name that no other stage has"),
        ({"name": 3, "steps": 3}, r"config.stages\[1\].name = 3: wants a name"),
    ],
)
def test_stages_that_cannot_be(folder, stage, message):
    with pytest.raises(UserError, match=message):
        small(folder, stages=(WEAK, stage))


@pytest.fixture
def config_file(folder, tmp_path):
    """Two stages, the second with a file that is not there."""
    file = tmp_path / "config.py"
    file.write_text(
        "from jaxembed.config import default_config\n\n\ndef get_config(arg=None):\n"
        "    c = default_config()\n    c.model.arch, c.tokenizer = 'bert', 'file:tokenizer.json'\n"
        f"    good, bad = {{'path': {str(folder / 'pairs.jsonl')!r}}}, {{'path': 'nowhere.jsonl'}}\n"
        "    c.stages = ({'steps': 2, 'data': {'train': (good,)}}, {'steps': 2, 'data': {'train': (bad,)}})\n"
        "    return c\n"
    )
    return file


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "config.stages[1].data.train[0].path: no such file or folder: nowhere.jsonl"),
        (["--config.stages[1].data.train[0].path=other.jsonl"], "no such file or folder: other.jsonl"),
        (["--config.stages[1].steps=many"], "invalid literal for int() with base 10: 'many'"),
        (
            ["--config.stages[1].loss.temperature=1.0"],
            "no such field: loss; of a stage or source, flags set what the config file sets",
        ),
        (["--data=pairs.jsonl"], "--data: config.stages[0] has data of its own"),
    ],
)
def test_what_is_wrong_with_a_stage_shows_at_once(config_file, tmp_path, more, message):
    result = python("-m", "jaxembed.train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *more)
    assert_refused(result, message)
    assert not (tmp_path / "run").exists()
