"""Several processes of one run, for real: the same losses, each other's checkpoints, and an end in bounded time."""

import dataclasses
import json
import pathlib
import shutil
import time

import numpy as np
import pytest
from pod import finish, start
from safetensors.numpy import load_file
from survivors import plain_pairs, write_config
from tiny_run import SHALLOW, sentence, tiny_config, train_on, write_lines

from jaxembed import config as config_lib
from jaxembed.config import MeshConfig
from jaxembed.metrics import read_metrics

STEPS, HALFWAY = 12, 6
SCORE, EXPORTED = "eval/sts/tiny-dev", pathlib.Path("export", "model.safetensors")
RUNS = str(pathlib.Path(__file__).with_name("pod_runs.py"))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Processes, devices of each, and the mesh over all of them."""

    processes: int
    devices: int
    mesh: MeshConfig


LAYOUTS = {
    "1x1": Layout(1, 1, MeshConfig()),
    "1x4": Layout(1, 4, MeshConfig(data=2, fsdp=2)),
    "2x2": Layout(2, 2, MeshConfig(data=1, fsdp=4)),  # every weight lies on both processes
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pod")


@pytest.fixture(scope="module")
def config(folder):
    rng = np.random.default_rng(5)
    rows = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": float(i % 6)} for i in range(40)]
    return tiny_config(
        folder,
        steps=STEPS,
        batch_size=16,
        log_every=1,
        data__train=plain_pairs(folder),
        model__shape=SHALLOW,
        model__projection=24,
        model__dropout=0.1,
        optimizer__warmup_steps=5,
        optimizer__clip_norm=1.0,
        checkpoint__every=HALFWAY,
        eval__every=HALFWAY,
        eval__sts=(str(write_lines(folder / "tiny-dev.jsonl", rows)),),
    )


def launch(folder, layout: str, runs: list[tuple[config_lib.Config, pathlib.Path]]) -> None:
    """Trains each of these in turn, on a layout; one process is this one."""
    chosen = LAYOUTS[layout]
    runs = [(dataclasses.replace(config, mesh=chosen.mesh), workdir) for config, workdir in runs]
    if chosen.processes == 1:
        for config, workdir in runs:
            train_on(chosen.devices, config, workdir)
        return
    said = [{"config": config_lib.to_json(config), "workdir": str(workdir)} for config, workdir in runs]
    file = folder / f"runs-{layout}.json"
    file.write_text(json.dumps(said))
    commands = [(RUNS, str(file))] * chosen.processes
    for ended in finish(start(chosen.processes, chosen.devices, commands)):
        assert ended.code == 0, ended.err


@pytest.fixture(scope="module")
def trained(folder, config):
    """The same run on every layout, name → work directory; the processes also go on with what one began."""
    launch(folder, "1x1", [(config, folder / "1x1")])
    launch(folder, "1x4", [(config, folder / "1x4")])
    launch(folder, "2x2", [(config, folder / "2x2"), (config, halfway(folder, "1x4", "2x2"))])
    return {layout: folder / layout for layout in LAYOUTS}


def halfway(folder, layout: str, other: str) -> pathlib.Path:
    """A copy of the run on a layout as it was in the middle, for another layout to go on with."""
    copy = folder / f"{layout}-on-{other}"
    shutil.copytree(folder / layout, copy, ignore=shutil.ignore_patterns("export", str(STEPS)))
    return copy


def assert_same_losses(workdir, other, relative: float = 1e-5) -> None:
    lines, others = ([line for line in read_metrics(run) if line["step"]] for run in (workdir, other))
    assert [line["step"] for line in lines] == [line["step"] for line in others] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([x[name] for x in lines], [x[name] for x in others], rtol=relative)
    for name in ("pairs", "tokens", "learning_rate"):
        assert [line[name] for line in lines] == [line[name] for line in others]


def test_any_number_of_processes_gives_the_same_losses(trained):
    for layout in ("1x4", "2x2"):
        assert_same_losses(trained[layout], trained["1x1"])


def test_evaluation_and_export_across_processes(trained):
    def scores(workdir) -> list[float]:
        return [line[SCORE] for line in read_metrics(workdir) if SCORE in line]

    wanted, expected = load_file(trained["1x1"] / EXPORTED), scores(trained["1x1"])
    assert len(expected) == 3  # before the first step, halfway, at the end
    for layout in ("1x4", "2x2"):
        assert scores(trained[layout]) == pytest.approx(expected, abs=1e-3)
        tensors = load_file(trained[layout] / EXPORTED)
        assert tensors.keys() == wanted.keys()
        for name, tensor in wanted.items():
            if name.endswith("key.bias"):  # moves no score, so its gradient is rounding, which Adam makes large
                continue
            np.testing.assert_allclose(tensors[name], tensor, atol=2e-5, err_msg=f"{layout}: {name}")
        dense = pathlib.Path("export", "2_Dense", "model.safetensors")
        for name, tensor in load_file(trained["1x1"] / dense).items():
            np.testing.assert_allclose(load_file(trained[layout] / dense)[name], tensor, atol=2e-5, err_msg=name)


def test_the_commands_evaluate_and_export_across_processes(folder, config, trained):
    workdir, out = trained["1x1"], folder / "exported"
    evaluated = ["-m", "jaxembed.evaluate", f"--model={workdir}", f"--sts={config.eval.sts[0]}"]
    exported = ["-m", "jaxembed.export", f"--workdir={workdir}", f"--out={out}"]
    for command in (evaluated, exported):
        first, second = finish(start(2, 1, [command, command]))
        assert first.code == second.code == 0, first.err + second.err
        assert not second.out
        if command is evaluated:
            last = [line[SCORE] for line in read_metrics(workdir) if SCORE in line][-1]
            assert json.loads(first.out.splitlines()[-1])[SCORE] == pytest.approx(last, abs=1e-3)
    assert (out / "model.safetensors").read_bytes() == (workdir / EXPORTED).read_bytes()


def test_a_checkpoint_resumes_on_every_layout(folder, config, trained):
    """Taken halfway on each, continued on another: the same batches, the losses of the unbroken run."""
    for layout, other in (("1x1", "1x4"), ("2x2", "1x1")):
        launch(folder, other, [(config, halfway(folder, layout, other))])
    for layout, other in (("1x1", "1x4"), ("2x2", "1x1"), ("1x4", "2x2")):
        assert_same_losses(folder / f"{layout}-on-{other}", trained[layout])


@pytest.fixture(scope="module")
def command(folder, config):
    """Arguments of python for a run that would go on for long."""
    long = dataclasses.replace(config, steps=10**6)
    return ["-m", "jaxembed.train", f"--config={write_config(folder, long, 'long')}"]


def test_a_missing_process_ends_the_others(folder, command):
    begun = time.monotonic()
    for process in (0, 1):
        commands = [[*command, f"--workdir={folder / 'missing'}"]] * (process + 1)
        started = start(2, 1, commands, timeout=8)
        if process == 1:  # that one stays, and waits for a coordinator that is no more
            started.pop(0).kill()
        (ended,) = finish(started)
        assert ended.code == 3 and f"process {process} of 2 has waited 8 s" in ended.err, ended.err
    assert time.monotonic() - begun < 60


def test_processes_that_are_not_about_to_run_the_same(folder, command):
    common = [*command, f"--workdir={folder / 'different'}"]
    first, second = finish(start(2, 1, [common, [*common, "--config.seed=5"]]))
    for ended in (first, second):
        assert ended.code == 2
        assert "error: process 1 of 2: another config than process 0 has (config.seed: 0 → 5)" in ended.err
    assert not (folder / "different").exists()


def test_more_processes_than_were_said(folder, command):
    common = [*command, f"--workdir={folder / 'different'}"]
    (ended,) = finish(start(2, 1, [common], first=2))
    assert ended.code == 2 and "of 2 processes (JAXEMBED_PROCESSES) the last is 1" in ended.err


def test_a_killed_process_ends_the_others(folder, command):
    workdir = folder / "lost"
    started = start(2, 1, [[*command, f"--workdir={workdir}"]] * 2, timeout=9)
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert started[0].poll() is None, finish(started)
        time.sleep(0.05)
    started[1].kill()
    begun = time.monotonic()
    first, second = finish(started)
    assert time.monotonic() - begun < 30
    assert second.code == -9 and first.code == 3, first.err
    assert "process 1 of 2: nothing was heard of it" in first.err or "another process was lost" in first.err


@pytest.mark.parametrize(("kind", "codes"), [("mistake", (2, 2)), ("kill", (3, -9))])
def test_a_process_that_waits_in_a_collective_hears_what_happened(kind, codes):
    errors = str(pathlib.Path(__file__).with_name("pod_errors.py"))
    ended = finish(start(2, 1, [(errors, kind)] * 2, timeout=20))
    assert tuple(process.code for process in ended) == codes, ended
    if kind == "mistake":
        assert all("error: process 1 of 2: my mistake" in process.err for process in ended)
    else:
        assert "most likely because another process was lost" in ended[0].err
