"""The recipes for real checkpoints: every machine's config loads, and the tiny mode trains, exports and verifies."""

import functools
import importlib.util
import math
import pathlib

import jax
import numpy as np
import pytest
from test_architectures import make, save_qwen
from tiny_run import sentence, write_lines, write_tokenizer

from jaxembed import config as config_lib
from jaxembed import sharding, trainer
from jaxembed.config import MeshConfig
from jaxembed.verification import verify

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMES = (
    "qwen3_0p6b",
    "mistral_7b_lora",
    "embeddinggemma",
    "modernbert",
    "t5_encoder",
    "nomic_moe",
    "qwen3_30b_a3b",
    "mamba_retriever_130m",
    "mamba2_long",
    "bimamba",
    "diffembed_dream_7b_lora",
    "llada_8b_lora",
)
STEPS = 2


def get_config(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


@pytest.mark.parametrize("name", NAMES)
def test_every_machine_has_a_config(name):
    for machine, chips in (("h200", 1), ("v5e-16", 16), ("v5p-64", 64)):
        c = get_config(name)(machine)
        c.data.train[0].path = "pairs.jsonl"
        config = config_lib.load(c)
        sizes = [getattr(config.mesh, axis) for axis in sharding.AXES]
        assert math.prod(size for size in sizes if size != -1) in (1, chips)
        shards = chips // math.prod(sizes[2:3] + sizes[4:])
        assert config.batch_size % (shards * config.grad_cache) == 0
    with pytest.raises(ValueError, match=r"knows the arguments h200, v5e-16, v5p-64, .*tiny, not 'tpu'"):
        get_config(name)("tpu")


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_mode_trains_exports_and_verifies(name, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_report", lambda *_: None)  # curves are slow to draw
    on_one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])  # as a laptop has it; faster to compile
    monkeypatch.setattr(sharding, "make_mesh", on_one)
    rng = np.random.default_rng(0)
    rows = [{key: sentence(rng, 6, 6) for key in ("query", "positive", "negative")} for _ in range(40)]
    c = get_config(name)("tiny")
    c.steps, c.log_to = STEPS, ()
    c.data.train[0].path = str(write_lines(tmp_path / "pairs.jsonl", rows))
    c.data.cache_dir = str(tmp_path / "cache")
    if c.model.init != "scratch":
        write = save_qwen if "dream" in name else write_tokenizer
        write(tmp_path / "tokenizer.json")
        tokenizers = {"": tmp_path / "tokenizer.json"}
        base = "Dream" if "dream" in name else "mistral"
        make(base, "native", tokenizers, sharding.make_mesh(MeshConfig())).save(tmp_path / "base")
        c.model.init = f"hf:{tmp_path / 'base'}"
    last = trainer.train(config_lib.load(c), tmp_path / "run")
    assert last["step"] == STEPS and math.isfinite(last["loss"])
    verify(tmp_path / "run" / "export")
