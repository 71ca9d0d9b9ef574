"""What the losses over tokens of a config ask of a model: a head that predicts words, and a mask token."""

import dataclasses

from jaxembed.blueprint import Blueprint
from jaxembed.config import Config, LossConfig
from jaxembed.errors import UserError
from jaxembed.hf.language_heads import language_of
from jaxembed.losses.table import LOSSES
from jaxembed.models.language_head import LanguageConfig
from jaxembed.reading import predicts_next
from jaxembed.stages import stages_of


def masks(c: Config) -> bool:
    """Whether any stage of a run masks words."""
    configs = [stage.config for stage in stages_of(c)]
    views = any(config.data.mask.query or config.data.mask.document for config in configs)
    return views or any(loss.name != "next_token" for loss in losses_over_tokens(c))


def losses_over_tokens(c: Config) -> list[LossConfig]:
    """Returns the losses over tokens of all stages, in their order."""
    losses = [loss for stage in stages_of(c) for loss in stage.config.all_losses]
    return [loss for loss in losses if LOSSES[loss.name].over_tokens]


def language_for(blueprint: Blueprint, c: Config) -> LanguageConfig | None:
    """Returns how the model of a run predicts words.

    Args:
      blueprint: the model's, with its mask token; its `language` is that of the run that it comes from, if any.
      c: the config.

    Returns:
      Its head; one without parameters where words are masked and none predicted; None where neither is done.

    Raises:
      UserError: a loss that the model's attention does not go with, or a run that has lost its head.
    """
    backbone, losses = blueprint.backbone, losses_over_tokens(c)
    causal = set(getattr(backbone, "attention", ("bidirectional",))) == {"causal"}
    for loss in losses:
        if loss.name == "next_token" and not causal:
            raise UserError(
                f"config.loss: next_token ({loss.title!r}) in a model that sees what it is to predict: set "
                "config.model.attention = 'causal', or take masked_next_token"
            )
    if causal and any(stage.config.model.anneal_attention for stage in stages_of(c)):
        raise UserError(
            "config.model.anneal_attention: the model's attention stays causal: set config.model.attention = "
            "'bidirectional', or leave it 0"
        )
    if c.eval.texts and not losses:
        raise UserError("config.eval.texts: no loss of the run is over tokens, so its model predicts none: leave it ()")
    if not losses and not masks(c):
        return None
    head = LanguageConfig()
    if losses:
        head = blueprint.language or language_of(blueprint.hf_config)
        if head.own_table and c.model.init.startswith("run:") and blueprint.language is None:
            raise UserError(
                f"config.model.init = {c.model.init!r}: that run had no loss over tokens, so it has no head that "
                "predicts words any more: start from its own config.model.init"
            )
    tokenizer = blueprint.tokenizer
    return dataclasses.replace(
        head,
        shift=predicts_next(losses, head.shift),
        words=backbone.vocab_size,
        mask_id=tokenizer.mask_id if masks(c) else -1,
        framing=tokenizer.framing_ids,
    )
