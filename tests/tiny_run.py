"""What tests of training share: a small vocabulary, records with every turn a record can take, a small config."""

import itertools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from jaxembed import config as config_lib
from jaxembed import sharding, trainer
from jaxembed.reporting import curves
from jaxembed.storage import AnyPath

SYLLABLES = ("ka", "lo", "mi", "ru", "se", "to", "vu", "ni", "pa")
WORDS = [first + second for first, second in itertools.product(SYLLABLES, repeat=2)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.1,
}
SHALLOW = SHAPE | {"num_hidden_layers": 1}  # for runs of which the model is not the point


def write_tokenizer(path: pathlib.Path) -> pathlib.Path:
    """Writes a WordPiece tokenizer.json that knows WORDS and can spell others; returns its path."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:!?-'"
    pieces = dict.fromkeys([*SPECIAL, *letters, *(f"##{c}" for c in letters), *WORDS])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    backend.save(str(path))
    return path


def sentence(rng: np.random.Generator, shortest: int = 2, longest: int = 14) -> str:
    """A sequence of words."""
    return " ".join(rng.choice(WORDS, rng.integers(shortest, longest + 1)))


def write_pairs(path: pathlib.Path, n: int, seed: int) -> pathlib.Path:
    """Writes plain pairs, all of one length, so that every batch has one shape; returns the path."""
    rng = np.random.default_rng(seed)
    rows = [{"query": sentence(rng, 8, 8), "positive": sentence(rng, 8, 8)} for _ in range(n)]
    return write_lines(path, rows)


def write_records(path: pathlib.Path, n: int, seed: int) -> pathlib.Path:
    """Writes records with 1 to 3 positives, 0 to 2 hard negatives, groups, and texts that repeat; returns the path."""
    rng = np.random.default_rng(seed)
    common = [sentence(rng) for _ in range(8)]
    pick = lambda: common[rng.integers(8)] if rng.random() < 0.2 else sentence(rng)  # noqa: E731
    rows = []
    for _ in range(n):
        row = {
            "query": pick(),
            "positive": [pick() for _ in range(rng.integers(1, 4))],
            "negative": [pick() for _ in range(rng.integers(0, 3))],
        }
        rows.append(row | ({"group": f"g{rng.integers(4)}"} if rng.random() < 0.5 else {}))
    return write_lines(path, rows)


def write_lines(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    """Writes a JSON object per line; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_config(folder: pathlib.Path, **changes: object) -> config_lib.Config:
    """A run from scratch over two sources of hard records in `folder`; `changes` are fields, dots as '__'."""
    c = config_lib.default_config()
    c.steps, c.batch_size = 20, 32
    c.model.arch, c.model.shape = "bert", SHAPE
    c.tokenizer = f"file:{write_tokenizer(folder / 'tokenizer.json')}"
    c.data.train = (
        {"path": str(write_records(folder / "a.jsonl", 150, 1))},
        {"path": str(write_records(folder / "b.jsonl", 100, 2)), "weight": 2.0, "negatives_from": "all"},
    )
    c.data.positives, c.data.negatives = 2, 2
    c.data.cache_dir = str(folder / "cache")
    c.optimizer.learning_rate = 3e-4
    values = c.to_dict()
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        node = values
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return config_lib.load(values)


def train_on(devices: int, config: config_lib.Config, workdir: AnyPath, pictures: bool = False, **options: Any) -> dict:
    """Trains on the first of the virtual devices: the fewer, the quicker to compile.

    Without `pictures` the curves of the report and of the card are no picture: drawing takes longer than many a run.
    """
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:devices]))
        if not pictures:
            patch.setattr(curves, "render", lambda title, fill: b"no picture")
        return trainer.train(config, workdir, **options)
