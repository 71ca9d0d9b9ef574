"""The commands: `--help`, and every kind of mistake as one line and exit code 2."""

import os
import pathlib
import subprocess
import sys

import pytest
from tiny_run import SHAPE, write_pairs, write_tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = "--config=configs/finetune_pairs.py:tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_pairs(folder / "pairs.jsonl", 40, 1)
    write_tokenizer(folder / "tokenizer.json")
    (folder / "broken.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": 3}\n')
    (folder / "syntax.py").write_text("def get_config(:\n")
    (folder / "empty.py").write_text("")
    (folder / "raises.py").write_text("def get_config():\n    raise RuntimeError('no luck')\n")
    (folder / "number.py").write_text("def get_config():\n    return 3\n")
    (folder / "imports.py").write_text("import no_such_module\n")
    (folder / "file").write_text("")
    (folder / "run").mkdir()
    return folder


def python(*arguments: str, devices: int = 1) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def assert_refused(result: subprocess.CompletedProcess, message: str) -> None:
    assert result.returncode == 2, result.stderr
    *progress, line = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert all(line.startswith("Tokenising ") for line in progress)
    assert not result.stdout


@pytest.mark.parametrize("command", ["train", "export", "evaluate", "report"])
def test_help(command):
    result = python("-m", f"jaxembed.{command}", "--help")
    assert result.returncode == 0 and not result.stderr
    assert f"python -m jaxembed.{command}" in result.stdout


TRAIN = [CONFIG, "--workdir={run}", "--data={pairs}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        ([CONFIG, "--data={pairs}"], "--workdir is missing"),
        ([*TRAIN, "--wrokdir=x"], "wrokdir"),
        ([*TRAIN, "stray"], "unexpected argument 'stray'"),
        ([*TRAIN, "--config.bach_size=8"], "bach_size"),
        ([*TRAIN, "--config.model.poling=mean"], "poling"),
        ([*TRAIN, "--config.batch_size=many"], "many"),
        ([*TRAIN, "--config.batch_size=1.5"], "1.5"),
        ([*TRAIN, "--config.export=perhaps"], "perhaps"),
        ([*TRAIN, "--config.data.train[7].path=x"], "index out of range"),
        ([*TRAIN, "--config.data.train[x].path=x"], "--config"),
        ([*TRAIN, "--config.model.pooling=maen"], "config.model.pooling: 'maen' is not one of"),
        ([*TRAIN, "--config.model.init=bert"], "config.model.init = 'bert': wants 'hf:FOLDER'"),
        ([*TRAIN, "--config.steps=0"], "config.steps = 0"),
        ([*TRAIN, "--config.eval.sts=('nowhere.jsonl',)"], "config.eval.sts: no such file or folder: nowhere.jsonl"),
        ([CONFIG, "--workdir={run}", "--data={folder}/none.jsonl"], "config.data.train[0].path: no such file or"),
        ([CONFIG, "--workdir={run}"], "config.data.train[0].path is empty"),
        (["--config=configs/finetune_pairs.py:huge", "--workdir={run}"], "knows the argument 'tiny', not 'huge'"),
        (["--config={folder}/none.py", "--workdir={run}"], "--config: no such file: {folder}/none.py"),
        (["--config={folder}/syntax.py", "--workdir={run}"], "(syntax.py, line 1)"),
        (["--config={folder}/empty.py", "--workdir={run}"], "has no attribute 'get_config'"),
        (["--config={folder}/raises.py", "--workdir={run}"], "{folder}/raises.py:2: RuntimeError: no luck"),
        (["--config={folder}/imports.py", "--workdir={run}"], "{folder}/imports.py:1: ModuleNotFoundError"),
        (["--config={folder}/number.py", "--workdir={run}"], "returns int, wants a ConfigDict"),
    ],
)
def test_mistakes_that_are_found_at_once(folder, arguments, message):
    places = {"run": folder / "run", "pairs": folder / "pairs.jsonl", "folder": folder}
    result = python("-m", "jaxembed.train", *(a.format(**places) for a in arguments))
    assert_refused(result, message.format(**places))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.mesh.fsdp=2"], "config.mesh: data -1, fsdp 2"),
        (["--data={folder}/broken.jsonl", "--config.batch_size=15"], "{folder}/broken.jsonl:2"),
        (["--workdir={folder}/file"], "--workdir={folder}/file: is a file"),
    ],
)
def test_mistakes_that_show_when_the_run_is_set_up(folder, tmp_path, arguments, message):
    scratch = [
        CONFIG,
        "--config.model.init=scratch",
        "--config.model.arch=bert",
        f"--config.model.shape={SHAPE}",
        f"--config.tokenizer=file:{folder}/tokenizer.json",
        f"--config.data.cache_dir={tmp_path}/cache",
        f"--data={folder}/pairs.jsonl",
        f"--workdir={tmp_path}/run",
    ]
    result = python("-m", "jaxembed.train", *scratch, *(a.format(folder=folder) for a in arguments), devices=3)
    assert_refused(result, message.format(folder=folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --workdir=RUN and --out=FOLDER [--layers=N] [--dim=N] [--dtype="),
        (["--workdir=x"], "give either --workdir=RUN and --out=FOLDER [--layers=N] [--dim=N] [--dtype="),
        (["--workdir=x", "--out=y", "--verify=z"], "give either"),
        (["--workdir={folder}/run", "--out={folder}/out"], "{folder}/run"),
        (["--verify={folder}/run"], "no jaxembed.json in it"),
        (["--verify={folder}/none"], "{folder}/none"),
    ],
)
def test_mistakes_with_export(folder, arguments, message):
    result = python("-m", "jaxembed.export", *(a.format(folder=folder) for a in arguments))
    assert_refused(result, message.format(folder=folder))


def test_what_answers_at_once_imports_nothing_heavy():
    modules = ", ".join(f"jaxembed.{name}" for name in ("cli", "train", "export", "evaluate", "report", "config_check"))
    code = f"import sys, {modules}; print(*sys.modules)"
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    heavy = {"jax", "flax", "optax", "orbax", "torch", "transformers", "tokenizers"}
    assert not (heavy | {"tensorflow_datasets", "datasets", "pyarrow"}) & set(result.stdout.split())
