"""The Hugging Face side of the BERT family: bert, roberta, xlm-roberta. One block, one table."""

from collections.abc import Mapping
from typing import Any

from jaxembed.errors import UserError
from jaxembed.hf.fields import SpecialIds, read_activation, read_count, read_number
from jaxembed.hf.rows import linear_rows, norm_rows, projection_rows
from jaxembed.hf.scratch import filled, token_fields
from jaxembed.hf.table import PadRows, Row
from jaxembed.models.bert import BertConfig

ROBERTA_PAD_ID = 1  # where config.json does not say
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Heads of pre-training and of tasks, the pooler (first token, for next-sentence prediction), and old buffers.
IGNORED = (
    "pooler.*",
    "embeddings.position_ids",
    "embeddings.token_type_ids",
    "cls.*",
    "lm_head.*",
    "classifier.*",
    "qa_outputs.*",
)
RENAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))  # checkpoints of 2018


def rows(config: BertConfig) -> tuple[Row, ...]:
    """Returns the table of names; see `jaxembed.hf.table`."""
    return (
        Row("embeddings.position_embeddings.weight", "embeddings/position/embedding"),
        *rows_but_positions_and_mlp(config),
        *mlp_rows(),
    )


def rows_but_positions_and_mlp(config: BertConfig) -> tuple[Row, ...]:
    """Returns the part of the table that the Jina-2 kind has too."""
    attention = "encoder.layer.{i}.attention."
    projections = (
        projection_rows(f"{attention}self.{name}", f"layers/attention/{name}") for name in ("query", "key", "value")
    )
    return (
        Row("embeddings.word_embeddings.weight", "embeddings/token/embedding", PadRows(config.vocab_size)),
        Row("embeddings.token_type_embeddings.weight", "embeddings/type/embedding"),
        *norm_rows("embeddings.LayerNorm", "embeddings/norm"),
        *(row for pair in projections for row in pair),
        *linear_rows(f"{attention}output.dense", "layers/attention/out", inputs=2),
        *norm_rows(f"{attention}output.LayerNorm", "layers/attention_norm"),
    )


def mlp_rows() -> tuple[Row, ...]:
    """Returns the part of the table that MPNet has too."""
    layer = "encoder.layer.{i}."
    return (
        *linear_rows(f"{layer}intermediate.dense", "layers/mlp/up"),
        *linear_rows(f"{layer}output.dense", "layers/mlp/down"),
        *norm_rows(f"{layer}output.LayerNorm", "layers/mlp_norm"),
    )


def pooler_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Returns the tensors that transformers' class has beside the table's, for which embeddings have no use."""
    return {"pooler.dense.weight": (config.width, config.width), "pooler.dense.bias": (config.width,)}


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> BertConfig:
    """Reads the shape out of a Hugging Face config.

    Args:
      hf: the content of config.json; `model_type` is 'bert', 'roberta' or 'xlm-roberta'.
      where: the file or config field that it stands in, for messages.

    Raises:
      UserError: a size is missing or no whole number, or the config asks for something that the model cannot do.
    """
    position_type = hf.get("position_embedding_type") or "absolute"
    if position_type != "absolute":
        raise UserError(f"{where}: position_embedding_type = {position_type!r} is not supported; supported: 'absolute'")
    return config_of_fields(
        hf,
        where,
        activation=read_activation(hf, "hidden_act", where, "gelu"),
        position_offset=0 if hf["model_type"] == "bert" else _pad_id(hf, where, ROBERTA_PAD_ID) + 1,
        type_vocab=read_count(hf, "type_vocab_size", where, 2),
    )


def config_of_fields(hf: Mapping[str, Any], where: str, **particular: Any) -> BertConfig:
    """Reads the fields that the whole family has; `particular` are those of BertConfig that are not the same in all.

    Raises:
      UserError: see `config_from_hf`.
    """
    refused = {
        "is_decoder": (bool(hf.get("is_decoder")), False),
        "add_cross_attention": (bool(hf.get("add_cross_attention")), False),
        "embedding_size": (hf.get("embedding_size", hf.get("hidden_size")), hf.get("hidden_size")),
    }
    for field, (value, supported) in refused.items():
        if value != supported:
            raise UserError(f"{where}: {field} = {value!r} is not supported; supported: {supported!r}")
    config = BertConfig(
        vocab_size=read_count(hf, "vocab_size", where),
        width=read_count(hf, "hidden_size", where),
        layers=read_count(hf, "num_hidden_layers", where),
        heads=read_count(hf, "num_attention_heads", where),
        mlp_width=read_count(hf, "intermediate_size", where),
        positions=read_count(hf, "max_position_embeddings", where, 512),
        norm_eps=read_number(hf, "layer_norm_eps", where, 1e-12),
        initializer_range=read_number(hf, "initializer_range", where, 0.02),
        **particular,
    )
    if config.width % config.heads:
        raise UserError(f"{where}: hidden_size = {config.width} is no multiple of num_attention_heads = {config.heads}")
    if config.max_length < 1:
        raise UserError(f"{where}: max_position_embeddings = {config.positions} leaves no position for a text")
    return config


def _pad_id(hf: Mapping[str, Any], where: str, default: int) -> int:
    """The token from whose id roberta counts its positions."""
    pad_id = hf.get("pad_token_id", default)
    if type(pad_id) is not int or pad_id < 0:
        raise UserError(f"{where}: pad_token_id = {pad_id!r}: roberta counts its positions from there; set it")
    return pad_id


def fresh_hf_config(
    model_type: str, shape: Mapping[str, Any], tokenizer: SpecialIds, where: str = "config.model.shape"
) -> dict[str, Any]:
    """Returns the Hugging Face config of a model to be made from scratch; the writer adds the class and the dtype.

    Args:
      model_type: 'bert', 'roberta' or 'xlm-roberta'.
      shape: fields of config.json, SIZES at the least.
      tokenizer: gives vocab_size, pad_token_id and the ids of first and last token, where `shape` does not.
      where: what `shape` is called, for messages.

    Raises:
      UserError: a field is unknown, or what `config_from_hf` refuses.
    """
    tokens = token_fields(tokenizer)
    offset = 0 if model_type == "bert" else _pad_id(shape, where, tokens["pad_token_id"]) + 1
    known = {
        **dict.fromkeys(SIZES),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512 + offset,
        "type_vocab_size": 2 if model_type == "bert" else 1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12 if model_type == "bert" else 1e-5,
        **tokens,
    }
    hf_config = filled(model_type, known, shape, where)
    config_from_hf(hf_config, where)
    return hf_config
