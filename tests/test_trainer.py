"""The loop: a run that is killed, told to stop, or moved to other devices goes on as if nothing had happened."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file
from tiny_run import SHALLOW, sentence, tiny_config, train_on, write_lines, write_pairs

from jaxembed import config as config_lib
from jaxembed.checkpoint import find
from jaxembed.errors import TrainingStopped, UserError
from jaxembed.metrics import read_metrics
from jaxembed.observing import fields
from jaxembed.trainer import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, SAVED_EVERY = 24, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def sts(folder):
    rng = np.random.default_rng(5)
    rows = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": float(i % 6)} for i in range(40)]
    return str(write_lines(folder / "tiny-dev.jsonl", rows))


def small(folder, **changes):
    """A short run over plain pairs."""
    source = {"path": str(write_pairs(folder / "pairs.jsonl", 100, 7))}
    defaults = {"steps": 8, "batch_size": 16, "checkpoint__every": 4, "export": False, "data__train": (source,)}
    return tiny_config(folder, **{"model__shape": SHALLOW} | defaults | changes)


def repeatable(workdir) -> list[dict]:
    """The lines of metrics without their clock readings."""
    return [fields.repeatable(line) for line in read_metrics(workdir)]


def saved(workdir, step: int | None = None) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint: weights, average, optimizer, step."""
    found = find(str(workdir) if step is None else f"{workdir}@{step}")
    parts = [part for part in ("model", "average", "rest") if (found / part).exists()]
    with ocp.StandardCheckpointer() as checkpointer:
        trees = {part: checkpointer.restore(found / part) for part in parts}
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys() and len(a) > 20
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


class Command:
    """`python -m jaxembed.train` in a process of its own, on two virtual devices."""

    def __init__(self, config: config_lib.Config, workdir: pathlib.Path, largest_file: int = 0) -> None:
        """`largest_file` is in bytes: beyond it writing fails, as on a full disk."""
        self.workdir = workdir
        values = workdir.with_suffix(".json")
        values.write_text(json.dumps(config_lib.to_json(config)))
        file = workdir.with_suffix(".py")
        file.write_text(
            "import json\nimport ml_collections\n\n\ndef get_config(arg=None):\n"
            f"    return ml_collections.ConfigDict(json.load(open({str(values)!r})))\n"
        )
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_COMPILATION_CACHE_DIR": "" if largest_file else str(ROOT / ".cache" / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        watched = ["prlimit", f"--fsize={largest_file}", sys.executable] if largest_file else [sys.executable]
        shown = [] if largest_file else ["-X", "importtime"]
        command = [*watched, *shown, "-m", "jaxembed.train", f"--config={file}", f"--workdir={workdir}"]
        self.logs = [workdir.with_suffix(suffix) for suffix in (".out", ".err")]  # files never fill up, as pipes do
        with self.logs[0].open("w") as out, self.logs[1].open("w") as errors:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=errors)

    def wait_for(self, name: str, content: str = "") -> None:
        """Returns when a file of the run holds that, or the process has ended."""
        file = self.workdir / name
        while self.process.poll() is None and not (file.exists() and content in file.read_text()):
            time.sleep(0.001)

    def wait_for_step(self, step: int) -> None:
        self.wait_for("metrics.jsonl", f'{{"step": {step},')

    def end(self, with_signal: int | None = None) -> tuple[int, str, str]:
        """Sends the signal, if any, and waits; returns exit code, output and errors."""
        if with_signal is not None and self.process.poll() is None:
            self.process.send_signal(with_signal)
        code = self.process.wait(timeout=300)
        return code, *(log.read_text() for log in self.logs)


@pytest.fixture(scope="module")
def long_config(folder):
    """On hard data, so that batches of several shapes come along."""
    return tiny_config(
        folder,
        steps=STEPS,
        batch_size=16,
        data__row_length="40",
        checkpoint__every=SAVED_EVERY,
        model__shape=SHALLOW,
        model__dropout=0.1,
        loss__learn_temperature=True,
        optimizer__ema=0.9,
        grad_cache=2,
    )


@pytest.fixture(scope="module")
def unbroken(folder, long_config):
    workdir = folder / "unbroken"
    code, out, errors = Command(long_config, workdir).end()
    assert code == 0, errors
    assert json.loads(out.splitlines()[-1])["step"] == STEPS
    return workdir


def test_training_imports_neither_torch_nor_tensorflow(unbroken):
    """Nor what imports them, in a whole run to its exported folder."""
    lines = unbroken.with_suffix(".err").read_text().splitlines()
    names = [line.split("|")[-1].strip() for line in lines if line.startswith("import time:")]
    imported = {name.split(".")[0] for name in names if "." in name}  # one turned away is named too, but not its parts
    assert {"jax", "orbax", "jaxembed"} <= imported
    assert not {"torch", "tensorflow", "transformers", "sentence_transformers", "datasets", "pandas"} & imported


