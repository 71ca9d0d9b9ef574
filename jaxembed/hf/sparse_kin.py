"""config.json of the sparse model that a dense one becomes: its kin among the architectures that have experts."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxembed.errors import UserError
from jaxembed.hf import decoders, nomic_moe
from jaxembed.hf.attention_modes import OURS as MODES
from jaxembed.hf.nomic_bert import NAMES, ROPE
from jaxembed.hf.nomic_bert import spelled as nomic_spelled

WHERE = "config.model.experts"
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "unk_token_id")
# Fields of config.json that dense and sparse decoders share.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "is_causal",
    MODES,
    "output_hidden_states",
    *TOKENS,
)
# Those that Nomic's kinds spell as bert does.
_NOT_RENAMED = ("vocab_size", "initializer_range", "output_hidden_states", *TOKENS)
Made = dict[str, Any]


def _mixtral(hf: Mapping[str, Any], experts: int, top_k: int, at: tuple[int, ...]) -> Made:
    """llama → mixtral, which has experts in every layer, and no biases."""
    said = {**decoders.FAMILIES["llama"].defaults, **hf}
    _refuse(said, ("attention_bias", "mlp_bias"), "mixtral")
    if len(at) != said["num_hidden_layers"]:
        raise UserError(
            f"{WHERE}: a llama becomes a mixtral, which has experts in every layer: leave every = 1 and layers = ()"
        )
    return _shared(said) | {
        "model_type": "mixtral",
        "intermediate_size": said["intermediate_size"],
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "sliding_window": None,
    }


def _qwen3_moe(hf: Mapping[str, Any], experts: int, top_k: int, at: tuple[int, ...]) -> Made:
    """qwen3 → qwen3_moe."""
    said = {**decoders.FAMILIES["qwen3"].defaults, **hf}
    _refuse(said, ("use_sliding_window",), "qwen3_moe")
    return _shared(said) | {
        "model_type": "qwen3_moe",
        "attention_bias": said["attention_bias"],
        "intermediate_size": said["intermediate_size"],
        "moe_intermediate_size": said["intermediate_size"],
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(said["num_hidden_layers"]) if i not in at],
        "use_sliding_window": False,
    }


def _from_bert(hf: Mapping[str, Any], experts: int, top_k: int, at: tuple[int, ...]) -> Made:
    """bert → Nomic's sparse BERT with a table of positions and biases."""
    usual = {"hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
    said = {**usual, **hf}
    own = {
        "activation_function": said["hidden_act"],
        "type_vocab_size": said["type_vocab_size"],
        "rotary_emb_fraction": 0.0,
        **dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "moe_up_bias"), True),
    }
    return _nomic_moe(said, own, experts, top_k, at)


def _from_nomic_bert(hf: Mapping[str, Any], experts: int, top_k: int, at: tuple[int, ...]) -> Made:
    """nomic_bert → the same with experts that have gates."""
    said = {"type_vocab_size": 2, "layer_norm_eps": 1e-12, **nomic_spelled(hf)}  # as config_from_hf takes them
    if ROPE.parameters(said, WHERE)["rope_type"] != "default":
        raise UserError(f"{WHERE}: a nomic_bert with scaled rotary positions has no sparse kin; leave these")
    if said.get("head_dim") not in (None, said["hidden_size"] // said["num_attention_heads"]):
        raise UserError(
            f"{WHERE}: head_dim = {said['head_dim']!r}: its sparse kin has hidden_size / num_attention_heads"
        )
    own = {
        "activation_function": "swiglu",
        "type_vocab_size": said["type_vocab_size"],
        "rotary_emb_fraction": 1.0,
        "rotary_emb_base": said["rotary_emb_base"],
        "moe_gated": True,
        **dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), False),
    }
    return _nomic_moe(said, own, experts, top_k, at)


def _nomic_moe(said: Mapping[str, Any], own: Made, experts: int, top_k: int, at: tuple[int, ...]) -> Made:
    named = {theirs: said[ours] for ours, theirs in NAMES.items() if ours in said}
    kept = {field: said[field] for field in _NOT_RENAMED if field in said}
    sparse = {
        "num_experts": experts,
        "moe_top_k": top_k,
        "moe_layers": list(at),
        "moe_normalize_expert_weights": 1,
    }
    return nomic_moe.spelled({"model_type": "nomic_bert", **kept, **named, **own, **sparse})


def _shared(said: Mapping[str, Any]) -> Made:
    return {field: said[field] for field in _SHARED if said.get(field) is not None}


def _refuse(said: Mapping[str, Any], fields: tuple[str, ...], kin: str) -> None:
    for field in fields:
        if said.get(field):
            raise UserError(f"{WHERE}.upcycle: config.json has {field} = {said[field]!r}, which no {kin} has")


# model_type → (its config.json, how many experts, how many a token takes, the sparse layers) → config.json.
SPARSE_KIN: dict[str, Callable[..., Made]] = {
    "bert": _from_bert,
    "nomic_bert": _from_nomic_bert,
    "llama": _mixtral,
    "qwen3": _qwen3_moe,
}
