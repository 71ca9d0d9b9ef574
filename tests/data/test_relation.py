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
        queries, documents = relation(plan, step)
        numbers, names = [], []  # of all texts that occur, on either side or as a partner
        groups, group_names = [], []
        for b in range(plan.batch_size):
            cache = caches[step.source_B[b]]
            record = cache.records[step.record_B[b]]
            assert (queries.pair[b], queries.rank[b], queries.weight[b]) == (b, 0, 1)
            assert queries.source[b] == step.source_B[b]
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
                d, text = b * 5 + place, step.texts_BxT[b, 1 + place]
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
                assert (documents.source[d], documents.scope[d]) == (step.source_B[b], scope)
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
    for side in relation(plan, plan.step(0)):
        assert np.all(side.scope == SCOPE_OWN)
        for field in dataclasses.fields(side):
            wanted = np.float32 if field.name in ("weight", "score") else np.int32
            assert getattr(side, field.name).dtype == wanted


def test_partners_of_a_crowded_record_hold_those_drawn():
    cache = FakeCache([FakeRecord(0, tuple(range(1, 41))), FakeRecord(50, (51,))])
    plan = Plan([cache], [SourceConfig(path="a")], batch_size=2, positives=3, negatives=0, seed=0)
    for n in range(20):
        step = plan.step(n)
        queries, documents = relation(plan, step)
        assert queries.partners.shape == (2, 16)
        for b in range(2):
            drawn = documents.text[(documents.pair == b) & (documents.rank >= 0)]
            assert set(drawn.tolist()) <= set(queries.partners[b].tolist())
        lone = int(np.flatnonzero(step.record_B == 1)[0])
        assert np.count_nonzero(queries.partners[lone] != NO_TEXT) == 1
