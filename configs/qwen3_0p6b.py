"""Make an embedder of Qwen3-0.6B as Qwen3 Embedding is (arXiv:2506.05176): all weights, causal, the last token.

    python -m jaxembed.train --config=configs/qwen3_0p6b.py:h200 --data=pairs.jsonl.gz --workdir=runs/qwen3
    python -m jaxembed.train --config=configs/qwen3_0p6b.py:tiny --data=pairs.jsonl.gz --workdir=runs/tiny

The loss is that of the paper: a query meets all documents and all other queries, a document the other documents, and
what scores 0.1 above the positive is left out as a false negative. `--config.model.attention=bidirectional` with
`--config.model.pooling=mean` makes it an encoder instead. The argument names the machine: 'h200' (one GPU; the
default), 'v5e-16', 'v5p-64', 'v5e-256', or 'tiny': a small model of the same architecture, from scratch, for a
laptop's first minutes.

Not run at full size yet. docs/scaling.md lists the bytes that a chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

TASK = "Given a web search query, retrieve relevant passages that answer the query"
MACHINES = {
    "h200": {"batch_size": 1024, "grad_cache": 8, "mesh": {}},
    "v5e-16": {"batch_size": 2048, "grad_cache": 8, "mesh": {"data": 1, "fsdp": 16}},
    "v5p-64": {"batch_size": 8192, "grad_cache": 4, "mesh": {"data": 4, "fsdp": 16}},
    "v5e-256": {"batch_size": 32_768, "grad_cache": 8, "mesh": {"data": 16, "fsdp": 16}},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4", "v5e-256": "v5e:16x16"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES or 'tiny'."""
    c = default_config()
    c.epochs = 1.0
    c.model.init = "hf:Qwen/Qwen3-0.6B-Base"
    c.model.pooling = "last"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.prompts.query = f"Instruct: {TASK}\nQuery:"
    c.data.max_length.query, c.data.max_length.document = 128, 512
    c.data.row_length = "512"
    c.data.negatives = 1
    c.loss.temperature = 0.02
    c.loss.blocks = ("qd", "qq", "dd")
    c.loss.false_negatives = "absolute"
    c.loss.false_negative_margin = 0.1
    c.optimizer.learning_rate = 1e-5
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 100
    c.export_dtype = "bfloat16"
    if arg == "tiny":
        c.epochs, c.steps, c.batch_size, c.grad_cache = 0.0, 6, 16, 2
        c.model.init, c.model.arch, c.tokenizer = "scratch", "qwen3", "train:bpe:600"
        c.model.shape = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
        }
        c.model.dtype = c.export_dtype = "float32"
        c.data.max_length.query, c.data.max_length.document, c.data.row_length = 48, 64, "auto"
        c.optimizer.warmup_steps = 2
        return c
    known = (*MACHINES, "tiny")
    if arg and arg not in known:
        raise ValueError(f"configs/qwen3_0p6b.py knows the arguments {', '.join(known)}, not {arg!r}")
    c.update(MACHINES[arg or "h200"])
    return c
