import itertools

import numpy as np
import pytest
from fake_cache import simple_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.data.rungs import choose_row_length, choose_rungs, rung_for


def padding(needed, rungs):
    return sum(rung_for(n, rungs) - n for n in needed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=40), st.integers(2, 6))
def test_no_choice_of_as_many_rungs_pads_less(needed, max_rungs):
    rungs = choose_rungs(needed, 100, max_rungs)
    assert list(rungs) == sorted(set(rungs)) and len(rungs) <= max_rungs and rungs[-1] == 100
    assert rungs[-2] > max(needed)  # headroom
    below, top = rungs[:-2], rungs[-2:]
    choices = itertools.combinations(sorted(set(needed)), len(below))
    assert padding(needed, rungs) == min(padding(needed, (*choice, *top)) for choice in choices)


def test_spread_needs_use_all_rungs_and_pad_little():
    needed = np.random.default_rng(0).normal(200, 15, 300).astype(int).tolist()
    rungs = choose_rungs(needed, 1000)
    assert len(rungs) == 6
    assert padding(needed, rungs) / sum(needed) < 0.04


def test_a_rung_that_saves_nothing_is_not_made():
    assert choose_rungs([100] * 50, 400) == (100, 103, 400)
    assert choose_rungs([1000] * 50 + [999], 4000) == (1000, 1030, 4000)


def test_needs_at_the_worst_case():
    assert choose_rungs([8, 8, 8], 8) == (8,)
    assert choose_rungs([7, 8], 8) == (7, 8)


def test_rung_for():
    assert [rung_for(n, (3, 5, 9)) for n in (1, 3, 4, 9)] == [3, 3, 5, 9]
    with pytest.raises(ValueError, match="needs 10 rows"):
        rung_for(10, (3, 5, 9))


@pytest.mark.parametrize("multiple, expected", [(8, 40), (128, 128)])
def test_row_length_holds_the_longest_text(multiple, expected):
    caches = [simple_cache(300, longest=20), simple_cache(300, longest=37)]
    assert max(c.max_length for c in caches) == 37
    assert choose_row_length(caches, multiple) == expected
