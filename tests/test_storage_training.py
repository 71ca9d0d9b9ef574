"""A run whose data, cache, work directory and export are in an object store goes as one on disk, also when killed."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from store_server import other_machine, serving
from tiny_run import SHALLOW, sentence, tiny_config, train_on, write_lines, write_pairs

from jaxembed import config as config_lib
from jaxembed import run_folder
from jaxembed.checkpoint import FOLDER, Checkpoints, find
from jaxembed.checkpoint_mirror import COMPLETE, complete_steps
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.export import export_model
from jaxembed.metrics import read_metrics
from jaxembed.observing import fields
from jaxembed.storage import local, path_of, sizes

TESTS = pathlib.Path(__file__).resolve().parent
TEXTS = ["kalo miru", "seto vuni pa"]
KILLED_AFTER = 4  # a checkpoint of this step is in the store
# A process that trains as `train_on_one` here does, on a config in a file.
PROGRAM = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import conftest, test_storage_training
from jaxembed import config
test_storage_training.train_on_one(config.load(json.load(open(sys.argv[2]))), sys.argv[3])
"""


def train_on_one(config: config_lib.Config, workdir: str) -> None:
    train_on(1, config, path_of(workdir))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="module")
def bucket(folder):
    with serving(folder / "copies") as url:
        yield url


@pytest.fixture(scope="module")
def configs(folder, bucket):
    """The run on disk, and in the store."""
    rng = np.random.default_rng(5)
    rows = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": float(i % 6)} for i in range(40)]
    files = write_pairs(folder / "pairs.jsonl", 100, 7), write_lines(folder / "dev.jsonl", rows)
    stored = [path_of(f"{bucket}/{file.name}") for file in files]
    for file, to in zip(files, stored):
        to.write_bytes(file.read_bytes())

    def config(pairs: object, sts: object, cache_dir: object) -> config_lib.Config:
        return tiny_config(
            folder,
            steps=8,
            batch_size=16,
            model__shape=SHALLOW,
            export=False,
            log_to=("tensorboard",),
            data__train=({"path": str(pairs)},),
            data__cache_dir=str(cache_dir),
            eval={"every": 2, "sts": (str(sts),)},
            checkpoint={"every": 2, "keep": 2, "best": "eval/sts/dev"},
        )

    return config(*files, folder / "cache"), config(*stored, f"{bucket}/cache")


@pytest.fixture(scope="module")
def on_disk(configs, folder):
    train_on_one(configs[0], str(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="module")
def in_store(configs, bucket, folder, on_disk):
    """Killed, then gone on with on another machine. Comes after `on_disk`, whose compiled programs it finds."""
    workdir = path_of(f"{bucket}/run")
    (folder / "config.json").write_text(json.dumps(config_lib.to_json(configs[1])))
    arguments = [TESTS, folder / "config.json", workdir]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, arguments)], cwd=TESTS.parent)
    while process.poll() is None and KILLED_AFTER not in complete_steps(workdir / FOLDER):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (workdir / FOLDER / "7" / "half").write_bytes(b"what a kill leaves of a step that is being sent")
    with pytest.MonkeyPatch.context() as patch:
        other_machine(folder / "elsewhere", patch)
        train_on_one(configs[1], str(workdir))
    return workdir


def arrays(workdir: object) -> dict[str, np.ndarray]:
    step = local(find(str(workdir)))
    with ocp.StandardCheckpointer() as checkpointer:
        trees = {part: checkpointer.restore(step / part) for part in ("model", "rest")}
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(trees)}


def test_a_killed_run_goes_on_from_the_store_and_ends_with_the_same_bits(on_disk, in_store):
    disk, store = ([fields.repeatable(line) for line in read_metrics(workdir)] for workdir in (on_disk, in_store))
    assert [line["step"] for line in store] == list(range(9)) and store == disk
    wanted, found = arrays(on_disk), arrays(in_store)
    assert wanted.keys() == found.keys() and len(found) > 20
    for path in wanted:
        np.testing.assert_array_equal(found[path], wanted[path], err_msg=path)


def test_the_work_directory_is_as_on_disk(on_disk, in_store):
    def shown(workdir: object) -> set[str]:
        names = {name for name in sizes(workdir) if not name.startswith((f"{FOLDER}/", "tensorboard/"))}
        return names | {f"{FOLDER}/{step}" for step in complete_steps(workdir / FOLDER)}

    assert shown(in_store) == shown(on_disk)
    assert all(f"{FOLDER}/{step}/{COMPLETE}" in sizes(in_store) for step in complete_steps(in_store / FOLDER))
    assert not (in_store / FOLDER / "7").exists()
    events = [path for path in (in_store / "tensorboard").iterdir()]
    assert len(events) == 2 and all(path.stat().st_size > 100 for path in events)  # of both starts


def test_models_are_opened_from_the_store(on_disk, in_store, bucket, folder):
    wanted, at_best = (Embedder.load(f"{on_disk}{which}").encode(TEXTS) for which in ("", "@best"))
    embedder = Embedder.load(str(in_store))
    np.testing.assert_array_equal(embedder.encode(TEXTS), wanted)
    np.testing.assert_array_equal(Embedder.load(f"{in_store}@best").encode(TEXTS), at_best)
    out = path_of(f"{bucket}/export")
    for _ in range(2):  # an exported folder is replaced
        export_model(embedder, out)
    exported = Embedder.load(str(out))
    np.testing.assert_allclose(exported.encode(TEXTS), wanted, atol=1e-6)
    assert "sentence-transformers" in (out / "README.md").read_text()


def test_what_is_not_there_or_another_runs_is_refused(configs, in_store, bucket):
    config = config_lib.to_json(configs[1]) | {"steps": 9}
    config["model"] = config["model"] | {"dropout": 0.5}
    with pytest.raises(UserError, match=f"{in_store} holds a run of another config"):
        run_folder.claim(in_store, config_lib.load(config))
    with pytest.raises(UserError, match=f"run:{in_store}@3: no checkpoint of step 3"):
        find(f"{in_store}@3")
    with pytest.raises(UserError, match=f"hf:{bucket}/none: no such folder"):
        Embedder.load(f"{bucket}/none")


def test_several_processes_are_refused_where_one_must_write(bucket, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=f"{bucket}/many/checkpoints: a run of several processes .* gs://"):
        Checkpoints(path_of(f"{bucket}/many"))
