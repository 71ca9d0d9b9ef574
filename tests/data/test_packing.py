import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.data.packing import deal, pack
from jaxembed.data.rungs import worst_case_rows

ROW = 32
lengths_lists = st.lists(st.integers(0, ROW), max_size=120).map(lambda x: np.array(x, np.int32))


def slow_best_fit(lengths, row_length):
    """Best-fit decreasing, by looking at every row for every text."""
    room = []
    for length in sorted((int(x) for x in lengths if x), reverse=True):
        fits = [r for r in range(len(room)) if room[r] >= length]
        if not fits:
            room.append(row_length)
            fits = [len(room) - 1]
        best = min(fits, key=lambda r: room[r])
        room[best] -= length
    return sorted(room)


@settings(max_examples=200, deadline=None)
@given(lengths_lists)
def test_pack_keeps_texts_apart_and_is_best_fit(lengths):
    row, start = pack(lengths, ROW)
    n_rows = int(row.max(initial=-1)) + 1
    used = np.zeros((n_rows, ROW), int)
    for r, s, length in zip(row, start, lengths):
        assert s + length <= ROW
        used[r, s : s + length] += 1
    assert used.max(initial=0) <= 1
    filled = used.sum(axis=1)
    if lengths.any():
        assert sorted((ROW - filled).tolist()) == slow_best_fit(lengths, ROW)
        assert n_rows < 2 * lengths.sum() / ROW + 1
        # each row is filled from its start, without holes
        assert all(used[r, : filled[r]].all() for r in range(n_rows))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 13), min_size=1, max_size=100), st.integers(13, 40))
def test_worst_case_holds(lengths, row_length):
    row, _ = pack(np.array(lengths), row_length)
    assert row.max() + 1 <= worst_case_rows(len(lengths), row_length, 13)


def test_worst_case_is_met():
    row, _ = pack(np.full(100, 13), 30)
    assert row.max() + 1 == worst_case_rows(100, 30, 13) == 50


def test_pack_wastes_little_on_short_texts():
    lengths = np.random.default_rng(0).integers(5, 40, 256)
    row, _ = pack(lengths, 64)
    assert 1 - lengths.sum() / ((row.max() + 1) * 64) < 0.03


def test_pack_refuses_a_text_longer_than_a_row():
    with pytest.raises(ValueError, match="33 tokens does not fit in a row of 32"):
        pack(np.array([3, 33]), 32)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_deal_gives_equal_counts_and_nearly_equal_tokens(n_bins, per_bin, seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 100, n_bins * per_bin)
    bin_of = deal(lengths, n_bins)
    assert np.bincount(bin_of, minlength=n_bins).tolist() == [per_bin] * n_bins
    loads = np.bincount(bin_of, weights=lengths, minlength=n_bins)
    assert loads.max() - loads.min() <= lengths.max()
    np.testing.assert_array_equal(bin_of, deal(lengths, n_bins))


def test_deal_makes_up_for_earlier_loads():
    loads = np.array([50, 0, 20, 30])
    lengths = np.array([40, 30, 20, 10])
    given_before = loads.copy()
    assert deal(lengths, 4, loads).tolist() == [1, 2, 3, 0]
    np.testing.assert_array_equal(loads, given_before)
