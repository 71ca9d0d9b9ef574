"""Make an encoder of Mistral-7B with low-rank adapters: bidirectional, mean of the text's tokens (LLM2Vec, 2404.05961).

    python -m jaxembed.train --config=configs/mistral_7b_lora.py:h200 --data=pairs.jsonl.gz --workdir=runs/mistral
    python -m jaxembed.train --config=configs/mistral_7b_lora.py:tiny --config.model.init=hf:FOLDER \
        --data=pairs.jsonl.gz --workdir=runs/tiny

The base's weights stay as they are, in bfloat16; adapters of rank 16 beside all linear layers are trained (about 42
million numbers), and checkpoints hold these alone. A query begins with its task; the prompt is read, not pooled, as in
E5-Mistral (arXiv:2401.00368) and LLM2Vec. `python -m jaxembed.export` writes the merged model, or with `--adapter` a
PEFT folder. The argument names the machine: 'h200' (one GPU; the default), 'v5e-16', 'v5p-64', or 'tiny', small batches
for a small Llama-like model in FOLDER.

Not run at full size yet. docs/scaling.md lists the bytes that a chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

TASK = "Given a web search query, retrieve relevant passages that answer the query"
MACHINES = {
    "h200": {"batch_size": 512, "grad_cache": 16, "mesh": {}},
    "v5e-16": {"batch_size": 512, "grad_cache": 8, "mesh": {"data": 1, "fsdp": 16}},
    "v5p-64": {"batch_size": 2048, "grad_cache": 4, "mesh": {"data": 4, "fsdp": 16}},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES or 'tiny'."""
    c = default_config()
    c.steps = 1000
    c.model.init = "hf:mistralai/Mistral-7B-v0.1"
    c.model.attention = "bidirectional"
    c.model.pooling = "mean"
    c.model.pool_prompt = False
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.model.lora.rank = 16
    c.model.lora.alpha = 32.0
    c.model.lora.dropout = 0.05
    c.prompts.query = f"Instruct: {TASK}\nQuery:"
    c.data.max_length.query, c.data.max_length.document = 512, 512
    c.data.row_length = "512"
    c.data.negatives = 1
    c.loss.temperature = 0.02
    c.optimizer.learning_rate = 2e-4
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup_steps = 300
    c.checkpoint.every = 100
    c.export_dtype = "bfloat16"
    if arg == "tiny":
        c.model.init = "hf:"  # to be named: the real one is 15 GB
        c.steps, c.batch_size, c.grad_cache = 6, 16, 2
        c.model.dtype = c.export_dtype = "float32"
        c.model.lora.rank = 4
        c.data.max_length.query, c.data.max_length.document, c.data.row_length = 48, 48, "auto"
        c.optimizer.warmup_steps = 2
        return c
    known = (*MACHINES, "tiny")
    if arg and arg not in known:
        raise ValueError(f"configs/mistral_7b_lora.py knows the arguments {', '.join(known)}, not {arg!r}")
    c.update(MACHINES[arg or "h200"])
    return c
