"""The quickstart: its config, and the way from installed functions to an exported folder."""

import importlib.util
import pathlib

import pytest
from conftest import ROOT
from tiny_run import train_on

from jaxembed import config as config_lib
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.datasets.installed_packages import Package
from jaxembed.datasets.py_docstrings import PyDocstrings, PyDocstringsConfig
from jaxembed.metrics import read_metrics

COLOURS = ("red", "green", "blue", "grey", "brown", "pink", "white", "black", "orange", "purple")
THINGS = ("house", "river", "lamp", "table", "bird", "stone", "cloud", "ship", "road", "letter", "tree", "wheel")


def get_config(arg: str):
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize("arg", ["", "tiny"])
def test_config_loads(arg):
    assert config_lib.load(get_config(arg)).tokenizer.startswith("train:bpe:")


def test_config_knows_no_other_argument():
    with pytest.raises(ValueError, match="knows the argument 'tiny', not 'huge'"):
        get_config("huge")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    """The folder of a small data set of the quickstart's kind."""
    root = tmp_path_factory.mktemp("site")
    for i, colour in enumerate(COLOURS):
        for thing in THINGS:
            text = f'def {thing}_{i}(x):\n    """Paint the {thing} in {colour}."""\n    {colour} = {i}\n'
            (root / f"{colour}_{thing}.py").write_text(text + f"    return {thing}.paint(x, {colour})\n")
    names = [path.name for path in root.iterdir()]
    package = Package("things", "1.0", "MIT", root, lambda: names)
    builder = PyDocstrings(data_dir=root / "data", config=PyDocstringsConfig(name="small", packages=[package]))
    builder.download_and_prepare(file_format="array_record")
    return pathlib.Path(builder.data_dir)


def test_quickstart_trains_evaluates_and_exports(prepared, tmp_path):
    c = get_config("tiny")
    c.data.train[0].name, c.data.train[0].path, c.data.train[0].split = "", str(prepared), "train"
    c.eval.pairs = (f"tfds:{prepared}:train",)  # held-out ones are too few here to be told apart
    c.data.cache_dir = str(tmp_path / "cache")
    train_on(2, config_lib.load(c), tmp_path / "run", pictures=True)
    lines = read_metrics(tmp_path / "run")
    (task,) = {name for line in lines for name in line if name.startswith("eval/pairs/") and name.count("/") == 2}
    scores = [line[task] for line in lines if task in line]
    assert len(scores) == 3 and scores[-1] > scores[0]
    assert lines[0][task.replace("eval/", "bm25/")] > 50  # its words are those of the code
    assert lines[-1]["loss"] < lines[1]["loss"]
    exported, own = (Tokenizer.load(f"hf:{tmp_path / 'run' / name}") for name in ("export", "model"))
    assert exported.fingerprint() == own.fingerprint()
    assert 261 < own.vocab_size <= 512
