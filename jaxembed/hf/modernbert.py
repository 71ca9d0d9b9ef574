"""The Hugging Face side of ModernBERT, in the spellings of transformers 4 and 5."""

from collections.abc import Mapping
from typing import Any

from jaxembed.errors import UserError
from jaxembed.hf.fields import SpecialIds, read_activation, read_count, read_number
from jaxembed.hf.rope import RopeWords, read_rope
from jaxembed.hf.rows import linear_rows, norm_rows
from jaxembed.hf.scratch import filled, token_fields
from jaxembed.hf.table import Flat, Fused, Linear, PadRows, Row
from jaxembed.models.modernbert import ModernBertConfig

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
IGNORED = ("head.*", "decoder.*", "classifier.*", "*inv_freq")
GLOBAL, LOCAL = "full_attention", "sliding_attention"
ROPE = RopeWords(
    theta=160_000.0,
    kinds=(),  # transformers 4 knows none, and 5 would scale the local layers too
    layer_type=GLOBAL,
    local_type=LOCAL,
    local_theta=10_000.0,
    fields=("global_rope_theta", "local_rope_theta"),
)


def rows(config: ModernBertConfig) -> tuple[Row, ...]:
    """Returns the table of names; see `jaxembed.hf.table`."""
    layer, norm_bias = "layers.{i}.", config.norm_bias
    return (
        Row("embeddings.tok_embeddings.weight", "token/embedding", PadRows(config.vocab_size)),
        *norm_rows("embeddings.norm", "token_norm", norm_bias),
        *norm_rows(f"{layer}attn_norm", "layers/attention_norm", norm_bias, first=1),
        *_fused(f"{layer}attn.Wqkv", "layers/attention", ("query", "key", "value"), config.attention_bias),
        *linear_rows(f"{layer}attn.Wo", "layers/attention/out", inputs=2, bias=config.attention_bias),
        *norm_rows(f"{layer}mlp_norm", "layers/mlp_norm", norm_bias),
        *_fused(f"{layer}mlp.Wi", "layers/mlp", ("gate", "up"), config.mlp_bias),
        *linear_rows(f"{layer}mlp.Wo", "layers/mlp/down", bias=config.mlp_bias),
        *norm_rows("final_norm", "norm", norm_bias),
    )


def _fused(hf: str, ours: str, names: tuple[str, ...], bias: bool) -> tuple[Row, ...]:
    """Linear layers that lie in one, one behind the other."""
    leaves = [("weight", "kernel", Linear())] + ([("bias", "bias", Flat())] if bias else [])
    return tuple(
        Fused(
            f"{hf}.{theirs}",
            f"{ours}/{names[0]}/{leaf}",
            transform,
            others=tuple((f"{ours}/{name}/{leaf}", transform) for name in names[1:]),
        )
        for theirs, leaf, transform in leaves
    )


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModernBertConfig:
    """Reads the shape out of a Hugging Face config.

    Args:
      hf: the content of config.json.
      where: the file or config field that it stands in, for messages.

    Raises:
      UserError: a size is missing or no whole number, or the config asks for something that the model cannot do.
    """
    width, heads = read_count(hf, "hidden_size", where), read_count(hf, "num_attention_heads", where)
    if width % heads:
        raise UserError(f"{where}: hidden_size = {width} is no multiple of num_attention_heads = {heads}")
    layers = read_count(hf, "num_hidden_layers", where)
    window = read_count(hf, "local_attention", where, 128)
    if window < 2:
        raise UserError(f"{where}: local_attention = {window}, wants at least 2 tokens")
    positions = read_count(hf, "max_position_embeddings", where, 8192)
    rope, local_rope = (
        read_rope(parameters(hf, where), width // heads, positions, where)
        for parameters in (ROPE.parameters, ROPE.local_parameters)
    )
    if (rope.width, local_rope.width) != (width // heads, width // heads):
        raise UserError(f"{where}: partial_rotary_factor: modernbert turns all channels of a head")
    return ModernBertConfig(
        vocab_size=read_count(hf, "vocab_size", where),
        width=width,
        layers=layers,
        heads=heads,
        mlp_width=read_count(hf, "intermediate_size", where),
        local=_local(hf, layers, where),
        reach=window // 2,
        rope=rope,
        local_rope=local_rope,
        max_length=positions,
        norm_eps=read_number(hf, "norm_eps", where, 1e-5),
        norm_bias=bool(hf.get("norm_bias")),
        attention_bias=bool(hf.get("attention_bias")),
        mlp_bias=bool(hf.get("mlp_bias")),
        activation=read_activation(hf, "hidden_activation", where, "gelu"),
        initializer_range=read_number(hf, "initializer_range", where, 0.02),
    )


def _local(hf: Mapping[str, Any], layers: int, where: str) -> tuple[bool, ...]:
    """Whether each layer is local: a list in transformers 5, a period before."""
    types = hf.get("layer_types")
    if types is None:
        period = read_count(hf, "global_attn_every_n_layers", where, 3)
        return tuple(i % period > 0 for i in range(layers))
    if not isinstance(types, list | tuple) or len(types) != layers or not set(types) <= {GLOBAL, LOCAL}:
        raise UserError(f"{where}: layer_types = {types!r}: wants {layers} of {GLOBAL}, {LOCAL}")
    return tuple(kind == LOCAL for kind in types)


def fresh_hf_config(
    shape: Mapping[str, Any], tokenizer: SpecialIds, where: str = "config.model.shape"
) -> dict[str, Any]:
    """Returns config.json of a model to be made from scratch, in the words of both versions of transformers.

    Args:
      shape: fields of config.json, SIZES at the least.
      tokenizer: gives vocab_size and the ids of padding, first and last token, where `shape` does not.
      where: what `shape` is called, for messages.

    Raises:
      UserError: a field is unknown, or what `config_from_hf` refuses.
    """
    tokens = token_fields(tokenizer)
    # transformers would take ids of the real ModernBERT's vocabulary for those that are not given.
    ends = {name: tokens.get(name) for name in ("bos_token_id", "eos_token_id")}
    known = {
        **dict.fromkeys(SIZES),
        "hidden_activation": "gelu",
        "max_position_embeddings": 8192,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": ROPE.theta,
        "local_rope_theta": ROPE.local_theta,
        "initializer_range": 0.02,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "mlp_dropout": 0.0,
        **tokens,
        **ends,
        "cls_token_id": ends["bos_token_id"],
        "sep_token_id": ends["eos_token_id"],
    }
    hf_config = filled("modernbert", known, shape, where)
    config_from_hf(hf_config, where)
    return ROPE.spelled(hf_config)
