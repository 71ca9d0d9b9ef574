"""The architectures that can be read from and written to Hugging Face folders: one entry each."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxembed.config import nearest
from jaxembed.errors import UserError
from jaxembed.hf import bert
from jaxembed.hf.attention_modes import with_modes
from jaxembed.hf.table import Row, Shape
from jaxembed.models.bert import Bert
from jaxembed.models.layers.attention import MODES


@dataclasses.dataclass(frozen=True)
class Architecture:
    """All that is particular to one `model_type`.

    Attributes:
      model_type: the name in config.json, and of `config.model.arch`.
      hf_class: the class of transformers that opens what we write.
      backbone: our class, called with (key, its config, ModelOptions).
      attention: mode → the fields of config.json by which transformers knows it; {} where it needs none. Modes that
        are not here train, but cannot be exported; `fixed_attention` says whether they may be asked for at all.
      fixed_attention: True for encoders, that only see both ways.
      config_from_hf: config.json and, for messages, where it stands → the backbone's config. Raises UserError.
      fresh_hf_config: fields of config.json, the tokenizer and, for messages, what the fields are called → config.json
        of a model made from scratch. Raises UserError.
      rows: the backbone's config → the table of names.
      unused: the backbone's config → name → shape of tensors that `hf_class` has beside the table's. They are exported
        as they were read, or zero, because transformers fills what is missing with random numbers.
      prefixes: what checkpoints may put before all names, '' first.
      ignored: patterns of names that an embedding model has no use for.
      renames: (regex, replacement) from older names.
      transformers: the first version whose `hf_class` gives this model.
    """

    model_type: str
    hf_class: str
    backbone: type
    attention: Mapping[str, Mapping[str, Any]]
    fixed_attention: bool
    config_from_hf: Callable[..., Any]
    fresh_hf_config: Callable[..., dict[str, Any]]
    rows: Callable[[Any], tuple[Row, ...]]
    unused: Callable[[Any], dict[str, Shape]]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()
    transformers: str = "4.0"

    @property
    def modes(self) -> tuple[str, ...]:
        """The values of `config.model.attention` that it takes."""
        return ("native", *self.attention) if self.fixed_attention else ("native", *MODES)

    def with_attention(self, hf_config: Mapping[str, Any], modes: Sequence[str]) -> dict[str, Any]:
        """Returns config.json of the same model with another attention.

        Args:
          hf_config: config.json.
          modes: one for all layers, or one for each.

        Raises:
          UserError: a mode that the architecture does not have, or a wrong number of them.
        """
        config = self.config_from_hf(hf_config)
        if len(modes) not in (1, config.layers):
            has = f"the {self.model_type} has {config.layers} layers"
            raise UserError(f"config.model.attention_layers has {len(modes)} modes, {has}")
        for mode in modes:
            if mode not in self.modes:
                takes = ", ".join(self.modes)
                raise UserError(f"config.model.attention = {mode!r}: {self.model_type} takes {takes}")
        return with_modes(hf_config, modes, config.attention, self.attention, config.layers)


def _bert_family(model_type: str, hf_class: str, prefix: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        hf_class=hf_class,
        backbone=Bert,
        attention={"bidirectional": {}},
        fixed_attention=True,
        config_from_hf=bert.config_from_hf,
        fresh_hf_config=functools.partial(bert.fresh_hf_config, model_type),
        rows=bert.rows,
        unused=bert.pooler_shapes,
        prefixes=("", prefix),
        ignored=bert.IGNORED,
        renames=bert.RENAMES,
    )


ARCHITECTURES: dict[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        _bert_family("bert", "BertModel", "bert."),
        _bert_family("roberta", "RobertaModel", "roberta."),
        _bert_family("xlm-roberta", "XLMRobertaModel", "roberta."),
    )
}


def architecture(model_type: Any, where: str = "config.model.arch") -> Architecture:
    """Returns the architecture of that `model_type`; `where` says where it stands, for the message.

    Raises:
      UserError: it is not known.
    """
    if model_type not in ARCHITECTURES:
        hint = nearest(str(model_type), ARCHITECTURES)
        raise UserError(f"{where}: model_type {model_type!r} is not known{hint}; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]
