"""The Hugging Face side of the Jina-2 kind: BERT with ALiBi and a gated MLP.

The layout of jinaai/jina-embeddings-v2-base-en. Its config.json says model_type 'bert', and its class is not in
transformers: programs that open the folder fetch it from jinaai/jina-bert-implementation, as `auto_map` says.
"""

from collections.abc import Mapping
from typing import Any

from jaxembed.errors import UserError
from jaxembed.hf.bert import IGNORED as IGNORED
from jaxembed.hf.bert import SIZES, config_of_fields, rows_but_positions_and_mlp
from jaxembed.hf.fields import SpecialIds, read_count, refuse_others
from jaxembed.hf.rows import linear_rows, norm_rows
from jaxembed.hf.scratch import filled, token_fields
from jaxembed.hf.table import Fused, Linear, Row
from jaxembed.models.bert import BertConfig

ACTIVATION_OF = {"geglu": "gelu", "reglu": "relu"}  # by feed_forward_type
CODE = "jinaai/jina-bert-implementation--"
AUTO_MAP = {"AutoConfig": f"{CODE}configuration_bert.JinaBertConfig", "AutoModel": f"{CODE}modeling_bert.JinaBertModel"}


def is_jina_bert(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this kind."""
    return hf.get("model_type") == "bert" and hf.get("position_embedding_type") == "alibi"


def rows(config: BertConfig) -> tuple[Row, ...]:
    """Returns the table of names; see `jaxembed.hf.table`."""
    mlp = "encoder.layer.{i}.mlp."
    return (
        *rows_but_positions_and_mlp(config),
        Fused(
            f"{mlp}gated_layers.weight",
            "layers/mlp/gate/kernel",
            Linear(),
            others=(("layers/mlp/up/kernel", Linear()),),
        ),
        *linear_rows(f"{mlp}wo", "layers/mlp/down"),
        *norm_rows(f"{mlp}layernorm", "layers/mlp_norm"),
    )


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> BertConfig:
    """Reads the shape out of config.json; `where` says where it stands, for messages.

    Raises:
      UserError: as `jaxembed.hf.bert.config_from_hf`.
    """
    refuse_others(hf, where, {"position_embedding_type": ("alibi",)})
    kind = hf.get("feed_forward_type")
    if kind not in ACTIVATION_OF:
        raise UserError(
            f"{where}: feed_forward_type = {kind!r} is not supported; supported: {', '.join(ACTIVATION_OF)}"
        )
    return config_of_fields(
        hf,
        where,
        activation=ACTIVATION_OF[kind],
        type_vocab=read_count(hf, "type_vocab_size", where, 2),
        alibi=True,
        gated=True,
    )


def fresh_hf_config(
    shape: Mapping[str, Any], tokenizer: SpecialIds, where: str = "config.model.shape"
) -> dict[str, Any]:
    """Returns config.json of a model to be made from scratch; see `jaxembed.hf.bert.fresh_hf_config`.

    Raises:
      UserError: a field is unknown, or what `config_from_hf` refuses.
    """
    known = {
        **dict.fromkeys(SIZES),
        "position_embedding_type": "alibi",
        "feed_forward_type": "geglu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 8192,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        **token_fields(tokenizer),
    }
    hf_config = filled("bert", known, shape, where)
    config_from_hf(hf_config, where)
    return spelled(hf_config)


def spelled(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json with the place of the class."""
    return {**hf, "auto_map": AUTO_MAP}
