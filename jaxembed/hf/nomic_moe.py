"""The Hugging Face side of Nomic's sparse BERT, the layout of nomic-ai/nomic-embed-text-v2-moe.

config.json says model_type 'nomic_bert', as the dense ones do, in nomic-ai's names alone (GPT-2's: n_embd, n_layer, …):
transformers' own class of that model_type is dense, and would silently open such a folder with random weights for what
it does not find. So the folder holds a class of ours, `modeling_nomic_moe.py`, to which `auto_map` leads and which runs
with trust_remote_code=True only; and `hidden_act`, which only transformers' own class reads, says no activation, so
that without remote code it stops there.

llama.cpp and vLLM read the hub's layout without that code, but know neither the fields that only we have (OURS) nor a
table of positions, which an upcycled BERT may need, and read past moe_normalize_expert_weights; llama.cpp leaves out
the bias behind the experts too, and opens models of 2048 positions only. Where a folder must
open in transformers without remote code, train a mixtral or qwen3_moe with config.model.attention = 'bidirectional'
instead: these have classes there, and `is_causal: false`.

Facts from nomic-ai's contrastors (layers/moe.py, models/huggingface) and vLLM's port of the model: layer i is sparse
where i % moe_every_n_layers == 1; the router's softmax is over all experts in float32, its top k are not normalised;
one bias lies behind all experts; `w1` and `w2` hold an expert's F rows one behind another. In gated experts `w1` is the
gate and `v1` goes around it, as in megablocks' GLU.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxembed.errors import UserError
from jaxembed.hf.fields import SpecialIds, read_activation, read_count, read_number, refuse_others
from jaxembed.hf.nomic_bert import IGNORED as IGNORED
from jaxembed.hf.nomic_bert import NAMES, POSITIONS, ROPE, SIZES
from jaxembed.hf.rows import linear_rows, norm_rows
from jaxembed.hf.scratch import filled, token_fields
from jaxembed.hf.source_experts import read_source_experts
from jaxembed.hf.table import Flat, Fused, Linear, PadRows, Row, Shape
from jaxembed.models.layers.rope import RopeConfig
from jaxembed.models.layers.routing import ExpertsShape
from jaxembed.models.nomic_bert import NomicBertConfig
from jaxembed.models.options import per_layer

CODE = pathlib.Path(__file__).with_name("modeling_nomic_moe.py")  # copied into folders, never imported
AUTO_MAP = {"AutoConfig": f"{CODE.stem}.NomicBertConfig", "AutoModel": f"{CODE.stem}.NomicBertModel"}
ELSEWHERE = (
    "llama.cpp and vLLM read this layout by themselves, but not the fields of config.json that only jaxembed writes."
)
STOP = "see activation_function; this model needs trust_remote_code=True"
GATED = {"swiglu": "silu", "geglu": "gelu"}  # activation_function → the gate's, ours; others are those of plain MLPs
# Fields of ours, written where they are not the default: which layers are sparse, where that is no every n-th; whether
# experts have gates; whether each has a bias into its hidden layer.
OURS: dict[str, Any] = {"moe_layers": None, "moe_gated": False, "moe_up_bias": False}
# What nomic-ai's class takes where config.json does not say.
DEFAULTS: dict[str, Any] = {
    "activation_function": "gelu_new",
    "qkv_proj_bias": True,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "rotary_emb_fraction": 0.0,
    "rotary_emb_base": 10_000.0,
    "moe_every_n_layers": 0,
    "moe_normalize_expert_weights": False,
}
# What nomic-ai's code can do and the backbone cannot: fixed at these values.
FIXED: dict[str, Any] = {
    "prenorm": False,
    "parallel_block": False,
    "use_rms_norm": False,
    "causal": False,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "expert_choice_router": False,
    "num_shared_experts": 0,
    "ffn_div": 1,
}
# transformers' words, which are not written: `hidden_act` would be a second activation.
FOREIGN = ("hidden_act", "head_dim", "rope_theta", "rope_parameters", "rope_scaling")


@dataclasses.dataclass(frozen=True)
class Stacked:
    """[X · out, in] ↔ our [X, in, out]: the kernels of all experts, one behind another."""

    def hf_shape(self, shape: Shape) -> Shape:
        return shape[0] * shape[2], shape[1]

    def to_ours(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor.reshape(shape[0], shape[2], shape[1]).swapaxes(1, 2)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.swapaxes(1, 2).reshape(-1, array.shape[1])


@dataclasses.dataclass(frozen=True)
class StackedRows:
    """[X · in, out] ↔ our [X, in, out]: the same of kernels that are stored as ours are."""

    def hf_shape(self, shape: Shape) -> Shape:
        return shape[0] * shape[1], shape[2]

    def to_ours(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor.reshape(shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, array.shape[2])


def is_nomic_moe(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this kind."""
    return hf.get("model_type") == "nomic_bert" and bool(hf.get("num_experts"))


