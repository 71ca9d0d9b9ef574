"""The Hugging Face side of diffusion language models: LLaDA (arXiv:2502.09992) and Dream (arXiv:2508.15487).

Both see a text from both sides. LLaDA's block is Llama's, Dream's is Qwen 2's; but their classes are code on the hub,
and LLaDA's config.json and tensors have names of their own. So folders are written as the kin that transformers opens,
with `is_causal: false`; the layout of the hub is written where that is asked for.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from jaxembed.errors import UserError
from jaxembed.hf import decoders
from jaxembed.hf.decoders import BIDIRECTIONAL, BIDIRECTIONAL_AND_TEI, FAMILIES
from jaxembed.hf.fields import SpecialIds, read_count, read_number, refuse_others
from jaxembed.hf.rope import RopeWords
from jaxembed.hf.scratch import filled
from jaxembed.hf.table import Row, Shape
from jaxembed.models.transformer import TransformerConfig

MASK_ID = "mask_token_id"
LLAMA, QWEN2 = FAMILIES["llama"], FAMILIES["qwen2"]
# What LLaDA's classes take fields to be where config.json does not say; those of them that shape the model.
LLADA_DEFAULTS: dict[str, Any] = {
    "n_kv_heads": None,
    "mlp_hidden_size": None,
    "mlp_ratio": 4,
    "embedding_size": None,
    "max_sequence_length": 1024,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "init_std": 0.02,
    "activation_type": "swiglu",
    "weight_tying": True,
    "block_type": "sequential",
    "layer_norm_type": "default",
    "rope": False,
    "include_bias": True,
}
# Fields by which a LLaDA would be another block than Llama's: the one value that is read.
LLADA_BLOCK: dict[str, Any] = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "layer_norm_with_affine": True,
    "attention_layer_norm": False,
    "multi_query_attention": False,
    "input_emb_norm": False,
    "scale_logits": False,
}
DREAM_BLOCK: dict[str, Any] = {"is_causal": False, "use_sliding_window": False, "use_mrope": False}
TOKENS = tuple(f"{role}_token_id" for role in ("pad", "bos", "eos", "mask"))
KEPT = (*TOKENS, "output_hidden_states", "matryoshka_dimensions", "dtype", "torch_dtype")
LLADA, LLADA_HEAD, DREAM_HEAD = "model.transformer.", "model.transformer.ff_out.weight", "lm_head.weight"
# Llama's names → LLaDA's.
_TOPS = {"embed_tokens": "wte", "norm": "ln_f"}
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
LLADA_IGNORED = ("model.transformer.ff_out.*", "*.rotary_emb.*")
LLADA_RENAMES = ((r"^transformer\.", LLADA),)
DREAM_IGNORED = ("lm_head.*", "*.rotary_emb.inv_freq")
DREAM_RENAMES = ((r"^(embed_tokens|layers|norm)\.", r"model.\1."),)


class MaskedIds(SpecialIds, Protocol):
    """What is asked of a tokenizer; see `jaxembed.data.tokenizer.Tokenizer`."""

    mask_id: int


@dataclasses.dataclass(frozen=True)
class _LladaRope(RopeWords):
    def with_scaling(self, hf: Mapping[str, Any], scaling: Mapping[str, Any], where: str) -> dict[str, Any]:
        raise UserError(
            f"{where}: LLaDA's config.json has no words for scaled positions: start from a folder that was exported of "
            "it, which is a llama"
        )


LLADA_ROPE = _LladaRope()


def llada_rows(config: TransformerConfig) -> tuple[Row, ...]:
    """Returns LLaDA's table of names; see `jaxembed.hf.table`."""
    names = {f"{theirs}.weight": f"{LLADA}{ours}.weight" for theirs, ours in _TOPS.items()}
    names |= {f"layers.{{i}}.{theirs}.weight": f"{LLADA}blocks.{{i}}.{ours}.weight" for theirs, ours in _PARTS.items()}
    return tuple(dataclasses.replace(row, hf=names[row.hf]) for row in decoders.rows(LLAMA, config))


def dream_rows(config: TransformerConfig) -> tuple[Row, ...]:
    """Returns Dream's table of names; see `jaxembed.hf.table`."""
    return tuple(dataclasses.replace(row, hf=f"model.{row.hf}") for row in decoders.rows(QWEN2, config))


def llada_head(config: TransformerConfig) -> dict[str, Shape]:
    """Returns the tensor that predicts words, for which embeddings have no use."""
    return {LLADA_HEAD: (config.vocab_size, config.width)}


def dream_head(config: TransformerConfig) -> dict[str, Shape]:
    """Returns the tensor that predicts words, for which embeddings have no use."""
    return {DREAM_HEAD: (config.vocab_size, config.width)}


def llada_config(hf: Mapping[str, Any], where: str = "config.json") -> TransformerConfig:
    """Reads the shape out of a LLaDA's config.json.

    Args:
      hf: its content.
      where: the file or config field that it stands in, for messages.

    Raises:
      UserError: a size is missing or no whole number, or the block is not Llama's.
    """
    return decoders.config_from_hf(LLAMA, as_llama(hf, where), where)


