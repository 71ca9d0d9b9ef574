"""Make an embedder of a diffusion language model, Dream-7B, for long documents: DiffEmbed (arXiv:2505.15045).

    python -m jaxembed.train --config=configs/diffembed_dream_7b_lora.py:h200 --data=pairs.jsonl.gz --workdir=runs/dream
    python -m jaxembed.train --config=configs/diffembed_dream_7b_lora.py:tiny --config.model.init=hf:FOLDER \
        --data=pairs.jsonl.gz --workdir=runs/tiny

Dream has learned to fill masked words in, so it reads a text from both sides before any training for vectors: these are
the means of its tokens' states, the prompt's included. Adapters of rank 16 beside all linear layers are trained, the
base stays in bfloat16. Rank, 4,096 tokens, 5e-5 after 100 steps, 64,000 pairs with a hard negative each and the
temperature 1 / 20 are those of the paper's code (siyue-zhang/DiffEmbed, train_configs/supervised/Dream_long.json, for
the E5 data; alpha and dropout are LLM2Vec's, which it builds on), whose batch was 16 pairs on 4 GPUs. `python -m
jaxembed.export` writes a bidirectional qwen2 that needs no code of the hub; with `--layout=hub` a Dream again.

The argument names the machine: 'h200' (one GPU; the default), 'v5e-16', 'v5p-64', or 'tiny', small batches for a small
model in FOLDER.

Not run at full size yet. docs/scaling.md lists the bytes that a chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

TASK = "Given a web search query, retrieve relevant passages that answer the query"
MACHINES = {
    "h200": {"batch_size": 64, "grad_cache": 16, "mesh": {}},
    "v5e-16": {"batch_size": 64, "grad_cache": 4, "mesh": {"data": 1, "fsdp": 16}},
    "v5p-64": {"batch_size": 256, "grad_cache": 2, "mesh": {"data": 4, "fsdp": 16}},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4"}
PAIRS = 64_000


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES or 'tiny'."""
    c = default_config()
    c.model.init = "hf:Dream-org/Dream-v0-Instruct-7B"
    c.model.pooling = "mean"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.model.lora.rank = 16
    c.model.lora.alpha = 32.0
    c.model.lora.dropout = 0.05
    c.prompts.query = f"{TASK}: "
    c.data.max_length.query, c.data.max_length.document = 512, 4096
    c.data.row_length = "4096"
    c.data.negatives = 1
    c.loss.temperature = 0.05
    c.optimizer.learning_rate = 5e-5
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup_steps = 100
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
        raise ValueError(f"configs/diffembed_dream_7b_lora.py knows the arguments {', '.join(known)}, not {arg!r}")
    c.update(MACHINES[arg or "h200"])
    c.steps = PAIRS // c.batch_size
    return c