def rows(config: NomicBertConfig) -> tuple[Row, ...]:
    """Returns the table of names; see `jaxembed.hf.table`."""
    layer, sparse = "encoder.layers.{i}.", _numbers(config, True)
    attention = [_qkv(f"{layer}attn.Wqkv.weight", "kernel", Linear())]
    if config.attention_bias:
        attention.append(_qkv(f"{layer}attn.Wqkv.bias", "bias", Flat()))
    position = (Row("embeddings.position_embeddings.weight", "embeddings/position/embedding"),)
    experts, shape = f"{layer}mlp.experts.", config.experts
    of_experts = [
        *([] if shape.by_source else [Row(f"{layer}mlp.router.layer.weight", "experts/router/kernel", Linear())]),
        Row(f"{experts}mlp.w1", f"experts/{'gate' if shape.gated else 'up'}/kernel", Stacked()),
        *([Row(f"{experts}mlp.v1", "experts/up/kernel", Stacked())] if shape.gated else []),
        *([Row(f"{experts}mlp.b1", "experts/up/bias", Flat())] if shape.up_bias else []),
        Row(f"{experts}mlp.w2", "experts/down/kernel", StackedRows()),
        Row(f"{experts}bias", "experts/out/bias"),
    ]
    return (
        Row("embeddings.word_embeddings.weight", "embeddings/token/embedding", PadRows(config.vocab_size)),
        *(position if config.rope is None else ()),
        Row("embeddings.token_type_embeddings.weight", "embeddings/type/embedding"),
        *norm_rows("emb_ln", "embeddings/norm"),
        *attention,
        *linear_rows(f"{layer}attn.out_proj", "layers/attention/out", inputs=2, bias=config.attention_bias),
        *norm_rows(f"{layer}norm1", "layers/attention_norm"),
        *(dataclasses.replace(row, at=sparse) for row in of_experts),
        *_dense_rows(config, layer),
        *norm_rows(f"{layer}norm2", "layers/mlp_norm"),
    )


def _qkv(hf: str, leaf: str, transform: Linear | Flat) -> Fused:
    others = tuple((f"layers/attention/{name}/{leaf}", transform) for name in ("key", "value"))
    return Fused(hf, f"layers/attention/query/{leaf}", transform, others=others)


def _dense_rows(config: NomicBertConfig, layer: str) -> list[Row]:
    """Returns the rows of the dense layers' MLPs."""
    into, out_of = config.mlp_biases
    names = {"fc11": "up", "fc12": "gate"} if config.gated else {"fc1": "up"}
    linears = [(theirs, ours, into) for theirs, ours in names.items()] + [("fc2", "down", out_of)]
    dense = _numbers(config, False)
    return [
        dataclasses.replace(row, at=dense)
        for theirs, ours, bias in linears
        for row in linear_rows(f"{layer}mlp.{theirs}", f"mlps/{ours}", bias=bias)
        if dense
    ]


