"""Contrastive learning that does not drive hard negatives away from the queries they answer (CLP)."""

import jax

from jaxembed.losses.embedded import Embedded
from jaxembed.losses.geometry import mean_over_pairs, unit
from jaxembed.losses.infonce import infonce


def clp(
    e: Embedded,
    *,
    temperature: jax.Array | float,
    penalty: float,
    hard_negatives: str,
    exchange: str,
    precision: str,
    tile: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns InfoNCE + penalty · mean(1 − cos(n, q_n)).

    A hard negative n of one query is an answer to another, q_n. Pushed away from the first, it should stay with the
    second (contrastive learning penalty, Yu 2024, arXiv:2412.17364; the paper's idea, in our form: 1 − cos). The mean
    goes over each pair's own hard negatives, then over the pairs by weight; pairs without any have no penalty.

    Data: pairs with hard negatives and `negative_query`, for each of them a query that it answers.

    Args:
      e: the step's texts, spread, with `negative_queries`.
      temperature: of InfoNCE, float32 scalar; differentiable.
      penalty: weight of the second term.
      hard_negatives: of InfoNCE, as are `exchange`, `precision` and `tile`.
      exchange: how devices meet the others' texts.
      precision: of the similarities.
      tile: edge of the similarity tiles.

    Returns:
      The loss, float32 scalar, and InfoNCE's metrics with `negative_cosine`, the mean of cos(n, q_n).
    """
    fields = {"hard_negatives": hard_negatives, "exchange": exchange, "precision": precision, "tile": tile}
    loss, metrics = infonce(e, temperature=temperature, **fields)
    negatives_NxKxE = e.documents[:, e.positives :]
    cosines_NxK = (unit(negatives_NxKxE) * unit(e.negative_queries)).sum(-1)
    chosen = e.is_negative[:, e.positives :]
    loss += penalty * mean_over_pairs(1 - cosines_NxK, chosen, e.weights)
    mean_cosine = jax.lax.stop_gradient(mean_over_pairs(cosines_NxK, chosen, e.weights))
    return loss, {**metrics, "negative_cosine": mean_cosine}
