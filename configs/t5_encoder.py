"""Make a dual encoder of T5's encoder: mean, a linear layer, unit length (Sentence-T5, 2108.08877; GTR, 2112.07899).

    python -m jaxembed.train --config=configs/t5_encoder.py:h200 --data=pairs.jsonl.gz --workdir=runs/t5
    python -m jaxembed.train --config=configs/t5_encoder.py:tiny --data=pairs.jsonl.gz --workdir=runs/tiny

The optimizer is AdamW, as with the peers in PyTorch (the papers: Adafactor at a constant rate of 1e-3). The
computation is in bfloat16, in which T5's large activations are safe (in float16 they are not). The argument names the
machine: 'h200' (one GPU; the default), 'v5e-16', 'v5p-64', or 'tiny': a small model of the same architecture, from
scratch, for a laptop's first minutes.

Not run at full size yet. docs/scaling.md lists the bytes that a chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

MACHINES = {
    "h200": {"batch_size": 2048, "grad_cache": 32, "mesh": {}},
    "v5e-16": {"batch_size": 2048, "grad_cache": 16, "mesh": {"data": 16}},
    "v5p-64": {"batch_size": 8192, "grad_cache": 4, "mesh": {"data": 64}},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES or 'tiny'."""
    c = default_config()
    c.epochs = 1.0
    c.model.init = "hf:google/t5-v1_1-base"
    c.model.pooling = "mean"
    c.model.projection = 768
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.data.max_length.query, c.data.max_length.document = 64, 512
    c.data.row_length = "512"
    c.data.negatives = 1
    c.loss.temperature = 0.01
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 500
    if arg == "tiny":
        c.epochs, c.steps, c.batch_size, c.grad_cache = 0.0, 6, 16, 2
        c.model.init, c.model.arch, c.tokenizer = "scratch", "t5", "train:bpe:600"
        c.model.shape = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 48}
        c.model.projection = 24
        c.model.dtype = "float32"
        c.data.max_length.query, c.data.max_length.document, c.data.row_length = 48, 64, "auto"
        c.optimizer.warmup_steps = 2
        return c
    known = (*MACHINES, "tiny")
    if arg and arg not in known:
        raise ValueError(f"configs/t5_encoder.py knows the arguments {', '.join(known)}, not {arg!r}")
    c.update(MACHINES[arg or "h200"])
    return c
