"""What config.json of a model made from scratch is put together from."""

from collections.abc import Mapping
from typing import Any

from jaxembed.config import nearest
from jaxembed.errors import UserError
from jaxembed.hf.fields import SpecialIds


def filled(model_type: str, known: Mapping[str, Any], shape: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns config.json: the user's fields, and defaults for the others.

    Args:
      model_type: of the architecture.
      known: the fields that may be given, with their defaults; None for those that must be.
      shape: the user's fields.
      where: what `shape` is called, for messages.

    Raises:
      UserError: a field is not known.
    """
    for field in shape:
        if field not in known:
            raise UserError(f"{where}: {model_type} has no field {field!r}{nearest(field, known)}")
    return {"model_type": model_type, **known, **shape}


def token_fields(tokenizer: SpecialIds) -> dict[str, int]:
    """Returns the fields that depend on the tokenizer: its size, and the ids of padding, first and last token."""
    ends = {"bos_token_id": tokenizer.cls_id, "eos_token_id": max(tokenizer.eos_id, tokenizer.sep_id)}
    return {
        "vocab_size": tokenizer.vocab_size,
        "pad_token_id": max(tokenizer.pad_id, 0),
        **{name: token_id for name, token_id in ends.items() if token_id >= 0},
    }
