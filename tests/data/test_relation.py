import dataclasses

import numpy as np
from fake_cache import FakeCache, FakeRecord, random_cache

from jaxembed.config import SourceConfig
from jaxembed.data.batch import HARD_NEGATIVE, NO_GROUP, NO_TEXT, SCOPE_ALL, SCOPE_OWN, VOID
from jaxembed.data.plan import Plan
from jaxembed.data.relation import relation


def same_partition(numbers, names):
    """Whether two sequences call the same places equal."""
    return len(set(zip(numbers, names))) == len(set(numbers)) == len(set(names))


def test_against_a_walk_over_the_records():
    caches = [random_cache(30, 0), random_cache(40, 1, n_groups=3)]
    sources = [SourceConfig(path="a"), SourceConfig(path="b", negatives_from="all")]
    plan = Plan(caches, sources, batch_size=35, positives=2, negatives=3, seed=0)
    for n in range(3):
        step = plan.step(n)
        queries, documents = relation(plan, step, shards=1)
        assert documents.text.shape == (35, 5)
        numbers, names = [], []  # of all texts that occur, on either side or as a partner
        groups, group_names = [], []
        for b in range(plan.batch_size):
            cache = caches[step.source_B[b]]
            record = cache.records[step.record_B[b]]
            assert (queries.pair[b], queries.rank[b], queries.weight[b]) == (b, 0, 1)
            assert queries.source[b] == queries.pool[b] == step.source_B[b]
            scope = SCOPE_ALL if step.source_B[b] == 1 else 0
            assert queries.scope[b] == scope
            assert np.isnan(queries.score[b])
            numbers.append(queries.text[b])
            names.append(record.query)
            known = queries.partners[b][queries.partners[b] != NO_TEXT]
            numbers.extend(known)
            names.extend(record.positives)
            if record.group:
                groups.append(queries.group[b])
                group_names.append(record.group)
            else:
                assert queries.group[b] == NO_GROUP
            for place in range(5):
                d, text = (b, place), step.texts_BxT[b, 1 + place]
                if text < 0:
                    assert documents.pair[d] == VOID and documents.text[d] == NO_TEXT
                    assert documents.weight[d] == 0 and documents.group[d] == NO_GROUP
                    assert documents.partners[d].tolist() == [NO_TEXT] and np.isnan(documents.score[d])
                    continue
                positive = place < 2
                assert documents.pair[d] == b
                assert documents.rank[d] == (place if positive else HARD_NEGATIVE)
                assert documents.weight[d] == float(positive)
                assert documents.partners[d].tolist() == [queries.text[b] if positive else NO_TEXT]
                assert documents.group[d] == queries.group[b]
                assert (documents.source[d], documents.pool[d]) == (step.source_B[b], step.source_B[b])
                assert documents.scope[d] == scope
                np.testing.assert_equal(documents.score[d], cache.scores[text])
                numbers.append(documents.text[d])
                names.append(int(cache.names[text]))
        assert same_partition(numbers, names)
        assert min(numbers) == 0 and max(numbers) < len(numbers)
        assert same_partition(groups, group_names)


def test_own_scope_and_types():
    plan = Plan(
        [random_cache(10, 2)],
        [SourceConfig(path="a", in_batch=False)],
        batch_size=6,
        positives=1,
        negatives=2,
        seed=0,
    )
    for side in relation(plan, plan.step(0), shards=1):
        assert np.all(side.scope == SCOPE_OWN)
        for field in dataclasses.fields(side):
            wanted = np.float32 if field.name in ("weight", "score") else np.int32
            assert getattr(side, field.name).dtype == wanted


def test_partners_of_a_crowded_record_hold_those_drawn():
    cache = FakeCache([FakeRecord(0, tuple(range(1, 41))), FakeRecord(50, (51,))])
    plan = Plan([cache], [SourceConfig(path="a")], batch_size=2, positives=3, negatives=0, seed=0)
    for n in range(20):
        step = plan.step(n)
        queries, documents = relation(plan, step, shards=1)
        assert queries.partners.shape == (2, 16)
        for b in range(2):
            drawn = documents.text[b][documents.rank[b] >= 0]
            assert drawn.size == np.count_nonzero(step.texts_BxT[b, 1:] >= 0)
            assert set(drawn.tolist()) <= set(queries.partners[b].tolist())
        lone = int(np.flatnonzero(step.record_B == 1)[0])
        assert np.count_nonzero(queries.partners[lone] != NO_TEXT) == 1


def test_sources_that_keep_to_their_device_have_a_pool_for_each_part():
    sources = [
        SourceConfig(path="a", cross_device=False),
        SourceConfig(path="b"),
        SourceConfig(path="c", negatives_from="all"),
    ]
    plan = Plan([random_cache(20, i) for i in range(3)], sources, batch_size=24, positives=2, negatives=1, seed=0)
    step = plan.step(5)
    queries, documents = relation(plan, step, shards=4)
    part = np.arange(24) // 6
    for a in range(24):
        for b in range(24):
            source, other = step.source_B[a], step.source_B[b]
            same = source == other and (source > 0 or part[a] == part[b])
            assert (queries.pool[a] == queries.pool[b]) == same
        assert queries.scope[a] == (SCOPE_ALL if step.source_B[a] == 2 else queries.pool[a])
    np.testing.assert_array_equal(documents.pool, np.repeat(queries.pool[:, None], 3, axis=1))
    np.testing.assert_array_equal(documents.scope, np.repeat(queries.scope[:, None], 3, axis=1))


def test_queries_of_hard_negatives_are_no_part_of_the_relation():
    caches = [random_cache(30, 0, negative_queries=True), random_cache(20, 1)]
    sources = [SourceConfig(path="a"), SourceConfig(path="b")]
    plain, wide = (
        Plan(caches, sources, batch_size=25, positives=2, negatives=3, seed=0, negative_queries=wanted)
        for wanted in (False, True)
    )
    for n in range(2):
        for side, other in zip(relation(plain, plain.step(n), 1), relation(wide, wide.step(n), 1)):
            for field in dataclasses.fields(side):
                np.testing.assert_array_equal(getattr(side, field.name), getattr(other, field.name))
