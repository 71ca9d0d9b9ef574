"""Paths in object stores: reading, copies that follow changes, folders that are complete or not there, errors."""

import gzip
import importlib
import json
import pathlib
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stored_vectors
from store_server import forget_stores, other_machine, serving
from tiny_run import write_pairs, write_records, write_tokenizer

from jaxembed import storage
from jaxembed.config import EvalConfig, MaxLength, PromptConfig, SourceConfig, build
from jaxembed.data import cache, cache_writer
from jaxembed.data.cache import build_or_open
from jaxembed.data.records import RecordReader
from jaxembed.data.sources import label_of
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import StoreLost, UserError, exit_code
from jaxembed.evaluation.classification import read_classification
from jaxembed.evaluation.pairs import read_pairs
from jaxembed.evaluation.retrieval import read_retrieval
from jaxembed.evaluation.sets import require_sets
from jaxembed.evaluation.sts import read_sts
from jaxembed.hf.writer import replacing
from jaxembed.metrics import MetricsWriter, read_metrics
from jaxembed.run_folder import claim, disk_errors
from jaxembed.storage import StorePath, filling, local, path_of
from jaxembed.train import require_files
from jaxembed.vectors.folder import VectorFolder


def put(path: StorePath, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("copies")) as url:
        yield url


@pytest.fixture
def place(bucket, request):
    """A folder of the test's own."""
    return path_of(f"{bucket}/{request.node.name.partition('[')[0]}")


def test_local_paths_stay_what_they_were(tmp_path):
    before = set(sys.modules)
    assert path_of(tmp_path) == tmp_path and path_of("~/x").is_absolute() and path_of("a/b").parts == ("a", "b")
    assert local(tmp_path) == tmp_path and storage.staged(tmp_path / "x") == tmp_path / "x"
    assert not {"fsspec", "s3fs"} & (set(sys.modules) - before)


def test_a_path_is_read_as_on_disk(place):
    assert not place.exists() and not place.is_dir() and not list(place.iterdir())
    put(place / "a" / "b.txt", b"two\nlines\n")
    put(place / "c.txt", b"c")
    again = path_of(f"{place}/a/")
    assert again == place / "a" and again.parent == place and again.name == "a" and str(again).startswith("s3://")
    assert place.is_dir() and not place.is_file() and (place / "c.txt").is_file()
    assert [path.name for path in place.iterdir()] == ["a", "c.txt"]
    assert storage.sizes(place) == {"a/b.txt": 10, "c.txt": 1}
    file = place / "a/b.txt"
    assert file.read_text() == "two\nlines\n" and file.stat().st_size == 10
    with file.open() as stream:
        assert list(stream) == [b"two\n", b"lines\n"]
    with pytest.raises(FileNotFoundError):
        (place / "none").read_text()
    with pytest.raises(FileNotFoundError):
        (place / "none").stat()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "names no bucket"),
        ("nothing://bucket/x", "nothing:// is no kind of place that is known"),
        ("gs://bucket/x", "gs:// needs the package gcsfs: pip install gcsfs"),
    ],
)
def test_urls_that_do_not_serve(url, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "gs", raising=False)
    forget_stores()
    with pytest.raises(UserError, match=message):
        path_of(url)


def test_a_store_that_refuses_is_one_line(bucket, monkeypatch):
    wrong = path_of("s3://no-such-bucket/run")
    assert not wrong.exists() and storage.sizes(wrong) == {}
    config = build({"steps": 1, "data": {"train": ({"path": "x"},)}, "model": {"init": "hf:x"}})
    with pytest.raises(UserError, match=r"s3://no-such-bucket/run/config.json: cannot be written: .*bucket"):
        claim(wrong, config)
    with pytest.raises(UserError, match=r"data.train\[0\].path: no such file or folder: s3://no-such-bucket/run"):
        require_files(build({"steps": 1, "data": {"train": ({"path": str(wrong)},)}, "model": {"init": "hf:x"}}))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_stores()
    with pytest.raises(StoreLost, match=r"^s3://tests/x: cannot be read: .*127.0.0.1:9") as lost:
        path_of(f"{bucket}/x").exists()
    assert exit_code(lost.value) == 3
    monkeypatch.undo()
    forget_stores()


