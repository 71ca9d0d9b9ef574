"""Data sets of the `datasets` package, from folders and as from the hub, and every mistake in one line."""

import importlib.util

import datasets
import pytest

from jaxembed.config import SourceConfig
from jaxembed.data import hf_rows
from jaxembed.data.records import Record, RecordReader
from jaxembed.errors import UserError

ROWS = [{"query": f"q{i}", "positive": ["p", f"p{i}"], "negative": None, "vector": [0.5] * 4} for i in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds `one`, a data set of ten rows, and `two`, with the splits train (ten) and test (three rows)."""
    folder = tmp_path_factory.mktemp("hf")
    one = datasets.Dataset.from_list(ROWS)
    one.info.license = "mit"
    one.with_format("numpy").save_to_disk(folder / "one", num_shards=3)
    datasets.DatasetDict(train=one, test=one.select(range(7, 10))).save_to_disk(folder / "two")
    one.to_parquet(folder / "plain" / "train.parquet")
    return folder


def records(*indices):
    return [Record(f"q{i}", ("p", f"p{i}")) for i in indices]


@pytest.mark.parametrize(
    ("name", "split", "indices"),
    [
        ("one", "train", range(10)),
        ("one", "train[2:4]", (2, 3)),
        ("two", "test", (7, 8, 9)),
        ("two", "train[:20%]+test[1:]", (0, 1, 8, 9)),
    ],
)
def test_folders(folder, monkeypatch, name, split, indices):
    monkeypatch.setattr(hf_rows, "_ROWS", 3)  # several chunks
    reader = RecordReader(SourceConfig(source="hf", path=str(folder / name), split=split), "error", "w")
    assert list(reader) == records(*indices)
    assert reader.name(reader.line) == f"hf:{name}:{split} row {len(indices)}"
    assert reader.source.done == reader.source.total == len(indices)
    assert (reader.source.label, reader.source.licence) == (f"hf:{name}", "mit")
    assert list(reader) == records(*indices)  # it can be read again


def test_a_name_goes_to_the_loader_of_the_hub(folder, tmp_path, monkeypatch):
    """As of a repository of parquet files; the loader takes a folder of them for one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    source = SourceConfig(source="hf", name=str(folder / "plain"), split="train[5:]")
    reader = RecordReader(source, "error", "w")
    assert list(reader) == records(*range(5, 10))
    assert reader.source.licence == "" and all(file.is_relative_to(tmp_path) for file in reader.source.files)


def test_bad_rows_are_counted(tmp_path):
    rows = [{"query": "q", "positive": "p"}, {"query": " ", "positive": "p"}, {"query": "q", "positive": None}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "bad")
    reader = RecordReader(SourceConfig(source="hf", path=str(tmp_path / "bad")), "skip", "w")
    assert list(reader) == [Record("q", ("p",))]
    assert (reader.skipped, reader.reasons[0]) == (2, "hf:bad:train row 2: 'query' is empty")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"path": "two", "split": "dev"},
            "w.split: .*two: Unknown split \"dev\". Should be one of \\['train', 'test'\\]",
        ),
        ({"path": "one", "split": "test"}, 'w.split: .*one: Unknown split "test"'),
        ({"path": "one", "split": "train["}, "w.split: .*one: Unrecognized instruction format: train\\["),
        ({"path": "plain"}, "w.path: .*plain is no folder that save_to_disk of datasets wrote"),
        ({"path": "one", "columns": {"id": "x"}}, "w.columns: no record of hf:one:train has x"),
        ({"path": "one", "format": "flagembedding"}, "no usable record: all 10 are bad, the first: hf:one:train row 1"),
        (
            {"path": "one", "columns": {"query": "a"}, "format": "flagembedding"},
            "hf:one:train: has the columns query, positive, negative, vector, none that a record of format 'flagembedd",
        ),
        (
            {"name": "nobody/knows"},
            "w.name: hf:nobody/knows cannot be loaded: Couldn't reach 'nobody/knows' on the Hub",
        ),
        ({"name": "no body"}, "w.name: hf:no body cannot be loaded: "),
    ],
)
def test_mistakes(folder, fields, message):
    if "path" in fields:
        fields = fields | {"path": str(folder / fields["path"])}
    with pytest.raises(UserError, match=message):
        list(RecordReader(SourceConfig(source="hf", **fields), "skip", "w"))


def test_the_package_is_optional(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"w\.source = 'hf' needs the package datasets: pip install datasets"):
        RecordReader(SourceConfig(source="hf", path=str(folder / "one")), "error", "w")
