"""Sharing texts out among bins, and packing a bin's texts into rows."""

import numpy as np


def deal(lengths_N: np.ndarray, n_bins: int, loads: np.ndarray | None = None) -> np.ndarray:
    """Shares texts out so that every bin gets equally many, and nearly equal tokens.

    The texts are taken longest first, n_bins at a time, the longest of each round going to the bin with the fewest
    tokens so far. Deterministic: ties go by number.

    Args:
      lengths_N: int, tokens of each text (0 for void slots), N a multiple of n_bins.
      n_bins: number of bins.
      loads: int [n_bins], tokens that the bins hold already; none by default.

    Returns:
      int64 [N], each text's bin.
    """
    if n_bins == 1:
        return np.zeros(lengths_N.size, np.int64)
    order_NxBins = np.argsort(-lengths_N.astype(np.int64), kind="stable").reshape(-1, n_bins)
    sorted_NxBins = lengths_N[order_NxBins].astype(np.int64)
    loads = np.zeros(n_bins, np.int64) if loads is None else loads.astype(np.int64)
    bin_of_N = np.empty(lengths_N.size, np.int64)
    for members, sizes in zip(order_NxBins, sorted_NxBins):
        lightest_first = loads.argsort(kind="stable")
        bin_of_N[members] = lightest_first
        loads[lightest_first] += sizes
    return bin_of_N


def pack(lengths_N: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs texts into rows: best-fit decreasing (Johnson, 1973).

    Each text, longest first, goes into the fullest row that still has room for it. Rows wait in a stack per remaining
    capacity, and the bits of one integer say which stacks are not empty. Deterministic.

    Args:
      lengths_N: int, tokens of each text; those of 0 tokens take no room and stand at the start of row 0.
      row_length: tokens in a row, at least the longest text.

    Returns:
      int64 [N], each text's row, from 0; and int64 [N], its first place in the row.

    Raises:
      ValueError: a text is longer than a row.
    """
    row_N, start_N = np.zeros(lengths_N.size, np.int64), np.zeros(lengths_N.size, np.int64)
    order = np.argsort(-lengths_N.astype(np.int64), kind="stable")
    order = order[: np.count_nonzero(lengths_N)]
    sizes: list[int] = lengths_N[order].tolist()
    if sizes and sizes[0] > row_length:
        raise ValueError(f"a text of {sizes[0]} tokens does not fit in a row of {row_length}")
    rows, starts, n_rows = [], [], 0
    stacks: list[list[int]] = [[] for _ in range(row_length + 1)]
    open_stacks = 0
    for size in sizes:
        fitting = open_stacks >> size
        if fitting:
            capacity = size + (fitting & -fitting).bit_length() - 1
            row = stacks[capacity].pop()
            if not stacks[capacity]:
                open_stacks ^= 1 << capacity
        else:
            row, capacity, n_rows = n_rows, row_length, n_rows + 1
        rows.append(row)
        starts.append(row_length - capacity)
        if left := capacity - size:
            stacks[left].append(row)
            open_stacks |= 1 << left
    row_N[order], start_N[order] = rows, starts
    return row_N, start_N
