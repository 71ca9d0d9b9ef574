"""What the losses over tokens of a config ask of a model: a head that predicts words, and a mask token."""

import dataclasses
from collections.abc import Sequence

from jaxembed.blueprint import Blueprint
from jaxembed.config import AUTO, Config, LossConfig
from jaxembed.errors import UserError
from jaxembed.hf.language_heads import language_of
from jaxembed.losses.table import LOSSES
from jaxembed.models.language_head import LanguageConfig
from jaxembed.models.mamba import MambaConfig
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
    losses, masked = losses_over_tokens(c), masks(c)
    _require_attention(blueprint, c)
    if c.eval.texts and not losses:
        raise UserError("config.eval.texts: no loss of the run is over tokens, so its model predicts none: leave it ()")
    if c.model.mask_token and not masked:
        raise UserError(
            f"config.model.mask_token = {c.model.mask_token!r} is of no use: nothing is masked; leave it ''"
        )
    if not losses and not masked:
        return None
    had = blueprint.language if blueprint.language and blueprint.language.predicts else None
    head = had or language_of(blueprint.hf_config)
    if not losses:
        head = LanguageConfig(shift=head.shift, predicts=False)
    elif head.own_table and c.model.init.startswith("run:") and had is None:
        raise UserError(
            f"config.model.init = {c.model.init!r}: that run had no loss over tokens, so it has no head that "
            "predicts words any more: start from its own config.model.init"
        )
    tokenizer = blueprint.tokenizer
    return dataclasses.replace(
        head,
        shift=_shift(c, losses, head.shift),
        words=blueprint.backbone.vocab_size,
        mask_id=tokenizer.mask_id if masked else -1,
        framing=tokenizer.framing_ids,
    )


def _shift(c: Config, losses: Sequence[LossConfig], learned: bool) -> bool:
    """Returns whether the run's model predicts a token from the state before it, which 'auto' stands for in all stages.

    Raises:
      UserError: a later loss says otherwise than 'auto' meant where it stands.
    """
    found = predicts_next(losses, learned)
    for i, loss in enumerate(losses):
        if loss.name == "masked_diffusion" and loss.predicts == AUTO and predicts_next(losses[:i], learned) != found:
            raise UserError(
                f"config.stages: the loss {loss.title!r} has predicts = 'auto', and the losses behind it predict from "
                "other states than those before it: say 'same' or 'next'"
            )
    return found


def _require_attention(blueprint: Blueprint, c: Config) -> None:
    """Refuses losses that do not go with what the model's attention sees, or with how it grows."""
    backbone, causal = blueprint.backbone, blueprint.causal
    for loss in losses_over_tokens(c):
        if loss.name == "next_token" and not causal:
            raise UserError(
                f"config.loss: next_token ({loss.title!r}) in a model that sees what it is to predict: set "
                "config.model.attention = 'causal', or take masked_next_token"
            )
        if loss.name != "next_token" and causal:
            raise UserError(
                f"config.loss: {loss.name} ({loss.title!r}) in a causal model, which sees nothing behind a masked "
                "word: set config.model.attention = 'bidirectional', or take next_token"
            )
    growing = any(stage.config.model.anneal_attention for stage in stages_of(c))
    if growing and (causal or isinstance(backbone, MambaConfig)):
        why = "has no attention" if isinstance(backbone, MambaConfig) else "stays causal: set config.model.attention"
        raise UserError(f"config.model.anneal_attention: the model {why}; leave it 0")
