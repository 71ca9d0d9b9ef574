"""Records as pairs of numbered texts, for losses on vectors that are made once: probes of merging, heads."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.config import SourceConfig
from jaxembed.data.batch import NO_GROUP
from jaxembed.data.records import RecordReader
from jaxembed.data.sources import parse_spec
from jaxembed.errors import UserError
from jaxembed.losses.library import compute, describe
from jaxembed.models.pooling import l2_normalize

NONE = -1  # in `negatives`: no text
ARRAYS = ("query", "query_id", "positive", "negatives", "group")  # of `Pairs`, an entry for each pair


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Queries with what matches them, each text once: a record of several positives is as many pairs.

    Attributes:
      queries: distinct texts.
      documents: distinct texts.
      query: int32 [N], the number of each pair's query.
      query_id: int32 [N], numbers that queries share with documents of the same text, and with no others.
      positive: int32 [N], of its positive among the documents.
      negatives: int32 [N, K], of its hard negatives; NONE where it has fewer.
      group: int32 [N]: pairs of one group are never each other's negatives; NO_GROUP for none.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    query: np.ndarray
    query_id: np.ndarray
    positive: np.ndarray
    negatives: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.query)

    def part(self, chosen: np.ndarray) -> "Pairs":
        """Returns some of the pairs, by their numbers or a mask, with the texts of all."""
        return dataclasses.replace(self, **{name: getattr(self, name)[chosen] for name in ARRAYS})

    def arrays(self) -> dict[str, jax.Array]:
        """Returns the arrays by name, for functions that are compiled."""
        return {name: jnp.asarray(getattr(self, name)) for name in ARRAYS}


def read_pairs(spec: str, where: str, negatives: int) -> Pairs:
    """Reads records.

    Args:
      spec: a file, folder or glob, 'tfds:NAME[:SPLIT]' or 'hf:NAME[:SPLIT]'.
      where: the flag that names it, for messages.
      negatives: hard negatives of each that are kept, the first ones.

    Raises:
      UserError: nothing there, or a bad record (named FILE:LINE); pairs that are graded instead of matching.
    """
    queries: dict[str, int] = {}
    documents: dict[str, int] = {}
    groups: dict[tuple[str, str], int] = {}
    rows: list[tuple[int, int, list[int], int]] = []
    graded = True  # all have scores, none a hard negative: they say how alike two texts are, not that they match
    for record in RecordReader(SourceConfig(**parse_spec(spec)), "error", where):
        graded &= bool(record.scores) and not record.negatives
        query = queries.setdefault(record.query, len(queries))
        hard = [documents.setdefault(text, len(documents)) for text in record.negatives[:negatives]]
        named = ("group", record.group) if record.group else ("label", record.label) if record.label else None
        group = groups.setdefault(named, len(groups)) if named else NO_GROUP
        rows += [(query, documents.setdefault(text, len(documents)), hard, group) for text in record.positives]
    if graded:
        raise UserError(
            f"{where}: {spec} has graded pairs, each with a score and without a hard negative: the contrastive loss "
            "would draw unlike texts together; leave the scores out where all pairs match"
        )
    padded = np.full((len(rows), max(len(hard) for _, _, hard, _ in rows)), NONE, np.int32)
    for i, (_, _, hard, _) in enumerate(rows):
        padded[i, : len(hard)] = hard
    query, positive, group = (np.array([row[i] for row in rows], np.int32) for i in (0, 1, 3))
    ids = np.array([documents.get(text, len(documents) + number) for text, number in queries.items()], np.int32)
    return Pairs(tuple(queries), tuple(documents), query, ids[query], positive, padded, group)


def batches(n: int, size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the numbers of the pairs of each batch of an epoch, int32 [n // size, size]."""
    order = np.random.default_rng((seed, epoch)).permutation(n).astype(np.int32)
    return order[: n // size * size].reshape(-1, size)


def endless(n: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yields batches, int32 [size], epoch after epoch."""
    epoch = 0
    while True:
        yield from batches(n, size, seed, epoch)
        epoch += 1


def loss_of(
    queries_NxE: jax.Array, documents_NxDxE: jax.Array, pairs: Pairs, temperature: float, unit: bool
) -> jax.Array:
    """Returns the contrastive loss (InfoNCE) of pairs, a mean over them.

    A pair's negatives are its hard ones and all documents of other pairs, but for known matches and its own group.

    Args:
      queries_NxE: the pairs' queries.
      documents_NxDxE: the positive of each, then its K hard negatives; what lies at NONE does not matter.
      pairs: what they are to each other: arrays, NumPy or traced, of N pairs.
      temperature: divides the similarities.
      unit: compare by cosine instead of by dot products.
    """
    if unit:
        queries_NxE, documents_NxDxE = l2_normalize(queries_NxE), l2_normalize(documents_NxDxE)
    numbers = jnp.concatenate([jnp.asarray(pairs.positive)[:, None], jnp.asarray(pairs.negatives)], axis=1)
    texts = describe(
        queries_NxE,
        documents_NxDxE,
        present=numbers != NONE,
        query_ids=jnp.asarray(pairs.query_id),
        document_ids=numbers,
        groups=jnp.asarray(pairs.group),
    )
    return compute("infonce", texts, temperature=temperature)[0]


def compares_by_cosine(similarity: str, where: str) -> bool:
    """Tells whether a model's vectors are compared by cosine and not by dot products.

    Raises:
      UserError: by neither, so that the contrastive loss would train what nobody asks.
    """
    if similarity not in ("cosine", "dot"):
        raise UserError(
            f"{where}: compares vectors by {similarity} distance, which the contrastive loss does not train: wants a "
            "model that compares by cosine or dot products"
        )
    return similarity == "cosine"
