"""The Hugging Face side of bamba: a decoder-shaped transformer with Mamba-2 mixers for attention in most layers.

What it shares with the others is read as theirs (`jaxembed.hf.decoders`). Half of the channels of attention's heads
turn with their position, whatever config.json says outside of `rope_parameters`. `is_causal: false` opens the layers of
attention, the mixers read forwards. The gated norm is of the channels of one group each, as in `jaxembed.hf.mamba`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxembed.errors import UserError
from jaxembed.hf import decoders
from jaxembed.hf.decoders import BIDIRECTIONAL, Family
from jaxembed.hf.fields import SpecialIds, read_activation, read_count, read_number, refuse_others
from jaxembed.hf.mamba import LIMIT, plain_limit, read_limit
from jaxembed.hf.mixer_rows import mamba2_rows
from jaxembed.hf.rows import linear_rows, norm_rows, projection_rows
from jaxembed.hf.table import PadRows, Row
from jaxembed.models.hybrid import HybridConfig
from jaxembed.models.layers.ssm import Mamba2Shape
from jaxembed.models.options import per_layer

TURNED = {"partial_rotary_factor": 0.5}
PLACES = "attn_layer_indices"
EVERY = 8  # of so many layers of a model from scratch one has attention
FAMILY = Family(
    "bamba",
    "BambaModel",
    "4.48.0",
    {
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 262_144,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        PLACES: None,
        "mamba_n_heads": 128,
        "mamba_d_head": "auto",
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        LIMIT: None,
    },
    BIDIRECTIONAL,
)


def rows(config: HybridConfig) -> tuple[Row, ...]:
    """Returns the table of names; see `jaxembed.hf.table`."""
    layer = "layers.{i}."
    norms = {"input_layernorm": "mixing_norm", "pre_ff_layernorm": "mlp_norm"}
    linears = [(f"{layer}feed_forward.{name}_proj", f"layers/mlp/{name}") for name in ("gate", "up", "down")]
    heads = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    attention = [
        *(row for hf, o in heads.items() for row in projection_rows(_attn(hf), f"attention/{o}", config.qkv_bias)),
        *linear_rows(_attn("o_proj"), "attention/out", inputs=2, bias=config.out_bias),
    ]
    return (
        Row("embed_tokens.weight", "token/embedding", PadRows(config.vocab_size)),
        *norm_rows("final_layernorm", "norm", bias=False),
        *(row for hf, o in norms.items() for row in norm_rows(f"{layer}{hf}", f"layers/{o}", bias=False)),
        *(row for hf, ours in linears for row in linear_rows(hf, ours, bias=config.mlp_bias)),
        *_at(attention, config, False),
        *_at(mamba2_rows(f"{layer}mamba", "mixers", config.mixer), config, True),
    )


def _attn(name: str) -> str:
    return f"layers.{{i}}.self_attn.{name}"


def _at(found: list[Row] | tuple[Row, ...], config: HybridConfig, mixers: bool) -> list[Row]:
    """Returns the rows as of the layers that have a mixer, or have none; [] where there are no such layers."""
    numbers = tuple(i for i, is_mixer in enumerate(per_layer(config.mixers, config.layers)) if is_mixer == mixers)
    return [dataclasses.replace(row, at=numbers) for row in found if numbers]


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> HybridConfig:
    """Reads the shape out of a Hugging Face config.

    Args:
      hf: the content of config.json.
      where: the file or config field that it stands in, for messages.

    Raises:
      UserError: a size is missing or no whole number, or the config asks for something that the model cannot do.
    """
    fields = ("attention_bias", "mlp_bias", "mamba_conv_bias", "mamba_proj_bias")
    refuse_others(hf, where, dict.fromkeys(fields, (False, True)))
    hf = {**FAMILY.defaults, **hf}
    shared = decoders.config_from_hf(FAMILY, hf | TURNED, where)
    mixers = _mixers(hf, shared.layers, where)
    if all(mixers) and "causal" not in shared.attention:
        raise UserError(f"{where}: {PLACES} names no layer, so none could see both ways; mixers read forwards")
    of_shared = {field.name: getattr(shared, field.name) for field in dataclasses.fields(shared)}
    of_shared |= {"qkv_bias": bool(hf["attention_bias"]), "out_bias": bool(hf["attention_bias"])}
    of_shared |= {"mlp_bias": bool(hf["mlp_bias"])}
    return HybridConfig(**of_shared, mixer=_mixer(hf, shared.width, where), mixers=mixers)


def _mixers(hf: Mapping[str, Any], layers: int, where: str) -> tuple[bool, ...]:
    """Returns whether each layer has a mixer. Numbers behind the last layer are of layers cut off."""
    numbers = hf[PLACES] or []
    if not isinstance(numbers, list | tuple) or not all(type(i) is int and i >= 0 for i in numbers):
        raise UserError(f"{where}: {PLACES} = {numbers!r}: wants numbers of layers, the first being 0")
    return tuple(i not in numbers for i in range(layers))


def _mixer(hf: Mapping[str, Any], width: int, where: str) -> Mamba2Shape:
    channels = int(read_number(hf, "mamba_expand", where) * width)
    heads, groups = (read_count(hf, f"mamba_n_{what}", where) for what in ("heads", "groups"))
    head_width = channels // heads if hf["mamba_d_head"] == "auto" else read_count(hf, "mamba_d_head", where)
    if heads * head_width != channels:
        product = f"{heads} · {head_width} is not mamba_expand · hidden_size = {channels}"
        raise UserError(f"{where}: mamba_n_heads · mamba_d_head = {product}")
    if heads % groups:
        raise UserError(f"{where}: mamba_n_groups = {groups} does not divide mamba_n_heads = {heads}")
    return Mamba2Shape(
        heads=heads,
        head_width=head_width,
        state=read_count(hf, "mamba_d_state", where),
        groups=groups,
        kernel=read_count(hf, "mamba_d_conv", where),
        activation=read_activation(hf, "hidden_act", where, "silu"),
        bias=bool(hf["mamba_proj_bias"]),
        conv_bias=bool(hf["mamba_conv_bias"]),
        norm_eps=read_number(hf, "rms_norm_eps", where),
        norm_groups=groups,
        step_limit=read_limit(hf, where),
    )


def spelled(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json in every spelling that programs read; see `jaxembed.hf.decoders.spelled`."""
    return decoders.spelled(FAMILY, plain_limit(hf) | TURNED)