def assert_same_run(workdir, unbroken) -> None:
    lines = repeatable(workdir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines == repeatable(unbroken)
    assert_same_bits(saved(workdir), saved(unbroken))
    exported = "export/model.safetensors"
    assert (workdir / exported).read_bytes() == (unbroken / exported).read_bytes()


def test_killed_at_random_moments(folder, long_config, unbroken):
    """SIGKILL once while starting, then soon after the line of a random step."""
    rng = random.Random(3)
    workdir = folder / "killed"
    command = Command(long_config, workdir)
    command.wait_for("config.json")
    time.sleep(rng.uniform(0, 1))
    assert command.end(signal.SIGKILL)[0] == -signal.SIGKILL
    command = Command(long_config, workdir)
    command.wait_for_step(rng.randrange(2, STEPS - 2))
    time.sleep(rng.uniform(0, 0.02))
    assert command.end(signal.SIGKILL)[0] == -signal.SIGKILL
    code, _, errors = Command(long_config, workdir).end()
    assert code == 0, errors
    assert_same_run(workdir, unbroken)
    assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())  # nothing half saved is left


def test_told_to_stop_it_saves_leaves_with_0_and_goes_on_later(folder, long_config, unbroken):
    workdir = folder / "stopped"
    config = dataclasses.replace(long_config, checkpoint=dataclasses.replace(long_config.checkpoint, every=1000))
    command = Command(config, workdir)
    command.wait_for_step(7)
    code, _, errors = command.end(signal.SIGTERM)
    assert code == 0, errors
    done = int(find(str(workdir)).name)
    assert 7 <= done < STEPS and repeatable(workdir)[-1]["step"] == done
    assert not (workdir / "export").exists()
    code, _, errors = Command(config, workdir).end()
    assert code == 0, errors
    assert f"{done} of {STEPS} steps are done: going on" in errors
    assert_same_run(workdir, unbroken)


def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint_intact(folder):
    workdir = folder / "full"
    config = small(folder, steps=4, log_to=())
    train_on(2, config, workdir)
    before = saved(workdir, 4)
    longer = dataclasses.replace(config, steps=12)
    code, _, errors = Command(longer, workdir, largest_file=20_000).end()
    *_, line = errors.splitlines()
    assert code == 2 and "Traceback" not in errors
    assert line.startswith(f"error: {workdir}: cannot be written: File too large. The newest complete checkpoint is")
    assert find(str(workdir)).name == "4"
    assert_same_bits(saved(workdir, 4), before)
    train_on(2, longer, workdir)
    assert [line["step"] for line in read_metrics(workdir)] == list(range(1, 13))


@pytest.fixture(scope="module")
def finished(folder):
    """A run on 8 devices, with the checkpoints of steps 4 and 8."""
    workdir = folder / "finished"
    train_on(8, small(folder), workdir)
    return workdir


@pytest.mark.parametrize("devices", [4, 1])
def test_resumed_on_fewer_devices(folder, finished, devices):
    workdir = folder / f"on{devices}"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")
    train_on(devices, small(folder, mesh__fsdp=min(2, devices)), workdir)
    before, after = read_metrics(finished), read_metrics(workdir)
    assert [line["step"] for line in after] == list(range(1, 9))
    for name in ("loss", "grad_norm", "learning_rate", "accuracy"):
        np.testing.assert_allclose([x[name] for x in after], [x[name] for x in before], rtol=1e-5)
    assert [line["tokens"] for line in after] == [line["tokens"] for line in before]


def test_a_finished_run_started_again_trains_nothing_and_says_so(folder, finished, capfd):
    before = (finished / "metrics.jsonl").read_bytes(), saved(finished)
    line = train_on(8, small(folder), finished)
    assert "8 of 8 steps are done: nothing left to train" in capfd.readouterr().err
    assert line["step"] == 8
    assert (finished / "metrics.jsonl").read_bytes() == before[0]
    assert_same_bits(saved(finished), before[1])


def test_a_run_can_be_lengthened_but_not_shortened(folder, finished, tmp_path):
    workdir = tmp_path / "longer"
    shutil.copytree(finished, workdir)
    with pytest.raises(UserError, match="has done 8 steps, more than the 6 asked for"):
        train_on(1, small(folder, steps=6), workdir)
    train_on(1, small(folder, steps=10), workdir)
    assert [line["step"] for line in read_metrics(workdir)] == list(range(1, 11))


