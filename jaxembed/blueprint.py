"""All that is known of a model but its weights."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxembed import run_folder
from jaxembed.config import LoraConfig
from jaxembed.config_check import MAX_LENGTH
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import UserError
from jaxembed.hf.architectures import Architecture, architecture_of
from jaxembed.hf.peft import linear_layers
from jaxembed.hf.safetensors_io import open_tensors, write_tensors
from jaxembed.models.language_head import LanguageConfig
from jaxembed.models.layers.routing import ExpertsShape
from jaxembed.models.lora import Lora
from jaxembed.models.nomic_bert import NomicBertConfig
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import (
    HeadConfig,
    ModelFactory,
    TextEncoder,
)
from jaxembed.models.transformer import TransformerConfig
from jaxembed.storage import AnyPath, filling, local

FOLDER = "model"  # in a run's folder
FILE = "blueprint.json"  # in that, written last


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A model without its trained weights.

    Attributes:
      hf_config: the Hugging Face config.json; its model_type names the architecture.
      head: from token states to a vector.
      pooling_said: whether the folder that it comes from says how to pool; False where that is a guess.
      max_length: longest text in tokens.
      prompts: named prompts.
      default_prompt_name: the prompt used when none is named; '' for none.
      similarity: how vectors are meant to be compared: 'cosine', 'dot', 'euclidean', 'manhattan'.
      truncate_dim: vectors are cut to this many dimensions after all else; 0 for not.
      tokenizer: texts to token ids.
      unused: tensors that the architecture's class has and embeddings do not use; handed through to the export.
      base: a digest of the weights that a run's adapters stand on; '' without adapters.
      language: how it predicts words; None where it only makes vectors.
    """

    hf_config: dict[str, Any]
    head: HeadConfig
    pooling_said: bool
    max_length: int
    prompts: dict[str, str]
    default_prompt_name: str
    similarity: str
    truncate_dim: int
    tokenizer: Tokenizer
    unused: Mapping[str, np.ndarray]
    base: str = ""
    language: LanguageConfig | None = None

    @property
    def architecture(self) -> Architecture:
        """The entry in the table of architectures."""
        return architecture_of(self.hf_config)

    @property
    def backbone(self) -> Any:
        """The backbone's frozen config."""
        return self.architecture.config_from_hf(self.hf_config)

    @property
    def causal(self) -> bool:
        """Whether no token sees one behind it, in any layer."""
        return set(getattr(self.backbone, "attention", ("bidirectional",))) == {"causal"}

    @property
    def experts(self) -> ExpertsShape | None:
        """The experts of its sparse layers; None where it has none."""
        match self.backbone:
            case TransformerConfig(experts=experts) | NomicBertConfig(experts=experts):
                return experts
            case _:
                return None

    @property
    def longest(self) -> int:
        """The most tokens that a text may have."""
        return self.backbone.max_length if self.architecture.bounded else MAX_LENGTH

    def factory(self, options: ModelOptions, seed: int = 0, lora: Lora | None = None) -> ModelFactory:
        """Returns the maker of this model; `seed` is that of fresh weights, `lora` its adapters."""
        make, backbone, rest = self.architecture.backbone, self.backbone, (options, lora, self.language)
        return ModelFactory(lambda: TextEncoder(jax.random.key(seed), make, backbone, self.head, *rest))

    def lora(self, c: LoraConfig) -> Lora | None:
        """Returns the adapters that a config asks for, None for none.

        Raises:
          UserError: `targets` names no linear layer.
        """
        if not c.rank:
            return None
        rows = self.architecture.rows(self.backbone)
        scale = c.alpha / (c.rank**0.5 if c.rslora else c.rank)
        return Lora(c.rank, scale, c.dropout, linear_layers(rows, c.targets, "config.model.lora.targets"))

    def save(self, folder: AnyPath) -> None:
        """Writes the blueprint; `load` reads it."""
        said = dataclasses.asdict(dataclasses.replace(self, tokenizer=None, unused=None))
        with filling(folder, FILE, anew=True) as place:  # every start writes the same
            (place / FILE).unlink(missing_ok=True)  # until all is there
            self.tokenizer.save(place, self.max_length)
            if self.unused:
                (place / "unused").mkdir(exist_ok=True)
                write_tensors(place / "unused", self.unused)
            run_folder.write_json(place / FILE, said)

    @classmethod
    def load(cls, folder: AnyPath) -> "Blueprint":
        """Reads what `save` wrote.

        Raises:
          UserError: there is none.
        """
        try:
            place = local(folder)
            said = json.loads((place / FILE).read_text())
        except FileNotFoundError as error:
            raise UserError(f"{folder.parent}: not the folder of a run that has started: no {folder.name}/") from error
        unused = open_tensors(place / "unused") if (place / "unused").exists() else {}
        language = said.get("language")
        loaded = {
            "head": HeadConfig(**said["head"]),
            "tokenizer": Tokenizer.load(f"hf:{place}"),
            "unused": unused,
            "language": LanguageConfig(**language | {"framing": tuple(language["framing"])}) if language else None,
        }
        return cls(**(said | loaded))
