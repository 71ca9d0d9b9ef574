"""Routing weights as vectors (MoEE, Li & Zhou 2024, arXiv:2410.10814).

What the routers of a mixture of experts say of a text tells texts apart too, though nothing was trained for that. A
token's routing weights are each router's softmax over all its experts, those of all sparse layers one after another.
They are pooled as the token states are: in the paper both are taken at the last token.

The authors' code (tianyi-lab/MoE-Embedding) takes some models' logits in place of the softmax, and brings each
dimension to mean 0 and variance 1 over a batch. Here, as in the paper, weights stay as they are: a text's vector does
not depend on what else is in the batch.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxembed.data.batch import Rows
from jaxembed.errors import UserError
from jaxembed.models.layers.routing import ExpertsShape
from jaxembed.models.options import per_layer
from jaxembed.models.pooling import l2_normalize, pool
from jaxembed.sharding import STATES

if TYPE_CHECKING:
    from jaxembed.models.text_encoder import HeadConfig

MODES = ("alone", "concat", "sum")


def routing_width(backbone: Any) -> int:
    """Returns n X, the routing weights of a token of a backbone with this frozen config; 0 where nothing is routed."""
    match backbone:
        case object(experts=ExpertsShape(by_source=False, count=count), sparse=sparse):
            return count * sum(per_layer(sparse, backbone.layers))
        case _:
            return 0


def with_moee(head: "HeadConfig", backbone: Any, mode: str, weight: float, where: str = "") -> "HeadConfig":
    """Returns the head with routing weights in its vectors.

    Args:
      head: the model's.
      backbone: its backbone's frozen config.
      mode: as of `HeadConfig.moee`; '' for none.
      weight: as of `HeadConfig.moee_weight`.
      where: what comes before 'moee' where it is set, for messages: 'config.model.', '--' or ''.

    Raises:
      UserError: the model has no routers, transforms the token states before it pools them, or the weight is not
        above 0.
    """
    said = f"{where}moee = {mode!r}"
    if mode and not routing_width(backbone):
        raise UserError(f"{said}: the model has no routers, whose weights this takes: leave it out")
    if mode and head.pooling == "latent":
        raise UserError(f"{said}: pooling 'latent' transforms token states, not routing weights: name another pooling")
    if mode == "sum" and not (math.isfinite(weight) and weight > 0):
        raise UserError(f"{where}moee_weight = {weight:g}: wants a number above 0")
    return dataclasses.replace(head, moee=mode, moee_weight=weight)


def combine(vectors_SxTxE: jax.Array, probabilities_NxRxLxX: jax.Array, rows: Rows, head: "HeadConfig") -> jax.Array:
    """Brings routing weights into vectors.

    Args:
      vectors_SxTxE: of the token states, float32, behind the whole head but for its normalisation.
      probabilities_NxRxLxX: the routers' of every token, those of all N sparse layers.
      rows: the tokens' rows.
      head: the model's.

    Returns:
      float32 [S, T, N X] of the weights 'alone', else [S, T, E + N X]. In 'sum' both parts are brought to length 1 and
      the weights' then to √weight: the dot product of two such vectors is cosine + weight · cosine.
    """
    side_by_side = probabilities_NxRxLxX.transpose(1, 2, 0, 3)
    shape = *side_by_side.shape[:2], side_by_side.shape[2] * side_by_side.shape[3]
    tokens = jax.lax.reshape(side_by_side, shape, out_sharding=STATES)
    weights = pool(tokens, rows, vectors_SxTxE.shape[1], head.pooling, head.pool_prompt)
    if head.moee == "alone":
        return weights
    if head.moee == "sum":
        vectors_SxTxE, weights = l2_normalize(vectors_SxTxE), head.moee_weight**0.5 * l2_normalize(weights)
    return jnp.concatenate([vectors_SxTxE, weights], axis=-1)
