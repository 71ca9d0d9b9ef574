"""Fine-tune an encoder with any of the losses, as the papers that brought them up set them.

    python -m jaxembed.train --config=configs/losses.py:NAME --config.model.init=hf:FOLDER --data=pairs.jsonl.gz \
        --workdir=runs/NAME

NAME is one of LOSSES below; without one it is infonce. `:NAME,tiny` and `:tiny` make every size small enough for a
laptop's first minute. What the records must have is said beside each name; nothing said means pairs, of which the loss
uses hard negatives if there are any. `embedding_gemma`, `gist` and `match` follow a teacher:
--config.teacher.init=hf:FOLDER. `conan` has two sources: '--config.data.train[0].path=retrieval.jsonl.gz' and
'--config.data.train[1].path=sts.jsonl.gz'.

Sizes and learning rates are ours, for MiniLM; of a paper come the loss and its numbers, where the comment names them.
Not run yet at full size.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxembed.config import default_config

SYMMETRIC = {"loss.blocks": ("qd", "dq"), "loss.partition": "separate"}
# At the rate of a fine-tuned model's weights, a temperature or a bias would hardly move.
FAST = {"optimizer.by_regex": (("loss/", 100.0),)}

LOSSES: dict[str, dict[str, Any]] = {
    # van den Oord et al. 2018, arXiv:1807.03748
    "infonce": {},
    # E5, arXiv:2212.03533; BGE, arXiv:2309.07597: temperature 0.01
    "e5": {"loss.temperature": 0.01},
    # CLIP, arXiv:2103.00020: temperature learned from 0.07
    "symmetric": SYMMETRIC | {"loss.temperature": 0.07, "loss.learn_temperature": True} | FAST,
    # GTE, arXiv:2308.03281: temperature 0.01
    "gte": {"loss.blocks": ("qd", "dq", "qq", "dd"), "loss.temperature": 0.01},
    # Qwen3-Embedding, arXiv:2506.05176: what is 0.1 more similar than the positive is no negative
    "qwen3": {"loss.blocks": ("qd", "qq", "dd"), "loss.false_negatives": "absolute", "loss.false_negative_margin": 0.1},
    # LaBSE, arXiv:1902.08564 and 2007.01852: margin 0.3
    "additive_margin": SYMMETRIC | {"loss.margin": 0.3},
    # EmbeddingGemma, arXiv:2509.20354: hardness 5. Hard negatives, a teacher
    "embedding_gemma": {"losses": ({"name": "infonce", "hardness": 5.0}, {"name": "spread_out"}, {"name": "match"})},
    # LLaVE, arXiv:2503.04812: hardness 9
    "llave": {"loss.hardness": 9.0, "loss.hardness_of": "in_batch"},
    # KaLM-Embedding-V2, arXiv:2506.20923: focal 0.5; 0.8 of a step from one source. Several hard negatives a pair
    "kalm": {"loss.focal": 0.5, "loss.mixed_negatives": 4, "data.one_source": 0.8},
    # Contrastive learning penalty, arXiv:2412.17364: weight 0.1. Hard negatives, each with a `negative_query`
    "clp": {"loss.name": "clp", "loss.penalty": 0.1},
    # GISTEmbed, arXiv:2402.16829: temperature 0.01. A teacher
    "gist": {
        "loss.blocks": ("qd", "qq", "dd"),
        "loss.false_negatives": "teacher",
        "loss.false_negative_margin": 0.0,
        "loss.temperature": 0.01,
    },
    # SigLIP, arXiv:2303.15343: temperature learned from 0.1, bias from -10
    "sigmoid": {"loss.name": "sigmoid", "loss.temperature": 0.1, "loss.learn_temperature": True, "loss.bias": -10.0}
    | FAST,
    # FaceNet, arXiv:1503.03832: margin 0.2. Hard negatives
    "triplet": {"loss.name": "triplet", "loss.margin": 0.2},
    # CoSENT, kexue.fm/archives/8847: temperature 0.05. Scores
    "cosent": {"loss.name": "cosent", "loss.temperature": 0.05},
    # AnglE, arXiv:2309.12871: beside it CoSENT (and in-batch negatives, which are for pairs that match). Scores
    "angle": {"losses": ({"name": "angle"}, {"name": "cosent"})},
    # SBERT, arXiv:1908.10084. Scores from -1 to 1
    "cosine": {"loss.name": "cosine"},
    # Margin-MSE, arXiv:2010.02666: dot products, of any length. A cross-encoder's scores, hard negatives
    "margin_mse": {"loss.name": "margin_mse", "model.normalize": False},
    # Ranking distillation as in E5, arXiv:2212.03533. A teacher's scores, hard negatives
    "kl": {"loss.name": "kl"},
    # Jasper and Stella, arXiv:2412.19048: the terms weigh 10 and 200. A teacher
    "match": {"loss.name": "match", "loss.similarity_weight": 20.0},
    # Global orthogonal regularisation, arXiv:1708.06320
    "spread_out": {"losses": ({"name": "infonce"}, {"name": "spread_out"})},
    # SimCSE without labels, arXiv:2104.08821: dropout 0.1, temperature 0.05. Records of one `text`
    "simcse": {"data.train": ({"format": "texts"},), "model.dropout": 0.1, "loss.temperature": 0.05},
    # Matryoshka, arXiv:2205.13147: each size half of the one before
    "matryoshka": {"matryoshka.dims": (192, 96, 48, 24)},
    # 2D Matryoshka, arXiv:2402.14776: depths too, which follow the full one's similarities
    "matryoshka_2d": {"matryoshka.dims": (192, 96, 48), "matryoshka.layers": (2, 4), "matryoshka.kl": 1.0},
    # Starbucks, arXiv:2410.13230: every depth with a width of its own
    "starbucks": {
        "matryoshka.dims": (48, 96, 192),
        "matryoshka.layers": (1, 2, 4),
        "matryoshka.pairs": "zip",
        "matryoshka.kl": 1.0,
    },
    # Conan-embedding, arXiv:2408.15710: both tasks in every step. Retrieval pairs, then pairs with scores
    "conan": {
        "data.train": ({"losses": ("infonce",), "share": 3.0}, {"losses": ("cosent",), "share": 1.0}),
        "losses": ({"name": "infonce"}, {"name": "cosent"}),
    },
}

# Argument → where it is to run; `make test-aot` compiles it for there.
TOPOLOGIES = {"": "h200:1", "tiny": "cpu:1"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; `arg` is '', a name of LOSSES, 'tiny' or both with a comma."""
    words = [word for word in (arg or "").split(",") if word]
    names = [word for word in words if word != "tiny"] or ["infonce"]
    if len(names) > 1 or names[0] not in LOSSES:
        raise ValueError(f"configs/losses.py knows {', '.join(LOSSES)}, each also with ',tiny', not {arg!r}")
    changes = dict(LOSSES[names[0]])
    c = default_config()
    c.epochs = 1.0
    c.batch_size = 128
    c.model.init = "hf:sentence-transformers/all-MiniLM-L6-v2"
    c.model.pooling = "mean"
    c.optimizer.learning_rate = 2e-5
    c.optimizer.warmup_steps = 50
    sources = changes.pop("data.train", ({},))
    c.data.train = tuple(ConfigDict(c.data.train[0].to_dict() | source) for source in sources)
    c.losses = tuple(ConfigDict(c.loss.to_dict() | loss) for loss in changes.pop("losses", ()))
    c.update_from_flattened_dict(changes)
    if "tiny" in words:
        c.epochs, c.steps, c.batch_size = 0.0, 20, 16
        c.data.negatives = 2
        c.optimizer.warmup_steps = 2
        c.checkpoint.every = 10
        # Sizes that the smallest of models have too.
        c.matryoshka.dims = (16,) if c.matryoshka.dims else ()
        c.matryoshka.layers = (1,) if c.matryoshka.layers else ()
    return c
