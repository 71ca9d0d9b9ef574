"""The sigmoid loss of SigLIP (Zhai et al. 2023, arXiv:2303.15343)."""

import jax
import jax.numpy as jnp

from jaxembed.losses import sides
from jaxembed.losses.contrastive import Method, Scoring, reduce_scores
from jaxembed.losses.embedded import Embedded, accuracy, weighted_mean
from jaxembed.losses.negatives import Rule
from jaxembed.losses.reductions import SoftplusSum


def sigmoid(
    e: Embedded,
    *,
    temperature: jax.Array | float,
    bias: jax.Array | float,
    hard_negatives: str = "all",
    exchange: str = "auto",
    precision: str = "float32",
    tile: int = 2048,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean over queries of the sum of log(1 + exp(∓(s + bias))), minus for positives, plus for negatives.

    Every pair of a query and a document is a yes-or-no question of its own; there is no softmax over the batch. The
    bias starts low, because most of the answers are no.

    Data: pairs, pairs with hard negatives, several positives.

    Args:
      e: the texts of a step.
      temperature: float32 scalar; s = dot product / temperature; SigLIP learns it from 0.1. Differentiable.
      bias: float32 scalar; SigLIP learns it from -10. Differentiable.
      hard_negatives: 'all': others' hard negatives are negatives too; 'own': a query meets its own alone.
      exchange, precision, tile: see `jaxembed.losses.contrastive.Method`.

    Returns:
      The loss, a float32 scalar, and the metrics `accuracy` (share of queries whose worst positive is more similar
      than every negative) and `bias`.
    """
    scale = 1 / jnp.asarray(temperature, jnp.float32)
    scoring = Scoring(Rule(own_hard=True, others_hard=hard_negatives == "all"), SoftplusSum())
    method = Method(e.axes, exchange, precision, tile)
    against, highest = reduce_scores(sides.rows(e, "q"), sides.columns(e, "d", "q"), scoring, method, scale, bias)
    found, similarity = e.is_positive[:, : e.positives], e.scores[:, : e.positives]
    positive = jnp.where(found, jax.nn.softplus(-(scale * similarity + bias)), 0).sum(1)
    metrics = {"accuracy": accuracy(e, highest), "bias": jnp.asarray(bias, jnp.float32)}
    return weighted_mean(positive + against, e.weights), jax.lax.stop_gradient(metrics)
