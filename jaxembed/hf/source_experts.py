"""A key of our own in config.json: experts that a text's source picks, which no other program knows.

A model of this kind is exported an expert at a time, as the dense model that it is for a text of one source.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxembed.errors import UserError
from jaxembed.models.layers.routing import ExpertsShape

OURS = "jaxembed_source_experts"
# Fields that a later run, which starts from such a model, may have changed: they hold for the dense model too.
LATER = ("output_hidden_states", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters")


def with_source_experts(sparse: Mapping[str, Any], dense: Mapping[str, Any], served: int) -> dict[str, Any]:
    """Returns config.json of a model whose texts' sources pick the experts.

    Args:
      sparse: config.json of the sparse model.
      dense: that of the dense one which each expert makes.
      served: the expert of texts without a source.
    """
    return {**sparse, OURS: {"served": served, "dense": dict(dense)}}


def read_source_experts(hf: Mapping[str, Any], shape: ExpertsShape | None) -> ExpertsShape | None:
    """Returns the shape of the experts as our key has it: without a router where a text's source picks its expert."""
    if shape is None or OURS not in hf:
        return shape
    return dataclasses.replace(shape, by_source=True, served=hf[OURS]["served"])


def serving(hf: Mapping[str, Any], expert: int, count: int) -> dict[str, Any]:
    """Returns config.json of the same model, in which texts without a source go to this expert.

    Raises:
      UserError: there is no such expert, or a router picks the experts.
    """
    if OURS not in hf:
        raise UserError(f"--expert={expert} is for models whose texts' sources pick the experts (routing 'source')")
    if not 0 <= expert < count:
        raise UserError(
            f"--expert={expert}: the model has experts 0 … {count - 1}, one for each source of its training"
        )
    return {**hf, OURS: {**hf[OURS], "served": expert}}


def dense_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json of the dense model that each expert makes; what its attention sees is not looked at."""
    return {**hf[OURS]["dense"], **{field: hf[field] for field in LATER if field in hf}}
