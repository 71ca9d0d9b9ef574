"""What the texts of a step are to each other: the relation that the loss reads, in the plan's order."""

from typing import Any

import numpy as np

from jaxembed.data.batch import HARD_NEGATIVE, NO_GROUP, NO_TEXT, SCOPE_ALL, SCOPE_OWN, VOID, Texts
from jaxembed.data.plan import Plan, StepPlan

_PARTNERS = 16  # of a record's positives, so many are known to its query (more where a step uses more)


def relation(plan: Plan, step: StepPlan, shards: int) -> tuple[Texts, Texts]:
    """Describes the queries and documents of a step. The hard negatives' own queries are for their loss to know.

    Numbers of texts and groups are dense in this step, made from the 64-bit hashes of the caches: equal hashes, equal
    numbers, on both sides. Hard negatives count as rows of no loss (weight 0), void slots likewise.

    Args:
      plan: the run's.
      step: the plan of this step.
      shards: parts of the batch that a source with `cross_device = False` keeps apart.

    Returns:
      Queries, NumPy arrays [B]; and documents, [B, P + K]: of each pair its positives, then its hard negatives.
      A query's `partners` are all the positives of its record, those not drawn included, up to 16 or P columns.
    """
    n_pairs = step.source_B.size
    pair_B = np.arange(n_pairs, dtype=np.int32)
    documents_BxD = step.texts_BxT[:, 1 : 1 + plan.documents]
    real_BxD = documents_BxD >= 0
    positive_BxD = real_BxD & (np.arange(plan.documents) < plan.positives)
    query_text_B, document_text_BxD, partners_BxW = _text_numbers(plan, step)
    group_B = _group_numbers(plan, step)
    pool_B, scope_B = _pools(plan, step, shards)
    score_BxD = plan.take(step.source_B, np.maximum(documents_BxD, 0), lambda cache, text: cache.scores[text])

    def of_documents(value_B: np.ndarray, void: int, present_BxD: np.ndarray = real_BxD) -> np.ndarray:
        return np.where(present_BxD, value_B[:, None], void)

    everywhere = np.ones_like(real_BxD)
    queries = _texts(
        pair=pair_B,
        rank=np.zeros_like(pair_B),
        text=query_text_B,
        partners=partners_BxW,
        group=group_B,
        source=step.source_B,
        pool=pool_B,
        scope=scope_B,
        weight=np.ones(n_pairs),
        score=np.full(n_pairs, np.nan),
    )
    documents = _texts(
        pair=of_documents(pair_B, VOID),
        rank=np.where(positive_BxD, np.arange(plan.documents), HARD_NEGATIVE),
        text=document_text_BxD,
        partners=of_documents(query_text_B, NO_TEXT, positive_BxD)[:, :, None],
        group=of_documents(group_B, NO_GROUP),
        source=of_documents(step.source_B, 0, everywhere),
        pool=of_documents(pool_B, 0, everywhere),
        scope=of_documents(scope_B, 0, everywhere),
        weight=positive_BxD,
        score=np.where(real_BxD, score_BxD, np.nan),
    )
    return queries, documents


def _text_numbers(plan: Plan, step: StepPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the numbers of the queries [B], documents [B, D] and queries' partners [B, W]; NO_TEXT for none."""
    most = max(cache.max_positives for cache in plan.caches)
    column_W = np.arange(min(most, max(_PARTNERS, plan.positives)))
    n_positives_B = plan.take(step.source_B, step.record_B, lambda cache, record: cache.n_positives[record])
    partners_BxW = np.where(column_W < n_positives_B[:, None], step.texts_BxT[:, :1] + 1 + column_W, -1)
    # Of a record with more positives than columns, those in this step must not be left out.
    crowded = np.flatnonzero(n_positives_B > column_W.size)
    partners_BxW[crowded, : plan.positives] = step.texts_BxT[crowded, 1 : 1 + plan.positives]

    texts = np.concatenate([step.texts_BxT[:, : 1 + plan.documents], partners_BxW], axis=1)
    hashes = plan.take(step.source_B, np.maximum(texts, 0), lambda cache, text: cache.hashes[text])
    numbers = np.full(texts.shape, NO_TEXT, np.int64)
    numbers[texts >= 0] = np.unique(hashes[texts >= 0], return_inverse=True)[1]
    return numbers[:, 0], numbers[:, 1 : 1 + plan.documents], numbers[:, 1 + plan.documents :]


def _group_numbers(plan: Plan, step: StepPlan) -> np.ndarray:
    hashes_B = plan.take(step.source_B, step.record_B, lambda cache, record: cache.groups[record])
    numbers_B = np.full(hashes_B.shape, NO_GROUP, np.int64)
    grouped = hashes_B != 0
    numbers_B[grouped] = np.unique(hashes_B[grouped], return_inverse=True)[1]
    return numbers_B


def _pools(plan: Plan, step: StepPlan, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns each pair's pool and scope, int [B].

    A source's pool is the source; one that keeps to its device has a pool for each part of the batch, as many pairs as
    a device has.
    """
    n_pairs = step.source_B.size
    part_B = np.arange(n_pairs) * shards // n_pairs
    in_batch_B, all_B, apart_B = (
        np.array(flags)[step.source_B]
        for flags in zip(*((s.in_batch, s.negatives_from == "all", not s.cross_device) for s in plan.sources))
    )
    pool_B = step.source_B + np.where(apart_B, len(plan.sources) * part_B, 0)
    return pool_B, np.select([~in_batch_B, all_B], [SCOPE_OWN, SCOPE_ALL], pool_B)


def _texts(**fields: np.ndarray) -> Texts:
    kinds: dict[str, Any] = {"weight": np.float32, "score": np.float32}
    return Texts(**{name: value.astype(kinds.get(name, np.int32)) for name, value in fields.items()})
