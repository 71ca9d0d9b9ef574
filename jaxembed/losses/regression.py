"""Similarities as numbers to be met: the first loss for graded pairs (SBERT, Reimers & Gurevych 2019, 1908.10084)."""

import jax
import jax.numpy as jnp

from jaxembed.losses.embedded import Embedded
from jaxembed.losses.geometry import cosines, mean_over_pairs


def cosine(e: Embedded) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean of (cos(q, d) − score)², over each pair's scored documents, then over the pairs by weight.

    CosineSimilarityLoss of sentence-transformers.

    Data: scored pairs. Scores must lie between −1 and 1, as a cosine does: the file has to hold them so (STS scores of
    0 … 5 divided by 5). `cosent` and `angle` only compare scores, and take any scale.

    Args:
      e: the step's texts, spread.

    Returns:
      The loss, float32 scalar, and no metrics.
    """
    scores_NxD = e.document_texts.score
    scored = e.present & ~jnp.isnan(scores_NxD)
    errors_NxD = cosines(e) - jnp.where(scored, scores_NxD, 0)
    return mean_over_pairs(jnp.square(errors_NxD), scored, e.weights), {}
