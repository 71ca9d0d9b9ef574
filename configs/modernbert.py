"""Train ModernBERT-base (arXiv:2412.13663) on pairs of long texts: local and global attention, rows of 2,048 tokens.

    python -m jaxembed.train --config=configs/modernbert.py:h200 --data=pairs.jsonl.gz --workdir=runs/modernbert
    python -m jaxembed.train --config=configs/modernbert.py:tiny --data=pairs.jsonl.gz --workdir=runs/tiny

With the prompts of Nomic Embed (arXiv:2402.01613), pooling as there. The argument names the machine: 'h200' (one GPU;
the default), 'v5e-16', 'v5p-64', or 'tiny': a small model of the same architecture, from scratch, for a laptop's first
minutes.

Not run at full size yet. docs/scaling.md lists the bytes that a chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

MACHINES = {
    "h200": {"batch_size": 2048, "grad_cache": 64, "mesh": {}},
    "v5e-16": {"batch_size": 4096, "grad_cache": 64, "mesh": {"data": 16}},
    "v5p-64": {"batch_size": 16384, "grad_cache": 32, "mesh": {"data": 64}},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES or 'tiny'."""
    c = default_config()
    c.epochs = 1.0
    c.model.init = "hf:answerdotai/ModernBERT-base"
    c.model.pooling = "mean"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.prompts = {"query": "search_query: ", "document": "search_document: "}
    c.data.max_length.query, c.data.max_length.document = 256, 2048
    c.data.row_length = "2048"
    c.data.negatives = 0
    c.loss.temperature = 0.02
    c.optimizer.learning_rate = 8e-5
    c.optimizer.warmup_steps = 500
    if arg == "tiny":
        c.epochs, c.steps, c.batch_size, c.grad_cache = 0.0, 6, 16, 2
        c.model.init, c.model.arch, c.tokenizer = "scratch", "modernbert", "train:bpe:600"
        c.model.shape = {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "local_attention": 16,
        }
        c.model.dtype = "float32"
        c.data.max_length.query, c.data.max_length.document, c.data.row_length = 48, 64, "auto"
        c.optimizer.warmup_steps = 2
        return c
    known = (*MACHINES, "tiny")
    if arg and arg not in known:
        raise ValueError(f"configs/modernbert.py knows the arguments {', '.join(known)}, not {arg!r}")
    c.update(MACHINES[arg or "h200"])
    return c
