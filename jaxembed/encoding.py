"""Packing texts for encoding: from token lists to device batches of a few shapes, and back to the order given."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxembed.data.batch import Rows
from jaxembed.data.packing import pack

TOKENS_ON_CPU = 1_024  # of one shard's part of a device batch: what its layers pass on stays in the cache
TOKENS_ON_ACCELERATOR = 32_768
SHORTEST_ROW_ON_CPU = 32
SHORTEST_ROW_ON_ACCELERATOR = 128  # the attention kernels' block


@dataclasses.dataclass(frozen=True)
class TokenizedTexts:
    """Texts as their tokens.

    Attributes:
      tokens: token ids of each text.
      prompt_lengths: int [n], how many leading tokens of each text are the prompt's.
      longest: the most tokens that a text may have.
    """

    tokens: Sequence[np.ndarray]
    prompt_lengths: np.ndarray
    longest: int


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

    @property
    def n_texts(self) -> int:
        """How many texts it holds."""
        return int((self.texts >= 0).sum())

    @property
    def n_tokens(self) -> int:
        """How many tokens they have."""
        return int((self.rows.segment_ids > 0).sum())

    @property
    def places(self) -> int:
        """How many tokens the rows have room for."""
        return self.rows.segment_ids.size


def device_batches(texts: TokenizedTexts, shards: int, batch_size: int = 0) -> Iterator[DeviceBatch]:
    """Packs texts into device batches.

    Texts of similar length share rows twice as long as the longest of them, so that rows fill well and attention
    stays cheap; what room is left there shorter texts take, at no cost. Rows, their number and the slots are powers of
    two, so that few shapes are compiled.

    Args:
      texts: as their tokens; no row is longer than the longest that a text may be, rounded up to the shortest row.
      shards: S, the batch shards of the mesh.
      batch_size: texts per device batch at the most, about; 0 = as many as fill a fixed number of tokens.

    Yields:
      The batches, the longest texts first, so that what does not fit in memory shows at once.
    """
    on_cpu = jax.default_backend() == "cpu"
    shortest = SHORTEST_ROW_ON_CPU if on_cpu else SHORTEST_ROW_ON_ACCELERATOR
    budget = TOKENS_ON_CPU if on_cpu else TOKENS_ON_ACCELERATOR
    lengths = np.array([len(t) for t in texts.tokens], np.int64)
    classes = np.maximum(_power_of_two(lengths), shortest // 2)
    waiting = _Waiting(lengths)
    for size in sorted(set(classes.tolist()), reverse=True):
        members = waiting.take(np.flatnonzero((classes == size) & (lengths > 0)))
        if not members.size:
            continue
        row_length = max(shortest, min(2 * size, -(-texts.longest // shortest) * shortest))
        row, start = pack(lengths[members], row_length)
        n_rows = int(row.max()) + 1
        used = np.bincount(row, lengths[members], n_rows).astype(np.int64)
        more, row_of_more, start_of_more = waiting.fill(used, row_length)
        members, row, start = (
            np.concatenate(pair) for pair in ((members, more), (row, row_of_more), (start, start_of_more))
        )
        per_shard = max(1, budget // row_length)
        if batch_size:
            per_shard = max(1, min(per_shard, -(-batch_size * size // (row_length * shards))))
        order = np.argsort(row, kind="stable")
        for first in range(0, n_rows, per_shard * shards):
            here = order[slice(*np.searchsorted(row[order], (first, first + per_shard * shards)))]
            rows_per_shard = min(per_shard, _power_of_two(-(-(min(n_rows - first, per_shard * shards)) // shards)))
            places = members[here], row[here] - first, start[here]
            yield _device_batch(texts, *places, shards, int(rows_per_shard), row_length)


class _Waiting:
    """Texts that are in no row yet, by their lengths."""

    def __init__(self, lengths_N: np.ndarray) -> None:
        self._lengths, self._waits = lengths_N, lengths_N > 0
        self._of_length: list[list[int]] = [[] for _ in range(int(lengths_N.max(initial=0)) + 1)]
        for number, length in enumerate(lengths_N.tolist()):
            self._of_length[length].append(number)
        self._there = sum(1 << length for length, numbers in enumerate(self._of_length) if numbers and length)

    def take(self, members: np.ndarray) -> np.ndarray:
        """Returns those of `members`, which are all texts of some lengths, that wait still; they do so no more."""
        members = members[self._waits[members]]
        self._waits[members] = False
        for length in set(self._lengths[members].tolist()):
            self._there &= ~(1 << length)
        return members

    def fill(self, used_R: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fills rows up: into each, again and again, the longest text that waits and fits.

        Args:
          used_R: int, tokens in each row.
          row_length: tokens that each has room for.

        Returns:
          int64 [n] all: the texts, which wait no more, their rows and their first places there.
        """
        found: list[tuple[int, int, int]] = []
        for row, place in enumerate(used_R.tolist()):
            while fitting := self._there & ((2 << (row_length - place)) - 1):
                length = fitting.bit_length() - 1
                numbers = self._of_length[length]
                found.append((numbers.pop(), row, place))
                place += length
                if not numbers:
                    self._there ^= 1 << length
        filled = np.array(found, np.int64).reshape(-1, 3)
        self._waits[filled[:, 0]] = False
        return filled[:, 0], filled[:, 1], filled[:, 2]


def _device_batch(
    texts: TokenizedTexts,
    numbers: np.ndarray,
    row: np.ndarray,
    start: np.ndarray,
    shards: int,
    rows_per_shard: int,
    row_length: int,
) -> DeviceBatch:
    """Lays the texts of these numbers out, each at the start of its place in its row."""
    shard = row // rows_per_shard
    counts = np.bincount(shard, minlength=shards)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # rows ascend, so shards do
    slots = 16
    while slots < counts.max():  # powers of four, so that few shapes are compiled
        slots *= 4
    of_slot = np.full((shards, slots), -1, np.int64)
    of_slot[shard, slot] = numbers

    tokens = [texts.tokens[number] for number in numbers.tolist()]
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
        prompt_mask=place(position < np.repeat(texts.prompt_lengths[numbers], lengths), False, bool),
    )
    return DeviceBatch(rows, slots, of_slot)


def _power_of_two(n: np.ndarray | int) -> np.ndarray:
    """Returns the smallest power of two that is at least n (1 for 0)."""
    return 1 << np.ceil(np.log2(np.maximum(n, 1))).astype(np.int64)
