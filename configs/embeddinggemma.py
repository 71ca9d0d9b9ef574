"""Fine-tune EmbeddingGemma (arXiv:2509.20354) on your own pairs: bidirectional Gemma 3, mean, two linear layers.

    python -m jaxembed.train --config=configs/embeddinggemma.py:h200 --data=pairs.jsonl.gz --workdir=runs/gemma
    python -m jaxembed.train --config=configs/embeddinggemma.py:tiny --data=pairs.jsonl.gz --workdir=runs/tiny

The folder's own prompts ('task: search result | query: ' and 'title: none | text: ') are used and kept; attention,
windows, pooling and the layers after it are as the folder says. Vectors also serve at 512, 256 and 128 dimensions, as
those of the original. The argument names the machine: 'h200' (one GPU; the default), 'v5e-16', 'v5p-64', or 'tiny': a
small model of the same architecture, from scratch, for a laptop's first minutes.

Not run at full size yet. docs/scaling.md lists the bytes that a chip of each machine holds.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

MACHINES = {
    "h200": {"batch_size": 1024, "grad_cache": 16, "mesh": {}},
    "v5e-16": {"batch_size": 2048, "grad_cache": 8, "mesh": {"data": 4, "fsdp": 4}},
    "v5p-64": {"batch_size": 8192, "grad_cache": 2, "mesh": {"data": 16, "fsdp": 4}},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"h200": "h200:1", "v5e-16": "v5e:4x4", "v5p-64": "v5p:4x4x4"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a machine of MACHINES or 'tiny'."""
    c = default_config()
    c.epochs = 1.0
    c.model.init = "hf:google/embeddinggemma-300m"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.data.max_length.query, c.data.max_length.document = 128, 512
    c.data.row_length = "512"
    c.data.negatives = 1
    c.loss.temperature = 0.05
    c.matryoshka.dims = (512, 256, 128)
    c.optimizer.learning_rate = 2e-5
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 100
    if arg == "tiny":
        c.epochs, c.steps, c.batch_size, c.grad_cache = 0.0, 6, 16, 2
        c.model.init, c.model.arch, c.tokenizer = "scratch", "gemma3_text", "train:bpe:600"
        c.model.attention = "bidirectional"
        c.model.shape = {
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 48,
            "sliding_window": 16,
        }
        c.model.dtype = "float32"
        c.matryoshka.dims = (16,)
        c.data.max_length.query, c.data.max_length.document, c.data.row_length = 48, 64, "auto"
        c.optimizer.warmup_steps = 2
        return c
    known = (*MACHINES, "tiny")
    if arg and arg not in known:
        raise ValueError(f"configs/embeddinggemma.py knows the arguments {', '.join(known)}, not {arg!r}")
    c.update(MACHINES[arg or "h200"])
    return c
