from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from fake_cache import FakeCache, FakeRecord, random_cache, simple_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.config import SourceConfig
from jaxembed.data.plan import Plan, interleave, quotas
from jaxembed.errors import UserError


def make(caches, weights=None, shares=None, in_batch=True, **options):
    n = len(caches)
    sources = [
        SourceConfig(path=f"{i}.jsonl", weight=weight, share=share, in_batch=in_batch)
        for i, (weight, share) in enumerate(zip(weights or [1.0] * n, shares or [0.0] * n))
    ]
    return Plan(caches, sources, **{"batch_size": 4, "positives": 1, "negatives": 0, "seed": 0} | options)


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


def passes_are_even(plan, steps):
    """Whether, after each step, no record of a source was drawn twice more often than another."""
    drawn = [np.zeros(cache.n_records, np.int64) for cache in plan.caches]
    for step in steps:
        for source, counts in enumerate(drawn):
            np.add.at(counts, step.record_B[step.source_B == source], 1)
            if np.ptp(counts) > 1:
                return False
    return True


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=4),
    st.integers(2, 15),
    st.sampled_from([0.3, 0.5, 0.8, 1.0]),
)
def test_steps_of_one_source_as_counted_from_the_first_draw(sources, batch_size, part):
    sizes, weights = zip(*sources)
    plan = make([simple_cache(n) for n in sizes], weights, batch_size=batch_size, one_source=part)
    n_main = round(part * batch_size)
    pattern, _ = interleave(quotas([Fraction(w) * n for n, w in sources], 65_536))
    steps = [plan.step(n) for n in range(pattern.size)]
    mixed = iter(np.tile(pattern, batch_size).tolist())
    total = Counter()
    for step, main in zip(steps, pattern.tolist()):
        expected = Counter([main] * n_main + [next(mixed) for _ in range(batch_size - n_main)])
        assert Counter(step.source_B.tolist()) == expected
        total += expected
    assert passes_are_even(plan, steps)
    # Over one period of main sources each source has its due, and a further period goes on where this one ended.
    assert [total[s] for s in range(len(sizes))] == (batch_size * np.bincount(pattern)).tolist()
    assert passes_are_even(plan, steps + [plan.step(n) for n in range(pattern.size, pattern.size + 9)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=5), st.integers(2, 24))
def test_fixed_shares_in_every_step(sources, batch_size):
    sizes, shares = zip(*sources)
    exact = [Fraction(share * batch_size, sum(shares)) for share in shares]
    wanted = [int(x) for x in exact]
    while sum(wanted) < batch_size:
        wanted[int(np.argmax([x - w for x, w in zip(exact, wanted)]))] += 1
    options = {"shares": [share / 10 for share in shares], "batch_size": batch_size}
    if 0 in wanted:
        with pytest.raises(
            UserError, match=rf"train\[{wanted.index(0)}\]\.share = .* is no whole pair of config.batch_s"
        ):
            make([simple_cache(n) for n in sizes], **options)
        return
    plan = make([simple_cache(n) for n in sizes], **options)
    steps = [plan.step(n) for n in range(30)]
    assert all(np.bincount(step.source_B).tolist() == wanted for step in steps)
    assert passes_are_even(plan, steps)
    assert np.bincount(plan.step(10**13).source_B).tolist() == wanted
    assert plan.steps_per_epoch == sum(sizes) / batch_size


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": [1.0, 7.0, 0.3]},
        {"shares": [0.2, 0.5, 0.3]},
        {"one_source": 0.5},
        {"one_source": 0.9, "weights": [1.0, 7.0, 0.3]},
    ],
)
def test_every_part_of_a_step_has_its_part_of_each_source(options):
    plan = make([simple_cache(n) for n in (40, 25, 90)], batch_size=96, **options)
    for n in range(40):
        source_B = plan.step(n).source_B
        due = np.bincount(source_B, minlength=3) / 8
        for part in source_B.reshape(8, 12):
            assert np.abs(np.bincount(part, minlength=3) - due).max() <= 2


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


@pytest.mark.parametrize("negative_queries", [False, True])
def test_texts_are_the_records_own(negative_queries):
    caches = [random_cache(40, 0, negative_queries=True), random_cache(25, 1)]
    plan = make(caches, batch_size=65, positives=2, negatives=3, negative_queries=negative_queries)
    assert (plan.positives, plan.negatives, plan.documents) == (2, 3, 5)
    assert plan.texts_per_pair == (9 if negative_queries else 6)
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
                (texts[3:6], end_of_positives, len(wanted.negatives)),
            ):
                real = chosen[chosen >= 0]
                assert real.size == min(available, chosen.size) == np.unique(real).size
                assert all(start <= t < start + available for t in real)
                assert np.all(chosen[real.size :] == -1)
                if available <= chosen.size:
                    assert real.tolist() == list(range(start, start + available))
            for negative, query in zip(texts[3:6], texts[6:]):
                if negative < 0 or source == 1:
                    assert query == -1
                else:  # a hard negative's query is named 60 more than it
                    assert query < cache.first_text[record + 1]
                    assert cache.names[query] == cache.names[negative] + 60
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