def test_an_account_that_is_refused_is_not_to_be_tried_again(bucket, monkeypatch):
    def refuse(url):
        raise PermissionError("Access Denied")

    store = path_of(bucket + "/x").store
    monkeypatch.setattr(store, "cat_file", refuse)
    with pytest.raises(UserError, match="s3://tests/x: cannot be read: Access Denied") as refused:
        path_of(f"{bucket}/x").read_bytes()
    assert exit_code(refused.value) == 2


def test_a_copy_is_made_once_and_again_when_a_file_changes(place, monkeypatch):
    put(place / "model" / "config.json", b"{}")
    put(place / "model" / "1_Pooling" / "config.json", b"[]")
    put(place / "model" / "weights.bin", b"pickle")
    first = local(place / "model", ("*.json",))
    assert first.name == "model" and storage.sizes(first) == {"1_Pooling/config.json": 2, "config.json": 2}
    with monkeypatch.context() as patch:
        patch.setattr(storage, "fetch", None)  # nothing is fetched
        assert local(place / "model", ("*.json",)) == first
    put(place / "model" / "config.json", b"[]")  # of the same size
    second = local(place / "model", ("*.json",))
    assert (first / "config.json").read_text() == "{}" and (second / "config.json").read_text() == "[]"
    with pytest.raises(FileNotFoundError):
        local(place / "none")


def test_a_copy_is_complete_or_not_there(place, tmp_path, monkeypatch):
    put(place / "a", b"a")
    with pytest.raises(UserError, match="cannot be copied"):
        storage.fetch(place, tmp_path / "copy", ("a", "missing"))
    assert not list(tmp_path.iterdir())


