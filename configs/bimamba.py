"""Make an encoder of Mamba-130M that reads every text both ways: a second mixer in each layer reads it from its end.

    python -m jaxembed.train --config=configs/bimamba.py:h200 --data=pairs.jsonl.gz --workdir=runs/bimamba
    python -m jaxembed.train --config=configs/bimamba.py:tiny --data=pairs.jsonl.gz --workdir=runs/tiny

The backward mixers begin as copies of the forward ones; a layer adds the average of both (as in Vision Mamba,
arXiv:2401.09417, mixers of their own read backwards). Vectors are the mean of all tokens. With
`--config.model.ssm.directions=shared` one mixer reads both ways: half the parameters, the same time. The exported
folder needs trust_remote_code=True elsewhere, since transformers has no such model. The argument names the machine:
'h200' (one GPU; the default), 'v5e-16', 'v5p-64', or 'tiny': a small model of the same architecture, from scratch, for
a laptop's first minutes.

Not run at full size yet. docs/scaling.md lists the bytes that a chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

# As in configs/mamba_retriever_130m.py.
BY_STEPS = {"ssm": {"kernel": "steps"}}
MACHINES = {
    "h200": {"batch_size": 1024, "grad_cache": 8, "mesh": {}, "model": {"ssm": {"chunk": 4}}},
    "v5e-16": {"batch_size": 2048, "grad_cache": 8, "mesh": {"data": 16}, "model": BY_STEPS},
    "v5p-64": {"batch_size": 8192, "grad_cache": 4, "mesh": {"data": 64}, "model": BY_STEPS},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES or 'tiny'."""
    c = default_config()
    c.epochs = 1.0
    c.model.init = "hf:state-spaces/mamba-130m-hf"
    c.model.attention = "bidirectional"
    c.model.pooling = "mean"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.data.max_length.query, c.data.max_length.document = 64, 512
    c.data.row_length = "512"
    c.data.negatives = 1
    c.loss.temperature = 0.02
    c.optimizer.learning_rate = 5e-5
    c.optimizer.warmup_steps = 500
    if arg == "tiny":
        c.epochs, c.steps, c.batch_size, c.grad_cache = 0.0, 6, 16, 2
        c.model.init, c.model.arch, c.tokenizer = "scratch", "mamba", "train:bpe:600"
        c.model.shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
        c.model.dtype, c.model.remat = "float32", "none"
        c.data.max_length.query, c.data.max_length.document, c.data.row_length = 48, 64, "auto"
        c.optimizer.warmup_steps = 2
        return c
    known = (*MACHINES, "tiny")
    if arg and arg not in known:
        raise ValueError(f"configs/bimamba.py knows the arguments {', '.join(known)}, not {arg!r}")
    c.update(MACHINES[arg or "h200"])
    return c
