"""InfoNCE, the loss of in-batch negatives (van den Oord et al. 2018, arXiv:1807.03748), and its family by options.

Called MultipleNegativesRankingLoss in sentence-transformers. What others call losses of their own are settings here:

| of | settings |
|---|---|
| E5 (arXiv:2212.03533), BGE, NV-Embed | the defaults, temperature 0.01 … 0.02 |
| CLIP (arXiv:2103.00020), MultipleNegativesSymmetricRankingLoss | blocks qd, dq; partition separate |
| GTE (arXiv:2308.03281) | blocks qd, dq, qq, dd |
| Qwen3-Embedding (arXiv:2506.05176) | blocks qd, qq, dd; false_negatives absolute, margin 0.1 |
| LaBSE's additive margin (arXiv:1902.08564) | margin 0.3; blocks qd, dq; partition separate |
| EmbeddingGemma (arXiv:2509.20354) | hardness 5, of own hard negatives |
| LLaVE (arXiv:2503.04812) | hardness 9, of in-batch negatives |
| KaLM-Embedding-V2 (arXiv:2506.20923) | focal 0.5; mixed_negatives |
| GISTEmbed (arXiv:2402.16829) | false_negatives teacher, margin 0; blocks qd, qq, dd |
| SimCSE (arXiv:2104.08821) | records of format 'texts', dropout 0.1, temperature 0.05 |
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxembed.losses import sides
from jaxembed.losses.contrastive import Method, Scoring, reduce_scores
from jaxembed.losses.embedded import Embedded, accuracy, own_scores, weighted_mean
from jaxembed.losses.mixing import mixed_negatives as mix
from jaxembed.losses.negatives import Rule
from jaxembed.losses.reductions import MASKED, LogSumExp


def infonce(
    e: Embedded,
    *,
    temperature: jax.Array | float,
    blocks: tuple[str, ...] = ("qd",),
    partition: str = "joint",
    hard_negatives: str = "all",
    false_negatives: str = "keep",
    false_negative_margin: float = 0.1,
    false_negative_blocks: tuple[str, ...] = sides.BLOCKS,
    margin: float = 0.0,
    hardness: float = 0.0,
    hardness_of: str = "own",
    focal: float = 0.0,
    mixed_negatives: int = 0,
    exchange: str = "auto",
    precision: str = "float32",
    tile: int = 2048,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean loss over the valid pairs of the global batch.

    With s = dot product / temperature, a query with the positive p costs -log(exp(s_p) / Z), where Z sums exp(s) over
    p and the negatives of all blocks. Of several positives each has its own term, without the others in it; the mean
    is taken over them, then over the queries by weight.

    Data: pairs, pairs with hard negatives, several positives; texts of one label, which are not each other's negatives.

    Args:
      e: the texts of a step.
      temperature: float32 scalar; differentiable.
      blocks: what is compared: 'qd' the query with others' documents and its own hard negatives, 'dq' the positive
        with others' queries, 'qq' the query with others' queries, 'dd' the positive with others' documents.
      partition: 'joint', one Z of all blocks, or 'separate', a loss for each block, averaged.
      hard_negatives: 'all': others' hard negatives are negatives too; 'own': a query meets its own alone.
      false_negatives: leaves out negatives that are too similar: 'absolute' more than margin above the positive,
        'relative' more than margin · |positive| above it, 'teacher' more than margin above in a teacher's vectors,
        'keep' none. Of several positives the most similar counts.
      false_negative_margin: that margin, in similarity; below 0 it leaves out what is a little less similar too.
      false_negative_blocks: the blocks that it holds for.
      margin: taken off the positive's similarity.
      hardness: negatives weigh exp(hardness · similarity), a weight without gradient.
      hardness_of: which negatives do: the pair's 'own' hard ones, those 'in_batch', or 'all'.
      focal: a term weighs (1 - exp(s_p) / Z) to this power, with gradient.
      mixed_negatives: hard negatives mixed from the pair's own, so many per query.
      exchange, precision, tile: see `jaxembed.losses.contrastive.Method`.

    Returns:
      The loss, a float32 scalar, and the metrics `accuracy` (share of queries whose worst positive is more similar
      than every negative), if the block qd is there.
    """
    scale = 1 / jnp.asarray(temperature, jnp.float32)
    method = Method(e.axes, exchange, precision, tile)
    found, similarity = e.is_positive[:, : e.positives], e.scores[:, : e.positives]
    # Scores are measured from a positive's similarity: the loss is the same, and its gradient by the scale is a sum of
    # small numbers instead of the difference of two large ones.
    level = jax.lax.stop_gradient(jnp.where(found, similarity, 0))
    levels = {"q": level[:, :1], "d": level}

    def log_sum(block: str) -> tuple[jax.Array, jax.Array]:
        """Returns log(Z / exp(s_p)) of a block's negatives, [N, P], and the highest similarity of its rows."""
        row_kind, column_kind = block
        leaves_out = false_negatives != "keep" and block in false_negative_blocks
        guided = leaves_out and false_negatives == "teacher"
        ceiling = _ceiling(e, row_kind, false_negatives, false_negative_margin) if leaves_out else None
        rows = sides.rows(e, row_kind, guided)
        rows = dataclasses.replace(rows, ceiling=ceiling, offset=levels[row_kind].reshape(-1))
        columns = sides.columns(e, column_kind, row_kind, guided)
        rule = Rule(block == "qd", hard_negatives == "all", same_kind=row_kind == column_kind)
        scoring = Scoring(rule, LogSumExp(), hardness if block == "qd" or hardness_of != "own" else 0.0, hardness_of)
        value, highest = reduce_scores(rows, columns, scoring, method, scale)
        value = value.reshape(e.queries.shape[0], -1)
        if block == "qd" and mixed_negatives:
            value = jnp.logaddexp(value, _log_sum_of_mixed(e, mixed_negatives, scale, levels["q"]))
        return value + scale * (levels[row_kind] - similarity), highest

    sums = {block: log_sum(block) for block in blocks}
    values = [value for value, _ in sums.values()]
    groups = [values] if partition == "joint" else [[value] for value in values]
    own = -scale * margin * jnp.ones_like(similarity)
    costs = [functools.reduce(jnp.logaddexp, group, own) - own for group in groups]
    terms = sum(_focal(cost, focal) for cost in costs) / len(costs)
    loss = weighted_mean(jnp.where(found, terms, 0).sum(1) / jnp.maximum(found.sum(1), 1), e.weights)
    metrics = {"accuracy": accuracy(e, sums["qd"][1])} if "qd" in sums else {}
    return loss, jax.lax.stop_gradient(metrics)


