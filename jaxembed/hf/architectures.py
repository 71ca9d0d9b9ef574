"""The architectures that can be read from and written to Hugging Face folders: one entry each."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from jaxembed.config import nearest
from jaxembed.errors import UserError
from jaxembed.hf import (
    bamba,
    bert,
    decoders,
    diffusion,
    jina_bert,
    mamba,
    modernbert,
    mpnet,
    nomic_bert,
    nomic_moe,
    sparse_decoders,
    t5,
)
from jaxembed.hf.attention_modes import OURS, with_modes
from jaxembed.hf.rope import RopeWords
from jaxembed.hf.table import Row, Shape
from jaxembed.hf.word_rules import Cuts, qwen_words
from jaxembed.models.bert import Bert
from jaxembed.models.hybrid import Hybrid
from jaxembed.models.layers.attention import MODES
from jaxembed.models.mamba import Mamba
from jaxembed.models.modernbert import ModernBert
from jaxembed.models.nomic_bert import NomicBert
from jaxembed.models.t5 import T5
from jaxembed.models.transformer import Transformer

ANY_TRANSFORMERS = "4.0"
PER_LAYER = ("layer_types", OURS)  # fields of config.json that are lists, one entry per layer


@dataclasses.dataclass(frozen=True)
class Architecture:
    """All that is particular to one `model_type`.

    Attributes:
      model_type: the name in config.json, and of `config.model.arch`. (But 'jina_bert' says 'bert' in config.json, and
        'nomic_moe' 'nomic_bert'.)
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
      requires: config.json → a version that it needs beside that one, '' for none.
      bounded: whether no text may be longer than the config's `max_length`; else that is only what is usual.
      cuts: how transformers cuts texts into words, where it does not follow tokenizer.json.
      rope: how config.json speaks of rotary positions; None where there are none that could be scaled.
      spelled: config.json → the same in every spelling that programs read; for what is read, and what is written.
      unpacked: a checkpoint's tensors, by name → the same where some hold what is several tensors in the table: views.
      depth: the field of config.json that says how many layers there are.
      code: a file of ours that folders hold, with the class that opens them; None where that is in transformers.
      elsewhere: of a folder with `code`, what programs but transformers make of it: a sentence.
      all_states: whether `hf_class` gives the states of the embeddings, of every layer, and the last ones normed: what
        sentence-transformers makes a mean of layers of.
      portable_as: config.json → that of the architecture in transformers as which a model is written, its weights under
        other names. Such a one's own class is code on the hub, and its own layout written only where that is asked for.
        None: it is written as what it is.
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
    transformers: str = ANY_TRANSFORMERS
    requires: Callable[[Mapping[str, Any]], str] = lambda hf: ""
    cuts: Cuts | None = None
    bounded: bool = True
    rope: RopeWords | None = None
    spelled: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    unpacked: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict
    depth: str = "num_hidden_layers"
    code: pathlib.Path | None = None
    elsewhere: str = ""
    all_states: bool = True
    portable_as: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """The values of `config.model.attention` that it takes."""
        return ("native", *self.attention) if self.fixed_attention else ("native", *MODES)

    def with_attention(
        self, hf_config: Mapping[str, Any], modes: Sequence[str], where: str = "config.model.attention"
    ) -> dict[str, Any]:
        """Returns config.json of the same model with another attention.

        Args:
          hf_config: config.json.
          modes: one for all layers, or one for each.
          where: what they are called, for messages.

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
                raise UserError(f"{where} = {mode!r}: {self.model_type} takes {takes}")
        return with_modes(hf_config, modes, config.attention, self.attention, config.layers)

    def with_rope_scaling(
        self, hf_config: Mapping[str, Any], scaling: Mapping[str, Any], where: str = "config.model.rope_scaling"
    ) -> dict[str, Any]:
        """Returns config.json of the same model for longer texts; see `jaxembed.hf.rope.RopeWords.with_scaling`.

        Raises:
          UserError: a wrong scaling, or an architecture without rotary positions.
        """
        if self.rope is None:
            raise UserError(f"{where}: {self.model_type} has no rotary positions that could be scaled")
        return self.rope.with_scaling(hf_config, scaling, where)

    def with_layers(self, hf_config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """Returns config.json of the model's first layers alone."""
        lists = {field: hf_config[field][:layers] for field in PER_LAYER if hf_config.get(field)}
        return {**hf_config, self.depth: layers, **lists}


