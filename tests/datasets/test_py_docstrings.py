"""The data set of docstrings and functions: its splits, its duplicates, and the tfds builder around it."""

import pathlib
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from jaxembed.datasets import py_docstrings
from jaxembed.datasets.installed_packages import Package
from jaxembed.datasets.py_docstrings import PyDocstrings, PyDocstringsConfig, collect

N_FILES = 200


def function(name: str, summary: str, number: int) -> str:
    return f'def {name}(x):\n    """{summary}"""\n    x += {number}\n    return x\n\n'


def package(root: pathlib.Path, name: str = "things", version: str = "1.0") -> Package:
    """A package of many small files."""
    paths = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    return Package(name, version, "MIT", root, lambda: paths)


def files_of(*packages: Package):
    return list(py_docstrings.list_files(packages))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("site")
    for i in range(N_FILES):
        folder = root / "things" / f"part{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        text = function(f"add_{i}", f"Add the number {'i' * (i + 2)} to it.", i)
        text += function(f"twin_{i}", f"Plus {i}: says the same everywhere.", 1000 + i)
        (folder / f"module{i}.py").write_text(text)
    (root / "things" / "tests").mkdir()
    (root / "things" / "tests" / "test_it.py").write_text(function("test", "Check that all is well.", 1))
    return root


def test_whole_files_are_held_out(root):
    splits = collect(files_of(package(root)))
    files = {split: {e.id.rsplit(".", 1)[0] for e in examples} for split, examples in splits.items()}
    assert set(files) == {"train", "validation", "test"}
    assert len(files["train"]) > 160 and files["validation"] and files["test"]
    assert not files["train"] & (files["validation"] | files["test"]) and not files["validation"] & files["test"]
    everything = [e for examples in splits.values() for e in examples]
    example = next(e for e in everything if e.id == "things.part1.module7.add_7")
    assert example.query == "Add the number iiiiiiiii to it." and example.group == "add the number iiiiiiiii to it"
    assert example.positive == "def add_7(x):\n    x += 7\n    return x"
    assert (example.package, example.licence) == ("things 1.0", "MIT")
    assert not [e for e in everything if "tests" in e.id]


def test_held_out_queries_do_not_say_what_training_says(root):
    splits = collect(files_of(package(root)))
    trained = {e.group for e in splits["train"]}
    assert "plus says the same everywhere" in trained  # equal but for a number: one group
    for split in ("validation", "test"):
        assert splits[split] and not trained & {e.group for e in splits[split]}


def test_equal_queries_and_equal_codes_occur_once(tmp_path):
    texts = [
        function("f", "Return it plus one.", 1),
        function("f", "Another summary of it.", 1),
        function("g", "Return it plus one.", 2),
        function("h", "A third summary here.", 3),
    ]
    for i, text in enumerate(texts):
        (tmp_path / f"m{i}.py").write_text(text)
    found = [e for examples in collect(files_of(package(tmp_path))).values() for e in examples]
    assert len({e.query for e in found}) == len({e.positive for e in found}) == len(found) < len(texts)


def test_no_package_gives_more_than_its_share(root, monkeypatch):
    monkeypatch.setattr(py_docstrings, "MOST_OF_A_PACKAGE", 10)
    splits = collect(files_of(package(root), package(root, "others")))
    counts = {}
    for examples in splits.values():
        for e in examples:
            counts[e.package] = counts.get(e.package, 0) + 1
    assert 8 <= counts["things 1.0"] <= 11  # a file's functions go together


def test_builder(root, tmp_path):
    def prepared(folder: str):
        config = PyDocstringsConfig(name="small", packages=[package(root)])
        builder = PyDocstrings(data_dir=tmp_path / folder, config=config)
        builder.download_and_prepare(file_format="array_record")
        return builder

    builder, again = prepared("a"), prepared("b")
    assert builder.info.redistribution_info.license == "permissive, each package's own: MIT"
    assert "things 1.0: MIT" in builder.info.description
    expected = collect(files_of(package(root)))
    for split, examples in expected.items():
        rows = [{key: value.decode() for key, value in row.items()} for row in builder.as_data_source(split=split)]
        assert sorted(row["id"] for row in rows) == sorted(e.id for e in examples)
        assert {row["id"]: row["positive"] for row in rows} == {e.id: e.positive for e in examples}
        assert rows == [{k: v.decode() for k, v in row.items()} for row in again.as_data_source(split=split)]


def test_other_versions_are_another_data_set(root, monkeypatch, tmp_path):
    names = set()
    for version in ("1.0", "1.0", "1.1"):
        monkeypatch.setattr(py_docstrings, "permissive", lambda _, version=version: [package(root, version=version)])
        names.add(py_docstrings.installed().name)
    assert len(names) == 2
    builder = tfds.builder("py_docstrings", data_dir=tmp_path)
    assert builder.builder_config.name in str(builder.data_dir) and builder.builder_config.packages


def test_no_tensorflow():
    code = "import sys, jaxembed.datasets.py_docstrings; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