def _ceiling(e: Embedded, kind: str, false_negatives: str, margin: float) -> jax.Array:
    """Returns the similarity above which a row's negatives are taken for false ones: [N] or, of positives, [N · P]."""
    found = e.is_positive[:, : e.positives]
    similarity = e.scores
    if false_negatives == "teacher":
        similarity = own_scores(e.teacher_queries, e.teacher_documents, e.present)
    similarity = jnp.where(found, similarity[:, : e.positives], MASKED)
    similarity = similarity.max(1) if kind == "q" else sides.flat(similarity)
    return similarity + margin * (jnp.abs(similarity) if false_negatives == "relative" else 1)


def _log_sum_of_mixed(e: Embedded, count: int, scale: jax.Array, level_Nx1: jax.Array) -> jax.Array:
    """Returns the log-sum-exp of a query's scores with its mixed negatives, measured from a level, [N, 1]."""
    vectors_NxXxE, present_NxX = mix(e, count)
    scores = scale * (own_scores(e.queries, vectors_NxXxE, present_NxX) - level_Nx1)
    return jax.nn.logsumexp(jnp.where(present_NxX, scores, MASKED), axis=1, keepdims=True)


def _focal(cost: jax.Array, power: float) -> jax.Array:
    """Weighs costs -log p by (1 - p) ** power (focal loss, Lin et al. 2017, arXiv:1708.02002)."""
    if not power:
        return cost
    return cost * jnp.maximum(-jnp.expm1(-cost), 1e-9) ** power
