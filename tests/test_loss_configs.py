"""configs/losses.py: every loss and preset loads, and trains its model and all that the loss itself learns."""

import importlib.util
import math
import pathlib

import numpy as np
import pytest
from test_embedder import make
from test_trainer import saved
from tiny_run import SHAPE, sentence, train_on, write_lines, write_tokenizer

from jaxembed import config as config_lib
from jaxembed.losses.objective import loss_params
from jaxembed.losses.table import LOSSES as TABLE
from jaxembed.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, TEACHER_WIDTH = 2, 16
TAUGHT = ("embedding_gemma", "gist", "match")


def load_module():
    spec = importlib.util.spec_from_file_location("losses_config", ROOT / "configs" / "losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONFIGS = load_module()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records that have all that any loss needs, a tokenizer, a teacher of another width."""
    folder = tmp_path_factory.mktemp("loss_configs")
    rng = np.random.default_rng(3)
    texts = lambda n: [sentence(rng, 4, 4) for _ in range(n)]  # noqa: E731
    rows = [
        {
            "text": sentence(rng, 4, 4),
            "query": sentence(rng, 4, 4),
            "positive": texts(1),
            "negative": texts(2),
            "negative_query": texts(2),
            "scores": rng.uniform(0, 1, 3).round(3).tolist(),
        }
        for _ in range(60)
    ]
    for name, part in (("first", rows[:40]), ("second", rows[40:])):
        write_lines(folder / f"{name}.jsonl", part)
    write_tokenizer(folder / "tokenizer.json")
    make(folder, model__shape=SHAPE | {"num_hidden_layers": 1, "hidden_size": TEACHER_WIDTH}).save(folder / "teacher")
    return folder


def small(folder, name: str) -> config_lib.Config:
    """The config's tiny mode, for two steps of a tiny model from scratch."""
    c = CONFIGS.get_config(f"{name},tiny")
    c.steps = c.checkpoint.every = STEPS
    c.optimizer.name, c.optimizer.weight_decay, c.optimizer.clip_norm = "sgd", 0.0, 0.0  # quick to compile
    c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.by_regex = 0.1, 0, ()
    c.model.init, c.model.arch = "scratch", "bert"
    c.model.shape = SHAPE | {"num_hidden_layers": 1 + len(c.matryoshka.layers)}
    c.tokenizer = f"file:{folder / 'tokenizer.json'}"
    c.data.cache_dir, c.data.row_length = str(folder / "cache"), "8"  # a text in each row: one shape
    c.export, c.log_to = False, ()
    for source, file in zip(c.data.train, ("first", "second")):
        source.path = str(folder / f"{file}.jsonl")
    if name in TAUGHT:
        c.teacher.init = f"hf:{folder / 'teacher'}"
    return config_lib.load(c)


@pytest.mark.parametrize("name", CONFIGS.LOSSES)
def test_every_loss_trains_the_model_and_its_own_parameters(folder, tmp_path, name):
    config = small(folder, name)
    train_on(1, config, tmp_path)
    lines = read_metrics(tmp_path)
    assert len(lines) == STEPS
    assert all(math.isfinite(line["loss"]) and 0 < line["grad_norm"] < math.inf for line in lines), lines
    start = loss_params(config, SHAPE["hidden_size"], TEACHER_WIDTH)
    trained = saved(tmp_path)
    for label, own in start.items():
        for key, before in own.items():
            (after,) = (x for path, x in trained.items() if path.endswith(f"['loss']['{label}']['{key}']"))
            assert (after != before).all(), (label, key)
    assert sum(map(len, start.values())) == sum(
        c.learn_temperature + len(TABLE[c.name].learns) for c in config.all_losses
    )
