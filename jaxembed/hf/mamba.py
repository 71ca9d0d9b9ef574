"""The Hugging Face side of Mamba, Mamba-2 and Falcon Mamba, and of the same reading every text both ways.

transformers has classes for the first three alone. The others, their kin, have model_types of their own, so that
transformers stops at them in place of reading them from left to right; their folders hold `modeling_bimamba.py`, to
which `auto_map` leads and which runs with trust_remote_code=True only.

config.json's `intermediate_size`, where it is there, counts before `expand`: tiiuae/falcon-mamba-7b says expand = 16 of
4096 channels, and has 8192. The norm in front of a Mamba-2 mixer's way out is of the channels of one group each, as
state-spaces' own code and transformers since 5.23 have it; versions before took all channels together.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxembed.errors import UserError
from jaxembed.hf.fields import SpecialIds, read_activation, read_count, read_number, refuse_others
from jaxembed.hf.mixer_rows import mamba1_rows, mamba2_rows
from jaxembed.hf.scratch import filled, token_fields
from jaxembed.hf.table import PadRows, Row
from jaxembed.models.layers.ssm import Mamba1Shape, Mamba2Shape
from jaxembed.models.mamba import MambaConfig

ELSEWHERE = "No other program reads texts both ways by itself; a causal model needs no code in its folder."
CODE = pathlib.Path(__file__).with_name("modeling_bimamba.py")  # copied into folders, never imported
CLASSES = {"mamba": "Mamba", "mamba2": "Mamba2", "falcon_mamba": "FalconMamba"}
KIN = {f"bi{model_type}": model_type for model_type in CLASSES}  # which reads both ways → what it is made of
AUTO_MAPS = {
    f"bi{model_type}": {"AutoConfig": f"{CODE.stem}.Bi{name}Config", "AutoModel": f"{CODE.stem}.Bi{name}Model"}
    for model_type, name in CLASSES.items()
}
GROUPS_SINCE = "5.23.0"  # the first transformers that norms groups by themselves
IGNORED = ("lm_head.*",)
RENAMES = ((r"^embedding\.", "embeddings."),)  # as the first folders have it
SIZES = ("hidden_size", "num_hidden_layers")
LIMIT = "time_step_limit"
SHARED = "shared_directions"
# The fields that shape the model, with what transformers takes them to be where config.json does not say.
_COMMON: dict[str, Any] = {
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
}
_MAMBA = {**_COMMON, "state_size": 16, "time_step_rank": "auto", "time_step_scale": 1.0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba": _MAMBA,
    "mamba2": {**_COMMON, "state_size": 128, "num_heads": 128, "head_dim": 64, "n_groups": 8, LIMIT: [0.0, math.inf]},
    "falcon_mamba": {**_MAMBA, "mixer_rms_eps": 1e-6},
}


def rows(config: MambaConfig) -> tuple[Row, ...]:
    """Returns the table of names; see `jaxembed.hf.table`."""
    of_mixer = mamba1_rows if isinstance(config.mixer, Mamba1Shape) else mamba2_rows
    mixers = {"mixer": "mixer"} | ({"backward_mixer": "backward"} if config.backward == "separate" else {})
    return (
        Row("embeddings.weight", "token/embedding", PadRows(config.vocab_size)),
        Row("norm_f.weight", "norm/scale"),
        Row("layers.{i}.norm.weight", "layers/norm/scale"),
        *(row for hf, ours in mixers.items() for row in of_mixer(f"layers.{{i}}.{hf}", f"layers/{ours}", config.mixer)),
    )


def is_original(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of state-spaces' own program."""
    return "model_type" not in hf and {"d_model", "n_layer", "ssm_cfg"} <= hf.keys()


def config_from_hf(model_type: str, hf: Mapping[str, Any], where: str = "config.json") -> MambaConfig:
    """Reads the shape out of a Hugging Face config.

    Args:
      model_type: one of CLASSES or KIN.
      hf: the content of config.json.
      where: the file or config field that it stands in, for messages.

    Raises:
      UserError: a size is missing or no whole number, or the config asks for something that the model cannot do.
    """
    base = KIN.get(model_type, model_type)
    if hf.get("quantization_config"):
        raise UserError(f"{where}: quantization_config: quantised weights are not read; take the model's own weights")
    booleans = dict.fromkeys(("use_bias", "use_conv_bias", "residual_in_fp32", SHARED), (False, True))
    refuse_others(hf, where, {"rms_norm": (True,), **booleans})
    hf = {**DEFAULTS[base], **{field: value for field, value in hf.items() if value is not None}}
    width = read_count(hf, "hidden_size", where)
    return MambaConfig(
        vocab_size=read_count(hf, "vocab_size", where),
        width=width,
        layers=read_count(hf, "num_hidden_layers", where),
        mixer=_mamba2(hf, width, where) if base == "mamba2" else _mamba1(hf, width, where),
        norm_eps=read_number(hf, "layer_norm_epsilon", where),
        initializer_range=read_number(hf, "initializer_range", where),
        residual_float32=bool(hf["residual_in_fp32"]),
        backward=("shared" if hf.get(SHARED) else "separate") if model_type in KIN else "none",
    )


def _mamba1(hf: Mapping[str, Any], width: int, where: str) -> Mamba1Shape:
    # Of other functions some versions of transformers take the one behind the convolution for the gate too, some SiLU.
    refuse_others(hf, where, {"hidden_act": ("silu", "swish")})
    rank = math.ceil(width / 16) if hf["time_step_rank"] == "auto" else read_count(hf, "time_step_rank", where)
    return Mamba1Shape(
        channels=read_count(hf, "intermediate_size", where, _expanded(hf, "expand", width, where)),
        state=read_count(hf, "state_size", where),
        rank=rank,
        inner_eps=read_number(hf, "mixer_rms_eps", where) if "mixer_rms_eps" in hf else 0.0,
        step_scale=read_number(hf, "time_step_scale", where),
        **_shared_fields(hf, where),
    )