def test_a_folder_of_another_config_is_left_alone(folder, finished):
    with pytest.raises(UserError, match=r"another config \(seed: 0 → 1; optimizer.learning_rate: 0.0003 → 0.1\)"):
        train_on(1, small(folder, seed=1, optimizer__learning_rate=0.1), finished)
    assert json.loads((finished / "config.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 14}, "config.batch_size = 14 is not a multiple of 8 shards of the mesh"),
        ({"mesh__data": 3}, "config.mesh: data 3, .* do not multiply to the 8 devices"),
        ({"model__init": "hf:nowhere"}, "nowhere"),
        ({"model__init": "run:nowhere"}, "run:nowhere: nowhere holds no complete checkpoint"),
        ({"model__arch": "bort"}, "'bort' is not known, did you mean 'bert'?"),
        ({"model__shape": {"hidden_size": 32}}, "config.model.shape: num_hidden_layers is missing"),
        ({"tokenizer": "file:nowhere.json"}, "there is no file nowhere.json"),
        ({"data__max_length__query": 41}, "config.data.max_length.query = 41: this bert takes at most 40"),
        ({"data__row_length": "8"}, "config.data.row_length = 8 does not hold the longest text, 10 tokens"),
        ({"optimizer__name": "adamm"}, "'adamm' is no optimizer of optax"),
        ({"optimizer__by_regex": (("nothing", 0.0),)}, "'nothing' matches no parameter"),
    ],
)
def test_set_ups_that_only_the_files_and_devices_show_to_be_wrong(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(small(folder, **changes), tmp_path / "run")


def test_epochs_are_passes_over_the_data(folder):
    config = small(folder, steps=0, epochs=1.25)
    assert train_on(1, config, folder / "epochs")["step"] == 8  # 125 pairs in batches of 16
    assert [line["pairs"] for line in read_metrics(folder / "epochs")] == [16] * 8


def test_lines_are_logged_as_often_as_asked_and_at_the_end(folder):
    train_on(1, small(folder, log_every=3), folder / "seldom")
    assert [line["step"] for line in read_metrics(folder / "seldom")] == [3, 6, 8]


@pytest.fixture(scope="module")
def scored(folder, sts):
    """A run with evaluations at 0, 3, 6, 8, keeping the newest checkpoint and the best."""
    workdir = folder / "scored"
    config = small(
        folder,
        checkpoint__every=100,
        checkpoint__keep=1,
        checkpoint__best="eval/sts/tiny-dev",
        eval__every=3,
        eval__sts=(sts,),
        optimizer__ema=0.5,
        optimizer__learning_rate=3e-3,
        export=True,
    )
    train_on(1, config, workdir)
    return workdir


def test_scores_are_in_the_lines_and_the_best_checkpoint_is_kept(scored):
    lines = {line["step"]: line for line in read_metrics(scored)}
    name = "eval/sts/tiny-dev"
    assert [step for step, line in lines.items() if name in line] == [0, 3, 6, 8]
    assert "loss" not in lines[0] and "loss" in lines[3]
    best = max((3, 6, 8), key=lambda step: lines[step][name])
    kept = sorted(int(p.name) for p in (scored / "checkpoints").iterdir())
    assert kept == sorted({best, 8})
    assert int(find(f"{scored}@best").name) == best


def test_a_metric_that_no_evaluation_gives_is_refused(folder, sts):
    for name in ("eval/sts/other", "eval/sts/tiny-dev/nonsense"):
        config = small(folder, checkpoint__best=name, eval__every=3, eval__sts=(sts,))
        with pytest.raises(UserError, match=f"config.checkpoint.best = '{name}'.*eval/sts/tiny-dev"):
            train_on(1, config, folder / "wrong-metric")


@pytest.mark.parametrize("which", ["", "@8", "@best"])
def test_a_run_starts_from_another_runs_averaged_weights(folder, scored, which, tmp_path):
    changes = {"model__init": f"run:{scored}{which}", "model__arch": "auto", "tokenizer": "auto", "model__shape": {}}
    train_on(1, small(folder, **changes, steps=1, optimizer__learning_rate=0.0), tmp_path / "next")
    now = {k: v for k, v in saved(tmp_path / "next").items() if k.startswith("['model']")}
    then = saved(scored, int(find(f"{scored}{which}").name))
    assert_same_bits(now, {k.replace("average", "model"): v for k, v in then.items() if k.startswith("['average']")})


@pytest.mark.parametrize(
    ("which", "message"),
    [("@4", "no checkpoint of step 4; there are"), ("/nowhere", "holds no complete checkpoint")],
)
def test_a_run_that_is_not_there(folder, scored, which, message):
    config = small(folder, model__init=f"run:{scored}{which}", model__arch="auto", tokenizer="auto", model__shape={})
    with pytest.raises(UserError, match=message):
        train_on(1, config, folder / "from-nowhere")


def test_best_of_a_run_that_kept_none(folder, finished):
    config = small(folder, model__init=f"run:{finished}@best", model__arch="auto", tokenizer="auto", model__shape={})
    with pytest.raises(UserError, match="kept no best checkpoint"):
        train_on(1, config, folder / "from-nowhere")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_records(folder):
    workdir = folder / "diverged"
    changes = {"checkpoint__every": 1, "optimizer__learning_rate": 1e30, "optimizer__warmup_steps": 2}
    message = r"step 3: loss nan.*not finite. Its records: .*pairs\.jsonl:\d+.*The newest checkpoint \(step 2\)"
    with pytest.raises(TrainingStopped, match=message):
        train_on(1, small(folder, **changes), workdir)
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2]


def test_the_average_is_exported(scored):
    exported = load_file(scored / "export" / "model.safetensors")["embeddings.LayerNorm.weight"]
    weights = saved(scored)
    path = "['backbone']['embeddings']['norm']['scale']"
    np.testing.assert_array_equal(exported, weights["['average']" + path])
    assert (exported != weights["['model']" + path]).any()
