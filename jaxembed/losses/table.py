"""The losses by name: where each lives, which fields of the config it takes, what its data must have. No jax here."""

import dataclasses
import importlib
from collections.abc import Callable

SCORES, COSINES, MATCHES = "scores", "scores from -1 to 1", "positives that match"
NEGATIVES, NEGATIVE_QUERIES = "hard negatives", "negative_query"
TEACHER, SCORES_OR_TEACHER = "a teacher", "scores, or a teacher"
MIN_TEMPERATURE = 0.01  # a learned temperature stays above it: scale at most 100, as in CLIP (arXiv:2103.00020)
ENGINE = ("exchange", "precision", "tile")  # fields of all losses that compare every text with every other


@dataclasses.dataclass(frozen=True)
class Entry:
    """A loss.

    Attributes:
      where: 'module:function' in `jaxembed.losses`. The function is called with an `Embedded` and the fields of
        `takes` as keyword arguments, and returns (loss, metrics).
      takes: fields of `LossConfig`; `temperature` and `bias` come as arrays, learned or not.
      needs: what every record of its sources must have (SCORES, COSINES, MATCHES, NEGATIVES,
        NEGATIVE_QUERIES), or the run (TEACHER), or one of both (SCORES_OR_TEACHER).
      learns: parameters of its own that it always trains: 'bias', 'projection'.
      over_tokens: whether it is about tokens and not vectors. The function is called with the `Tokens` of some rows and
        returns the `Questions` that a language model is asked; see `jaxembed.losses.predicting`.
    """

    where: str
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    learns: tuple[str, ...] = ()
    over_tokens: bool = False

    def load(self) -> Callable:
        """Imports the function."""
        module, function = self.where.split(":")
        return getattr(importlib.import_module(f"jaxembed.losses.{module}"), function)


_PREDICTING = ("sides", "tile")  # fields of all losses over tokens
_MASKED = ("mask_rate", "random_rate", "keep_rate", *_PREDICTING)
_NEGATIVES = ("false_negatives", "false_negative_margin", "false_negative_blocks", "hard_negatives")
_INFONCE = ("temperature", "blocks", "partition", "margin", "hardness", "hardness_of", "focal", "mixed_negatives")

LOSSES: dict[str, Entry] = {
    "infonce": Entry("infonce:infonce", (*_INFONCE, *_NEGATIVES, *ENGINE), needs=(MATCHES,)),
    "clp": Entry(
        "penalty:clp", ("temperature", "penalty", "hard_negatives", *ENGINE), needs=(MATCHES, NEGATIVE_QUERIES)
    ),
    "sigmoid": Entry(
        "sigmoid:sigmoid", ("temperature", "bias", "hard_negatives", *ENGINE), needs=(MATCHES,), learns=("bias",)
    ),
    "triplet": Entry("triplet:triplet", ("margin", "distance"), needs=(NEGATIVES,)),
    "cosent": Entry("ranking:cosent", ("temperature",), needs=(SCORES,)),
    "angle": Entry("ranking:angle", ("temperature",), needs=(SCORES,)),
    "cosine": Entry("regression:cosine", needs=(SCORES, COSINES)),
    "margin_mse": Entry("distillation:margin_mse", needs=(SCORES, NEGATIVES)),
    "kl": Entry("distillation:kl", ("temperature", "teacher_temperature"), needs=(NEGATIVES, SCORES_OR_TEACHER)),
    "match": Entry("distillation:match", ("similarity_weight",), needs=(TEACHER,), learns=("projection",)),
    "spread_out": Entry("spread_out:spread_out"),
    "masked_diffusion": Entry(
        "masked_diffusion:masked_diffusion", ("mask_least", "mask_draws", "predicts", *_PREDICTING), over_tokens=True
    ),
    "masked_lm": Entry("predicting:masked_lm", _MASKED, over_tokens=True),
    "masked_next_token": Entry("predicting:masked_next_token", _MASKED, over_tokens=True),
    "next_token": Entry("predicting:next_token", _PREDICTING, over_tokens=True),
}
