"""The triplet loss (FaceNet, Schroff et al. 2015, arXiv:1503.03832; for texts SBERT, arXiv:1908.10084)."""

import jax
import jax.numpy as jnp

from jaxembed.losses.embedded import Embedded
from jaxembed.losses.geometry import cosines, mean_over_pairs


def triplet(e: Embedded, *, margin: float, distance: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean of max(0, margin + dist(q, p) − dist(q, n)).

    The mean goes over each pair's positives p, each with each of its own hard negatives n, then over the pairs by
    weight. Pairs without hard negatives do not take part.

    Data: pairs with hard negatives.

    Args:
      e: the step's texts, spread.
      margin: how much nearer than a negative a positive shall be.
      distance: 'cosine', 1 − cos, or 'euclidean', the length of the difference. SBERT has 'euclidean' and margin 5,
        for vectors of any length; for vectors of length 1 it lies between 0 and 2, as does 'cosine'.

    Returns:
      The loss, float32 scalar, and `accuracy`, the share of triplets in which the positive is nearer.
    """
    distances_NxD = 1 - cosines(e) if distance == "cosine" else _euclidean(e)
    gaps_NxPxK = distances_NxD[:, : e.positives, None] - distances_NxD[:, None, e.positives :]
    chosen = e.is_positive[:, : e.positives, None] & e.is_negative[:, None, e.positives :]
    loss = mean_over_pairs(jax.nn.relu(margin + gaps_NxPxK), chosen, e.weights)
    accuracy = mean_over_pairs((gaps_NxPxK < 0).astype(jnp.float32), chosen, e.weights)
    return loss, {"accuracy": jax.lax.stop_gradient(accuracy)}


def _euclidean(e: Embedded) -> jax.Array:
    """Returns the distance of each query from its own documents, float32 [N, D]; its gradient at 0 is 0."""
    squares = jnp.square(e.queries[:, None] - e.documents).sum(-1)
    apart = e.present & (squares > 0)
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1)), 0)
