"""Many weak pairs first, then fewer with hard negatives: the two stages of NV-Embed (arXiv:2405.17428).

    python -m jaxembed.train --config=configs/weak_then_hard.py --config.model.init=hf:FOLDER --workdir=runs/stages \
        '--config.stages[0].data.train[0].path=weak.jsonl.gz' '--config.stages[1].data.train[0].path=hard.jsonl.gz'

In the second stage a query's negatives are its own hard ones alone, as there: in-batch negatives do not serve data of
classes and clusters, whose texts may well match. `:tiny` makes every size small enough for a laptop's first minutes.

Not run yet at full size; `:tiny` with all-MiniLM-L6-v2, pairs of captions, then triplets of NLI: STS-B dev 86.7 → 87.1.
"""

from ml_collections import ConfigDict

from jaxembed.config import default_config

# Argument → where it is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"": "h200:1", "tiny": "cpu:1"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is '' or 'tiny'."""
    c = default_config()
    c.batch_size = 1024
    c.grad_cache = 8
    c.model.init = "hf:sentence-transformers/all-MiniLM-L6-v2"
    c.loss.temperature = 0.02
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 200
    weak = {"name": "weak", "epochs": 1.0, "data": {"train": ({"path": ""},)}}
    hard = {
        "name": "hard",
        "epochs": 2.0,
        "batch_size": 128,
        "grad_cache": 1,
        "data": {"train": ({"path": "", "in_batch": False},), "negatives": 7},
        "optimizer": {"learning_rate": 1.5e-5, "warmup_steps": 50},
    }
    if arg == "tiny":
        c.batch_size, c.grad_cache = 32, 2
        c.optimizer.warmup_steps = 2
        weak |= {"epochs": 0.0, "steps": 12}
        hard |= {"epochs": 0.0, "steps": 8, "batch_size": 16}
        hard["optimizer"]["warmup_steps"] = 2
        c.checkpoint.every = 10
    elif arg:
        raise ValueError(f"configs/weak_then_hard.py knows the argument 'tiny', not {arg!r}")
    c.stages = (weak, hard)
    return c
