"""Losses that only ask for the order of graded pairs: what is more alike shall score higher.

With items (query, document) of score y and similarity s, over the global batch,

    log(1 + Σ over items i, j of one source with y_i > y_j of exp((s_j − s_i) / temperature)).

The sum has N² terms, but sorted by score it is one pass: the items below i are those before it, and their
log Σ exp(s_j / temperature) is a running log-sum-exp: O(n log n) time, O(n) memory. There is one logarithm over all
sources, so a source with more comparisons has a greater say, as in one list of them all.
"""

import jax
import jax.numpy as jnp

from jaxembed.losses.embedded import Embedded, everywhere, own_scores
from jaxembed.losses.geometry import cosines, unit
from jaxembed.losses.reductions import MASKED


def cosent(e: Embedded, *, temperature: jax.Array | float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss above with cosines as similarities (CoSENT, Su 2022, kexue.fm/archives/8847).

    CoSENTLoss of sentence-transformers, where `scale` is 1 / temperature, 20.

    Data: scored pairs, scores of any scale. Ties are not compared, nor are documents of different sources. Documents
    without a score are left out, as are pairs of weight 0; other weights do not matter, for a comparison has two.

    Args:
      e: the step's texts, spread.
      temperature: float32 scalar; differentiable.

    Returns:
      The loss, float32 scalar, and no metrics.
    """
    return _order(e, cosines(e) / temperature), {}


def angle(e: Embedded, *, temperature: jax.Array | float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss above with angles in complex space as similarities (AnglE, Li & Li 2023, arXiv:2309.12871).

    The two halves of a vector are the real and imaginary parts of a complex one; with lengths divided out, s is the
    absolute value of the sum of both parts of Σ x · conj(y), whose derivative does not vanish where the cosine's does.
    AnglELoss of sentence-transformers. The paper trains it in a weighted sum with `cosent` and in-batch negatives:
    write these into `config.losses`, and give `infonce` a source of its own, of pairs that match; it takes no grades.

    Data, arguments and result: as of `cosent`. A vector of odd width counts as one longer, with a zero.
    """
    q, d = (_even(unit(x)) for x in (e.queries, e.documents))
    half = q.shape[-1] // 2
    turned = jnp.concatenate([q[:, half:], -q[:, :half]], axis=-1)  # its dot products are the imaginary parts
    return _order(e, jnp.abs(own_scores(q + turned, d, e.present)) / temperature), {}


def _even(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)])


def _order(e: Embedded, similarities_NxD: jax.Array) -> jax.Array:
    """Returns the loss of similarities that were divided by the temperature."""
    scores_NxD = e.document_texts.score
    kept = e.present & ~jnp.isnan(scores_NxD) & (e.weights > 0)[:, None]
    arrays = similarities_NxD, jnp.where(kept, scores_NxD, 0), e.document_texts.source, kept
    s, score, source, kept = (everywhere(x).reshape(-1) for x in arrays)
    order = jnp.lexsort((score, source))
    return _of_sorted(*(x[order] for x in (s, score, source, kept)))


@jax.custom_vjp
def _of_sorted(s_n: jax.Array, score_n: jax.Array, source_n: jax.Array, kept_n: jax.Array) -> jax.Array:
    """Returns the loss of items in the order of (source, score)."""
    return _forward(s_n, score_n, source_n, kept_n)[0]


def _forward(s_n: jax.Array, *order: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    lower, higher = _terms(s_n, order[-1])
    below = _log_sum_before(lower, *order[:-1])
    loss = jnp.logaddexp(0.0, jax.nn.logsumexp(below + higher))
    return loss, (s_n, *order, below, loss)


def _backward(residuals: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array | None, ...]:
    s_n, *order, below, loss = residuals
    lower, higher = _terms(s_n, order[-1])
    above = jnp.flip(_log_sum_before(*(jnp.flip(x) for x in (higher, *order[:-1]))))
    return cotangent * (jnp.exp(lower + above - loss) - jnp.exp(below + higher - loss)), None, None, None


_of_sorted.defvjp(_forward, _backward)


def _terms(s_n: jax.Array, kept_n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what an item adds to a comparison's exponent as the one of lower score, and as that of higher score."""
    return jnp.where(kept_n, s_n, MASKED), jnp.where(kept_n, -s_n, MASKED)


def _log_sum_before(values_n: jax.Array, score_n: jax.Array, source_n: jax.Array) -> jax.Array:
    """Returns log Σ exp of the values that come before each item in its source, those of equal score left out."""
    place = jnp.arange(values_n.size)
    first = jnp.ones(1, bool)
    of_source = jnp.concatenate([first, source_n[1:] != source_n[:-1]])  # the first of its source
    of_score = of_source | jnp.concatenate([first, score_n[1:] != score_n[:-1]])  # the first of equal scores
    begin, start = (jax.lax.cummax(jnp.where(is_first, place, 0)) for is_first in (of_source, of_score))

    def double(step: jax.Array, up_to: jax.Array) -> jax.Array:
        """Widens sums over the last 2^step items to twice as many, as far as the source goes."""
        back = 1 << step
        return jnp.where(place - back >= begin, jnp.logaddexp(up_to, jnp.roll(up_to, back)), up_to)

    up_to = jax.lax.fori_loop(0, (values_n.size - 1).bit_length(), double, values_n)
    return jnp.where(start == begin, MASKED, up_to[start - 1])
