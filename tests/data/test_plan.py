from fractions import Fraction

import numpy as np
import pytest
from fake_cache import FakeCache, FakeRecord, random_cache, simple_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.config import SourceConfig
from jaxembed.data.plan import Plan, interleave, quotas
from jaxembed.errors import UserError


def make(caches, weights=None, batch_size=4, positives=1, negatives=0, seed=0, **options):
    weights = weights or [1.0] * len(caches)
    sources = [SourceConfig(path=f"{i}.jsonl", weight=w, **options) for i, w in enumerate(weights)]
    return Plan(caches, sources, batch_size=batch_size, positives=positives, negatives=negatives, seed=seed)


def draws(plan, n_draws):
    """The first draws of the run as (source, record)."""
    steps = [plan.step(n) for n in range(-(-n_draws // plan.batch_size))]
    source = np.concatenate([s.source_B for s in steps])[:n_draws]
    return source, np.concatenate([s.record_B for s in steps])[:n_draws]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 17), st.integers(0, 2**32 - 1))
def test_each_record_once_per_epoch(n_records, batch_size, seed):
    plan = make([simple_cache(n_records)], batch_size=batch_size, seed=seed)
    _, record = draws(plan, 3 * n_records)
    for epoch in record.reshape(3, n_records):
        assert sorted(epoch.tolist()) == list(range(n_records))


def test_epochs_seeds_and_sources_are_shuffled_apart():
    n = 200
    _, record = draws(make([simple_cache(n)], seed=1), 2 * n)
    _, other_seed = draws(make([simple_cache(n)], seed=2), n)
    source, mixed = draws(make([simple_cache(n), simple_cache(n)], seed=1), 2 * n)
    orders = [record[:n], record[n:], other_seed, mixed[source == 1]]
    for i, a in enumerate(orders):
        assert np.mean(a == np.arange(n)) < 0.1
        for b in orders[:i]:
            assert np.mean(a == b) < 0.1


def test_each_record_once_per_epoch_of_its_source_in_a_mixture():
    sizes = (7, 30, 11)
    source, record = draws(make([simple_cache(n) for n in sizes], [2.0, 1.0, 0.5], batch_size=5), 600)
    for s, n in enumerate(sizes):
        own = record[source == s]
        for start in range(0, own.size - n + 1, n):
            assert sorted(own[start : start + n].tolist()) == list(range(n))


def test_weights_1_and_3_get_their_shares_in_every_period():
    source, _ = draws(make([simple_cache(10), simple_cache(10)], [1.0, 3.0]), 400)
    np.testing.assert_array_equal(source.reshape(-1, 4).sum(axis=1), np.full(100, 3))


def test_equal_weights_draw_every_record_equally_often():
    plan = make([simple_cache(30), simple_cache(90), simple_cache(7)], batch_size=127)
    for n in (0, 1, 50):
        step = plan.step(n)
        assert np.bincount(step.source_B).tolist() == [30, 90, 7]
        assert len(set(zip(step.source_B.tolist(), step.record_B.tolist()))) == 127
    assert plan.steps_per_epoch == 1


def test_steps_per_epoch_counts_weights():
    assert make([simple_cache(10), simple_cache(30)], [2.0, 0.5], batch_size=4).steps_per_epoch == (20 + 15) / 4


@pytest.mark.parametrize(
    "shares, expected",
    [
        ([Fraction(5)], [1]),
        ([Fraction(1, 10) * 30, Fraction(3) * 10], [1, 10]),
        ([Fraction(85_394), Fraction(15_000)], [42_697, 7_500]),
    ],
)
def test_quotas_are_exact_where_they_can_be(shares, expected):
    assert quotas(shares, 65_536).tolist() == expected


def test_quotas_are_rounded_where_they_must_be():
    shares = [Fraction(10**9 + 7), Fraction(123_457), Fraction(1)]
    given_ = quotas(shares, 65_536)
    assert given_.sum() == 65_536 and given_.min() >= 1
    exact = np.array([float(s / sum(shares)) for s in shares])
    assert np.abs(given_ / 65_536 - exact).max() < 2 / 65_536


def test_interleave_is_even_and_counts_turns():
    given_ = np.array([5, 2, 13])
    source, turn = interleave(given_)
    for s, q in enumerate(given_):
        places = np.flatnonzero(source == s)
        assert turn[places].tolist() == list(range(q))
        assert np.diff(places).max() <= 20 / q + 3


def test_any_step_at_once_and_whatever_the_batch_size():
    caches = [random_cache(40, 0), random_cache(25, 1)]
    small = make(caches, [1.0, 2.0], batch_size=4, positives=2, negatives=2, seed=3)
    big = make(caches, [1.0, 2.0], batch_size=12, positives=2, negatives=2, seed=3)
    for n in (50, 3, 1_000_000, 10**13):
        step = big.step(n)
        parts = [small.step(3 * n + i) for i in range(3)]
        for name in ("source_B", "record_B", "texts_BxT", "lengths_BxT"):
            np.testing.assert_array_equal(getattr(step, name), np.concatenate([getattr(p, name) for p in parts]))


def test_texts_are_the_records_own():
    caches = [random_cache(40, 0), random_cache(25, 1)]
    plan = make(caches, batch_size=65, positives=2, negatives=3)
    assert (plan.positives, plan.negatives, plan.texts_per_pair) == (2, 3, 6)
    for n in range(5):
        step = plan.step(n)
        for source, record, texts, lengths in zip(step.source_B, step.record_B, step.texts_BxT, step.lengths_BxT):
            cache = caches[source]
            wanted = cache.records[record]
            first = int(cache.first_text[record])
            end_of_positives = first + 1 + len(wanted.positives)
            assert texts[0] == first
            for chosen, start, available in (
                (texts[1:3], first + 1, len(wanted.positives)),
                (texts[3:], end_of_positives, len(wanted.negatives)),
            ):
                real = chosen[chosen >= 0]
                assert real.size == min(available, chosen.size) == np.unique(real).size
                assert all(start <= t < start + available for t in real)
                assert np.all(chosen[real.size :] == -1)
                if available <= chosen.size:
                    assert real.tolist() == list(range(start, start + available))
            assert lengths.tolist() == [int(cache.lengths[t]) if t >= 0 else 0 for t in texts]


def test_surplus_texts_are_drawn_evenly_and_anew():
    plan = make([simple_cache(1, positives=7, negatives=7)], batch_size=7000, positives=2, negatives=2)
    texts = plan.step(0).texts_BxT
    for chosen in (texts[:, 1:3] - 1, texts[:, 3:] - 8):
        counts = np.bincount(chosen.ravel(), minlength=7)
        assert counts.size == 7 and np.abs(counts / 2000 - 1).max() < 0.1
    assert abs(np.corrcoef(texts[:, 1], texts[:, 3])[0, 1]) < 0.05


def test_wishes_beyond_the_data_are_cut():
    plan = make([simple_cache(5, positives=2), simple_cache(5, negatives=1)], positives=9, negatives=7)
    assert (plan.positives, plan.negatives) == (2, 1)


def test_no_negatives_at_all_is_refused():
    with pytest.raises(UserError, match=r"train\[0\]\.in_batch = False, but 0.jsonl has no hard negatives"):
        make([simple_cache(5)], negatives=3, in_batch=False)


def test_records_of_a_tiny_source_repeat_within_a_step():
    cache = FakeCache([FakeRecord(1, (2,))])
    assert make([cache], batch_size=1000).step(3).record_B.tolist() == [0] * 1000
