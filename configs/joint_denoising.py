"""Train an embedder and a denoiser at once: contrastive pairs, and the words of their texts under masks.

    python -m jaxembed.train --config=configs/joint_denoising.py --config.model.init=run:runs/diffusion \
        --data=pairs.jsonl.gz --workdir=runs/joint

The contrastive loss also sees a noised view: a part of every query's words is masked, drawn anew each step. Beside it
the model predicts the masked words of documents (masked diffusion, LLaDA, arXiv:2502.09992), with a weight that falls
in a line, so that the last steps are the contrastive loss's. `config.model.init` is a checkpoint that predicts words: a
run of configs/pretrain_decoder.py, a decoder, a BERT (then name masked_lm in place of masked_diffusion). `:tiny` makes
every size small.

Not run at full size yet; docs/benchmarks.md has it for a small decoder.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"": "h200:1", "tiny": "cpu:1"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is '' or 'tiny'."""
    c = default_config()
    c.steps, c.batch_size, c.grad_cache = 2000, 1024, 8
    c.model.init = "hf:Qwen/Qwen3-0.6B-Base"
    c.model.mask_token = "<|mask|>"
    c.model.attention = "bidirectional"
    c.model.pooling = "mean"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.data.mask.query = 0.1
    c.data.max_length.query, c.data.max_length.document = 256, 256
    c.data.row_length = "512"
    denoising = {"name": "masked_diffusion", "weight": 0.2, "weight_end": 0.0, "sides": ("document",)}
    c.losses = ({"name": "infonce", "temperature": 0.05}, denoising)
    c.optimizer.learning_rate = 2e-5
    c.optimizer.warmup_steps = 100
    c.export_dtype = "bfloat16"
    if arg == "tiny":
        c.model.init = "hf:"  # to be named
        c.steps, c.batch_size, c.grad_cache = 6, 16, 2
        c.model.dtype = c.export_dtype = "float32"
        c.model.remat = "none"
        c.data.max_length.query, c.data.max_length.document, c.data.row_length = 48, 48, "auto"
        c.optimizer.warmup_steps = 2
    elif arg:
        raise ValueError(f"configs/joint_denoising.py knows the argument 'tiny', not {arg!r}")
    return c