def dream_config(hf: Mapping[str, Any], where: str = "config.json") -> TransformerConfig:
    """Reads the shape out of a Dream's config.json; see `llada_config`."""
    return decoders.config_from_hf(QWEN2, as_qwen2(hf, where), where)


def as_llama(hf: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """Returns config.json of the llama that a LLaDA is, bidirectional.

    Raises:
      UserError: it is none; see `llada_config`.
    """
    if hf.get("num_experts"):
        raise UserError(f"{where}: num_experts: LLaDA's mixtures of experts are not read, its dense models are")
    said = {**LLADA_DEFAULTS, **hf}
    refuse_others(said, where, {field: (value,) for field, value in LLADA_BLOCK.items()})
    width, heads = read_count(said, "d_model", where), read_count(said, "n_heads", where)
    kv_heads = read_count(said, "n_kv_heads", where, heads)
    if width % heads or heads % kv_heads:
        sizes = f"{width}, {heads}, {kv_heads}"
        raise UserError(f"{where}: d_model, n_heads, n_kv_heads = {sizes}: wants each to divide the one before")
    if said["activation_type"] not in ("silu", "gelu", "relu"):
        raise UserError(f"{where}: activation_type = {said['activation_type']!r} is not supported; supported: 'silu'")
    made = {
        "model_type": LLAMA.model_type,
        "vocab_size": llada_words(said, where),
        "hidden_size": width,
        "num_hidden_layers": read_count(said, "n_layers", where),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": read_count(said, "mlp_hidden_size", where, int(said["mlp_ratio"] * width)),
        "max_position_embeddings": read_count(said, "max_sequence_length", where),
        "rms_norm_eps": read_number(said, "rms_norm_eps", where),
        "rope_theta": read_number(said, "rope_theta", where),
        "hidden_act": said["activation_type"],
        "initializer_range": read_number(said, "init_std", where),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": bool(said["weight_tying"]),
        **BIDIRECTIONAL_AND_TEI,
        **{field: hf[field] for field in KEPT if field in hf},
    }
    return LLAMA.rope.spelled(made)


def llada_words(hf: Mapping[str, Any], where: str = "config.json") -> int:
    """Returns the rows of a LLaDA's token table.

    Raises:
      UserError: config.json does not say.
    """
    return read_count(hf, "embedding_size", where, read_count(hf, "vocab_size", where))


def as_qwen2(hf: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """Returns config.json of the qwen2 that a Dream is, bidirectional.

    Raises:
      UserError: it asks for something that Qwen 2's block is not.
    """
    refuse_others(hf, where, {field: (value,) for field, value in DREAM_BLOCK.items()})
    left_out = (*DREAM_BLOCK, "auto_map")
    kept = {field: value for field, value in hf.items() if field not in left_out}
    tied = bool(hf.get("tie_word_embeddings", False))
    own = {"model_type": QWEN2.model_type, "use_sliding_window": False, "tie_word_embeddings": tied, **BIDIRECTIONAL}
    return QWEN2.rope.spelled(kept | own)


def fresh_llada(shape: Mapping[str, Any], tokenizer: MaskedIds, where: str = "config.model.shape") -> dict[str, Any]:
    """Returns config.json of a LLaDA to be made from scratch.

    Args:
      shape: fields of LLaDA's config.json, d_model, n_layers, n_heads and mlp_hidden_size at the least.
      tokenizer: gives vocab_size and the ids of the first, last, padding and mask token, where `shape` does not.
      where: what `shape` is called, for messages.

    Raises:
      UserError: a field is unknown, or what `llada_config` refuses.
    """
    known = {
        **dict.fromkeys(("d_model", "n_layers", "n_heads", "mlp_hidden_size")),
        "n_kv_heads": shape.get("n_heads"),
        "vocab_size": tokenizer.vocab_size,
        "embedding_size": shape.get("vocab_size", tokenizer.vocab_size),
        "max_sequence_length": decoders.FRESH_LENGTH,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "init_std": 0.02,
        "activation_type": "silu",
        "weight_tying": False,
        **LLADA_BLOCK,
        "multi_query_attention": None,
        **_ids(tokenizer),
    }
    hf_config = filled("llada", known, shape, where)
    llada_config(hf_config, where)
    return hf_config


def fresh_dream(shape: Mapping[str, Any], tokenizer: MaskedIds, where: str = "config.model.shape") -> dict[str, Any]:
    """Returns config.json of a Dream to be made from scratch; see `jaxembed.hf.decoders.fresh_hf_config`.

    Raises:
      UserError: a field is unknown, or what `dream_config` refuses.
    """
    dream = dataclasses.replace(QWEN2, model_type="Dream", defaults={**QWEN2.defaults, **dict.fromkeys(TOKENS)})
    own = {**_ids(tokenizer), "tie_word_embeddings": False}
    hf_config = decoders.fresh_hf_config(dream, own | dict(shape), tokenizer, where)
    dream_config(hf_config, where)
    return hf_config


def _ids(tokenizer: MaskedIds) -> dict[str, int | None]:
    ends = (tokenizer.pad_id, tokenizer.cls_id, max(tokenizer.eos_id, tokenizer.sep_id), tokenizer.mask_id)
    return {field: token_id if token_id >= 0 else None for field, token_id in zip(TOKENS, ends)}
