"""Packing texts for encoding: from token lists to device batches of a few shapes, and back to the order given."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxembed.data.batch import Rows
from jaxembed.data.packing import pack

TOKENS_ON_CPU = 4_096  # of one shard's part of a device batch
TOKENS_ON_ACCELERATOR = 32_768
SHORTEST_ROW_ON_CPU = 64
SHORTEST_ROW_ON_ACCELERATOR = 128  # the attention kernels' block


@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """Rows for all shards, and which text each of their vectors belongs to.

    Attributes:
      rows: arrays [S * r, L]; shard s owns rows s * r … (s + 1) * r - 1.
      slots: vectors per shard.
      texts: int64 [S, slots], the number of the text in each slot, -1 for none.
    """

    rows: Rows
    slots: int
    texts: np.ndarray


def device_batches(
    tokens: Sequence[np.ndarray], prompt_lengths: np.ndarray, shards: int, max_length: int, batch_size: int = 0
) -> Iterator[DeviceBatch]:
    """Packs texts into device batches.

    Texts of similar length share rows twice as long as the longest of them, so that rows fill well and attention
    stays cheap; rows, their number and the slots are powers of two, so that few shapes are compiled.

    Args:
      tokens: token ids of each text.
      prompt_lengths: how many leading tokens of each text are the prompt's.
      shards: S, the batch shards of the mesh.
      max_length: of the model; no row is longer than that rounded up to the shortest row.
      batch_size: texts per device batch at the most, about; 0 = as many as fill a fixed number of tokens.

    Yields:
      The batches, the longest texts first, so that what does not fit in memory shows at once.
    """
    on_cpu = jax.default_backend() == "cpu"
    shortest = SHORTEST_ROW_ON_CPU if on_cpu else SHORTEST_ROW_ON_ACCELERATOR
    budget = TOKENS_ON_CPU if on_cpu else TOKENS_ON_ACCELERATOR
    lengths = np.array([len(t) for t in tokens], np.int64)
    classes = np.maximum(_power_of_two(lengths), shortest // 2)
    for size in sorted(set(classes.tolist()), reverse=True):
        members = np.flatnonzero((classes == size) & (lengths > 0))
        row_length = max(shortest, min(2 * size, -(-max_length // shortest) * shortest))
        row, start = pack(lengths[members], row_length)
        per_shard = max(1, budget // row_length)
        if batch_size:
            per_shard = max(1, min(per_shard, -(-batch_size * size // (row_length * shards))))
        n_rows = int(row.max(initial=-1)) + 1
        for first in range(0, n_rows, per_shard * shards):
            here = (row >= first) & (row < first + per_shard * shards)
            rows_per_shard = min(per_shard, _power_of_two(-(-(min(n_rows - first, per_shard * shards)) // shards)))
            placed = [tokens[i] for i in members[here]]
            yield _device_batch(
                placed,
                members[here],
                row[here] - first,
                start[here],
                prompt_lengths[members[here]],
                shards,
                rows_per_shard,
                row_length,
            )


def _device_batch(
    tokens: list[np.ndarray],
    numbers: np.ndarray,
    row: np.ndarray,
    start: np.ndarray,
    prompt_lengths: np.ndarray,
    shards: int,
    rows_per_shard: int,
    row_length: int,
) -> DeviceBatch:
    shard = row // rows_per_shard
    order = np.argsort(shard, kind="stable")
    counts = np.bincount(shard, minlength=shards)
    slot = np.empty(len(row), np.int64)
    slot[order] = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    slots = max(8, int(_power_of_two(counts.max())))
    texts = np.full((shards, slots), -1, np.int64)
    texts[shard, slot] = numbers

    lengths = np.array([len(t) for t in tokens])
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    at = (np.repeat(row, lengths), np.repeat(start, lengths) + position)
    shape = (shards * rows_per_shard, row_length)

    def place(values: np.ndarray, empty: int, dtype: type) -> np.ndarray:
        array = np.full(shape, empty, dtype)
        array[at] = values
        return array

    rows = Rows(
        tokens=place(np.concatenate(tokens), 0, np.int32),
        segment_ids=place(np.repeat(np.arange(len(tokens)) + 1, lengths), 0, np.int32),
        positions=place(position, 0, np.int32),
        span_ids=place(np.repeat(slot, lengths), -1, np.int32),
        prompt_mask=place(position < np.repeat(prompt_lengths, lengths), False, bool),
    )
    return DeviceBatch(rows, slots, texts)


def _power_of_two(n: np.ndarray | int) -> np.ndarray:
    """Returns the smallest power of two that is at least n (1 for 0)."""
    return 1 << np.ceil(np.log2(np.maximum(n, 1))).astype(np.int64)
