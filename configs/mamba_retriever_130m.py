"""Make a retriever of Mamba-130M as Mamba Retriever is (arXiv:2408.08066): causal, the vector of an end token.

    python -m jaxembed.train --config=configs/mamba_retriever_130m.py:h200 --data=marco.jsonl.gz --workdir=runs/mamba
    python -m jaxembed.train --config=configs/mamba_retriever_130m.py:tiny --data=pairs.jsonl.gz --workdir=runs/tiny

The data are those of MS MARCO's passages: a query, its positives, hard negatives. The paper's are the model, the end
token behind every text, cosines, and from its README (github.com/41924076/MambaRetriever) two epochs at a learning rate
of 1e-5 in float32, which gave MRR@10 32.3. Ours are the temperature of 0.01, 7 hard negatives, texts of at most 32 and
128 tokens, as usual for this set, the batch, and bfloat16: state-space layers keep step sizes, decays and states in
float32 in any case. The argument names the machine: 'h200' (one GPU; the default), 'v5e-16', 'v5p-64', or 'tiny': a
small model of the same architecture, from scratch, for a laptop's first minutes.

Not run at full size yet. docs/scaling.md lists the bytes that a chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

# What a chip's own memory holds decides how states are computed: a few tokens of all states at once, or one by one.
BY_STEPS = {"ssm": {"kernel": "steps"}}
MACHINES = {
    "h200": {"batch_size": 512, "grad_cache": 4, "mesh": {}, "model": {"ssm": {"chunk": 4}}},
    "v5e-16": {"batch_size": 1024, "grad_cache": 2, "mesh": {"data": 16}, "model": BY_STEPS},
    "v5p-64": {"batch_size": 4096, "grad_cache": 2, "mesh": {"data": 64}, "model": BY_STEPS},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES or 'tiny'."""
    c = default_config()
    c.epochs = 2.0
    c.model.init = "hf:state-spaces/mamba-130m-hf"
    c.model.pooling = "last"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.data.max_length.query, c.data.max_length.document = 32, 128
    c.data.row_length = "512"
    c.data.negatives = 7
    c.loss.temperature = 0.01
    c.optimizer.learning_rate = 1e-5
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
        raise ValueError(f"configs/mamba_retriever_130m.py knows the arguments {', '.join(known)}, not {arg!r}")
    c.update(MACHINES[arg or "h200"])
    return c
