"""The Hugging Face side of T5's encoders: t5 (FLAN-T5 too) and mt5. Whole checkpoints are read, encoders written."""

from collections.abc import Mapping
from typing import Any

from jaxembed.errors import UserError
from jaxembed.hf.fields import SpecialIds, read_activation, read_count, read_number
from jaxembed.hf.rows import linear_rows, norm_rows, projection_rows
from jaxembed.hf.scratch import filled, token_fields
from jaxembed.hf.table import PadRows, Row
from jaxembed.models.t5 import T5Config

SIZES = ("d_model", "num_layers", "num_heads", "d_ff")
IGNORED = ("decoder.*", "lm_head.*", "encoder.embed_tokens.weight")  # the last is shared.weight again
FEED_FORWARD = {"t5": "relu", "mt5": "gated-gelu"}  # where config.json does not say


def rows(config: T5Config) -> tuple[Row, ...]:
    """Returns the table of names; see `jaxembed.hf.table`."""
    attention, mlp = "encoder.block.{i}.layer.0.", "encoder.block.{i}.layer.1."
    up, *gate = ("wi_1", "wi_0") if config.gated else ("wi",)
    projections = (
        projection_rows(f"{attention}SelfAttention.{name[0]}", f"layers/attention/{name}", bias=False)
        for name in ("query", "key", "value")
    )
    return (
        Row("shared.weight", "token/embedding", PadRows(config.vocab_size)),
        Row("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias/bias"),
        *norm_rows(f"{attention}layer_norm", "layers/attention_norm", bias=False),
        *(row for rows in projections for row in rows),
        *linear_rows(f"{attention}SelfAttention.o", "layers/attention/out", inputs=2, bias=False),
        *norm_rows(f"{mlp}layer_norm", "layers/mlp_norm", bias=False),
        *linear_rows(f"{mlp}DenseReluDense.{up}", "layers/mlp/up", bias=False),
        *(row for name in gate for row in linear_rows(f"{mlp}DenseReluDense.{name}", "layers/mlp/gate", bias=False)),
        *linear_rows(f"{mlp}DenseReluDense.wo", "layers/mlp/down", bias=False),
        *norm_rows("encoder.final_layer_norm", "norm", bias=False),
    )


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> T5Config:
    """Reads the shape out of a Hugging Face config.

    Args:
      hf: the content of config.json; `model_type` is 't5' or 'mt5'.
      where: the file or config field that it stands in, for messages.

    Raises:
      UserError: a size is missing or no whole number, or the config asks for something that the model cannot do.
    """
    kind = hf.get("feed_forward_proj") or FEED_FORWARD[hf["model_type"]]
    activation = str(kind).removeprefix("gated-")
    if kind == "gated-gelu":
        activation = "gelu_new"  # transformers' reading of that word
    config = T5Config(
        vocab_size=read_count(hf, "vocab_size", where),
        width=read_count(hf, "d_model", where),
        layers=read_count(hf, "num_layers", where),
        heads=read_count(hf, "num_heads", where),
        head_width=read_count(hf, "d_kv", where, 64),
        mlp_width=read_count(hf, "d_ff", where),
        max_length=read_count(hf, "n_positions", where, 512),
        buckets=read_count(hf, "relative_attention_num_buckets", where, 32),
        max_distance=read_count(hf, "relative_attention_max_distance", where, 128),
        norm_eps=read_number(hf, "layer_norm_epsilon", where, 1e-6),
        activation=read_activation({"feed_forward_proj": activation}, "feed_forward_proj", where, activation),
        gated=str(kind).startswith("gated-"),
        initializer_factor=read_number(hf, "initializer_factor", where, 1.0),
    )
    if config.buckets < 4 or config.max_distance <= config.buckets // 4:
        raise UserError(
            f"{where}: relative_attention_num_buckets = {config.buckets}, relative_attention_max_distance = "
            f"{config.max_distance}: wants at least 4 buckets, and a distance above a quarter of their number"
        )
    return config


def fresh_hf_config(
    model_type: str, shape: Mapping[str, Any], tokenizer: SpecialIds, where: str = "config.model.shape"
) -> dict[str, Any]:
    """Returns the Hugging Face config of a model to be made from scratch; the writer adds the class and the dtype.

    Args:
      model_type: 't5' or 'mt5'.
      shape: fields of config.json, SIZES at the least.
      tokenizer: gives vocab_size and the ids of padding and of the last token, where `shape` does not.
      where: what `shape` is called, for messages.

    Raises:
      UserError: a field is unknown, or what `config_from_hf` refuses.
    """
    known = {
        **dict.fromkeys(SIZES),
        "d_kv": 64,
        "feed_forward_proj": "gated-gelu",
        "n_positions": 512,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "is_encoder_decoder": False,
        "use_cache": False,
        **token_fields(tokenizer),
    }
    hf_config = filled(model_type, known, shape, where)
    config_from_hf(hf_config, where)
    return hf_config
