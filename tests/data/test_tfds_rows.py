"""Data sets of tfds: prepared if need be, read without TensorFlow, and every mistake in one line."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from jaxembed.config import MaxLength, PromptConfig, SourceConfig
from jaxembed.data import tfds_rows
from jaxembed.data.cache import build_or_open
from jaxembed.data.records import Record, RecordReader
from jaxembed.data.texts import TextReader
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

class OwnPairs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain"), tfds.core.BuilderConfig(name="broken")]
    code_path = None

    def _info(self):
        text = tfds.features.Text()
        features = {"query": text, "positive": tfds.features.Sequence(text), "score": np.float32, "label": np.int64}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), license="CC-BY-4.0\\n"
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(4)}

    def _generate_examples(self, n):
        if self.builder_config.name == "broken":
            raise RuntimeError("the source is gone")
        for i in range(n):
            query = b"\\xff" if i == 3 else f"é{i}"
            yield i, {"query": query, "positive": [f"p{i}", "q"], "score": i / 4, "label": i}
"""
NAMED = {"source": "tfds", "name": "own_pairs"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a package of builders of its own, and `data`, where the data set is prepared."""
    folder = tmp_path_factory.mktemp("tfds")
    (folder / "own_sets").mkdir()
    (folder / "own_sets" / "__init__.py").touch()
    (folder / "own_sets" / "own_pairs.py").write_text(BUILDER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds_rows, "_OWN", "own_sets")
        patch.syspath_prepend(str(folder))
        RecordReader(SourceConfig(**NAMED, data_dir=str(folder / "data")), "error", "w")
        yield folder


@pytest.fixture
def prepared(home):
    return home / "data" / "own_pairs" / "plain" / "1.0.0"


def test_single_texts_with_ids(prepared):
    reader = TextReader(f"tfds:{prepared}:test", "--input", field="positive", id_field="label")
    assert sorted(reader) == [(f"{i}.{j}", text) for i in range(4) for j, text in enumerate((f"p{i}", "q"))]
    with pytest.raises(UserError, match=r"no column 'text', but .*: name one by --field"):
        list(TextReader(f"tfds:{prepared}", "--input"))


def test_rows_become_records_as_those_of_files_do(home):
    columns = {"id": "label"}
    source = SourceConfig(**NAMED, data_dir=str(home / "data"), split="test", columns=columns)
    reader = RecordReader(source, "skip", "w")
    records = sorted(reader, key=lambda record: record.id)
    assert records == [Record(f"é{i}", (f"p{i}", "q"), id=str(i), label=str(i)) for i in range(3)]
    assert reader.skipped == 1 and "'query' is not UTF-8" in reader.reasons[0]
    assert reader.reasons[0].startswith("tfds:own_pairs:test row ")
    assert (reader.source.done, reader.source.total) == (4, 4)
    assert (reader.source.label, reader.source.licence) == ("tfds:own_pairs", "CC-BY-4.0")


def test_slices_and_folders(home, prepared, monkeypatch):
    monkeypatch.setattr(tfds_rows, "_ROWS", 3)  # several chunks

    def read(**fields):
        reader = RecordReader(SourceConfig(source="tfds", **fields), "skip", "w")
        return [(record.query, reader.name(reader.line)) for record in reader]

    whole = read(path=str(prepared))
    assert len(whole) == 19 and whole[-1][1] == "tfds:own_pairs:train row 20"
    assert [query for query, _ in read(name="own_pairs/plain:1.0.0", data_dir=str(home / "data"))] == [
        query for query, _ in whole
    ]
    first = [(query, name.replace("train", "train[:25%]")) for query, name in whole if int(name.split()[-1]) <= 5]
    assert read(path=str(prepared), split="train[:25%]") == first
    assert len(read(path=str(prepared), split="train+test")) == 19 + 3


def test_cached_as_a_file_of_the_same_records_is(home, minilm_dir, tmp_path):
    tokenizer = Tokenizer.load(f"hf:{minilm_dir}")

    def cache(source):
        return build_or_open(source, tokenizer, PromptConfig("", ""), MaxLength(16, 16), tmp_path, "skip", False)

    rows = [{"query": f"é{i}", "positive": [f"p{i}", "q"]} for i in (0, 1, 2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = cache(SourceConfig(path=str(tmp_path / "a.jsonl")))
    own = cache(SourceConfig(**NAMED, data_dir=str(home / "data"), split="test"))
    assert sorted(own.hashes) == sorted(file.hashes) and own.total_tokens == file.total_tokens
    assert (own.label, own.licence, own.skipped) == ("tfds:own_pairs", "CC-BY-4.0", 1)
    assert own.record_name(0) == f"tfds:own_pairs:test row {own.lines[0]}"
    assert own.skipped_reasons[0].startswith("tfds:own_pairs:test row ")
    assert cache(SourceConfig(**NAMED, data_dir=str(home / "data"), split="test")).path == own.path
    assert cache(SourceConfig(**NAMED, data_dir=str(home / "data"), split="train")).path != own.path


def test_tensorflow_is_not_imported_where_it_is_installed(home, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise AssertionError('imported')")
    code = """
import sys
from jaxembed.config import SourceConfig
from jaxembed.data import tfds_rows
from jaxembed.data.records import RecordReader
assert not {"tensorflow_datasets", "datasets", "pyarrow"} & set(sys.modules)
tfds_rows._OWN = "own_sets"
reader = RecordReader(SourceConfig(source="tfds", name="own_pairs", data_dir=sys.argv[1]), "skip", "w")
assert len(list(reader)) == 19
assert "tensorflow" not in sys.modules
"""
    environment = {"PYTHONPATH": f"{home}:{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", code, str(tmp_path / "anew")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert not result.stdout and "downloaded and prepared to" in result.stderr  # commands end with JSON on stdout
    assert (tmp_path / "anew" / "own_pairs" / "plain" / "1.0.0" / "features.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "own_pears"}, r"w\.name: tfds knows no data set 'own_pears', did you mean 'own_pairs'\?"),
        ({"name": "own_pairs:2.0.0"}, r"w\.name: tfds:own_pairs:2\.0\.0: .* only: 1\.0\.0; wants NAME\[/CONF"),
        ({"name": "own_pairs/plane"}, "w.name: tfds:own_pairs/plane: BuilderConfig plane not found"),
        ({"name": "own pairs"}, "w.name: tfds:own pairs: Parsing builder name string own pairs failed"),
        ({"name": "own_pairs:test"}, "w.name: 'own_pairs:test' is no name of tfds: a version is three numbers"),
        ({"name": "own_pairs/broken"}, "w.name: tfds:own_pairs/broken cannot be prepared: the source is gone"),
        ({"name": "own_pairs", "split": "tset"}, "w.split: tfds:own_pairs: Unknown split 'tset'. Should be one of"),
        ({"name": "own_pairs", "split": "train["}, "w.split: tfds:own_pairs: Error parsing split 'train\\['"),
        ({"name": "own_pairs", "format": "tevatron"}, "no usable record: all 20 are bad, the first: tfds:own_pairs:t"),
        ({"name": "own_pairs", "columns": {"id": "x"}}, "w.columns: no record of tfds:own_pairs:train has x"),
        ({"path": "."}, r"w\.path: \. is no prepared tfds data set: wants the folder with its dataset_info\.json"),
    ],
)
def test_mistakes(home, fields, message):
    place = {"data_dir": str(home / "data")} if "name" in fields else {}
    with pytest.raises(UserError, match=message):
        list(RecordReader(SourceConfig(source="tfds", **place, **fields), "skip", "w"))


def test_a_data_set_that_comes_with_tfds_is_known_without_its_code_being_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"w\.name: tfds:glue/mrcp: BuilderConfig mrcp not found"):
        RecordReader(SourceConfig(source="tfds", name="glue/mrcp", data_dir=str(tmp_path)), "skip", "w")


def test_files_for_tensorflow_only(home, prepared, tmp_path):
    """As if it had been prepared in tfds' usual format, which takes TensorFlow to write."""
    copy = tmp_path / "own_pairs" / "plain" / "1.0.0"
    shutil.copytree(prepared, copy)
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    for shard in copy.glob("*.array_record*"):
        shard.rename(str(shard).replace("array_record", "tfrecord"))
    message = "w: tfds:own_pairs is prepared in .* as tfrecord, which only TensorFlow reads: prepare it anew with `tfds"
    with pytest.raises(UserError, match=message + ".*, or set w.data_dir to another folder"):
        RecordReader(SourceConfig(**NAMED, data_dir=str(tmp_path)), "skip", "w")
    with pytest.raises(UserError, match=message + " build --file_format=array_record`$"):
        RecordReader(SourceConfig(source="tfds", path=str(copy)), "skip", "w")


def test_damaged_files(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    (shard,) = (tmp_path / "copy").glob("*train*")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="tfds:own_pairs:train: cannot read on after row 0: "):
        list(RecordReader(SourceConfig(source="tfds", path=str(tmp_path / "copy")), "skip", "w"))
