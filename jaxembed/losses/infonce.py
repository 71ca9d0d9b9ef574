"""InfoNCE, the loss of in-batch negatives (van den Oord et al. 2018, arXiv:1807.03748).

Called MultipleNegativesRankingLoss in sentence-transformers. Data: pairs, pairs with hard negatives, several positives.
"""

import jax
import jax.numpy as jnp

from jaxembed.data.batch import Texts
from jaxembed.losses.contrastive import RowScores, row_scores

MIN_TEMPERATURE = 0.01  # a learned temperature stays above it: scale at most 100, as in CLIP (arXiv:2103.00020)


def infonce(
    queries_NxE: jax.Array,
    documents_MxE: jax.Array,
    queries: Texts,
    documents: Texts,
    temperature: jax.Array,
    n_positives: int = 1,
    symmetric: bool = False,
    tile: int = 2048,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean loss over the valid pairs of the global batch.

    For a query with positives p and negatives n, loss = mean over p of -log(exp(s_p) / (exp(s_p) + sum_n exp(s_n)))
    with s = dot product / temperature: positives do not compete with each other. The sum over all devices is divided
    once by the sum of weights, so neither loss nor gradient depends on the number of devices.

    Args:
      queries_NxE: float32 vectors, sharded over the batch axes of the mesh in use.
      documents_MxE: likewise; positives and hard negatives.
      queries: what the queries are; see `jaxembed.data.batch.Texts`.
      documents: what the documents are.
      temperature: float32 scalar; differentiable.
      n_positives: most positives of a query in the batch.
      symmetric: also documents → queries; the two directions are averaged.
      tile: edge of the similarity tiles.

    Returns:
      The loss, a float32 scalar, and the metrics `accuracy` (share of queries whose worst positive beats every
      negative).
    """
    scale = 1 / temperature
    scores = row_scores(queries_NxE, documents_MxE, queries, documents, scale, n_positives, tile)
    loss = _weighted_mean(_row_losses(scores), queries.weight)
    lowest = jnp.where(scores.found > 0, scores.positives, jnp.inf).min(-1)
    metrics = {"accuracy": _weighted_mean((lowest > scores.hardest).astype(jnp.float32), queries.weight)}
    if symmetric:
        back = row_scores(documents_MxE, queries_NxE, documents, queries, scale, 1, tile)
        loss = (loss + _weighted_mean(_row_losses(back), documents.weight)) / 2
    return loss, jax.tree.map(jax.lax.stop_gradient, metrics)


def _row_losses(scores: RowScores) -> jax.Array:
    """Returns each row's loss [N], the mean over its positives; 0 without any."""
    against = jnp.logaddexp(scores.negatives[:, None], scores.positives) - scores.positives
    return (against * scores.found).sum(-1) / jnp.maximum(scores.found.sum(-1), 1)


def _weighted_mean(values_N: jax.Array, weights_N: jax.Array) -> jax.Array:
    weights_N = jax.sharding.reshard(weights_N, jax.typeof(values_N).sharding.spec)
    total = weights_N.sum()
    return (values_N * weights_N).sum() / jnp.where(total > 0, total, 1)
