"""`python -m jaxembed.plan`, from the config to the last line."""

import dataclasses
import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from configs import bimamba, quickstart, weak_then_hard
from jaxembed import model_source
from jaxembed.data.batch import PairShape
from jaxembed.errors import UserError
from jaxembed.plan import planned_config
from jaxembed.planning import planner, report, shapes
from jaxembed.planning.compiling import _of_message
from jaxembed.planning.topology import parse


@pytest.fixture(scope="module")
def plan():
    config = planned_config(quickstart.get_config("tiny").to_dict(), [])
    return planner.plan(config, parse("cpu:8"))


def test_figures_of_a_plan(plan):
    (step,) = plan.planned
    said = report.summary(plan.planned)
    # 16 pairs of a query of 48, one positive and seven negatives of 128 tokens; a text of 128 fills a row.
    assert (said["rows"], said["row_length"]) == (16 * 9, 128)
    assert int(step.load.lengths.sum()) == 16 * (48 + 8 * 128)
    assert said["bytes_per_chip"] == sum(said["bytes"].values())
    assert said["bytes"]["optimizer"] == 2 * said["bytes"]["parameters"] + 12  # two moments, and three counters
    assert said["fits"]
    assert said["collective_bytes_per_step"] >= 2 * 7 / 8 * said["bytes"]["parameters"]  # gradients are summed
    assert said["hardware_flops_per_chip"] * 8 >= said["model_flops_per_step"]
    assert said["step_seconds_estimate"] > 0
    assert said["pairs_per_s_estimate"] == pytest.approx(16 / said["step_seconds_estimate"])
    assert said["programs"] == [step.figures()]
    json.dumps(said)


def test_the_table(plan):
    out = io.StringIO()
    Console(file=out, width=120).print(report.tables(plan.planned, "quickstart", plan.assumptions))
    text = out.getvalue()
    for word in ("parameters, GB", "temporaries, GB", "all-reduce: number, sent MB", "a step, s", "MFU", "Assumed:"):
        assert word in text


def test_what_does_not_fit(plan):
    (step,) = plan.planned
    report.require_fitting([step], "here")
    small = dataclasses.replace(step, chip_bytes=step.compiled.used - 1000)
    assert small.missing == 1000
    assert not report.summary([small])["fits"]
    with pytest.raises(UserError, match=r"does not fit here: every text at its longest: missing 0\.00 GB .*grad_cache"):
        report.require_fitting([small], "here")
    full = dataclasses.replace(step.compiled, bytes={"parameters": 9, "optimizer": 0, "given": 0}, used=10, missing=3)
    with pytest.raises(UserError, match=r"config\.mesh\.fsdp"):
        report.require_fitting([dataclasses.replace(step, compiled=full)], "here")


def test_the_tpu_compilers_word_on_memory():
    said = (
        "RESOURCE_EXHAUSTED: CompileTimeHbmOom: Ran out of memory in memory space hbm. "
        "Used 48.97G of 15.75G hbm. Exceeded hbm capacity by 33.22G."
    )
    used, missing = _of_message(said, 99)
    assert used == int(48.97 * 2**30)
    assert missing == pytest.approx(33.22 * 2**30)
    said = "the total memory required for HLO temporaries (5.59T) exceeds available HBM (15.75G)."
    used, missing = _of_message(said, 1000)
    assert used == int(5.59 * 2**40) + 1000
    assert missing == used - 15.75 * 2**30
    with pytest.raises(UserError, match="the step does not compile: INTERNAL"):
        _of_message("INTERNAL: something else", 0)


def test_every_stage_is_planned_and_no_data_are_looked_for():
    config = planned_config(weak_then_hard.get_config("tiny").to_dict(), [])
    assert [stage["data"]["train"][0]["path"] for stage in config.stages] == ["pairs.jsonl"] * 2


def test_a_known_shape_that_is_made_to_read_both_ways():
    config = planned_config(bimamba.get_config("h200").to_dict(), [])
    blueprint = shapes.adapted(shapes.open_shape(config.model.init, config), config)
    assert (blueprint.hf_config["model_type"], blueprint.backbone.backward) == ("bimamba", "separate")


def test_lengths_of_texts_at_hand(tmp_path):
    file = tmp_path / "pairs.jsonl"
    lines = [{"query": f"word {i}", "positive": "some more words " * (1 + i % 3)} for i in range(64)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = quickstart.get_config("tiny").to_dict()
    asked["data"]["cache_dir"] = str(tmp_path / "cache")
    config = planned_config(asked, [str(file)])
    mesh = parse("cpu:8").mesh(config.mesh)
    blueprint, _ = model_source.open_source(config, tmp_path)
    longest, usual = planner._loads(config, mesh, blueprint)
    assert longest.pair == usual.pair == PairShape(1, 0)  # these records have one positive, and no negatives
    assert longest.lengths.size == usual.lengths.size == 2 * config.batch_size
    assert longest.lengths.sum() > usual.lengths.sum() > 0
    assert longest.rows > usual.rows
    assert longest.rows * longest.length >= longest.lengths.sum()
    assert usual.name.startswith("usual (")


def test_wrong_flags_answer_at_once():
    def run(*flags: str) -> str:
        done = subprocess.run([sys.executable, "-m", "jaxembed.plan", *flags], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "jax" not in done.stdout
        return done.stderr.strip()

    config = "--config=configs/quickstart.py:tiny"
    assert run(config) == "error: --topology is missing: name chips, such as v5e:4x4, h200:1 or cpu:1"
    assert run(config, "--topology=v9:1").startswith("error: --topology=v9:1: 'v9' is not one of v5e, v5p")
    assert "cpu wants a number of devices" in run(config, "--topology=cpu:x")
    assert "--data: config.stages[0] has data of its own" in run(
        "--config=configs/weak_then_hard.py:tiny", "--topology=cpu:1", "--data=pairs.jsonl"
    )


def test_what_did_not_compile_has_no_figures_of_a_program(plan):
    (step,) = plan.planned
    refused = dataclasses.replace(
        step, compiled=dataclasses.replace(step.compiled, missing=5), program=None, estimate=None
    )
    said = report.summary([step, refused])
    assert not said["fits"]
    assert said["collective_bytes_per_step"] is said["step_seconds_estimate"] is said["mfu_estimate"] is None
    assert said["programs"][0]["step_seconds_estimate"] > 0
    out = io.StringIO()
    Console(file=out, width=120).print(report.tables([step, refused], "both", ()))
    (line,) = (line for line in out.getvalue().splitlines() if "a step, s" in line)
    assert line.split("│")[3].strip() == "?" != line.split("│")[2].strip()
