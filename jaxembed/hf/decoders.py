"""The Hugging Face side of decoder-shaped models.

Dense: llama, mistral, qwen2, qwen3, gemma 1 to 3 (text), phi3. Sparse: mixtral, qwen2_moe, qwen3_moe, olmoe.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxembed.config import nearest
from jaxembed.errors import UserError
from jaxembed.hf import sparse_decoders
from jaxembed.hf.attention_modes import read_modes
from jaxembed.hf.fields import SpecialIds, read_activation, read_count, read_number
from jaxembed.hf.rope import RopeWords, read_rope
from jaxembed.hf.rows import linear_rows, projection_rows
from jaxembed.hf.sparse_decoders import MIXTRAL, OLMOE, QWEN2, QWEN3, ExpertWords
from jaxembed.hf.table import Flat, Fused, Linear, PadRows, Row, Same
from jaxembed.models.transformer import TransformerConfig, Window

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
IGNORED = ("lm_head.*", "rotary_emb.*", "*.rotary_emb.inv_freq", "score.*")
LAYER_TYPES = ("full_attention", "sliding_attention")
# transformers 5.2 and later make all of these bidirectional by `is_causal`; TEI has a word of its own for some.
BIDIRECTIONAL = {"is_causal": False}
BIDIRECTIONAL_AND_TEI = {"is_causal": False, "use_bidirectional_attention": True}
_COMMON = {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_QWEN = {
    **_COMMON,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
ALIKE = RopeWords()


@dataclasses.dataclass(frozen=True)
class Family:
    """What is particular to one `model_type`.

    Attributes:
      model_type: the name in config.json.
      hf_class: the class of transformers.
      since: the first version that has it.
      defaults: the fields that shape the model, with what transformers takes them to be where config.json does not say.
      bidirectional: the fields by which config.json says that attention sees both ways.
      rope: how it speaks of rotary positions.
      causal: the fields by which it says that attention sees only what is before; {} where that needs none.
      fused: whether queries, keys and values lie in one tensor, and the gate with the MLP's input in another.
      experts: how it speaks of experts; None for a dense model.
    """

    model_type: str
    hf_class: str
    since: str
    defaults: Mapping[str, Any]
    bidirectional: Mapping[str, Any]
    rope: RopeWords = ALIKE
    causal: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fused: bool = False
    experts: ExpertWords | None = None


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaModel",
            "4.43.0",
            _COMMON | {"head_dim": None, "attention_bias": False, "mlp_bias": False},
            BIDIRECTIONAL_AND_TEI,
        ),
        Family(
            "mistral",
            "MistralModel",
            "4.34.0",
            _COMMON
            | {
                "num_key_value_heads": 8,
                "head_dim": None,
                "max_position_embeddings": 131_072,
                "sliding_window": 4096,
            },
            BIDIRECTIONAL_AND_TEI,
        ),
        Family("qwen2", "Qwen2Model", "4.37.0", _QWEN, BIDIRECTIONAL),
        Family(
            "qwen3",
            "Qwen3Model",
            "4.51.0",
            _QWEN | {"head_dim": 128, "attention_bias": False},
            BIDIRECTIONAL_AND_TEI,
        ),
        Family(
            "gemma",
            "GemmaModel",
            "4.38.0",
            _COMMON
            | {
                "num_key_value_heads": 16,
                "head_dim": 256,
                "max_position_embeddings": 8192,
                "hidden_act": "gelu_pytorch_tanh",
                "attention_bias": False,
            },
            BIDIRECTIONAL,
        ),
        Family("gemma2", "Gemma2Model", "4.42.0", _GEMMA | {"attn_logit_softcapping": 50.0}, BIDIRECTIONAL),
        Family(
            "gemma3_text",
            "Gemma3TextModel",
            "4.56.0",
            _GEMMA
            | {
                "max_position_embeddings": 131_072,
                "attn_logit_softcapping": None,
                "sliding_window_pattern": 6,
            },
            {"use_bidirectional_attention": True},
            RopeWords(
                1_000_000.0,
                ("linear", "yarn", "llama3", "longrope"),
                layer_type="full_attention",
                local_type="sliding_attention",
            ),
            {"is_causal": True},  # it also knows is_causal, which must not stay false
        ),
        Family(
            "phi3",
            "Phi3Model",
            "5.0.0",  # 4 takes fewer fields of rope_scaling than programs that read both need
            _COMMON
            | {
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "sliding_window": None,
            },
            BIDIRECTIONAL,
            RopeWords(kinds=("longrope",), longrope_names=("su", "yarn")),
            fused=True,
        ),
        Family(
            "mixtral",
            "MixtralModel",
            "4.36.0",
            _COMMON
            | {
                "num_key_value_heads": 8,
                "head_dim": None,
                "max_position_embeddings": 131_072,
                "rms_norm_eps": 1e-5,
                "sliding_window": None,
                **MIXTRAL.defaults,
            },
            BIDIRECTIONAL,
            RopeWords(1_000_000.0),
            experts=MIXTRAL,
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeModel",
            "4.40.0",
            _QWEN | {"num_key_value_heads": 16, "qkv_bias": True, **QWEN2.defaults},
            BIDIRECTIONAL,
            experts=QWEN2,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeModel",
            "4.51.0",
            _COMMON
            | {
                "num_key_value_heads": 4,
                "head_dim": None,
                "max_position_embeddings": 32_768,
                "attention_bias": False,
                "use_sliding_window": False,
                "sliding_window": 4096,
                **QWEN3.defaults,
            },
            BIDIRECTIONAL,
            experts=QWEN3,
        ),
        Family(
            "olmoe",
            "OlmoeModel",
            "4.45.0",
            _COMMON
            | {
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "attention_bias": False,
                "clip_qkv": None,
                **OLMOE.defaults,
            },
            BIDIRECTIONAL,
            experts=OLMOE,
        ),
    )
}
FRESH_LENGTH = 512  # longest text of a model from scratch, where its shape does not say


def rows(family: Family, config: TransformerConfig) -> tuple[Row, ...]:
    """Returns the table of names; see `jaxembed.hf.table`."""
    layer, attention = "layers.{i}.", "layers.{i}.self_attn."
    inner = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    found = [
        Row("embed_tokens.weight", "token/embedding", PadRows(config.vocab_size)),
        Row("norm.weight", "norm/scale"),
    ]
    if family.fused:
        found += [_fused(f"{attention}qkv_proj.weight", [f"layers/attention/{ours}/kernel" for ours in inner.values()])]
    else:
        for hf, ours in inner.items():
            found += projection_rows(f"{attention}{hf}", f"layers/attention/{ours}", config.qkv_bias)
    found += linear_rows(f"{attention}o_proj", "layers/attention/out", inputs=2, bias=config.out_bias)
    if family.experts:
        found += sparse_decoders.rows(family.experts, config.experts, config.sparse)
    else:
        found += _mlp_rows(family, config.mlp_bias)
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if config.sandwich:
        norms |= {
            "post_attention_layernorm": "attention_out_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_out_norm",
        }
    found += [Row(f"{layer}{hf}.weight", f"layers/{ours}/scale") for hf, ours in norms.items()]
    if config.qk_norm:
        turned = Flat() if config.qk_norm_joint else Same()
        of_heads = {"q_norm": "query_norm", "k_norm": "key_norm"}
        found += [Row(f"{attention}{hf}.weight", f"layers/attention/{o}/scale", turned) for hf, o in of_heads.items()]
    return tuple(found)


def _mlp_rows(family: Family, bias: bool) -> list[Row]:
    mlp, ours = "layers.{i}.mlp.", "layers/mlp/"
    down = linear_rows(f"{mlp}down_proj", f"{ours}down", bias=bias)
    if family.fused:
        return [_fused(f"{mlp}gate_up_proj.weight", [f"{ours}gate/kernel", f"{ours}up/kernel"]), *down]
    into = [linear_rows(f"{mlp}{name}_proj", f"{ours}{name}", bias=bias) for name in ("gate", "up")]
    return [*into[0], *into[1], *down]


def _fused(hf: str, ours: list[str]) -> Fused:
    first, *others = ours
    return Fused(hf, first, Linear(), others=tuple((path, Linear()) for path in others))


def config_from_hf(family: Family, hf: Mapping[str, Any], where: str = "config.json") -> TransformerConfig:
    """Reads the shape out of a Hugging Face config.

    Args:
      family: that of its model_type.
      hf: the content of config.json.
      where: the file or config field that it stands in, for messages.

    Raises:
      UserError: a size is missing or no whole number, or the config asks for something that the model cannot do.
    """
    if hf.get("quantization_config"):
        raise UserError(f"{where}: quantization_config: quantised weights are not read; take the model's own weights")
    if family.experts:
        hf = sparse_decoders.spelled(family.experts, hf, where)
    hf = {**family.defaults, **hf}
    n_layers, heads = (read_count(hf, field, where) for field in ("num_hidden_layers", "num_attention_heads"))
    kv_heads = read_count(hf, "num_key_value_heads", where, heads)
    if heads % kv_heads:
        raise UserError(f"{where}: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}")
    width = read_count(hf, "hidden_size", where)
    if width % heads:
        raise UserError(f"{where}: hidden_size = {width} is no multiple of num_attention_heads = {heads}")
    head_width = read_count(hf, "head_dim", where, width // heads)
    positions = read_count(hf, "max_position_embeddings", where)
    rope = read_rope(family.rope.parameters(hf, where), head_width, positions, where)
    local_rope = rope
    if family.rope.local_type:
        local_rope = read_rope(family.rope.local_parameters(hf, where), head_width, positions, where)
    local = _local(family, hf, n_layers, where)
    modes = read_modes(hf, "bidirectional" if _is_bidirectional(family, hf) else "causal", n_layers, where)
    activation = "hidden_activation" if "hidden_activation" in family.defaults else "hidden_act"
    config = TransformerConfig(
        vocab_size=read_count(hf, "vocab_size", where),
        width=width,
        layers=n_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=read_count(hf, "intermediate_size", where),
        max_length=family.rope.longest_text(hf, where),
        rope=rope,
        local_rope=local_rope,
        local=local,
        window=_window(family, hf, where) if any(local) else Window(0, 0),
        attention=modes,
        norm_eps=read_number(hf, "rms_norm_eps", where),
        activation=read_activation(hf, activation, where, family.defaults[activation]),
        initializer_range=read_number(hf, "initializer_range", where),
    )
    if family.experts:
        shape, sparse = sparse_decoders.read_experts(family.experts, hf, n_layers, config.activation, where)
        config = dataclasses.replace(config, experts=shape, sparse=sparse)
    return dataclasses.replace(config, **_particular(family, hf, config, where))


def _particular(family: Family, hf: Mapping[str, Any], config: TransformerConfig, where: str) -> dict[str, Any]:
    """Returns the fields in which the families differ, of a config that has the others."""
    bias, width = bool(hf.get("attention_bias")), config.width
    if family.model_type == "llama":
        return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": bool(hf["mlp_bias"])}
    if family.model_type == "qwen2":
        return {"qkv_bias": True}
    if family.model_type == "qwen2_moe":
        return {"qkv_bias": bool(hf["qkv_bias"])}
    if family.model_type in ("qwen3", "qwen3_moe"):
        return {"qkv_bias": bias, "out_bias": bias, "qk_norm": True}
    if family.model_type == "olmoe":
        if config.head_width * config.heads != width:
            raise UserError(f"{where}: head_dim = {config.head_width}: olmoe's is hidden_size / num_attention_heads")
        clip = 0.0 if hf["clip_qkv"] is None else read_number(hf, "clip_qkv", where)
        return {"qkv_bias": bias, "out_bias": bias, "qk_norm": True, "qk_norm_joint": True, "clip_qkv": clip}
    if family.model_type == "gemma":
        # The first folders say 'gelu' and mean its approximation, as transformers takes it.
        act = {"activation": "gelu_tanh"} if hf["hidden_act"] == "gelu" else {}
        return {"qkv_bias": bias, "out_bias": bias, "norm_offset": 1.0, "embedding_scale": width**0.5, **act}
    if family.model_type in ("gemma2", "gemma3_text"):
        softcap = "attn_logit_softcapping"
        return {
            "qkv_bias": bias,
            "out_bias": bias,
            "qk_norm": family.model_type == "gemma3_text",
            "norm_offset": 1.0,
            "sandwich": True,
            "embedding_scale": width**0.5,
            "score_scale": read_number(hf, "query_pre_attn_scalar", where) ** -0.5,
            "softcap": 0.0 if hf[softcap] is None else read_number(hf, softcap, where),
        }
    return {}


def _local(family: Family, hf: Mapping[str, Any], n_layers: int, where: str) -> tuple[bool, ...]:
    """Returns whether layers are local, one value for all or one for each."""
    windowed = hf.get("sliding_window") is not None and bool(hf.get("use_sliding_window", True))
    if "layer_types" not in family.defaults:
        return (windowed and "sliding_window" in family.defaults,)
    types = hf["layer_types"]
    if types is None:
        numbers = range(n_layers)
        if family.model_type == "gemma2":
            return tuple(i % 2 == 0 for i in numbers)
        if family.model_type == "gemma3_text":
            pattern = read_count(hf, "sliding_window_pattern", where)
            return tuple((i + 1) % pattern != 0 for i in numbers)
        edge = read_count(hf, "max_window_layers", where) if windowed and hf["max_window_layers"] != 0 else 0
        if family.model_type == "qwen2_moe":
            return tuple(windowed and i < edge and i % 2 == 0 for i in numbers)
        return tuple(windowed and i >= edge for i in numbers)
    if not isinstance(types, list | tuple) or len(types) != n_layers or not set(types) <= set(LAYER_TYPES):
        raise UserError(f"{where}: layer_types = {types!r}: wants {n_layers} of {', '.join(LAYER_TYPES)}")
    return tuple(kind == "sliding_attention" for kind in types)


def _window(family: Family, hf: Mapping[str, Any], where: str) -> Window:
    """Returns what local layers see, as transformers has it in each mode.

    Causal: W tokens, the query's own among them. By `is_causal: false`: W on either side. By gemma3_text's own word,
    which halves W to W // 2 + 1 and then does not count the last: W // 2 on either side.
    """
    size = read_count(hf, "sliding_window", where) if hf.get("use_sliding_window", True) else 0
    if size < 2:
        raise UserError(f"{where}: sliding_window = {hf['sliding_window']!r} for local layers, wants at least 2 tokens")
    if family.model_type != "gemma3_text":
        return Window(size - 1, size)
    if hf.get("is_causal") is not False:
        return Window(size - 1, size // 2)
    return Window(size - 1, size // 2 + 1 if hf.get("use_bidirectional_attention") else size)


def _is_bidirectional(family: Family, hf: Mapping[str, Any]) -> bool:
    own = "use_bidirectional_attention"
    return hf.get("is_causal") is False or (own in family.bidirectional and bool(hf.get(own)))


def spelled(family: Family, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json in every spelling that programs read: rotary positions, and both words for bidirectional.

    Some folders only have TEI's word, which transformers does not know. The number of experts is in the hub's spelling,
    which all read.
    """
    out = family.rope.spelled(sparse_decoders.spelled(family.experts, hf) if family.experts else hf)
    words = family.bidirectional if "is_causal" in family.bidirectional and _is_bidirectional(family, hf) else {}
    return out | dict(words)


