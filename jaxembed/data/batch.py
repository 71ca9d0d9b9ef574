"""The batch contract: packed rows of tokens, and what the texts in them are to each other.

A step holds M micro-batches of R rows of L tokens. Rows are sharded over the batch axes of the mesh; a *bin* is what
one shard holds of one micro-batch (S shards, so S x M bins). Every bin holds the same number of whole pairs, Tq: their
queries, and D documents of each, its positives first. So shapes are static, pooled arrays have no holes but the void
slots, and what only concerns a pair never leaves its shard.

After pooling, micro-batch m's texts are an array [S, Tq + Tq * D, E]; queries sit in slots 0 ... Tq-1 of their bin, the
documents of query i in the slots Tq + i * D ... Tq + i * D + D-1. `Texts` describes the N = S * M * Tq queries, and
their documents [N, D], in the order (shard, micro-batch, slot), the order into which the model's output is flattened.
"""

import dataclasses

import jax
import numpy as np

Array = jax.Array | np.ndarray

VOID = -1  # pair number of a slot that holds no text
NO_TEXT = -2  # text number of a void slot or an absent partner: equal to no text's number
NO_GROUP = -1
HARD_NEGATIVE = -1  # rank of a hard negative; positives are ranked 0, 1, ...
SCOPE_ALL = -1  # rows of this scope take negatives from every pool
SCOPE_OWN = -2  # rows of this scope take no in-batch negatives, only their own hard ones


@dataclasses.dataclass(frozen=True)
class PairShape:
    """How many texts each pair of a batch has room for: a query, its positives, its hard negatives, …

    Attributes:
      positives: P.
      negatives: K.
      negative_queries: … and for each hard negative a query that it answers.
    """

    positives: int
    negatives: int
    negative_queries: bool = False

    @property
    def documents(self) -> int:
        """D, positives and hard negatives."""
        return self.positives + self.negatives

    @property
    def texts(self) -> int:
        """T, all of them."""
        return 1 + self.documents + (self.negatives if self.negative_queries else 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed tokens, every array [M, R, L].

    Attributes:
      tokens: int32 token ids, 0 where nothing is.
      segment_ids: int32, what attention may mix: 0 = padding, else 1 + the text's number in the global batch. The
        number comes from the plan (pair * texts per pair + place in the pair), so that dropout, which hashes it, does
        not depend on the mesh.
      positions: int32, 0, 1, ... inside each text.
      span_ids: int32, which pooled vector a token belongs to: the slot in its bin, -1 for none. A text may have several
        spans, or none.
      prompt_mask: bool, True for the tokens of a prompt (with the special token before them), which
        `pool_prompt = False` leaves out of pooling.
      source: int32, the data source of each token's text, where it says which expert the text goes to; else None.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    span_ids: Array
    prompt_mask: Array
    source: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """What each text of one side is to the others. Numbers are dense and local to the global batch.

    Arrays are [N] for queries and [N, D] for their documents.

    Attributes:
      pair: int32, the pair that the text belongs to, VOID for an empty slot.
      rank: int32, 0 for queries; 0, 1, ... for a pair's positives; HARD_NEGATIVE for its hard negatives.
      text: int32, equal numbers = equal texts (by 64-bit hash, prompts apart), NO_TEXT for an empty slot.
      partners: int32 [..., W], numbers of the texts known to match this one: a query's positives (all the record's,
        also those not drawn into this step), a positive's query. NO_TEXT where there are fewer, and for hard negatives.
      group: int32, equal numbers are never each other's in-batch negatives, NO_GROUP for none.
      source: int32, the data source.
      pool: int32, the texts it lies among: those of its source, or of its source in one part of the batch.
      scope: int32, the pool whose texts may be this row's in-batch negatives, SCOPE_ALL or SCOPE_OWN.
      weight: float32, how much this row's loss counts: the pair's weight, 0 for void slots and hard negatives.
      score: float32, a teacher's score or a graded similarity of the text with its query, NaN where there is none.
    """

    pair: Array
    rank: Array
    text: Array
    partners: Array
    group: Array
    source: Array
    pool: Array
    scope: Array
    weight: Array
    score: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's data: the rows that the model reads, and the relation that the loss reads.

    Attributes:
      rows: the texts' tokens.
      queries: what the queries are, arrays [N].
      documents: what their documents are, arrays [N, D].
      teacher_rows: the same texts in the tokens of a teacher; None without one.
    """

    rows: Rows
    queries: Texts
    documents: Texts
    teacher_rows: Rows | None = None