def _encoder(
    model_type: str,
    hf_class: str,
    backbone: type,
    module: ModuleType,
    fresh_hf_config: Callable[..., dict[str, Any]],
    **others: Any,
) -> Architecture:
    """An encoder whose side of Hugging Face is a module with config_from_hf, rows and IGNORED."""
    return Architecture(
        model_type=model_type,
        hf_class=hf_class,
        backbone=backbone,
        attention={"bidirectional": {}},
        fixed_attention=True,
        config_from_hf=module.config_from_hf,
        fresh_hf_config=fresh_hf_config,
        rows=module.rows,
        **{"unused": lambda config: {}, "prefixes": ("",), "ignored": module.IGNORED, **others},
    )


def _bert_family(model_type: str, hf_class: str, prefix: str) -> Architecture:
    fresh = functools.partial(bert.fresh_hf_config, model_type)
    parts = {"unused": bert.pooler_shapes, "prefixes": ("", prefix), "renames": bert.RENAMES}
    return _encoder(model_type, hf_class, Bert, bert, fresh, **parts)


def _t5(model_type: str, hf_class: str, since: str) -> Architecture:
    fresh = functools.partial(t5.fresh_hf_config, model_type)
    return _encoder(model_type, hf_class, T5, t5, fresh, transformers=since, depth="num_layers", bounded=False)


def _decoder(family: decoders.Family) -> Architecture:
    experts = {}
    if family.experts:
        unpacked = functools.partial(sparse_decoders.per_expert, family.experts)
        experts = {"unpacked": unpacked, "renames": family.experts.renames}
    return Architecture(
        model_type=family.model_type,
        hf_class=family.hf_class,
        backbone=Transformer,
        attention={"causal": family.causal, "bidirectional": family.bidirectional},
        fixed_attention=False,
        config_from_hf=functools.partial(decoders.config_from_hf, family),
        fresh_hf_config=functools.partial(decoders.fresh_hf_config, family),
        rows=functools.partial(decoders.rows, family),
        unused=lambda config: {},
        prefixes=("", "model."),
        ignored=decoders.IGNORED,
        transformers=family.since,
        rope=family.rope,
        spelled=functools.partial(decoders.spelled, family),
        cuts=qwen_words if family.model_type == "qwen2" else None,
        **experts,
    )


def _mamba(model_type: str, since: str) -> Architecture:
    """A state-space model; of the kinds that read both ways the class is ours."""
    both_ways = model_type in mamba.KIN
    return Architecture(
        model_type=model_type,
        hf_class=f"Bi{mamba.CLASSES[mamba.KIN[model_type]]}Model" if both_ways else f"{mamba.CLASSES[model_type]}Model",
        backbone=Mamba,
        attention={"bidirectional" if both_ways else "causal": {}},
        fixed_attention=True,
        config_from_hf=functools.partial(mamba.config_from_hf, model_type),
        fresh_hf_config=functools.partial(mamba.fresh_hf_config, model_type),
        rows=mamba.rows,
        unused=lambda config: {},
        prefixes=("", "backbone."),
        ignored=mamba.IGNORED,
        renames=mamba.RENAMES,
        transformers=since,
        requires=mamba.requires,
        bounded=False,
        spelled=mamba.spelled,
        code=mamba.CODE if both_ways else None,
        elsewhere=mamba.ELSEWHERE if both_ways else "",
        all_states=False,
    )


def _bamba() -> Architecture:
    return dataclasses.replace(
        _decoder(bamba.FAMILY),
        backbone=Hybrid,
        config_from_hf=bamba.config_from_hf,
        fresh_hf_config=bamba.fresh_hf_config,
        rows=bamba.rows,
        requires=mamba.requires,
        spelled=bamba.spelled,
    )


def _diffusion(model_type: str, hf_class: str, **others: Any) -> Architecture:
    """A diffusion language model: a decoder's block, seen from both sides."""
    return Architecture(
        model_type=model_type,
        hf_class=hf_class,
        backbone=Transformer,
        attention={"bidirectional": {}},
        fixed_attention=True,
        prefixes=("",),
        transformers="4.46.0",
        **others,
    )


