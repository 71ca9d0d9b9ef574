"""The batch contract: packed rows of tokens, and what the texts in them are to each other.

A step holds M micro-batches of R rows of L tokens. Rows are sharded over the batch axes of the mesh; a *bin* is what
one shard holds of one micro-batch (S shards, so S x M bins). Every bin holds the same number of texts: `Tq` queries
and `Td` documents, so that shapes are static and pooled arrays have no holes but the void slots.

After pooling, micro-batch m's texts are an array [S, Tq + Td, E]; queries sit in slots 0 ... Tq-1 of their bin,
documents in the slots behind. `Texts` describes the N = S * M * T texts of one side in the order (shard,
micro-batch, slot), the order into which the model's output is flattened.
"""

import dataclasses

import jax
import numpy as np

Array = jax.Array | np.ndarray

VOID = -1  # pair number of a slot that holds no text
NO_TEXT = -2  # text number of a void slot or an absent partner: equal to no text's number
NO_GROUP = -1
HARD_NEGATIVE = -1  # rank of a hard negative; positives are ranked 0, 1, ...
SCOPE_ALL = -1  # rows of this scope take negatives from every source
SCOPE_OWN = -2  # rows of this scope take no in-batch negatives, only their own hard ones


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
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    span_ids: Array
    prompt_mask: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """What each text of one side is to the others. N slots; numbers are dense and local to the global batch.

    Attributes:
      pair: int32 [N], the pair that the text belongs to, VOID for an empty slot.
      rank: int32 [N], 0 for queries; 0, 1, ... for a pair's positives; HARD_NEGATIVE for its hard negatives.
      text: int32 [N], equal numbers = equal texts (by 64-bit hash, prompts apart), NO_TEXT for an empty slot.
      partners: int32 [N, P], numbers of the texts known to match this one: a query's positives (all the record's, also
        those not drawn into this step), a positive's query. NO_TEXT where there are fewer, and for hard negatives.
      group: int32 [N], equal numbers are never each other's in-batch negatives, NO_GROUP for none.
      source: int32 [N], the data source.
      scope: int32 [N], the source whose texts may be this row's in-batch negatives, SCOPE_ALL or SCOPE_OWN.
      weight: float32 [N], how much this row's loss counts: the pair's weight, 0 for void slots.
      score: float32 [N], a teacher's score or a graded similarity of the text with its query, NaN where there is none.
    """

    pair: Array
    rank: Array
    text: Array
    partners: Array
    group: Array
    source: Array
    scope: Array
    weight: Array
    score: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's data: the rows that the model reads, and the relation that the loss reads."""

    rows: Rows
    queries: Texts
    documents: Texts