def test_of_one_file_its_folder_is_not_looked_through(place, tmp_path, monkeypatch):
    write_tokenizer(tmp_path / "tokenizer.json")
    file = path_of(put(place / "tokenizer.json", (tmp_path / "tokenizer.json").read_bytes()))
    put(place / "checkpoints" / "1" / "weights", b"large")
    monkeypatch.setattr(StorePath, "files", None)
    assert Tokenizer.load(f"file:{file}")._truncation_side == "right"
    put(place / "tokenizer_config.json", b'{"truncation_side": "left"}')
    assert Tokenizer.load(f"file:{file}")._truncation_side == "left"
    copy = storage.local_file(file, ("tokenizer_config.json", "none.json", "checkpoints"))
    assert sorted(path.name for path in copy.parent.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    with pytest.raises(FileNotFoundError):
        storage.local_file(place / "none.json", ("tokenizer.json",))


def test_a_folder_that_was_sent_is_not_sent_again(place):
    for name in ("first", "second"):
        folder = storage.staged(place / "profile")
        folder.mkdir()
        (folder / name).write_text(name)
        storage.publish(place / "profile")
        assert storage.sizes(place) == {f"profile/{name}": len(name)}
        storage.remove(place / "profile", name)  # the user's, who begins anew at the same URL


def test_a_folder_is_filled_with_its_mark_last(place, monkeypatch):
    sent, removed = [], []
    rm_file = place.store.rm_file
    monkeypatch.setattr(place.store, "rm_file", lambda url: (removed.append(url.rsplit("/", 1)[1]), rm_file(url)))
    put_files = place.store.put
    monkeypatch.setattr(place.store, "put", lambda ours, theirs: (sent.append(theirs), put_files(ours, theirs)))
    for number in range(2):
        with filling(place, "done") as folder:
            for name in ("done", "kept", f"own{number}"):
                (folder / name).write_text(str(number))
    assert [batch[-1].rsplit("/", 1)[1] for batch in sent] == ["own0", "done", "own1", "done"]
    assert storage.sizes(place) == {"done": 1, "kept": 1, "own1": 1} and (place / "kept").read_text() == "1"
    assert removed == ["done", "own0"]
    with filling(place, "done", anew=True) as folder:
        for name in ("done", "kept", "own1"):
            (folder / name).write_text("1")
    assert removed == ["done", "own0"]
    with pytest.raises(ZeroDivisionError), filling(place, "done") as folder:
        (folder / "done").write_text("2")
        1 / 0  # noqa: B018
    assert (place / "done").read_text() == "1"


def test_only_an_exported_folder_is_replaced(place):
    put(place / "other.txt", b"mine")
    with pytest.raises(UserError, match="is there already"), replacing(place, lambda _: False, "config.json"):
        pass
    assert storage.sizes(place) == {"other.txt": 4}


def test_metrics_are_in_the_store_at_every_checkpoint_and_cut_at_a_resume(place, tmp_path, monkeypatch):
    with MetricsWriter(place, None) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": float(step)})
            if step == 2:
                writer.sync()
                assert [line["step"] for line in read_metrics(place)] == [1, 2]
    assert [line["step"] for line in read_metrics(place)] == [1, 2, 3]
    other_machine(tmp_path / "elsewhere", monkeypatch)
    MetricsWriter(place, 2).close()
    assert [line["step"] for line in read_metrics(place)] == [1, 2]


def records_of(path: str, **fields: str) -> list:
    return list(RecordReader(SourceConfig(path=path, **fields), "error", "data"))


def test_records_of_files_folders_and_globs(place, tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(30)]
    put(place / "a" / "1.jsonl", lines(*rows[:10]))
    put(place / "a" / "deep" / "2.jsonl.gz", gzip.compress(lines(*rows[10:20])))
    put(place / "a" / ".hidden.jsonl", b"not JSON")
    pq.write_table(pa.Table.from_pylist(rows[20:]), tmp_path / "3.parquet", row_group_size=4)
    put(place / "3.parquet", (tmp_path / "3.parquet").read_bytes())
    assert [r.query for r in records_of(f"{place}/a")] == [f"q{i}" for i in range(20)]
    assert [r.query for r in records_of(f"{place}/a/**/*.gz")] == [f"q{i}" for i in range(10, 20)]
    assert [r.query for r in records_of(f"{place}/3.parquet")] == [f"q{i}" for i in range(20, 30)]
    assert label_of(f"{place}/a/*.jsonl", 1) == "a/*.jsonl (1 file)" and label_of(f"{place}/a", 2) == "a/ (2 files)"
    with pytest.raises(UserError, match=rf"data.path: {place}/\*.zst: no file matches"):
        records_of(f"{place}/*.zst")
    put(place / "bad.jsonl", lines(rows[0]) + b"{")
    with pytest.raises(UserError, match=rf"^{place}/bad.jsonl:2: broken JSON"):
        records_of(f"{place}/bad.jsonl")
    put(place / "cut.jsonl.gz", gzip.compress(lines(*rows))[:-9])
    with pytest.raises(UserError, match=rf"^{place}/cut.jsonl.gz: cannot read on after line"):
        records_of(f"{place}/cut.jsonl.gz")


def test_a_token_cache_is_built_once_for_all_machines(place, tmp_path, monkeypatch):
    data = put(place / "pairs.jsonl", write_records(tmp_path / "pairs.jsonl", 50, 3).read_bytes())
    tokenizer = Tokenizer.load(f"file:{write_tokenizer(tmp_path / 'tokenizer.json')}")
    stored = put(place / "tokenizer.json", (tmp_path / "tokenizer.json").read_bytes())
    assert Tokenizer.load(f"file:{stored}").fingerprint() == tokenizer.fingerprint()

    def opened(path, cache_dir):
        source = SourceConfig(path=str(path))
        return build_or_open(source, tokenizer, PromptConfig("", ""), MaxLength(20, 20), cache_dir, "error", False)

    there = opened(data, f"{place}/cache")
    on_disk = opened(tmp_path / "pairs.jsonl", tmp_path / "cache")
    for name in ("tokens", "lengths", "offsets", "hashes", "first_text", "lines"):
        np.testing.assert_array_equal(getattr(there, name), getattr(on_disk, name))
    assert there.record_name(4) == f"{data}:5"
    copies = other_machine(tmp_path / "elsewhere", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "fill", None)  # nothing is tokenised
        again = opened(data, f"{place}/cache")
    assert again.path.name == there.path.name and again.path.is_relative_to(copies)
    np.testing.assert_array_equal(again.tokens, there.tokens)
    (place / "cache" / "tokens" / there.path.name / "tokens.bin").write_bytes(b"damaged")
    other_machine(tmp_path / "third", monkeypatch)
    np.testing.assert_array_equal(opened(data, f"{place}/cache").tokens, there.tokens)
    assert (place / "cache" / "tokens" / there.path.name / "tokens.bin").stat().st_size == there.tokens.nbytes
    put(path_of(data), write_pairs(tmp_path / "others.jsonl", 50, 4).read_bytes())
    assert opened(data, f"{place}/cache").path.name != there.path.name


@pytest.fixture
def opened(place, tmp_path):
    """Opens the cache of a source in `place`."""
    source = SourceConfig(path=str(write_records(tmp_path / "pairs.jsonl", 20, 3)))
    tokenizer = Tokenizer.load(f"file:{write_tokenizer(tmp_path / 'tokenizer.json')}")
    prompts, lengths = PromptConfig("", ""), MaxLength(20, 20)
    return lambda: build_or_open(source, tokenizer, prompts, lengths, f"{place}/cache", "error", False)


def test_a_token_cache_that_could_not_be_sent_is_sent_at_the_next_start(place, opened, monkeypatch):
    def fail(*_, **__):
        raise StoreLost("away")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "send", fail)
        with pytest.raises(StoreLost):
            opened()
    assert storage.sizes(place) == {}
    monkeypatch.setattr(cache_writer, "fill", None)  # nothing is tokenised again
    stored = storage.sizes(place / "cache" / "tokens" / opened().path.name)
    assert stored == storage.sizes(opened().path) and cache_writer.META in stored
    monkeypatch.setattr(cache, "send", None)  # nor sent again
    opened()


