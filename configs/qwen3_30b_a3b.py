"""Make an embedder of Qwen3-30B-A3B: a mixture of 128 experts a layer, of which a token takes 8; bidirectional, mean.

    python -m jaxembed.train --config=configs/qwen3_30b_a3b.py:v5p-64 --data=pairs.jsonl.gz --workdir=runs/qwen3_moe
    python -m jaxembed.train --config=configs/qwen3_30b_a3b.py:tiny --data=pairs.jsonl.gz --workdir=runs/tiny

On 'v5p-64' and 'v5e-256' all weights are trained: experts lie along the mesh axis `expert`, so that a token travels to
its experts and back, their kernels and all other weights along `fsdp` too. On 'h200' (one GPU; the default) and
'v5e-16' adapters beside attention's projections are trained, the base stays in bfloat16. 'tiny' is a small model of the
same architecture, from scratch, for a laptop's first minutes.

Not run at full size yet. docs/scaling.md lists the bytes that a chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

TASK = "Given a web search query, retrieve relevant passages that answer the query"
MACHINES = {
    "h200": {"batch_size": 512, "grad_cache": 8, "mesh": {}},
    "v5e-16": {"batch_size": 512, "grad_cache": 4, "mesh": {"data": 1, "fsdp": 4, "expert": 4}},
    "v5p-64": {"batch_size": 2048, "grad_cache": 4, "mesh": {"data": 1, "fsdp": 4, "expert": 16}},
    "v5e-256": {"batch_size": 4096, "grad_cache": 8, "mesh": {"data": 1, "fsdp": 16, "expert": 16}},
}
ADAPTERS = ("h200", "v5e-16")
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4", "v5e-256": "v5e:16x16"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES or 'tiny'."""
    c = default_config()
    c.epochs = 1.0
    c.model.init = "hf:Qwen/Qwen3-30B-A3B-Base"
    c.model.attention = "bidirectional"
    c.model.pooling = "mean"
    c.model.pool_prompt = False
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.prompts.query = f"Instruct: {TASK}\nQuery:"
    c.data.max_length.query, c.data.max_length.document = 128, 512
    c.data.row_length = "512"
    c.data.negatives = 1
    c.loss.temperature = 0.02
    c.optimizer.learning_rate = 1e-5
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 100
    c.router.z = 1e-3
    c.log_every = 10  # a line holds the load of every expert
    c.export_dtype = "bfloat16"
    if arg == "tiny":
        c.epochs, c.steps, c.batch_size, c.grad_cache = 0.0, 6, 16, 2
        c.model.init, c.model.arch, c.tokenizer = "scratch", "qwen3_moe", "train:bpe:600"
        c.model.shape = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        }
        c.model.dtype = c.export_dtype = "float32"
        c.data.max_length.query, c.data.max_length.document, c.data.row_length = 48, 64, "auto"
        c.optimizer.warmup_steps, c.log_every = 2, 1
        return c
    known = (*MACHINES, "tiny")
    if arg and arg not in known:
        raise ValueError(f"configs/qwen3_30b_a3b.py knows the arguments {', '.join(known)}, not {arg!r}")
    if (arg or "h200") in ADAPTERS:
        c.model.lora.rank, c.model.lora.alpha, c.model.lora.targets = 16, 32.0, "self_attn"
        c.optimizer.learning_rate, c.optimizer.weight_decay = 2e-4, 0.0
        c.router.z = 0.0  # routers stay as they are
    c.update(MACHINES[arg or "h200"])
    return c
