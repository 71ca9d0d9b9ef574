"""LLM2Vec's three steps: both ways, masked next tokens, then contrastive (BehnamGhader et al. 2024, arXiv:2404.05961).

    python -m jaxembed.train --config=configs/llm2vec_mntp.py:h200 --workdir=runs/llm2vec \
        '--config.stages[0].data.train[0].path=texts.jsonl.gz' '--config.stages[1].data.train[0].path=pairs.jsonl.gz'

Adapters of rank 16 beside all linear layers; first a fifth of the words of plain texts is masked, each predicted from
the state before it (MNTP), with "_" for the masked ones, as there for Mistral; then pairs. The argument names the
machine: 'h200' (one GPU; the default), 'v5e-16', 'v5p-64', or 'tiny', small batches for a small Llama-like model in
FOLDER (--config.model.init=hf:FOLDER).

Not run at full size yet. docs/scaling.md lists the bytes that a chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

MACHINES = {
    "h200": {"texts": (32, 1), "pairs": (512, 16), "mesh": {}},
    "v5e-16": {"texts": (32, 1), "pairs": (512, 8), "mesh": {"data": 1, "fsdp": 16}},
    "v5p-64": {"texts": (64, 1), "pairs": (2048, 4), "mesh": {"data": 4, "fsdp": 16}},
    "tiny": {"texts": (16, 1), "pairs": (16, 2), "mesh": {}},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES."""
    if arg and arg not in MACHINES:
        raise ValueError(f"configs/llm2vec_mntp.py knows the arguments {', '.join(MACHINES)}, not {arg!r}")
    machine = MACHINES[arg or "h200"]
    tiny = arg == "tiny"
    c = default_config()
    c.model.init = "hf:" if tiny else "hf:mistralai/Mistral-7B-v0.1"
    c.model.attention = "bidirectional"
    c.model.mask_token = "[MASK]" if tiny else "_"
    c.model.pooling = "mean"
    c.model.dtype = c.export_dtype = "float32" if tiny else "bfloat16"
    c.model.remat = "full"
    c.model.lora.rank = 4 if tiny else 16
    c.model.lora.alpha = 32.0
    c.model.lora.dropout = 0.05
    c.mesh.update(machine["mesh"])
    length = 48 if tiny else 512
    c.data.max_length.query, c.data.max_length.document = length, length
    c.data.row_length = "auto" if tiny else "512"
    c.optimizer.weight_decay = 0.0
    c.checkpoint.every = 100
    masked = {
        "name": "masked next tokens",
        "steps": 2 if tiny else 1000,
        "batch_size": machine["texts"][0],
        "grad_cache": machine["texts"][1],
        "data": {"train": ({"path": "", "format": "texts"},), "positives": 0, "negatives": 0},
        "loss": {"name": "masked_next_token", "mask_rate": 0.2},
        "optimizer": {"learning_rate": 5e-5},
    }
    pairs = {
        "name": "pairs",
        "steps": 2 if tiny else 1000,
        "batch_size": machine["pairs"][0],
        "grad_cache": machine["pairs"][1],
        "data": {"train": ({"path": ""},), "negatives": 1},
        "loss": {"name": "infonce", "temperature": 0.05},
        "optimizer": {"learning_rate": 2e-4, "warmup_steps": 0 if tiny else 300},
    }
    c.stages = (masked, pairs)
    return c