def test_evaluation_sets(place):
    scored = [{"sentence1": "a", "sentence2": "b", "score": i} for i in range(3)]
    sts = put(place / "sts.jsonl.gz", gzip.compress(lines(*scored)))
    assert read_sts(sts).name == "sts" and len(read_sts(sts).scores) == 3
    put(place / "beir" / "corpus.jsonl", lines({"_id": "d", "text": "document"}))
    put(place / "beir" / "queries.jsonl.gz", gzip.compress(lines({"_id": "q", "text": "query"})))
    put(place / "beir" / "qrels" / "test.tsv", b"q\td\t1\n")
    beir = read_retrieval(f"{place}/beir")
    assert beir.name == "beir" and beir.gains == [{"d": 1.0}]
    for name in ("train", "test"):
        put(place / "trec" / f"{name}.jsonl", lines({"text": "x", "label": "1"}, {"text": "y", "label": "2"}))
    assert read_classification(f"{place}/trec").name == "trec"
    both = f"{place}/trec/train.jsonl:{place}/trec/test.jsonl"
    assert read_classification(both).test_labels == ["1", "2"]
    pairs = put(place / "held-out.jsonl", lines({"query": "q", "positive": "p"}))
    assert read_pairs(pairs, "--pairs").name == "held-out"
    require_sets(EvalConfig(sts=(sts,), retrieval=(f"{place}/beir",), pairs=(pairs,), classification=(both,)), "--")
    with pytest.raises(UserError, match=r"--sts: no such file or folder: s3://"):
        require_sets(EvalConfig(sts=(f"{place}/none.jsonl",)), "--")


def test_a_store_that_orbax_loses_is_no_mistake_of_the_users():
    for workdir, kind in ((StorePath("gs://bucket/run"), StoreLost), (pathlib.Path("run"), ValueError)):
        with pytest.raises(kind, match="CURL error") as raised, disk_errors(workdir):
            raise ValueError("UNAVAILABLE: CURL error: Could not connect to server")
        assert type(raised.value) is kind


@pytest.mark.parametrize("layout", ["npy", "parquet"])
def test_vectors_are_written_to_a_store_and_read_from_it(place, layout):
    folder = stored_vectors.write_shards(place / layout, dtype="int8", layout=layout)
    opened = VectorFolder.open(str(folder), "--corpus")
    assert list(opened.ids()) == stored_vectors.IDS
    assert np.abs(opened.vectors() - stored_vectors.VECTORS).max() < 0.02
