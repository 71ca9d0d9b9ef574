"""New hard negatives out of a query's own ones, made while training (KaLM-Embedding-V2, arXiv:2506.20923).

Mined negatives grow easy as the model learns. Mixtures of them, points between hard ones, cost neither search nor
encoding (MoCHi, Kalantidis et al. 2020, arXiv:2010.01028).
"""

import math

import jax
import jax.numpy as jnp

from jaxembed import hashing
from jaxembed.losses.embedded import EXACT, Embedded
from jaxembed.losses.geometry import unit
from jaxembed.losses.reductions import MASKED

_PLACE = 0x6D697865  # keeps these draws apart from those of dropout


def mixed_negatives(e: Embedded, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns `count` mixtures of each query's own hard negatives, of length 1.

    The two kinds of KaLM-Embedding-V2 in turns, first a pair-wise one, then a list-wise one:

    - pair-wise: λ · a + (1 − λ) · b of two of them, drawn evenly, λ from Beta(2, 2);
    - list-wise: Σ λ_m · n_m of all, λ_m in proportion to exp(q · n_m) times a draw from Exp(1). The draw is ours:
      without it, several of a query would be the same.

    The draws are a function of (seed, pair, number of the mixture), so neither devices nor micro-batches change them.
    The gradient flows through the hard negatives; the λ are constants.

    Args:
      e: the step's texts, spread; needs its `seed`.
      count: mixtures per query, at least 1.

    Returns:
      float32 [N, count, E], and bool [N, count]: which are there. Queries with fewer than two hard negatives have none.

    Raises:
      ValueError: there is no seed.
    """
    if e.seed is None:
        raise ValueError("mixed negatives are drawn: the texts need a seed, new for every step")
    present_NxK = e.is_negative[:, e.positives :]
    negatives_NxKxE = jnp.where(present_NxK[..., None], e.documents[:, e.positives :], 0)
    similarities_NxK = jax.lax.stop_gradient(e.scores[:, e.positives :])
    slots = present_NxK.shape[1]
    draws = hashing.uniform(_bits(e, count, slots + 1))
    draws_NxCxK, one_draw_NxC = draws[..., :slots], draws[..., slots]

    pairwise = _two_of(draws_NxCxK, present_NxK[:, None], _beta_2_2(one_draw_NxC))
    tilted_NxCxK = jnp.log(-jnp.log(draws_NxCxK)) + similarities_NxK[:, None]
    listwise = jax.nn.softmax(jnp.where(present_NxK[:, None], tilted_NxCxK, MASKED), axis=-1)
    weights_NxCxK = jnp.where((jnp.arange(count) % 2 == 0)[:, None], pairwise, listwise)
    mixed = unit(jnp.einsum("nck,nke->nce", weights_NxCxK, negatives_NxKxE, precision=EXACT))
    enough_N = present_NxK.sum(-1) > 1
    return jnp.where(enough_N[:, None, None], mixed, 0), jnp.broadcast_to(enough_N[:, None], mixed.shape[:2])


def _two_of(draws_NxCxK: jax.Array, present_Nx1xK: jax.Array, share_NxC: jax.Array) -> jax.Array:
    """Returns weights [N, C, K]: `share` for the one with the lowest draw, the rest for the next."""
    draws = jnp.where(present_Nx1xK, draws_NxCxK, jnp.inf)
    earlier = (draws[..., None, :] < draws[..., None]).sum(-1)  # how many were drawn before it
    return jnp.select([earlier == 0, earlier == 1], [share_NxC[..., None], 1 - share_NxC[..., None]], 0.0)


def _beta_2_2(uniform: jax.Array) -> jax.Array:
    """Turns even draws from (0, 1) into draws from Beta(2, 2): the inverse of its distribution, 3x² − 2x³."""
    return 0.5 - jnp.sin(jnp.arcsin(1 - 2 * uniform) / 3)


def _bits(e: Embedded, count: int, slots: int) -> jax.Array:
    """Returns hashes of (seed, pair, mixture, slot), uint32 [N, count, slots]."""
    pairs_N = hashing.mix(hashing.mix(e.seed ^ jnp.uint32(_PLACE)) ^ e.query_texts.pair.astype(jnp.uint32))
    cells = hashing.mix(jnp.arange(1, 1 + math.prod((count, slots)), dtype=jnp.uint32))
    return hashing.mix(pairs_N[:, None, None] ^ cells.reshape(count, slots))
