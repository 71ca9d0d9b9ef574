"""Code search from scratch, on what every machine has: docstrings → functions of the installed Python packages.

    make quickstart

or, in an environment of one's own,

    python -m jaxembed.train --config=configs/quickstart.py --workdir=runs/quickstart

A tokenizer and a one-layer encoder are trained on the functions of the standard library and of the packages that
training needs; whole files are held out, and searched before, during and after, with BM25 beside. `:tiny` makes every
size small enough for a laptop's first minute.

Run, with the versions of constraints.txt and Python 3.11 (21,437 pairs to train on, 1,563 to search): nDCG@10 9.0 →
65.7 (BM25 64.1), recall@1 49.2 (BM25 46.4). The pairs are few, and soon learnt by heart: 300 steps at temperature 0.02
and learning rate 3e-3 ended at 63.4.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

DATA = "py_docstrings"

# Argument → where it is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"": "cpu:1", "tiny": "cpu:1"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is '' or 'tiny'."""
    c = default_config()
    c.steps = 200
    c.batch_size = 256
    c.data.train[0].source, c.data.train[0].name = "tfds", DATA
    c.data.max_length.query, c.data.max_length.document = 48, 128
    c.tokenizer = "train:bpe:8192"
    c.model.arch = "bert"
    # Most of the parameters are the tokens' vectors, which cost next to nothing on a CPU; layers do.
    c.model.shape = {
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 128,
    }
    c.model.pooling = "mean"
    c.loss.temperature = 0.05
    c.loss.blocks, c.loss.partition = ("qd", "dq"), "separate"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 30
    c.eval.pairs = (f"tfds:{DATA}:test",)
    c.eval.bm25 = True
    c.eval.every = 50
    c.checkpoint.every = 100
    if arg == "tiny":
        c.steps, c.batch_size = 20, 16
        c.data.train[0].split = "train[:500]"
        c.tokenizer = "train:bpe:512"
        c.model.shape.hidden_size = c.model.shape.intermediate_size = 32
        c.eval.pairs = (f"tfds:{DATA}:test[:100]",)
        c.eval.every = c.checkpoint.every = 10
        c.optimizer.warmup_steps = 2
    elif arg:
        raise ValueError(f"configs/quickstart.py knows the argument 'tiny', not {arg!r}")
    return c
