"""Make a sparse encoder as Nomic Embed v2 is (arXiv:2502.07972): a dense one upcycled to 8 experts in every 2nd layer.

    python -m jaxembed.train --config=configs/nomic_moe.py:h200 --data=pairs.jsonl.gz --workdir=runs/nomic
    python -m jaxembed.train --config=configs/nomic_moe.py:minilm --data=pairs.jsonl.gz --workdir=runs/sparse
    python -m jaxembed.train --config=configs/nomic_moe.py:tiny --data=pairs.jsonl.gz --workdir=runs/tiny

A token takes 2 experts; at step 0 the vectors are the dense model's. The argument names the machine: 'h200' (one GPU;
the default), 'v5e-16', 'v5p-64'; or 'minilm', all-MiniLM-L6-v2 upcycled, for two CPU cores; or 'tiny': a small model of
the same architecture, from scratch, for a laptop's first minutes. `--config.model.experts.routing=source
--config.model.experts.top_k=1` gives each source of the data an expert of its own instead (arXiv:2401.15713).

Not run at full size yet, but for ':minilm': docs/benchmarks.md has its scores. docs/scaling.md lists the bytes that a
chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

MACHINES = {
    "h200": {"batch_size": 2048, "grad_cache": 8, "mesh": {}},
    "v5e-16": {"batch_size": 4096, "grad_cache": 16, "mesh": {"data": 4, "expert": 4}},
    "v5p-64": {"batch_size": 16384, "grad_cache": 4, "mesh": {"data": 16, "expert": 4}},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4", "minilm": "cpu:1"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES, 'minilm' or 'tiny'."""
    c = default_config()
    c.epochs = 1.0
    c.model.init = "hf:nomic-ai/nomic-embed-text-v1-unsupervised"
    c.model.pooling = "mean"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.model.experts.upcycle = 8
    c.model.experts.every = 2
    c.prompts = {"query": "search_query: ", "document": "search_document: "}
    c.data.max_length.query, c.data.max_length.document = 128, 512
    c.data.row_length = "512"
    c.data.negatives = 1
    c.loss.temperature = 0.02
    c.optimizer.learning_rate = 2e-5
    c.optimizer.warmup_steps = 500
    if arg in ("minilm", "tiny"):
        c.model.dtype, c.model.remat = "float32", "none"
        c.prompts = {"query": "", "document": ""}
        c.data.max_length.query, c.data.max_length.document, c.data.row_length = 64, 64, "auto"
    if arg == "minilm":
        c.epochs, c.steps, c.batch_size = 0.0, 300, 128
        c.model.init = "hf:sentence-transformers/all-MiniLM-L6-v2"
        c.loss.temperature = 0.05
        c.optimizer.warmup_steps = 30
        c.optimizer.by_regex = (("experts/router", 10.0),)  # fresh weights, in a short run
        return c
    if arg == "tiny":
        c.epochs, c.steps, c.batch_size, c.grad_cache = 0.0, 6, 16, 2
        c.model.init, c.model.arch, c.tokenizer = "scratch", "nomic_moe", "train:bpe:600"
        c.model.experts.upcycle, c.model.experts.every = 0, 1  # its shape has the experts
        c.model.shape = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "num_experts": 4,
            "moe_top_k": 2,
        }
        c.optimizer.warmup_steps = 2
        return c
    known = (*MACHINES, "minilm", "tiny")
    if arg and arg not in known:
        raise ValueError(f"configs/nomic_moe.py knows the arguments {', '.join(known)}, not {arg!r}")
    c.update(MACHINES[arg or "h200"])
    return c
