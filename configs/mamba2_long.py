"""Train Mamba-2 (arXiv:2405.21060) to find long documents: 8,192 tokens a text on one GPU, 32,768 on TPU slices.

    python -m jaxembed.train --config=configs/mamba2_long.py:h200 --data=pairs.jsonl.gz --workdir=runs/mamba2
    python -m jaxembed.train --config=configs/mamba2_long.py:tiny --data=pairs.jsonl.gz --workdir=runs/tiny

A layer's time and memory grow with the tokens, not with their square. A row holds one long document, or as many
shorter ones as fit. On the slices the chips of `sequence` share a row: what one of them hands to the next is a state of
its layers, of the same size however long the text is. Causal, the vector of an end token. The learning rate is the one
with which Mamba Retriever (arXiv:2408.08066) learned texts of 8k tokens in 4 epochs. The argument names the machine:
'h200' (one GPU; the default), 'v5e-16', 'v5p-64', or 'tiny': a small model of the same architecture, from scratch, for
a laptop's first minutes.

Not run at full size yet. docs/scaling.md lists the bytes that a chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

MACHINES = {
    "h200": {"batch_size": 128, "grad_cache": 8, "mesh": {}},
    "v5e-16": {"batch_size": 64, "grad_cache": 8, "mesh": {"data": 4, "sequence": 4}},
    "v5p-64": {"batch_size": 256, "grad_cache": 4, "mesh": {"data": 16, "sequence": 4}},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4"}
ROWS = {"h200": 8192, "v5e-16": 32_768, "v5p-64": 32_768}
QUERY = 128


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES or 'tiny'."""
    c = default_config()
    c.epochs = 4.0
    c.model.init = "hf:AntonV/mamba2-130m-hf"
    c.model.pooling = "last"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.model.ssm.chunk = 128
    c.data.negatives = 1
    c.loss.temperature = 0.02
    c.optimizer.learning_rate = 1e-5
    c.optimizer.warmup_steps = 100
    if arg == "tiny":
        c.epochs, c.steps, c.batch_size, c.grad_cache = 0.0, 6, 16, 2
        c.model.init, c.model.arch, c.tokenizer = "scratch", "mamba2", "train:bpe:600"
        c.model.shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 16, "head_dim": 16}
        c.model.ssm.chunk = 16  # so that a row has some
        c.model.dtype, c.model.remat = "float32", "none"
        c.data.max_length.query, c.data.max_length.document, c.data.row_length = 48, 64, "auto"
        c.optimizer.warmup_steps = 2
        return c
    known = (*MACHINES, "tiny")
    if arg and arg not in known:
        raise ValueError(f"configs/mamba2_long.py knows the arguments {', '.join(known)}, not {arg!r}")
    c.update(MACHINES[arg or "h200"])
    row = ROWS[arg or "h200"]
    c.data.max_length.query, c.data.max_length.document = QUERY, row - QUERY  # both fit one row
    c.data.row_length = str(row)
    return c