def _mamba2(hf: Mapping[str, Any], width: int, where: str) -> Mamba2Shape:
    channels, groups = _expanded(hf, "expand", width, where), read_count(hf, "n_groups", where)
    heads, head_width = (read_count(hf, field, where) for field in ("num_heads", "head_dim"))
    if heads * head_width != channels:
        raise UserError(
            f"{where}: num_heads · head_dim = {heads} · {head_width} is not expand · hidden_size = {channels}"
        )
    if heads % groups:
        raise UserError(f"{where}: n_groups = {groups} does not divide num_heads = {heads}")
    return Mamba2Shape(
        heads=heads,
        head_width=head_width,
        state=read_count(hf, "state_size", where),
        groups=groups,
        norm_eps=read_number(hf, "layer_norm_epsilon", where),
        norm_groups=groups,
        step_limit=read_limit(hf, where),
        **_shared_fields(hf, where),
    )


def _shared_fields(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the fields of both kinds of mixers."""
    low, high = (read_number(hf, f"time_step_{edge}", where) for edge in ("min", "max"))
    if low > high:
        raise UserError(f"{where}: time_step_min = {low:g} is above time_step_max = {high:g}")
    return {
        "kernel": read_count(hf, "conv_kernel", where),
        "activation": read_activation(hf, "hidden_act", where, "silu"),
        "bias": bool(hf["use_bias"]),
        "conv_bias": bool(hf["use_conv_bias"]),
        "step_range": (low, high),
        "step_floor": read_number(hf, "time_step_floor", where),
    }


def _expanded(hf: Mapping[str, Any], field: str, width: int, where: str) -> int:
    return int(read_number(hf, field, where) * width)


def read_limit(hf: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Returns the bounds of step sizes, `time_step_limit`; transformers 5 writes infinity as {"__float__": …}.

    Raises:
      UserError: they are no two numbers, the first the smaller.
    """
    said = hf.get(LIMIT)
    found = [0.0, math.inf] if said is None else said
    if isinstance(found, list | tuple):
        found = [math.inf if edge == {"__float__": "Infinity"} else edge for edge in found]
    fits = isinstance(found, list) and len(found) == 2 and all(type(edge) in (int, float) for edge in found)
    if not fits or not 0 <= found[0] < found[1]:
        raise UserError(f"{where}: {LIMIT} = {said!r}: wants two numbers, the first the smaller")
    return float(found[0]), float(found[1])


def plain_limit(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json without bounds of step sizes that bind nothing: infinity is no JSON."""
    if LIMIT not in hf:
        return dict(hf)
    low, high = read_limit(hf, "config.json")
    rest = {field: value for field, value in hf.items() if field != LIMIT}
    if (low, high) == (0.0, math.inf):
        return rest
    return rest | {LIMIT: [low, {"__float__": "Infinity"} if high == math.inf else high]}


def spelled(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json as it is written: no states are kept for generating, and kin lead to their class."""
    out = plain_limit(hf) | {"use_cache": False}
    if hf["model_type"] in KIN:
        out |= {SHARED: bool(hf.get(SHARED)), "auto_map": AUTO_MAPS[hf["model_type"]]}
    return out


def requires(hf: Mapping[str, Any]) -> str:
    """Returns the first transformers that computes such a config's gated norms; '' where all that know it do."""
    return GROUPS_SINCE if hf.get("n_groups", 1) != 1 or hf.get("mamba_n_groups", 1) != 1 else ""


def both_ways(hf: Mapping[str, Any], shared: bool) -> dict[str, Any]:
    """Returns config.json of the kin that reads every text both ways.

    Args:
      hf: config.json, of a model_type of CLASSES, or of one of KIN.
      shared: whether one mixer reads both ways; else each layer has a second one.
    """
    model_type = f"bi{KIN.get(hf['model_type'], hf['model_type'])}"
    name = CLASSES[KIN[model_type]]
    return spelled({**hf, "model_type": model_type, "architectures": [f"Bi{name}Model"], SHARED: shared})


def fresh_hf_config(
    model_type: str, shape: Mapping[str, Any], tokenizer: SpecialIds, where: str = "config.model.shape"
) -> dict[str, Any]:
    """Returns config.json of a model to be made from scratch.

    Its embeddings are drawn with 0.02 as standard deviation, as state-spaces' are, and not with transformers' 0.1;
    Mamba-2's have one group, which all versions of transformers compute alike.

    Args:
      model_type: one of CLASSES or KIN.
      shape: fields of config.json, SIZES at the least.
      tokenizer: gives vocab_size and the ids of padding, first and last token, where `shape` does not.
      where: what `shape` is called, for messages.

    Raises:
      UserError: a field is unknown, or what `config_from_hf` refuses.
    """
    base = KIN.get(model_type, model_type)
    known = {
        **dict.fromkeys(SIZES),
        **DEFAULTS[base],
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        **token_fields(tokenizer),
        **({SHARED: False} if model_type in KIN else {}),
    }
    if base == "mamba2":
        known |= {"n_groups": 1, "num_heads": _heads(known | shape, where)}
    hf_config = filled(model_type, known, shape, where)
    config_from_hf(model_type, hf_config, where)
    return spelled(hf_config)


def _heads(hf: Mapping[str, Any], where: str) -> int:
    """Returns how many heads there are, where config.json only says how wide one is."""
    channels = _expanded(hf, "expand", read_count(hf, "hidden_size", where), where)
    return max(1, channels // read_count(hf, "head_dim", where))
