"""The training command: what --data stands for, and the files that are looked for before anything starts."""

import pytest
from test_cli import CONFIG, assert_refused, python

from jaxembed import config, train
from jaxembed.config import SourceConfig
from jaxembed.errors import UserError

FIRST = config.to_json(
    SourceConfig(
        name="own", subset="en", split="test", data_dir="sets", source="hf", licence="mit", format="st", weight=2.0
    )
)


def source_of(spec):
    return config.build({"data": {"train": (train.source_of(FIRST, spec),)}}).data.train[0]


def test_data_flag_says_what_the_data_are_and_the_config_how_they_are_read():
    assert source_of("x/*.jsonl") == SourceConfig(path="x/*.jsonl", format="st", weight=2.0)
    assert source_of("hf:org/x") == SourceConfig(name="org/x", source="hf", format="st", weight=2.0)
    expected = SourceConfig(path="/x", split="dev", source="tfds", format="st", weight=2.0)
    assert source_of("tfds:/x:dev") == expected


def test_data_flag_keeps_the_place_where_tfds_prepares():
    expected = SourceConfig(name="x:1.0.0", source="tfds", data_dir="sets", format="st", weight=2.0)
    assert source_of("tfds:x:1.0.0") == expected


def asked(tmp_path, **changes):
    (tmp_path / "a.jsonl").touch()
    c = config.default_config()
    c.steps, c.model.init = 1, "hf:somewhere"
    c.data.train = ({"path": str(tmp_path / "a.jsonl")},)
    for name, value in changes.items():
        c[name].update(value)
    return config.load(c)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"train": ({"path": "{0}/a.jsonl"}, {"path": "{0}/*.gz"})}},
            r"config.data.train\[1\].path: .*no file",
        ),
        ({"data": {"train": ({"path": "{0}/x", "source": "hf"},)}}, r"config.data.train\[0\].path: there is no folder"),
        ({"eval": {"pairs": ("{0}/a.jsonl", "{0}/b.jsonl")}}, r"config.eval.pairs: no such file or folder: .*b\.jsonl"),
        ({"eval": {"pairs": ("tfds:",)}}, "'tfds:' names no data set"),
        ({"eval": {"classification": ("{0}/a.jsonl:{0}/b.jsonl",)}}, "config.eval.classification: no such .*b.jsonl"),
        ({"eval": {"classification": ("{0}/none",)}}, "config.eval.classification: no such file or folder: .*none"),
    ],
)
def test_files_that_are_not_there(tmp_path, changes, message):
    def fill(value):
        if isinstance(value, str):
            return value.format(tmp_path)
        return {k: fill(v) for k, v in value.items()} if isinstance(value, dict) else tuple(map(fill, value))

    with pytest.raises(UserError, match=message):
        train.require_files(asked(tmp_path, **fill(changes)))


def test_files_that_are_there(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).touch()
    evaluation = {"pairs": (f"{tmp_path}/*.jsonl", "tfds:own:test"), "classification": (str(tmp_path),)}
    train.require_files(asked(tmp_path, eval=evaluation))


def test_data_flag_takes_several_sources(tmp_path):
    (tmp_path / "a.jsonl").touch()
    result = python("-m", "jaxembed.train", CONFIG, f"--workdir={tmp_path}/run", f"--data={tmp_path}/a.jsonl,tfds:")
    assert_refused(result, "'tfds:' names no data set: wants tfds:NAME")
    result = python("-m", "jaxembed.train", CONFIG, f"--workdir={tmp_path}/run", f"--data={tmp_path}/*.jsonl,none/")
    assert_refused(result, "config.data.train[1].path: no such file or folder: none/")
