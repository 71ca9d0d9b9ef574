"""Train a small decoder on plain texts, by one of the losses over tokens: the start of an embedder, or its next step.

    python -m jaxembed.train --config=configs/pretrain_decoder.py --data=texts.jsonl.gz --workdir=runs/next
    python -m jaxembed.train --config=configs/pretrain_decoder.py:masked_diffusion --config.model.init=run:runs/next \
        --config.tokenizer=auto --data=texts.jsonl.gz --workdir=runs/diffusion

The texts are lines with a "text", or any records, whose queries and positives are all texts then
(--config.data.train[0].format=jaxembed --config.data.positives=1). The argument names the loss: 'next_token' (the
default), 'masked_lm', 'masked_next_token' or 'masked_diffusion'; all but the first see both ways, the attention of a
model of the next token growing from causal to that over the first steps (DiffuLLaMA, arXiv:2410.17891). Behind a comma
'tiny': `:masked_lm,tiny`. `docs/benchmarks.md` compares embedders that start from each.

The masked losses' rates: BERT's 80/10/10 of 30 % (as ModernBERT, arXiv:2412.13663), 20 % of LLM2Vec (arXiv:2404.05961).
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

LOSSES = {
    "next_token": {},
    "masked_lm": {"mask_rate": 0.3, "random_rate": 0.1, "keep_rate": 0.1},
    "masked_next_token": {"mask_rate": 0.2},
    "masked_diffusion": {},
}
# Where each is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"": "h200:1", "masked_diffusion": "h200:1", "masked_lm,tiny": "cpu:1"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is a loss of LOSSES, 'tiny', or both with a comma between."""
    words = (arg or "next_token").split(",")
    tiny = words[-1] == "tiny"
    loss = (words[: -1 if tiny else None] or ["next_token"])[0]
    if loss not in LOSSES or len(words) > 1 + tiny:
        known = f"{', '.join(LOSSES)}, and tiny behind a comma"
        raise ValueError(f"configs/pretrain_decoder.py knows the arguments {known}, not {arg!r}")
    c = default_config()
    c.steps, c.batch_size, c.grad_cache = 20_000, 1024, 32
    c.tokenizer = "train:bpe:32768"
    c.model.arch = "llama"
    c.model.shape = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "max_position_embeddings": 1024,
        "rope_theta": 10_000.0,
    }
    c.model.attention = "causal" if loss == "next_token" else "bidirectional"
    c.model.pooling = "last" if loss == "next_token" else "mean"
    c.model.dtype = "bfloat16"
    c.data.train[0].format = "texts"
    c.data.positives = c.data.negatives = 0
    c.data.max_length.query = c.data.max_length.document = 512
    c.loss.name = loss
    c.loss.update(LOSSES[loss])
    c.optimizer.learning_rate = 6e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 1000
    c.optimizer.weight_decay = 0.1
    if loss != "next_token":
        c.model.anneal_attention = 1000
    if tiny:
        c.steps, c.batch_size, c.grad_cache = 8, 16, 1
        c.tokenizer = "train:bpe:512"
        c.model.shape = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
        c.model.dtype = "float32"
        c.data.max_length.query = c.data.max_length.document = 64
        c.optimizer.learning_rate, c.optimizer.warmup_steps = 3e-3, 2
        c.model.anneal_attention = min(c.model.anneal_attention, 4)
    return c
