"""What a loss is given: the vectors of all texts of a step, and what the texts are to each other.

A pair's texts lie on one shard, so all that concerns a pair alone is local; what concerns the whole batch is the
engine's (`contrastive.py`), or a sum of small arrays.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxembed.data.batch import VOID, Texts

EXACT = jax.lax.Precision.HIGHEST  # float32 products also where the default is bfloat16 passes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Embedded:
    """The texts of a step as vectors: N queries, each with its D documents.

    Attributes:
      queries: float32 [N, E].
      documents: float32 [N, D, E]: of each query its positives, then its hard negatives.
      query_texts: what the queries are, arrays [N].
      document_texts: what their documents are, arrays [N, D].
      negative_queries: float32 [N, K, E], for each of the K hard negatives a query that it does answer, or None.
      teacher_queries: float32 [N, F], a teacher's vectors of the queries, or None.
      teacher_documents: float32 [N, D, F], or None.
      seed: uint32 scalar, new for every step, for losses that draw; None draws nothing.
      positives: how many of the D documents are for positives.
      axes: the mesh axes that the first dimension of all arrays is sharded over; () without a mesh.
    """

    queries: jax.Array
    documents: jax.Array
    query_texts: Texts
    document_texts: Texts
    negative_queries: jax.Array | None = None
    teacher_queries: jax.Array | None = None
    teacher_documents: jax.Array | None = None
    seed: jax.Array | None = None
    positives: int = dataclasses.field(default=1, metadata={"static": True})
    axes: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def weights(self) -> jax.Array:
        """How much each query's loss counts, float32 [N]."""
        return self.query_texts.weight

    @property
    def present(self) -> jax.Array:
        """Which documents are there, bool [N, D]."""
        return self.document_texts.pair != VOID

    @property
    def is_positive(self) -> jax.Array:
        """Which documents are positives, bool [N, D]."""
        return self.present & (self.document_texts.rank >= 0)

    @property
    def is_negative(self) -> jax.Array:
        """Which documents are hard negatives, bool [N, D]."""
        return self.present & (self.document_texts.rank < 0)

    @property
    def scores(self) -> jax.Array:
        """Dot products of each query with its own documents, float32 [N, D]; 0 where there is none."""
        return own_scores(self.queries, self.documents, self.present)


def own_scores(queries_NxE: jax.Array, documents_NxDxE: jax.Array, present_NxD: jax.Array) -> jax.Array:
    """Returns the dot products of each query with its own documents, float32 [N, D]; 0 where there is none."""
    return jnp.where(present_NxD, jnp.einsum("ne,nde->nd", queries_NxE, documents_NxDxE, precision=EXACT), 0)


def weighted_mean(values_N: jax.Array, weights_N: jax.Array) -> jax.Array:
    """Returns the mean over the global batch, 0 where all weights are 0.

    Sums over all devices are divided once, so neither value nor gradient depends on the number of devices.
    """
    total = weights_N.sum()
    return (values_N * weights_N).sum() / jnp.where(total > 0, total, 1)


def accuracy(e: Embedded, highest_N: jax.Array) -> jax.Array:
    """Returns the share of queries whose worst positive is more similar than every negative.

    Args:
      e: the step's texts.
      highest_N: float32, the highest similarity among a query's negatives.
    """
    found = e.is_positive[:, : e.positives]
    worst_N = jnp.where(found, e.scores[:, : e.positives], jnp.inf).min(1)
    return weighted_mean((worst_N > highest_N).astype(jnp.float32), e.weights)


def spread(embedded: Embedded) -> Embedded:
    """Spreads the texts over all mesh axes that divide them, so that tensor and sequence do not repeat the work.

    In an explicit mesh the arrays say which axes they are sharded over. Elsewhere (no mesh, or one whose axes are
    automatic) nothing is moved here, and `axes` stay as they are.
    """
    if not in_explicit_mesh():
        return embedded
    axes = embedded.axes or _loss_axes(embedded.queries)
    arrays = jax.tree.map(
        lambda x: jax.sharding.reshard(x, P(axes, *(None,) * (x.ndim - 1)) if x.ndim else P()), embedded
    )
    return dataclasses.replace(arrays, axes=axes)


def everywhere(x: jax.Array) -> jax.Array:
    """Returns the whole array on every device; for small ones."""
    return jax.sharding.reshard(x, P(*(None,) * x.ndim)) if in_explicit_mesh() else x


def in_explicit_mesh() -> bool:
    """Whether shardings are part of the arrays' types here."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)


def _loss_axes(queries: jax.Array) -> tuple[str, ...]:
    """Returns the axes that the pairs are spread over: those that they lie on, and others as far as they divide."""
    mesh = jax.sharding.get_abstract_mesh()
    given = jax.typeof(queries).sharding.spec[0]
    axes = [given] if isinstance(given, str) else list(given or ())
    for axis in (axis for axis in mesh.axis_names if axis not in axes):
        if queries.shape[0] % (math.prod(mesh.shape[a] for a in axes) * mesh.shape[axis]) == 0:
            axes.append(axis)
    return tuple(axes)
