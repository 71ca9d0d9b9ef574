"""The miner against loops over strings, on sets whose texts meet in every way."""

import dataclasses

import numpy as np
import pytest
from mining_cases import by_hand, records, same, why_not

from jaxembed.data.record_formats import Record
from jaxembed.errors import UserError
from jaxembed.mining import candidates, rules
from jaxembed.mining.collection import Collection
from jaxembed.mining.miner import mine
from jaxembed.mining.settings import Settings, require
from jaxembed.mining.tally import Tally
from jaxembed.mining.text_keys import hashes

SETTINGS = {
    "top": Settings(2),
    "window": Settings(3, first=2, last=5),
    "margins": Settings(3, last=30, absolute_margin=1.0, relative_margin=0.25),
    "negative scores": Settings(3, relative_margin=0.0, replace=True),
    "floor and ceiling": Settings(4, last=8, max_score=3.0, min_score=-2.0),
    "random": Settings(2, last=6, sampling="random", seed=7),
}


class Scores:
    """Dot products of small whole numbers, with many ties, in place of a model."""

    def __init__(self, collection: Collection, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.table = (rng.integers(-2, 3, (len(collection.queries), 3)) @ rng.integers(-2, 3, (3, 99))).astype(
            np.float32
        )
        self.table = self.table[:, : len(collection.documents)]
        self.place = {text: i for i, text in enumerate(collection.documents)}
        self.row = {query: i for i, query in enumerate(zip(collection.queries, collection.instructions))}
        self.depths, self.searched = [], []

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.depths.append(k)
        self.searched.append(len(queries))
        numbers = np.argsort(-self.table[queries], axis=1, kind="stable")[:, :k].astype(np.int32)
        return np.take_along_axis(self.table[queries], numbers, axis=1), numbers

    def score(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        return self.table[queries, documents]

    def of(self, record: Record, document: str) -> float:
        return float(self.table[self.row[record.query, record.instruction], self.place[document]])


def hash_of(text: str) -> int:
    return int(hashes([text])[0])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_taken_is_what_loops_take(name, seed, monkeypatch):
    monkeypatch.setattr(candidates, "CELLS", 1)
    monkeypatch.setattr(candidates, "LEAST", 5)
    settings = SETTINGS[name]
    everything, corpus = records(seed), [f"corpus {i}" for i in range(9)] + ["Corpus 3", "ALPHA 0"]
    collection = Collection.of(everything, corpus, distinct=seed % 2 == 0)
    first, second = Scores(collection, seed), Scores(collection, seed + 100)
    for rescore in (False, True):
        decisive = second if rescore else first
        mined = mine(collection, first.search, decisive.score, settings, rescore)
        taken, dropped = by_hand(everything, collection.documents, first.of, decisive.of, settings, hash_of)
        assert [[collection.documents[i] for i in mined.negatives[r]] for r in range(len(everything))] == taken
        assert {key: count for key, count in mined.tally.dropped.items() if count} == dropped
        owners = mined.negatives.owners
        assert (mined.scores == decisive.table[collection.query[owners], mined.negatives.values]).all()
        assert mined.tally.histograms["negatives"].sum() == mined.tally.chosen == len(mined.scores)
        assert mined.tally.chosen or name == "margins"
    positives = [decisive.of(r, text) for r in everything for text in r.positives]
    assert mined.positive_scores.tolist() == positives
    given = [decisive.of(r, text) for r in everything for text in r.negatives]
    assert mined.given_scores.tolist() == ([] if settings.replace else given)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_that_may_match_comes_out(seed):
    everything = records(seed, n=20)
    collection = Collection.of(everything)
    scores = Scores(collection, seed)
    mined = mine(collection, scores.search, scores.score, Settings(5))
    assert len(mined.negatives.values)
    for number, record in enumerate(everything):
        texts = [collection.documents[i] for i in mined.negatives[number]]
        assert not any(why_not(record, text, everything, keep_given=True) for text in texts)
        assert not any(same(a, b) for i, a in enumerate(texts) for b in texts[:i])


def test_the_search_goes_deeper_where_a_group_fills_the_first_ranks(monkeypatch):
    group = [Record(f"q{i}", (f"p{i}",), group="one") for i in range(40)]
    everything = [*group, *(Record(f"other {i}", (f"answer {i}",)) for i in range(30))]
    collection = Collection.of(everything)
    scores = Scores(collection, 0)
    in_group = np.array([text.startswith("p") for text in collection.documents])
    scores.table = np.where(in_group, 10, scores.table)
    settings = Settings(3, last=4)
    want, _ = by_hand(everything, collection.documents, scores.of, scores.of, settings, hash_of)

    def found():
        mined = mine(collection, scores.search, scores.score, settings)
        return [[collection.documents[i] for i in mined.negatives[r]] for r in range(len(everything))]

    monkeypatch.setattr(Collection, "most_known", np.ones(len(everything), np.int64))  # as if no group were known
    assert found() == want and scores.depths == [9, 18, 36, 70]
    monkeypatch.setattr(candidates, "CELLS", 200)
    monkeypatch.setattr(candidates, "LEAST", 4)
    scores.depths, scores.searched = [], []
    assert found() == want and {*scores.depths} == {9, 18, 36, 70}
    assert all(n <= max(200 // k, 4) for n, k in zip(scores.searched, scores.depths))
    assert scores.searched[:4] == [22, 22, 22, 4] and scores.searched[4] == 11 and scores.searched[-1] == 4
    scores.depths = []
    monkeypatch.setattr(candidates, "DEEPEST", 30)
    assert [len(texts) for texts in found()] == [0] * 40 + [3] * 30 and max(scores.depths) == 30
    assert all(want)


def test_queries_that_differ_in_their_instruction_share_what_is_known():
    everything = [Record("Q ", ("p1",), instruction="a"), Record("q", ("p2",), instruction="b"), Record("q", ("p1",))]
    everything += [Record("P3", ("Q",)), Record("x", ("p3", "n1", "n2"))]
    collection = Collection.of(everything)
    assert collection.queries[:3] == ["Q ", "q", "q"] and collection.instructions == ["a", "b", "", "", ""]
    scores = Scores(collection, 0)
    scores.table[:] = np.arange(len(collection.documents))
    mined = mine(collection, scores.search, scores.score, Settings(6))
    taken = [{collection.documents[i] for i in mined.negatives[number]} for number in range(3)]
    assert taken == [{"n1", "n2"}] * 3


def test_the_histogram_begins_with_the_first_candidates():
    tally = Tally(np.array([5.0, 6.0], np.float32))
    nothing, some = np.zeros((0, 3), bool), np.array([[True, True, False]])
    tally.add(np.zeros((0, 3), np.float32), {}, {}, nothing, nothing, rescored=False)
    tally.add(np.array([[2.0, 1.0, 0.0]], np.float32), {"same group": ~some}, {}, some, some, rescored=False)
    assert tally.edges[0] < 0 < 6 < tally.edges[-1] and tally.histograms["positives"].sum() == 2
    places = [np.flatnonzero(tally.histograms[name]) for name in ("dropped", "negatives", "positives")]
    assert [len(each) for each in places] == [1, 2, 2] and (np.diff(np.concatenate(places)) > 0).all()
    assert (Tally(np.ones(2, np.float32)).edges < 2).all()


def test_draws_depend_on_texts_alone():
    everything = records(3, n=16)
    settings = Settings(2, sampling="random", seed=1)

    def found(order, settings, corpus):
        collection = Collection.of([everything[i] for i in order], corpus)
        table = np.arange(len(collection.documents), dtype=np.float32) % 5  # ranks that differ between the orders
        search = lambda queries, k: (np.tile(table[:k], (len(queries), 1)), np.tile(np.arange(k), (len(queries), 1)))  # noqa: E731
        mined = mine(collection, search, lambda queries, documents: table[documents], settings)
        texts = ([collection.documents[i] for i in mined.negatives[place]] for place in range(len(order)))
        return {order[place]: set(each) for place, each in enumerate(texts)}

    documents = sorted({text.lower() for record in everything for text in (*record.positives, *record.negatives)})
    one = found(list(range(16)), settings, documents)
    # The first spelling of a text is the one that is taken, so the corpus names them all first.
    assert one == found(list(range(15, -1, -1)), settings, documents)
    assert one != found(list(range(16)), dataclasses.replace(settings, seed=2), documents)


def test_margins_below_zero():
    scores, positives = np.array([[-0.94, -0.96, -1.04, -1.06]], np.float32), np.array([-1.0], np.float32)
    assert rules.relative_margin(scores, positives, 0.05).tolist() == [[True, True, True, False]]
    assert rules.absolute_margin(scores, positives, 0.05).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": 5, "last": 5}, "--range=5:5: the first number must be"),
        ({"first": 98}, "holds 2 ranks, fewer than --negatives=4"),
        ({"absolute_margin": -0.1}, "--absolute_margin=-0.1: must be 0 or more"),
        ({"relative_margin": 1.0}, "--relative_margin=1: is a part"),
        ({"max_score": float("nan")}, "--max_score=nan: must be finite"),
        ({"min_score": 0.5, "max_score": 0.4}, "--min_score=0.5 is above --max_score=0.4"),
    ],
)
def test_rules_that_leave_nothing(changes, message):
    with pytest.raises(UserError, match=message):
        require(dataclasses.replace(Settings(), **changes))
