"""Lengths, angles and second moments of vectors, and the mean over what a pair has."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxembed.losses.embedded import EXACT, Embedded, in_explicit_mesh, own_scores, weighted_mean


def unit(vectors: jax.Array) -> jax.Array:
    """Brings vectors [..., E] to length 1; vectors of zeros stay zeros, with a finite gradient."""
    squares = jnp.square(vectors).sum(-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1))


def cosines(e: Embedded) -> jax.Array:
    """Returns the cosine of each query with its own documents, float32 [N, D]; 0 where there is none."""
    return own_scores(unit(e.queries), unit(e.documents), e.present)


def gram(a_NxTxE: jax.Array, b_NxTxF: jax.Array) -> jax.Array:
    """Returns AᵀB, float32 [E, F], of the texts of all devices, A and B having a row per text.

    ‖ABᵀ‖² = Σ (AᵀA ∘ BᵀB), so sums over the products of all texts with all need no matrix of them.

    Args:
      a_NxTxE: float32, sharded by pair.
      b_NxTxF: likewise.
    """
    whole = P(None, None) if in_explicit_mesh() else None
    return jnp.einsum("nte,ntf->ef", a_NxTxE, b_NxTxF, precision=EXACT, out_sharding=whole)


def mean_over_pairs(values: jax.Array, chosen: jax.Array, weights_N: jax.Array) -> jax.Array:
    """Returns the mean over the pairs of the global batch, by weight, of each pair's mean over its chosen values.

    A pair with nothing chosen does not take part. Values that are not chosen must be finite, derivatives too.

    Args:
      values: float32 [N, ...].
      chosen: bool, of the same shape.
      weights_N: float32.
    """
    inner = tuple(range(1, values.ndim))
    counts_N = chosen.sum(inner)
    means_N = jnp.where(chosen, values, 0).sum(inner) / jnp.maximum(counts_N, 1)
    return weighted_mean(means_N, jnp.where(counts_N > 0, weights_N, 0))
