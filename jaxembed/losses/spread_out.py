"""Vectors spread over the sphere: global orthogonal regularisation (Zhang et al. 2017, arXiv:1708.06320)."""

import jax
import jax.numpy as jnp

from jaxembed.losses.embedded import EXACT, Embedded
from jaxembed.losses.geometry import gram, unit


def spread_out(e: Embedded) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean of (x_i · x_j)² over queries of different pairs, plus the same over positives.

    The x are of length 1. Points drawn evenly from the sphere give 1 / E each. EmbeddingGemma (arXiv:2509.20354) adds
    this second moment to its contrastive loss, so that vectors suffer less from quantisation and approximate search:
    give it a weight in `config.losses`.

    Two pairs count by the product of their weights, and a pair's weight is shared evenly among its positives, which are
    not driven apart. Σ (x_i · x_j)² = ‖XᵀX‖² comes from E x E matrices, less each pair's own part; never B x B. That
    subtracts: the error is about 1e-7 · (1 + E / B) of the value.

    Data: any.

    Args:
      e: the step's texts, spread.

    Returns:
      The loss, float32 scalar, and no metrics.
    """
    positives = e.is_positive[:, : e.positives]
    of_queries = _mean_square(unit(e.queries)[:, None], (e.weights > 0)[:, None], e)
    return of_queries + _mean_square(unit(e.documents[:, : e.positives]), positives, e), {}


def _mean_square(vectors_NxTxE: jax.Array, present_NxT: jax.Array, e: Embedded) -> jax.Array:
    """Returns the mean of (x_i · x_j)² over texts of different pairs, 0 without two pairs."""
    several = (e.weights > 0).sum() > 1
    weights_N = e.weights / jnp.where(several, e.weights.sum(), 1)
    shares_NxT = present_NxT * (weights_N / jnp.maximum(present_NxT.sum(-1), 1))[:, None]
    roots_NxTxE = jnp.sqrt(shares_NxT)[..., None] * vectors_NxTxE
    own_NxTxT = jnp.einsum("nte,nue->ntu", roots_NxTxE, roots_NxTxE, precision=EXACT)
    between = jnp.square(gram(roots_NxTxE, roots_NxTxE)).sum() - jnp.square(own_NxTxT).sum()
    share = 1 - jnp.square(weights_N).sum()  # of products of different pairs
    return jnp.where(several, between / jnp.where(several, share, 1), 0)
