"""Losses that follow a teacher: its margins, its ranking of a query's documents, or its vectors themselves."""

import jax
import jax.numpy as jnp

from jaxembed.data.batch import VOID
from jaxembed.losses.embedded import EXACT, Embedded, own_scores, weighted_mean
from jaxembed.losses.geometry import gram, mean_over_pairs, unit
from jaxembed.losses.reductions import MASKED


def margin_mse(e: Embedded) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean of ((s_p − s_n) − (t_p − t_n))² (Margin-MSE, Hofstätter et al. 2020, arXiv:2010.02666).

    s are dot products, t the records' scores, which have to be of their size: cosines for models with vectors of
    length 1; a cross-encoder's raw scores, as in the paper, for models with `model.normalize = False`. The mean goes
    over each pair's positives p, each with each hard negative n, then over the pairs by weight.

    Data: pairs with hard negatives, a teacher's score for every document. What has no score is left out.

    Args:
      e: the step's texts, spread.

    Returns:
      The loss, float32 scalar, and no metrics.
    """
    scored = e.present & ~jnp.isnan(e.document_texts.score)
    errors_NxD = e.scores - jnp.where(scored, e.document_texts.score, 0)
    gaps_NxPxK = errors_NxD[:, : e.positives, None] - errors_NxD[:, None, e.positives :]
    chosen = scored[:, : e.positives, None] & scored[:, None, e.positives :]
    return mean_over_pairs(jnp.square(gaps_NxPxK), chosen, e.weights), {}


def kl(
    e: Embedded, *, temperature: jax.Array | float, teacher_temperature: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean of KL(softmax(t / teacher_temperature) ‖ softmax(s / temperature)) over a query's own documents.

    s are dot products; t the teacher's dot products where the run has a teacher, else the records' scores. E5
    (arXiv:2212.03533), KaLM-Embedding-V2 (arXiv:2506.20923); DistillKLDivLoss of sentence-transformers, which
    multiplies by temperature².

    Data: pairs with hard negatives, and a teacher's score for every document or a teacher. What has no score is left
    out, and pairs with fewer than two documents left do not take part.

    Args:
      e: the step's texts, spread.
      temperature: float32 scalar; differentiable.
      teacher_temperature: of the target.

    Returns:
      The loss, float32 scalar, and no metrics.
    """
    if e.teacher_queries is None:
        known = e.present & ~jnp.isnan(e.document_texts.score)
        targets_NxD = jnp.where(known, e.document_texts.score, 0)
    else:
        known = e.present
        targets_NxD = own_scores(e.teacher_queries, e.teacher_documents, known)
    targets_NxD = jax.lax.stop_gradient(_log_softmax(targets_NxD / teacher_temperature, known))
    divergences_NxD = jnp.exp(targets_NxD) * (targets_NxD - _log_softmax(e.scores / temperature, known))
    values_N = jnp.where(known, divergences_NxD, 0).sum(-1)
    return weighted_mean(values_N, jnp.where(known.sum(-1) > 1, e.weights, 0)), {}


def _log_softmax(logits_NxD: jax.Array, known: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(jnp.where(known, logits_NxD, MASKED), axis=-1)


def match(
    e: Embedded, *, similarity_weight: float, projection: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns how far the vectors are from a teacher's: mean(1 − cos(W s, t)) + similarity_weight · mean((SSᵀ − TTᵀ)²).

    The first term matches the vectors s of queries, positives and hard negatives with the teacher's t (EmbeddingGemma,
    arXiv:2509.20354); the projection W is used in training alone. The second compares the cosines of every two texts of
    the global batch in both models, S and T being their vectors of length 1 (Jasper and Stella, Zhang et al. 2024,
    arXiv:2412.19048, which weighs the terms 10 and 200, and measures S behind its projection). Here S is what the
    model gives: cosines need no equal widths, and it is those vectors that are exported.

    Every pair counts by its weight, shared evenly among its texts: a text has ω = weight / texts of the pair, and the
    means are Σ ω_i (…) / Σ ω and Σ ω_i ω_j (…) / (Σ ω)². The second comes from Gram matrices,
    ‖SᵀS‖² − 2 ‖SᵀT‖² + ‖TᵀT‖², never B x B. That subtracts: its error is about 1e-7 of the mean squared cosine, so a
    value of a thousandth of it is right to four digits.

    Data: any, with a teacher.

    Args:
      e: the step's texts, spread, with a teacher's vectors.
      similarity_weight: of the second term; 0 leaves it out.
      projection: float32 [E, F], learned; None where the teacher's vectors are as wide as the model's.

    Returns:
      The loss, float32 scalar, and the metrics `cosine`, the mean of cos(W s, t), and `similarity_error`, the second
      term before it is weighed.
    """
    students, teachers = _all_texts(e.queries, e.documents), _all_texts(e.teacher_queries, e.teacher_documents)
    projected = students if projection is None else jnp.einsum("nte,ef->ntf", students, projection, precision=EXACT)
    teachers = jax.lax.stop_gradient(unit(teachers))
    present = jnp.concatenate([e.query_texts.pair[:, None] != VOID, e.present], axis=1)
    cosines_NxT = (unit(projected) * teachers).sum(-1)
    loss = mean_over_pairs(1 - cosines_NxT, present, e.weights)
    metrics = {"cosine": mean_over_pairs(cosines_NxT, present, e.weights)}
    if similarity_weight:
        metrics["similarity_error"] = _similarity_error(unit(students), teachers, present, e)
        loss += similarity_weight * metrics["similarity_error"]
    return loss, jax.lax.stop_gradient(metrics)


def _all_texts(queries_NxE: jax.Array, documents_NxDxE: jax.Array) -> jax.Array:
    return jnp.concatenate([queries_NxE[:, None], documents_NxDxE], axis=1)


def _similarity_error(
    students_NxTxE: jax.Array, teachers_NxTxF: jax.Array, present: jax.Array, e: Embedded
) -> jax.Array:
    """Returns Σ ω_i ω_j (s_i · s_j − t_i · t_j)² / (Σ ω)² over the texts that are there."""
    shares_NxT = present * (e.weights / jnp.maximum(present.sum(-1), 1))[:, None]
    total = shares_NxT.sum()
    roots_NxTx1 = jnp.sqrt(shares_NxT / jnp.where(total > 0, total, 1))[..., None]
    s, t = roots_NxTx1 * students_NxTxE, roots_NxTx1 * teachers_NxTxF
    of_students, across, of_teachers = (jnp.square(gram(a, b)).sum() for a, b in ((s, s), (s, t), (t, t)))
    return of_students - 2 * across + of_teachers
