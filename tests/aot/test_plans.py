"""Every config on the machines that it names, compiled ahead of time and never run: it fits; too large ones are told.

In a tier of its own, `make test-aot`: XLA's compilers for TPUs and GPUs are large downloads, and a TPU case takes
minutes.
"""

import importlib.util
import os
import pathlib

import pytest
from rich.console import Console

from jaxembed.errors import UserError
from jaxembed.plan import ENVIRONMENT, planned_config
from jaxembed.planning import report
from jaxembed.planning.planner import plan
from jaxembed.planning.topology import parse

os.environ.update(ENVIRONMENT)  # read where the compilers are loaded
CONFIGS = pathlib.Path(__file__).resolve().parent.parent.parent / "configs"


def read(name: str):
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMED = [
    (path.stem, arg, where)
    for path in sorted(CONFIGS.glob("*.py"))
    for arg, where in read(path.stem).TOPOLOGIES.items()
]


@pytest.mark.parametrize(("name", "arg", "where"), NAMED, ids=lambda word: word or "whole")
def test_a_config_fits_where_it_is_to_run(name, arg, where, capsys):
    found = plan(planned_config(read(name).get_config(arg).to_dict(), []), parse(where))
    with capsys.disabled():
        Console(width=120).print(report.tables(found.planned, f"configs/{name}.py:{arg} on {where}", ()))
    report.require_fitting(found.planned, where)
    said = report.summary(found.planned)
    assert said["fits"]
    assert said["step_seconds_estimate"] > 0
    assert all(p.program.uncounted_loops == 0 for p in found.planned)
    # What the chips multiply is at least the model's own, and remat, gradient caching and padding leave it within 8 x.
    for step in found.planned:
        assert 0.99 * step.model_flops <= step.chips * step.hardware_flops <= 8 * step.model_flops


def test_a_7b_base_lies_in_bfloat16_once_over_its_slice():
    found = plan(planned_config(read("mistral_7b_lora").get_config("h200").to_dict(), []), parse("h200:1"))
    assert 2 * 7.1e9 < found.planned[0].compiled.bytes["given"] < 2.1 * 7.1e9


@pytest.mark.parametrize("where", ["v5e:2x2", "h200:1"])
def test_an_over_large_step_is_refused_with_the_bytes_missing(where):
    config = read("finetune_pairs").get_config("tiny")
    config.batch_size = 2**15
    found = plan(planned_config(config.to_dict(), []), parse(where))
    said = report.summary(found.planned)
    assert not said["fits"]
    assert said["missing_bytes"] > 1e9
    with pytest.raises(UserError, match=rf"does not fit {where}: .*missing [\d,.]+ GB on each chip; .*grad_cache"):
        report.require_fitting(found.planned, where)
