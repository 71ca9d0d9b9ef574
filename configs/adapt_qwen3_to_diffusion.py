"""Turn an autoregressive model into a diffusion model, then into an embedder: adapt, weak pairs, hard negatives.

    python -m jaxembed.train --config=configs/adapt_qwen3_to_diffusion.py:h200 --workdir=runs/dqwen \
        '--config.stages[0].data.train[0].path=texts.jsonl.gz' '--config.stages[1].data.train[0].path=texts.jsonl.gz' \
        '--config.stages[2].data.train[0].path=weak.jsonl.gz' '--config.stages[3].data.train[0].path=hard.jsonl.gz'

The first two stages are the recipe of DiffuLLaMA (Gong et al. 2024, arXiv:2410.17891) and Dream (arXiv:2508.15487):
masked diffusion on plain texts, a word predicted from the state before it, as the model learned to; in the first one
attention grows from causal to bidirectional (set config.model.anneal_attention to 0 there to switch at once), without
the kernels of accelerators, which know no such mask.
`python -m jaxembed.evaluate --model=runs/dqwen@STEP --texts=held_out.txt` gives the bound of the likelihood, `python
-m jaxembed.sample` fills masked words. The other two are those of NV-Embed (arXiv:2405.17428). The exported folder is
a qwen3 with `is_causal: false`, without any remote code. The argument names the machine: 'h200' (one GPU; the default),
'v5e-16', 'v5p-64', or 'tiny', small batches for a small Llama-like model in FOLDER (--config.model.init=hf:FOLDER).

Not run at full size yet. docs/scaling.md lists the bytes that a chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

MACHINES = {
    "h200": {"texts": (256, 8), "weak": (1024, 8), "hard": (256, 4), "mesh": {}},
    "v5e-16": {"texts": (256, 4), "weak": (1024, 8), "hard": (256, 4), "mesh": {"data": 1, "fsdp": 16}},
    "v5p-64": {"texts": (1024, 2), "weak": (4096, 4), "hard": (512, 2), "mesh": {"data": 4, "fsdp": 16}},
    "tiny": {"texts": (16, 2), "weak": (16, 2), "hard": (16, 1), "mesh": {}},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES."""
    if arg and arg not in MACHINES:
        raise ValueError(f"configs/adapt_qwen3_to_diffusion.py knows the arguments {', '.join(MACHINES)}, not {arg!r}")
    machine = MACHINES[arg or "h200"]
    tiny = arg == "tiny"
    c = default_config()
    c.model.init = "hf:" if tiny else "hf:Qwen/Qwen3-0.6B-Base"
    c.model.attention = "bidirectional"
    c.model.mask_token = "<|mask|>"
    c.model.pooling = "mean"
    c.model.dtype = c.export_dtype = "float32" if tiny else "bfloat16"
    c.model.remat = "none" if tiny else "full"
    c.mesh.update(machine["mesh"])
    length = 48 if tiny else 512
    c.data.max_length.query, c.data.max_length.document = length, length
    c.data.row_length = "auto" if tiny else "1024"
    c.optimizer.warmup_steps = 2 if tiny else 200
    c.checkpoint.every = 500

    def sizes(name: str, steps: int) -> dict:
        batch_size, grad_cache = machine[name]
        return {"steps": 2 if tiny else steps, "batch_size": batch_size, "grad_cache": grad_cache}

    grow = {
        "name": "grow",
        **sizes("texts", 2000),
        "data": {"train": ({"path": "", "format": "texts"},), "positives": 0, "negatives": 0},
        "loss": {"name": "masked_diffusion"},
        "optimizer": {"learning_rate": 2e-5, "schedule": "constant"},
        "model": {"anneal_attention": 2 if tiny else 2000},
    }
    adapt = grow | {"name": "adapt", **sizes("texts", 18_000), "model": {"anneal_attention": 0}}
    weak = {
        "name": "weak",
        **sizes("weak", 5000),
        "data": {"train": ({"path": ""},), "negatives": 0},
        "loss": {"name": "infonce", "temperature": 0.02},
        "optimizer": {"learning_rate": 5e-5},
    }
    hard = {
        "name": "hard",
        **sizes("hard", 2000),
        "data": {"train": ({"path": ""},), "negatives": 3},
        "loss": {"name": "infonce", "temperature": 0.02},
        "optimizer": {"learning_rate": 1e-5},
    }
    c.stages = (grow, adapt, weak, hard)
    return c
