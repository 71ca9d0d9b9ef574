"""The shorthand of a source, and which files a path stands for."""

import pytest

from jaxembed.config import SourceConfig
from jaxembed.data.sources import check_place, find_files, label_of, parse_spec
from jaxembed.errors import UserError


def files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ("a.jsonl", {"source": "auto", "path": "a.jsonl"}),
        ("folder/", {"source": "auto", "path": "folder/"}),
        ("x/**/*.parquet", {"source": "auto", "path": "x/**/*.parquet"}),
        ("tfds:pairs", {"source": "tfds", "name": "pairs"}),
        ("tfds:pairs:test", {"source": "tfds", "name": "pairs", "split": "test"}),
        ("tfds:glue/mrpc:2.0.0", {"source": "tfds", "name": "glue/mrpc:2.0.0"}),
        ("tfds:glue:2.*.*:train[:10%]", {"source": "tfds", "name": "glue:2.*.*", "split": "train[:10%]"}),
        ("hf:org/set:train[5:]+test", {"source": "hf", "name": "org/set", "split": "train[5:]+test"}),
        ("hf:./saved:validation", {"source": "hf", "path": "./saved", "split": "validation"}),
        ("tfds:/data/pairs/1.0.0", {"source": "tfds", "path": "/data/pairs/1.0.0"}),
    ],
)
def test_shorthand(spec, fields):
    assert parse_spec(spec) == fields
    SourceConfig(**fields)


def test_a_folder_is_taken_for_a_data_set_only_where_it_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(files(tmp_path, "saved/dataset_dict.json", "glue/notes.txt"))
    assert parse_spec("hf:saved:test") == {"source": "hf", "path": "saved", "split": "test"}
    assert parse_spec("tfds:glue") == {"source": "tfds", "name": "glue"}


@pytest.mark.parametrize("spec", ["tfds:", "hf:"])
def test_shorthand_without_a_name(spec):
    with pytest.raises(UserError, match=f"'{spec}' names no data set: wants tfds:NAME"):
        parse_spec(spec)


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    files(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert find_files(SourceConfig(path=str(tmp_path / "a[1].jsonl")), "f") == ("jsonl", (tmp_path / "a[1].jsonl",))
    assert find_files(SourceConfig(path=str(tmp_path / "a[0-9].jsonl")), "f") == ("jsonl", (tmp_path / "a1.jsonl",))


def test_the_kind_may_be_chosen(tmp_path):
    files(tmp_path, "a.jsonl", "b.parquet", "c.txt")
    assert find_files(SourceConfig(path=str(tmp_path), source="parquet"), "f") == ("parquet", (tmp_path / "b.parquet",))
    assert find_files(SourceConfig(path=str(tmp_path / "*.txt"), source="jsonl"), "f")[1] == (tmp_path / "c.txt",)
    (tmp_path / "a.jsonl").unlink()  # a note beside records is no source of theirs, plain lines alone are one
    assert find_files(SourceConfig(path=str(tmp_path)), "f") == ("parquet", (tmp_path / "b.parquet",))
    (tmp_path / "b.parquet").unlink()
    assert find_files(SourceConfig(path=str(tmp_path)), "f") == ("txt", (tmp_path / "c.txt",))


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("none.jsonl", "auto", r"f: no such file or folder: .*none\.jsonl"),
        ("mixed", "auto", r"mixed: files of two kinds, a\.jsonl and b\.parquet: set source to jsonl or parquet"),
        ("mixed/*", "auto", "files of two kinds"),
        (
            "empty",
            "auto",
            r"f: .*empty: no \.jsonl, \.jsonl\.gz, \.json, \.json\.gz, \.parquet, \.txt, \.txt\.gz file in this",
        ),
        ("empty", "parquet", r"empty: no \.parquet file in this folder or its subfolders"),
        ("empty/*.jsonl", "auto", r"f: .*empty/\*\.jsonl: no file matches"),
        ("text/*", "auto", r"c\.md ends in none of \.jsonl"),
        ("saved", "auto", "saved is the folder of a prepared data set: give it as tfds:FOLDER or hf:FOLDER"),
        ("none", "hf", "f: there is no folder .*none"),
        ("text/c.md", "tfds", "f: there is no folder .*c.md"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, path, source, message):
    files(tmp_path, "mixed/a.jsonl", "mixed/b.parquet", "empty/.hidden.jsonl", "text/c.md", "saved/dataset_info.json")
    with pytest.raises(UserError, match=message):
        check_place(SourceConfig(path=str(tmp_path / path), source=source), "f")


def test_places_that_are_not_looked_into(tmp_path):
    check_place(SourceConfig(name="nobody/knows", source="hf"), "f")
    check_place(SourceConfig(path=str(tmp_path), source="tfds"), "f")


def test_labels_name_no_place_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(files(tmp_path, "data/pairs.jsonl"))
    assert label_of(str(tmp_path / "data" / "pairs.jsonl"), 1) == "pairs.jsonl"
    assert label_of("data", 12) == label_of(f"{tmp_path}/data/", 12) == "data/ (12 files)"
    assert label_of("data/../data/.", 1) == "data/ (1 file)"
    assert label_of("/home/me/data/*/x-[0-9].jsonl", 2) == "data/*/x-[0-9].jsonl (2 files)"
    assert label_of("/*.jsonl", 2) == label_of("*.jsonl", 2) == "*.jsonl (2 files)"
