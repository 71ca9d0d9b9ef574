"""What a model does around a text: the pooling, end token and template that were asked for, on a given model."""

import dataclasses
from collections.abc import Sequence

from jaxembed.config import AUTO
from jaxembed.data import templates
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import UserError
from jaxembed.models.text_encoder import HeadConfig


def adapt(
    head: HeadConfig, tokenizer: Tokenizer, pooling: str, template: str, where: str = "", said: bool = True
) -> tuple[HeadConfig, Tokenizer]:
    """Returns the head and the tokenizer with another pooling and a template.

    - A template with words behind the text makes the model say the text in the next token: its last token is pooled,
      unless a pooling is named.
    - Pooling 'last' needs an end token behind every text, or the words of a template. Where a user names that pooling
      and the tokenizer has none, its end-of-sequence token is put there, behind texts that are cut too. A model that
      already pools the last token keeps its tokenizer as it is: that is what it was trained with.
    - Of an echoed text, means pool the second copy alone, without the prompt in it (Springer et al. 2024,
      arXiv:2402.15449).

    Args:
      head: the model's.
      tokenizer: the model's.
      pooling: as of `config.model.pooling`; 'auto' for the model's own.
      template: as of `config.model.template`; '' for none.
      where: what comes before 'pooling' and 'template' where they are set, for messages: 'config.model.' or ''.
      said: whether the model's folder says how it pools. Where it does not, its pooling is a guess: no training to keep
        to, and an echoed text is pooled by the mean.

    Raises:
      UserError: no such template, one on top of another, or no end token to pool.
    """
    words = templates.parse(template, f"{where}template") if template else None
    mode = head.pooling if pooling == AUTO else pooling
    if words and pooling == AUTO and (words.after or not said):
        mode = "last" if words.after else "mean"
    trained_so = said and head.pooling == "last"
    if pooling == "last" and not (tokenizer.appends_eos or trained_so or (words and words.after)):
        tokenizer = tokenizer.with_end_token(f"{where}pooling = 'last'")
    if words:
        tokenizer = tokenizer.with_template(words, f"{where}template")
    pool_prompt = head.pool_prompt
    if tokenizer.in_template and mode == "last":
        pool_prompt = True  # the last token is never the prompt's
    elif tokenizer.copies > 1 and mode != "cls":
        pool_prompt = False
    return dataclasses.replace(head, pooling=mode, pool_prompt=pool_prompt), tokenizer


def require_seeing(head: HeadConfig, attention: Sequence[str]) -> None:
    """Refuses to pool the first token of a model whose first token sees nothing: all texts would get one vector.

    Args:
      head: the model's.
      attention: its modes, one for all layers or one for each.

    Raises:
      UserError: pooling is 'cls', and no layer is bidirectional.
    """
    if head.pooling == "cls" and "bidirectional" not in attention:
        raise UserError("pooling = 'cls': the first token of a causal model sees no other; take 'last' or 'mean'")


def require_portable(head: HeadConfig, tokenizer: Tokenizer) -> None:
    """Refuses a pooling that no folder can say to other programs.

    sentence-transformers leaves a fixed number of tokens out of pooling, those of the prompt put into the template.

    Raises:
      UserError: of a text in a template only a part is pooled.
    """
    if tokenizer.in_template and not head.pool_prompt:
        part = "the last copy of the text" if tokenizer.copies > 1 else "the text without its prompt"
        raise UserError(
            f"config.model.template with pooling = {head.pooling!r} pools {part} alone, which no folder can say to "
            "other programs: set config.model.pooling = 'last', or config.export = False (Embedder opens the run)"
        )
