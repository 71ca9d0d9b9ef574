"""Encoding into folders: the same vectors whoever makes them, in whatever order, however often killed."""

import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from pod import environment, finish, start
from stored_vectors import manifest
from test_embedder import make
from tiny_run import sentence, write_lines

from jaxembed import encoding, sharding
from jaxembed.config import MeshConfig
from jaxembed.data.texts import TextReader
from jaxembed.distributed import Peers
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.vectors.encoding_run import Encoding
from jaxembed.vectors.folder import ShardWriter, VectorFolder
from jaxembed.vectors.quantize import quantize, ranges_of

SHARD = 16
TOLERANCE = 1e-5
FLAGS = (f"--shard_size={SHARD}", "--prompt_name=query")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in `model`, 100 texts in `texts.jsonl`, one of them empty, some twice."""
    folder = tmp_path_factory.mktemp("encode")
    make(folder, prompts={"query": "kaka: "}).save(folder / "model")
    rng = np.random.default_rng(0)
    texts = [*(sentence(rng, 1, 30) for _ in range(97)), "", "vuvu " * 60, "ka"]
    write_lines(folder / "texts.jsonl", [{"_id": f"t{i}", "text": text} for i, text in enumerate(texts)])
    return folder


def one_device():
    return sharding.make_mesh(MeshConfig(1), jax.devices()[:1])


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder.load(folder / "model", mesh=one_device())


@pytest.fixture(scope="module")
def texts(folder):
    return dict(TextReader(str(folder / "texts.jsonl"), "--input"))


@pytest.fixture(scope="module")
def want(embedder, texts):
    """Each text's vector, by its id; one text at a time for some of them."""
    vectors = dict(zip(texts, embedder.encode_query(list(texts.values()))))
    for key in ("t0", "t41", "t97", "t98", "t99"):
        assert np.abs(embedder.encode_query(texts[key]) - vectors[key]).max() <= TOLERANCE
    return vectors


def encode(embedder, input_path, out, peers=None, writer=ShardWriter, **options):
    """Encodes as the command does; returns the work."""
    reader = TextReader(str(input_path), "--input")
    writers = [writer(out, manifest(width=embedder.width, shard_size=SHARD))]
    return Encoding(embedder, reader, embedder.prompt_of("query"), writers, **options).run(peers or Peers())


def near(out, want):
    vectors = VectorFolder.open(out, "--out")
    ids = list(vectors.ids())
    assert sorted(ids) == sorted(want)
    assert np.abs(vectors.vectors() - np.stack([want[key] for key in ids])).max() <= TOLERANCE


def test_the_same_shuffled_in_other_rows_and_batches(tmp_path, folder, embedder, texts, want, monkeypatch):
    work = encode(embedder, folder / "texts.jsonl", tmp_path / "plain")
    near(tmp_path / "plain", want)
    assert (work.count, work.texts, work.kept) == (100, 100, 0) and 0 < work.tokens < work.places
    order = np.random.default_rng(1).permutation(list(texts))
    shuffled = write_lines(tmp_path / "shuffled.jsonl", [{"_id": key, "text": texts[key]} for key in order])
    monkeypatch.setattr(encoding, "SHORTEST_ROW_ON_CPU", 16)
    encode(embedder, shuffled, tmp_path / "shuffled", batch_size=3)
    near(tmp_path / "shuffled", want)


def test_the_same_on_eight_devices(tmp_path, folder, want):
    embedder = Embedder.load(folder / "model")
    assert embedder.mesh.size == 8
    encode(embedder, folder / "texts.jsonl", tmp_path / "v")
    near(tmp_path / "v", want)


class Killed(BaseException):
    """In the place of a signal."""


class Turns:
    """One of several processes, where the others take their turns before or after it."""

    def __init__(self, index, count):
        self.index, self.count, self.main = index, count, index == 0
        self.of_main, self.wait = (lambda value: value or self.there), lambda: None


