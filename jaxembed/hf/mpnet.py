"""The Hugging Face side of MPNet: BERT's block and a bias by distance, under names of its own."""

from collections.abc import Mapping
from typing import Any

from jaxembed.errors import UserError
from jaxembed.hf.bert import IGNORED as IGNORED
from jaxembed.hf.bert import SIZES, config_of_fields, mlp_rows
from jaxembed.hf.fields import SpecialIds, read_activation, refuse_others
from jaxembed.hf.rows import linear_rows, norm_rows, projection_rows
from jaxembed.hf.scratch import filled, token_fields
from jaxembed.hf.table import PadRows, Row
from jaxembed.models.bert import BertConfig

# transformers' class has these fixed, whatever config.json says: positions are counted over tokens other than PAD_ID.
PAD_ID, BUCKETS = 1, 32


def rows(config: BertConfig) -> tuple[Row, ...]:
    """Returns the table of names; see `jaxembed.hf.table`."""
    attention = "encoder.layer.{i}.attention."
    projections = (
        projection_rows(f"{attention}attn.{name[0]}", f"layers/attention/{name}") for name in ("query", "key", "value")
    )
    return (
        Row("embeddings.word_embeddings.weight", "embeddings/token/embedding", PadRows(config.vocab_size)),
        Row("embeddings.position_embeddings.weight", "embeddings/position/embedding"),
        *norm_rows("embeddings.LayerNorm", "embeddings/norm"),
        Row("encoder.relative_attention_bias.weight", "relative_bias/bias"),
        *(row for pair in projections for row in pair),
        *linear_rows(f"{attention}attn.o", "layers/attention/out", inputs=2),
        *norm_rows(f"{attention}LayerNorm", "layers/attention_norm"),
        *mlp_rows(),
    )


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> BertConfig:
    """Reads the shape out of config.json; `where` says where it stands, for messages.

    Raises:
      UserError: as `jaxembed.hf.bert.config_from_hf`.
    """
    refuse_others(hf, where, {"relative_attention_num_buckets": (BUCKETS,), "pad_token_id": (PAD_ID,)})
    return config_of_fields(
        hf,
        where,
        activation=read_activation(hf, "hidden_act", where, "gelu"),
        position_offset=PAD_ID + 1,
        type_vocab=0,
        buckets=BUCKETS,
    )


def fresh_hf_config(
    shape: Mapping[str, Any], tokenizer: SpecialIds, where: str = "config.model.shape"
) -> dict[str, Any]:
    """Returns config.json of a model to be made from scratch; see `jaxembed.hf.bert.fresh_hf_config`.

    Raises:
      UserError: a field is unknown or wrong, or the tokenizer's padding has another id than MPNet's.
    """
    if tokenizer.pad_id != PAD_ID:
        raise UserError(
            f"{where}: mpnet wants a tokenizer whose padding has the id {PAD_ID}, here it is {tokenizer.pad_id}; "
            "train 'bert' or 'roberta' instead"
        )
    known = {
        **dict.fromkeys(SIZES),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 512 + PAD_ID + 1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "relative_attention_num_buckets": BUCKETS,
        **token_fields(tokenizer),
    }
    hf_config = filled("mpnet", known, shape, where)
    config_from_hf(hf_config, where)
    return hf_config