ARCHITECTURES: dict[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        _bert_family("bert", "BertModel", "bert."),
        _bert_family("roberta", "RobertaModel", "roberta."),
        _bert_family("xlm-roberta", "XLMRobertaModel", "roberta."),
        _encoder(
            "mpnet",
            "MPNetModel",
            Bert,
            mpnet,
            mpnet.fresh_hf_config,
            unused=bert.pooler_shapes,
            prefixes=("", "mpnet."),
        ),
        _encoder(
            "jina_bert",
            "JinaBertModel",
            Bert,
            jina_bert,
            jina_bert.fresh_hf_config,
            unused=bert.pooler_shapes,
            prefixes=("", "bert."),
            spelled=jina_bert.spelled,
        ),
        _t5("t5", "T5EncoderModel", ANY_TRANSFORMERS),
        _t5("mt5", "MT5EncoderModel", ANY_TRANSFORMERS),
        _encoder(
            "nomic_bert",
            "NomicBertModel",
            NomicBert,
            nomic_bert,
            nomic_bert.fresh_hf_config,
            prefixes=("", "bert.", "nomic_bert."),
            rope=nomic_bert.ROPE,
            transformers="5.5.0",
            spelled=nomic_bert.spelled,
        ),
        _encoder(
            "nomic_moe",
            "NomicBertModel",
            NomicBert,
            nomic_moe,
            nomic_moe.fresh_hf_config,
            prefixes=("", "bert.", "nomic_bert."),
            transformers="5.23.0",
            spelled=nomic_moe.spelled,
            depth="n_layer",
            code=nomic_moe.CODE,
            elsewhere=nomic_moe.ELSEWHERE,
        ),
        _encoder(
            "modernbert",
            "ModernBertModel",
            ModernBert,
            modernbert,
            modernbert.fresh_hf_config,
            prefixes=("", "model."),
            transformers="4.48.0",
        ),
        *map(_decoder, decoders.FAMILIES.values()),
        _diffusion(
            "llada",
            "LLaDAModelLM",
            config_from_hf=diffusion.llada_config,
            fresh_hf_config=diffusion.fresh_llada,
            rows=diffusion.llada_rows,
            unused=diffusion.llada_head,
            ignored=diffusion.LLADA_IGNORED,
            renames=diffusion.LLADA_RENAMES,
            rope=diffusion.LLADA_ROPE,
            depth="n_layers",
            portable_as=diffusion.as_llama,
        ),
        _diffusion(
            "Dream",
            "DreamModel",
            config_from_hf=diffusion.dream_config,
            fresh_hf_config=diffusion.fresh_dream,
            rows=diffusion.dream_rows,
            unused=diffusion.dream_head,
            ignored=diffusion.DREAM_IGNORED,
            renames=diffusion.DREAM_RENAMES,
            rope=diffusion.QWEN2.rope,
            cuts=qwen_words,
            portable_as=diffusion.as_qwen2,
        ),
        _bamba(),
        _mamba("mamba", "4.39.0"),
        _mamba("mamba2", "4.44.0"),
        _mamba("falcon_mamba", "4.45.0"),
        *(_mamba(model_type, "5.0.0") for model_type in mamba.KIN),
    )
}


def architecture(model_type: Any, where: str = "config.model.arch") -> Architecture:
    """Returns the architecture of that `model_type`; `where` says where it stands, for the message.

    Raises:
      UserError: it is not known.
    """
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        hint = nearest(str(model_type), ARCHITECTURES)
        raise UserError(f"{where}: model_type {model_type!r} is not known{hint}; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def architecture_of(hf_config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Returns the architecture of a config.json; `where` says which, for the message.

    Raises:
      UserError: it is not known.
    """
    name = hf_config.get("model_type")
    if mamba.is_original(hf_config):
        raise UserError(f"{where}: state-spaces' own format is not read; take what is made for transformers, NAME-hf")
    if jina_bert.is_jina_bert(hf_config):
        name = "jina_bert"
    elif nomic_moe.is_nomic_moe(hf_config):
        name = "nomic_moe"
    return architecture(name, where)