def test_killed_five_times_with_changing_processes(tmp_path, folder, embedder, want):
    """Each start writes one shard and dies while it writes the next; a shard that is there is never made again."""
    out, made = tmp_path / "v", []

    class Mortal(ShardWriter):
        def write(self, shard, ids, stored):
            if self.left == 0:
                raise Killed
            self.left -= 1
            made.append(shard)
            super().write(shard, ids, stored)

    for processes in (1, 2, 3, 1, 1):
        Mortal.left = 1
        peers = Turns(0, processes)
        with pytest.raises(Killed):
            encode(embedder, folder / "texts.jsonl", out, peers, Mortal)
        assert not json.loads((out / "manifest.json").read_text())["complete"]
    assert sorted(made) == sorted(set(made)) and len(made) == 5
    work = encode(embedder, folder / "texts.jsonl", out)
    assert (work.kept, work.count, work.texts) == (5, 100, 100 - 5 * SHARD)
    near(out, want)


def test_processes_share_the_shards(tmp_path, folder, embedder, want):
    out, there = tmp_path / "v", [[]]
    works = []
    for index in (0, 2, 1):  # process 0 first, since it makes the folder; the rest in any order
        peers = Turns(index, 3)
        peers.there = there
        works.append(encode(embedder, folder / "texts.jsonl", out, peers))
    assert [work.texts for work in works] == [3 * SHARD - 12, 2 * SHARD, 2 * SHARD] and sum(w.kept for w in works) == 0
    near(out, want)


def command(folder, out, *more):
    model, texts = folder / "model", folder / "texts.jsonl"
    return ["-m", "jaxembed.encode", f"--model={model}", f"--input={texts}", f"--out={out}", *FLAGS, *more]


def test_two_processes_killed_then_one(tmp_path, folder, want):
    """By the command: two processes are killed when shards are there, one goes on, to the end."""
    out = tmp_path / "v"
    started = start(2, 1, [command(folder, out, "--shard_size=2")] * 2)
    while not any(out.glob("vectors-*")) and all(process.poll() is None for process in started):
        time.sleep(0.02)
    for process in started:
        process.send_signal(signal.SIGKILL)
    finish(started)
    kept = {file: file.stat().st_mtime_ns for file in out.glob("vectors-*")}
    (ended,) = finish(start(1, 1, [command(folder, out, "--shard_size=2")]))
    assert ended.code == 0, ended.err
    said = json.loads(ended.out.splitlines()[-1])
    assert said["texts"] == 100 and said["encoded"] == 100 - 2 * len(kept) < 100
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    near(out, want)
    first, second = finish(start(2, 1, [command(folder, tmp_path / "w")] * 2))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "in process 0 of 2" in first.out and second.out == ""
    near(tmp_path / "w", want)


def test_stored_small_and_narrow_by_the_command(tmp_path, folder, want):
    ended = run(folder, tmp_path / "v", "--precision=int8", "--dims=16,32", "--normalize", "--calibration=40")
    assert ended.returncode == 0, ended.stderr
    full = np.stack(list(want.values()))
    for width in (16, 32):
        vectors = VectorFolder.open(tmp_path / "v" / f"dim-{width}", "--out")
        assert vectors.normalized and vectors.manifest.calibration == 40
        cut = full[:, :width] / np.linalg.norm(full[:, :width], axis=1, keepdims=True)
        stored = np.concatenate([np.load(file) for file in sorted(vectors.path.glob("vectors-*.npy"))])
        levels = quantize(cut, "int8", ranges_of(cut[:40])).astype(int)
        assert stored.dtype == np.int8 and np.abs(stored - levels).max() <= 1  # a rounding at a step's border,
        assert (stored == levels)[levels < 126].mean() > 0.999  # as at the last one, where each dimension's largest is


def run(folder, out, *flags):
    return subprocess.run(
        [sys.executable, *command(folder, out, *flags)], env=environment(1), capture_output=True, text=True
    )


def test_mistakes_are_one_line(tmp_path, folder):
    ended = run(folder, tmp_path / "v", "--dims=64")
    assert (ended.returncode, ended.stdout) == (2, "") and not (tmp_path / "v").exists()
    assert ended.stderr == "error: --dims=64: the model's vectors have 32 dimensions\n"


def test_nothing_is_written_of_texts_that_cannot_be_read(tmp_path, embedder):
    texts = write_lines(tmp_path / "texts.jsonl", [{"name": "a"}])
    with pytest.raises(UserError, match=r"texts.jsonl:1: no 'text' \(the row has name\)"):
        encode(embedder, texts, tmp_path / "v")
    assert not (tmp_path / "v").exists()
