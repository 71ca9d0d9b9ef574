"""Make an embedder of a diffusion language model, LLaDA-8B (arXiv:2502.09992).

    python -m jaxembed.train --config=configs/llada_8b_lora.py:h200 --data=pairs.jsonl.gz --workdir=runs/llada
    python -m jaxembed.train --config=configs/llada_8b_lora.py:tiny --data=pairs.jsonl.gz --workdir=runs/tiny

LLaDA has learned to fill masked words in, and was never causal. Its vectors are the means of the tokens' states;
adapters of rank 16 beside all linear layers are trained, the base stays in bfloat16. No paper gives a recipe of LLaDA's
own: the figures are those of DiffEmbed for Dream-7B (configs/diffembed_dream_7b_lora.py). 4,096 tokens are the most
that it takes. `python -m jaxembed.export` writes a bidirectional llama that needs no code of the hub; with
`--layout=hub` a LLaDA again.

The argument names the machine: 'h200' (one GPU; the default), 'v5e-16', 'v5p-64', or 'tiny': a small model of the same
architecture, from scratch and without adapters, for a laptop's first minutes.

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
    c.model.init = "hf:GSAI-ML/LLaDA-8B-Instruct"
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
        c.steps, c.batch_size, c.grad_cache = 6, 16, 2
        c.model.init, c.model.arch, c.tokenizer = "scratch", "llada", "train:bpe:600"
        c.model.shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 48}
        c.model.lora.rank, c.model.dtype, c.export_dtype = 0, "float32", "float32"
        c.model.lora.alpha, c.model.lora.dropout = 16.0, 0.0
        c.data.max_length.query, c.data.max_length.document, c.data.row_length = 48, 64, "auto"
        c.optimizer.warmup_steps = 2
        return c
    known = (*MACHINES, "tiny")
    if arg and arg not in known:
        raise ValueError(f"configs/llada_8b_lora.py knows the arguments {', '.join(known)}, not {arg!r}")
    c.update(MACHINES[arg or "h200"])
    c.steps = PAIRS // c.batch_size
    return c
