"""The losses for other JAX programs: arrays in, loss and metrics out.

    from jaxembed.losses.library import compute, describe

    def loss(params, batch):
        queries_NxE, documents_NxDxE = encode(params, batch)
        texts = describe(queries_NxE, documents_NxDxE, present=batch["present"], groups=batch["groups"])
        return compute("infonce", texts, temperature=0.05, blocks=("qd", "dq"))

`jax.grad(loss, has_aux=True)` then gives the gradient of the mean over the global batch, however many the devices.
In a mesh of explicit axes the vectors' own sharding says which devices meet. In one of automatic axes name them, such
as `axes=("data",)`: the arrays are then split over these. Inside a `shard_map` of your own the losses cannot be used.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxembed.config import LossConfig
from jaxembed.data.batch import HARD_NEGATIVE, NO_GROUP, NO_TEXT, SCOPE_OWN, VOID, Texts
from jaxembed.losses.embedded import Embedded, spread
from jaxembed.losses.table import LOSSES


def describe(
    queries_NxE: jax.Array,
    documents_NxDxE: jax.Array,
    *,
    positives: int = 1,
    present: jax.Array | None = None,
    weights: jax.Array | None = None,
    scores: jax.Array | None = None,
    query_ids: jax.Array | None = None,
    document_ids: jax.Array | None = None,
    groups: jax.Array | None = None,
    sources: jax.Array | None = None,
    in_batch: bool = True,
    negative_queries: jax.Array | None = None,
    teacher_queries: jax.Array | None = None,
    teacher_documents: jax.Array | None = None,
    seed: jax.Array | None = None,
    axes: tuple[str, ...] = (),
) -> Embedded:
    """Says of vectors what they are to each other.

    Args:
      queries_NxE: unit vectors where similarities are to be cosines; all vectors are taken as float32.
      documents_NxDxE: of each query its positives, then its hard negatives.
      positives: how many of the D documents are positives.
      present: bool [N, D], which documents are there; all by default. What lies in the other places does not matter.
      weights: float32 [N], how much each query's loss counts; 1 by default, 0 for a slot without a query.
      scores: float32 [N, D], a teacher's scores or graded similarities, for losses that need them.
      query_ids: int32 [N], equal numbers for equal texts, among queries and documents; all different by default.
      document_ids: int32 [N, D], likewise. Equal texts are never each other's negatives.
      groups: int32 [N], at least 0; pairs of one group are never each other's negatives; negative numbers for none.
      sources: int32 [N], at least 0; negatives come from pairs of the same source; one source by default.
      in_batch: False leaves a query its own hard negatives alone.
      negative_queries: float32 [N, K, E], for each hard negative a query that it answers, for 'clp'.
      teacher_queries, teacher_documents: float32 [N, F] and [N, D, F], for losses that need a teacher.
      seed: uint32 scalar, new for every step, for losses that draw.
      axes: the mesh axes that N is to be split over, in a mesh of automatic axes.
    """
    n, d = documents_NxDxE.shape[:2]
    present = jnp.ones((n, d), bool) if present is None else present
    weights = jnp.ones(n) if weights is None else weights
    if query_ids is None:  # numbers that no document has
        query_ids = jnp.arange(n) + (0 if document_ids is None else 1 + jnp.max(document_ids))
    if document_ids is None:
        document_ids = 1 + jnp.max(query_ids) + jnp.arange(n * d).reshape(n, d)
    groups = jnp.full(n, NO_GROUP) if groups is None else jnp.where(groups < 0, NO_GROUP, groups)
    sources = jnp.zeros(n, int) if sources is None else sources
    scope = sources if in_batch else jnp.full(n, SCOPE_OWN)
    is_positive = present & (jnp.arange(d) < positives)
    pair = jnp.where(weights > 0, jnp.arange(n), VOID)
    document_pair = jnp.where(present, pair[:, None], VOID)

    def texts(weight: jax.Array, score: jax.Array, **numbers: jax.Array) -> Texts:
        whole = {name: x.astype(jnp.int32) for name, x in numbers.items()}
        return Texts(**whole, weight=weight.astype(jnp.float32), score=score.astype(jnp.float32))

    def of_documents(value_N: jax.Array) -> jax.Array:
        return jnp.broadcast_to(value_N[:, None], (n, d))

    queries = texts(
        weights,
        jnp.full(n, jnp.nan),
        pair=pair,
        rank=jnp.zeros(n),
        text=query_ids,
        partners=jnp.where(is_positive, document_ids, NO_TEXT)[:, :positives],
        group=groups,
        source=sources,
        pool=sources,
        scope=scope,
    )
    documents = texts(
        jnp.where(is_positive, weights[:, None], 0),
        jnp.full((n, d), jnp.nan) if scores is None else scores,
        pair=document_pair,
        rank=jnp.where(is_positive, jnp.arange(d), HARD_NEGATIVE),
        text=jnp.where(present, document_ids, NO_TEXT),
        partners=jnp.where(is_positive, query_ids[:, None], NO_TEXT)[..., None],
        group=of_documents(groups),
        source=of_documents(sources),
        pool=of_documents(sources),
        scope=of_documents(scope),
    )

    def clean(vectors: jax.Array | None, there: jax.Array) -> jax.Array | None:
        """Whatever lies in empty places, even NaN, must not reach a sum, nor its gradient."""
        if vectors is None:
            return None
        return jnp.where(there[..., None], jnp.asarray(vectors, jnp.float32), 0)

    counted, there = weights > 0, present & (weights > 0)[:, None]
    return Embedded(
        queries=clean(queries_NxE, counted),
        documents=clean(documents_NxDxE, there),
        query_texts=queries,
        document_texts=documents,
        negative_queries=clean(negative_queries, there[:, positives:]),
        teacher_queries=clean(teacher_queries, counted),
        teacher_documents=clean(teacher_documents, there),
        seed=seed,
        positives=positives,
        axes=tuple(axes),
    )


def compute(name: str, texts: Embedded, **options: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes a loss.

    Args:
      name: one of `jaxembed.losses.table.LOSSES`.
      texts: see `describe`.
      **options: fields of `jaxembed.config.LossConfig` that the loss takes, others by their defaults; 'temperature'
        and 'bias' may be arrays to differentiate by. 'match' takes `projection`, float32 [E, F] or None.

    Returns:
      The loss, a float32 scalar, and its metrics, float32 scalars without gradient.

    Raises:
      KeyError: no such loss.
      TypeError: an option that the loss does not take.
    """
    entry = LOSSES[name]
    arguments = {field: getattr(LossConfig(), field) for field in entry.takes} | options
    return entry.load()(spread(texts), **arguments)