def _numbers(config: NomicBertConfig, sparse: bool) -> tuple[int, ...]:
    """Returns the numbers of the layers that are sparse, or are not."""
    return tuple(i for i, is_sparse in enumerate(per_layer(config.sparse, config.layers)) if is_sparse == sparse)


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> NomicBertConfig:
    """Reads the shape out of a Hugging Face config.

    Args:
      hf: the content of config.json, in nomic-ai's words, or in those of transformers where it has no others.
      where: the file or config field that it stands in, for messages.

    Raises:
      UserError: a size is missing or no whole number, or the config asks for something that the model cannot do.
    """
    named = _in_hub_words(hf, where)
    supported = {field: (value,) for field, value in FIXED.items()}
    supported |= {field: (False, True) for field in ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias")}
    supported |= {"moe_normalize_expert_weights": (False, 1), "moe_gated": (False, True), "moe_up_bias": (False, True)}
    refuse_others(named, where, supported)
    width, heads, hidden = (read_count(named, field, where) for field in ("n_embd", "n_head", "n_inner"))
    if width % heads:
        raise UserError(f"{where}: n_embd = {width} is no multiple of n_head = {heads}")
    layers = read_count(named, "n_layer", where)
    experts, top_k = read_count(named, "num_experts", where), read_count(named, "moe_top_k", where)
    if top_k > experts:
        raise UserError(f"{where}: moe_top_k = {top_k} is more than num_experts = {experts}")
    act = named["activation_function"]
    activation = GATED.get(act) or read_activation(named, "activation_function", where, "gelu")
    shape = ExpertsShape(
        count=experts,
        top_k=top_k,
        width=hidden,
        normalize=bool(named["moe_normalize_expert_weights"]),
        activation=activation,
        gated=bool(named.get("moe_gated")),
        up_bias=bool(named.get("moe_up_bias")),
        out_bias=True,
    )
    return NomicBertConfig(
        vocab_size=read_count(named, "vocab_size", where),
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=hidden,
        rope=_rope(named, width // heads, where),
        max_length=read_count(named, NAMES[POSITIONS], where),
        type_vocab=read_count(named, "type_vocab_size", where, 2),
        norm_eps=read_number(named, NAMES["layer_norm_eps"], where, 1e-5),
        activation=activation,
        gated=act in GATED,
        attention_bias=named["qkv_proj_bias"],
        mlp_biases=(named["mlp_fc1_bias"], named["mlp_fc2_bias"]),
        initializer_range=read_number(named, "initializer_range", where, 0.02),
        experts=read_source_experts(named, shape),
        sparse=_sparse(named, layers, where),
    )


def _in_hub_words(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns config.json in nomic-ai's words, complete; what it says in these counts."""
    said = {field: value for field, value in hf.items() if value is not None}
    kind = ROPE.parameters(said, where)["rope_type"]
    if kind != "default":
        raise UserError(f"{where}: rope_type = {kind!r} is not supported; supported: 'default'")
    named = {field: said[theirs] for theirs, field in NAMES.items() if theirs in said}
    if "rope_theta" in said:
        named["rotary_emb_base"] = said["rope_theta"]
    rest = {field: value for field, value in said.items() if field not in NAMES and field not in FOREIGN}
    return {**DEFAULTS, **named, **rest}


def _rope(named: Mapping[str, Any], head_width: int, where: str) -> RopeConfig | None:
    fraction = named["rotary_emb_fraction"]
    if fraction not in (0, 1):
        raise UserError(f"{where}: rotary_emb_fraction = {fraction!r} is not supported; supported: 1.0, 0.0")
    if not fraction:
        return None
    if head_width % 2:
        raise UserError(f"{where}: rotary positions of {head_width} channels: wants an even number of them")
    return RopeConfig(head_width, read_number(named, "rotary_emb_base", where))


def _sparse(named: Mapping[str, Any], layers: int, where: str) -> tuple[bool, ...]:
    """Returns whether each layer is sparse. Of `moe_layers`, numbers behind the last layer are of layers cut off."""
    numbers, every = named.get("moe_layers"), named["moe_every_n_layers"]
    if type(every) is not int or every < 0:
        raise UserError(f"{where}: moe_every_n_layers = {every!r}: wants a whole number")
    if numbers is None:
        said, sparse = f"moe_every_n_layers = {every}", _every(every, layers)
    else:
        if not isinstance(numbers, list | tuple) or not all(type(i) is int and i >= 0 for i in numbers):
            raise UserError(f"{where}: moe_layers = {numbers!r}: wants numbers of layers, the first being 0")
        said, sparse = f"moe_layers = {list(numbers)}", tuple(i in numbers for i in range(layers))
    if not any(sparse):
        raise UserError(f"{where}: {said}: none of the {layers} layers has experts")
    return sparse


def _every(n: int, layers: int) -> tuple[bool, ...]:
    return tuple(n > 0 and i % n == 1 for i in range(layers))


def spelled(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json in nomic-ai's words alone, our fields only where these cannot say it."""
    named = _in_hub_words(hf, "config.json")
    layers, every = named["n_layer"], named["moe_every_n_layers"]
    sparse = _sparse(named, layers, "config.json")
    fitting = [n for n in (every, *range(2, layers + 1)) if _every(n, layers) == sparse]
    if fitting:
        said = {"moe_every_n_layers": fitting[0]}
    else:  # 0: programs that know no moe_layers miss tensors, and do not open it
        said = {"moe_every_n_layers": 0, "moe_layers": [i for i in range(layers) if sparse[i]]}
    said |= {field: named[field] for field, default in OURS.items() if default is False and named.get(field)}
    rest = {field: value for field, value in named.items() if field not in OURS}
    return {**rest, **FIXED, **said, "hidden_act": STOP, "auto_map": AUTO_MAP}


def fresh_hf_config(
    shape: Mapping[str, Any], tokenizer: SpecialIds, where: str = "config.model.shape"
) -> dict[str, Any]:
    """Returns config.json of a model to be made from scratch.

    Args:
      shape: fields of config.json: sizes as transformers spells them, SIZES at the least, the others as nomic-ai does.
      tokenizer: gives vocab_size and the ids of padding, first and last token, where `shape` does not.
      where: what `shape` is called, for messages.

    Raises:
      UserError: a field is unknown, or what `config_from_hf` refuses.
    """
    known = {
        **dict.fromkeys(SIZES),
        **DEFAULTS,
        **OURS,
        "activation_function": "gelu",
        "rotary_emb_fraction": 1.0,
        "num_experts": 8,
        "moe_top_k": 2,
        "moe_every_n_layers": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        POSITIONS: 2048,
        "type_vocab_size": 1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        **token_fields(tokenizer),
    }
    hf_config = filled("nomic_moe", known, shape, where) | {"model_type": "nomic_bert"}
    config_from_hf(hf_config, where)
    return spelled(hf_config)