def fresh_hf_config(
    shape: Mapping[str, Any], tokenizer: SpecialIds, where: str = "config.model.shape"
) -> dict[str, Any]:
    """Returns config.json of a model to be made from scratch.

    One in EVERY layers has attention, where `attn_layer_indices` does not say; mixers' heads have 64 channels, where
    neither `mamba_n_heads` nor `mamba_d_head` does.

    Args:
      shape: fields of config.json, `jaxembed.hf.decoders.SIZES` at the least.
      tokenizer: gives vocab_size and the ids of first, last and padding token, where `shape` does not.
      where: what `shape` is called, for messages.

    Raises:
      UserError: a field is unknown, or what `config_from_hf` refuses.
    """
    layers, width = (read_count(shape, field, where) for field in ("num_hidden_layers", "hidden_size"))
    channels = int(read_number(shape, "mamba_expand", where, 2.0) * width)
    head_width = shape.get("mamba_d_head", "auto")
    head_width = 64 if head_width == "auto" else read_count(shape, "mamba_d_head", where)
    fitted = {
        PLACES: list(range(min(EVERY, layers) // 2, layers, EVERY)),
        "mamba_n_heads": max(1, channels // head_width),
    }
    hf_config = decoders.fresh_hf_config(FAMILY, fitted | dict(shape), tokenizer, where)
    config_from_hf(hf_config, where)
    return spelled(hf_config)
