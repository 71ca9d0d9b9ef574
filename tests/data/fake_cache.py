"""An in-memory stand-in for a token cache, with the attributes that plan and loader read."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class FakeRecord:
    """Texts are named by integers; a text's length and tokens follow from its name."""

    query: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...] = ()
    group: int = 0
    scores: tuple[float, ...] = ()
    negative_queries: tuple[int, ...] = ()

    @property
    def texts(self):
        return (self.query, *self.positives, *self.negatives, *self.negative_queries)


class FakeCache:
    label = "fake.jsonl"

    def __init__(self, records, longest=30, prompt_length=0, token_type=np.uint16):
        self.records = records
        self.n_records = len(records)
        self.max_positives = max(len(r.positives) for r in records)
        self.max_negatives = max(len(r.negatives) for r in records)
        self.negative_queries = any(r.negative_queries for r in records)
        self.scored = all(r.scores for r in records)
        names = [name for r in records for name in r.texts]
        self.names = np.array(names, np.int64)
        self.n_texts = len(names)
        sizes = [len(r.texts) for r in records]
        self.first_text = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.n_positives = np.array([len(r.positives) for r in records], np.uint16)
        self.lengths = (3 + self.names * 7919 % (longest - 2)).astype(np.uint16)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self.tokens = np.concatenate([tokens_of_name(n, k) for n, k in zip(names, self.lengths)]).astype(token_type)
        self.max_length = int(self.lengths.max())
        self.prompt_lengths = np.full(self.n_texts, prompt_length, np.uint16)
        self.hashes = self.names.astype(np.uint64) + np.uint64(2**63)
        self.groups = np.array([r.group for r in records], np.uint64)
        self.scores = np.full(self.n_texts, np.nan, np.float32)
        for record, first in zip(records, self.first_text):
            self.scores[first + 1 : first + 1 + len(record.scores)] = record.scores


def tokens_of_name(name, length):
    """The tokens of a text: its name in two digits of base 1000 (the first from 60,000 on), then a counting tail."""
    return np.array([60_000 + name // 1000, name % 1000, *range(1, length - 1)], np.int64)


def simple_cache(n_records, first_name=0, positives=1, negatives=0, **options):
    """Records of distinct texts, all with the same number of positives and negatives."""
    size = 1 + positives + negatives
    records = []
    for r in range(n_records):
        q = first_name + r * size
        records.append(FakeRecord(q, tuple(range(q + 1, q + 1 + positives)), tuple(range(q + 1 + positives, q + size))))
    return FakeCache(records, **options)


def random_cache(
    n_records, seed, first_name=0, most_positives=3, most_negatives=4, n_groups=5, negative_queries=False, **options
):
    """Records of 60 distinct texts, so that many repeat; some in groups; some with scores."""
    random = np.random.default_rng(seed)

    def record():
        counts = random.integers(1, most_positives + 1), random.integers(0, most_negatives + 1)
        query, *others = (first_name + random.integers(0, 60, 1 + sum(counts))).tolist()
        scores = tuple(random.random(sum(counts)).tolist()) if random.random() < 0.5 else ()
        positives, negatives = tuple(others[: counts[0]]), tuple(others[counts[0] :])
        answered = tuple(60 + name for name in negatives) if negative_queries else ()
        return FakeRecord(query, positives, negatives, int(random.integers(0, n_groups)), scores, answered)

    return FakeCache([record() for _ in range(n_records)], **options)
