"""The Hugging Face side of Nomic's BERT.

config.json has two spellings: that of nomic-ai's repositories (GPT-2's names: n_embd, n_layer, …), which TEI and
llama.cpp read, and that of transformers 5, which takes its defaults where it finds only the other. Both are read; both
are written. Tensors have nomic-ai's names, which all of them read.
"""

from collections.abc import Mapping
from typing import Any

from jaxembed.errors import UserError
from jaxembed.hf.fields import SpecialIds, read_count, read_number, refuse_others
from jaxembed.hf.rope import RopeWords, read_rope
from jaxembed.hf.rows import linear_rows, norm_rows
from jaxembed.hf.scratch import filled, token_fields
from jaxembed.hf.table import Fused, Linear, PadRows, Row
from jaxembed.models.nomic_bert import NomicBertConfig

ROPE = RopeWords(theta=1000.0, kinds=("linear", "dynamic", "yarn"))
POSITIONS = "max_position_embeddings"
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
IGNORED = ("pooler.*", "cls.*", "classifier.*", "*.inv_freq")
# transformers' name → nomic-ai's.
NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    POSITIONS: "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
    "hidden_dropout_prob": "resid_pdrop",
    "attention_probs_dropout_prob": "attn_pdrop",
}
# What nomic-ai's code can do and transformers' class cannot: fixed at these values.
FIXED = {
    "activation_function": "swiglu",
    "prenorm": False,
    "parallel_block": False,
    "use_rms_norm": False,
    "causal": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
}


def rows(config: NomicBertConfig) -> tuple[Row, ...]:
    """Returns the table of names; see `jaxembed.hf.table`."""
    layer = "encoder.layers.{i}."
    key, value = ((f"layers/attention/{name}/kernel", Linear()) for name in ("key", "value"))
    return (
        Row("embeddings.word_embeddings.weight", "embeddings/token/embedding", PadRows(config.vocab_size)),
        Row("embeddings.token_type_embeddings.weight", "embeddings/type/embedding"),
        *norm_rows("emb_ln", "embeddings/norm"),
        Fused(f"{layer}attn.Wqkv.weight", "layers/attention/query/kernel", Linear(), others=(key, value)),
        *linear_rows(f"{layer}attn.out_proj", "layers/attention/out", inputs=2, bias=False),
        *norm_rows(f"{layer}norm1", "layers/attention_norm"),
        *linear_rows(f"{layer}mlp.fc11", "layers/mlp/up", bias=False),
        *linear_rows(f"{layer}mlp.fc12", "layers/mlp/gate", bias=False),
        *linear_rows(f"{layer}mlp.fc2", "layers/mlp/down", bias=False),
        *norm_rows(f"{layer}norm2", "layers/mlp_norm"),
    )


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> NomicBertConfig:
    """Reads the shape out of a Hugging Face config.

    Args:
      hf: the content of config.json, in either spelling.
      where: the file or config field that it stands in, for messages.

    Raises:
      UserError: a size is missing or no whole number, or the config asks for something that the model cannot do.
    """
    for field in ("num_experts", "moe_every_n_layers"):
        if hf.get(field):
            raise UserError(f"{where}: {field} = {hf[field]!r}: 'nomic_bert' has no experts, 'nomic_moe' has")
    named = _in_transformers_words(hf, where)
    refuse_others(named, where, {"hidden_act": ("silu",), **{field: (value,) for field, value in FIXED.items()}})
    width, heads = read_count(named, "hidden_size", where), read_count(named, "num_attention_heads", where)
    if named.get("head_dim") is None and width % heads:
        raise UserError(f"{where}: hidden_size = {width} is no multiple of num_attention_heads = {heads}")
    head_width = read_count(named, "head_dim", where, width // heads)
    rope = read_rope(ROPE.parameters(named, where), head_width, read_count(named, POSITIONS, where), where)
    if rope.width != head_width:
        raise UserError(
            f"{where}: rotary positions of {rope.width} of {head_width} channels: nomic_bert turns them all"
        )
    return NomicBertConfig(
        vocab_size=read_count(named, "vocab_size", where),
        width=width,
        layers=read_count(named, "num_hidden_layers", where),
        heads=heads,
        mlp_width=read_count(named, "intermediate_size", where),
        rope=rope,
        max_length=ROPE.longest_text(named, where),
        type_vocab=read_count(named, "type_vocab_size", where, 2),
        norm_eps=read_number(named, "layer_norm_eps", where, 1e-12),
        initializer_range=read_number(named, "initializer_range", where, 0.02),
    )


def _in_transformers_words(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns config.json in the spelling of transformers 5; what it says in that spelling counts."""
    if "hidden_size" in hf or "n_embd" not in hf:
        return {POSITIONS: 2048, **hf}
    if not hf.get("rotary_emb_fraction"):
        raise UserError(f"{where}: rotary_emb_fraction = {hf.get('rotary_emb_fraction')!r} is not supported; wants 1.0")
    named = {theirs: hf[field] for theirs, field in NAMES.items() if hf.get(field) is not None}
    theta = {"rope_theta": hf.get("rotary_emb_base", ROPE.theta)}
    rope = {"rope_type": "default", **theta}
    factor = hf.get("rotary_scaling_factor")
    if factor is not None:  # texts longer than those of the training are turned more slowly, as "dynamic" does
        rope |= {"rope_type": "dynamic", "factor": factor}
        named[POSITIONS] = hf.get("max_trained_positions", 2048)
    return {POSITIONS: 2048, **theta, "rope_parameters": rope, **named, **hf}


def spelled(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json in both spellings, as far as nomic-ai's can say it; what transformers' says counts."""
    named = _in_transformers_words(hf, "config.json")
    rope = ROPE.parameters(named, "config.json")
    rest = {field: value for field, value in named.items() if field not in NAMES.values()}
    if rope["rope_type"] not in ("default", "dynamic"):
        return rest
    hub = {field: named[theirs] for theirs, field in NAMES.items() if theirs in named}
    hub |= {"rotary_emb_base": rope["rope_theta"], "rotary_scaling_factor": rope.get("factor")}
    if rope["rope_type"] == "dynamic":
        hub["max_trained_positions"] = named[POSITIONS]
    return {**rest, **FIXED, **hub}


def fresh_hf_config(
    shape: Mapping[str, Any], tokenizer: SpecialIds, where: str = "config.model.shape"
) -> dict[str, Any]:
    """Returns config.json of a model to be made from scratch, in both spellings.

    Args:
      shape: fields of config.json as transformers spells them, SIZES at the least.
      tokenizer: gives vocab_size and the ids of padding, first and last token, where `shape` does not.
      where: what `shape` is called, for messages.

    Raises:
      UserError: a field is unknown, or what `config_from_hf` refuses.
    """
    known = {
        **dict.fromkeys(SIZES),
        "hidden_act": "silu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        POSITIONS: 2048,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "rope_theta": ROPE.theta,
        **token_fields(tokenizer),
    }
    hf_config = filled("nomic_bert", known, shape, where)
    config_from_hf(hf_config, where)
    return spelled(ROPE.spelled(hf_config))