def fresh_hf_config(
    family: Family, shape: Mapping[str, Any], tokenizer: SpecialIds, where: str = "config.model.shape"
) -> dict[str, Any]:
    """Returns the Hugging Face config of a model to be made from scratch; the writer adds the class and the dtype.

    Args:
      family: that of its model_type.
      shape: fields of config.json, SIZES at the least.
      tokenizer: gives vocab_size and the ids of first, last and padding token, where `shape` does not.
      where: what `shape` is called, for messages.

    Raises:
      UserError: a field is unknown, or what `config_from_hf` refuses.
    """
    ids = {
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.cls_id,
        "eos_token_id": max(tokenizer.eos_id, tokenizer.sep_id),
    }
    known = {
        "vocab_size": tokenizer.vocab_size,
        **dict.fromkeys(SIZES),
        **family.defaults,
        "max_position_embeddings": FRESH_LENGTH,
        **{name: token_id if token_id >= 0 else None for name, token_id in ids.items()},
        "tie_word_embeddings": True,
    }
    if family.model_type == "mistral":
        known["sliding_window"] = None
    takes = (*known, "rope_theta", "rope_scaling", "rope_parameters")
    for field in shape:
        if field not in takes:
            raise UserError(f"{where}: {family.model_type} has no field {field!r}{nearest(field, takes)}")
    heads, width = (read_count(shape, field, where) for field in ("num_attention_heads", "hidden_size"))
    head_width = shape.get("head_dim", width // heads)
    fitted = {"num_key_value_heads": heads, "head_dim": head_width, "query_pre_attn_scalar": head_width}
    known |= {field: value for field, value in fitted.items() if field in known}
    hf_config = {"model_type": family.model_type, **known, **shape}
    config_from_hf(family, hf_config, where)
    return family.rope.spelled(hf_config)
