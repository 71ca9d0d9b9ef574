"""Duplicates, texts of evaluation sets, and pairs that a model does not find, each against a plain definition."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import word_models

from jaxembed.data.record_formats import Record
from jaxembed.errors import UserError
from jaxembed.mining.consistency import consistent, drawn
from jaxembed.mining.contamination import Contamination
from jaxembed.mining.dropping import SHOWN, Dropped, sieve
from jaxembed.mining.duplicates import ExactDuplicates, NearDuplicates, bands
from jaxembed.mining.text_keys import hashes, letters, normalised, words

HASH, EMPTY = 1431053258, 634351890  # BLAKE2b of 'a' and of '', four bytes


def sieved(records, rule):
    """What a rule leaves, and what it counts."""
    dropped = Dropped()
    return list(sieve(records, [rule], dropped)), dropped


def test_what_counts_as_the_same_text():
    assert normalised("  \ufb01ne\u00a0\tSTRASSE ") == normalised("fine stra\u00dfe") == "fine strasse"
    assert letters("It's 3-D, really_so!") == "its3dreallyso"
    assert words("Ab_c 1.5 \u6f22\u5b57 \uff21") == ["ab", "c", "1", "5", "\u6f22", "\u5b57", "a"]
    assert hashes(["a", "", "a"]).tolist() == [HASH, EMPTY, HASH]


def test_exact_duplicates():
    records = [
        Record("A  b", ("c", "d")),
        Record("a b", ("D", "C")),
        Record("a b", ("c",)),
        Record("a b c", ("d",)),
        Record("a b", ("C ",), id="again"),
    ]
    kept, dropped = sieved(records, ExactDuplicates())
    assert kept == [records[0], records[2], records[3]]
    assert dropped.counts == {"exact duplicate": 2} and len(dropped.examples["exact duplicate"]) == 2


def jaccard(a: Record, b: Record) -> float:
    """Of the runs of three words of query and positives."""
    runs = []
    for record in (a, b):
        found = " ".join([record.query, *record.positives]).lower().split()
        runs.append(set(zip(found, found[1:], found[2:])))
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates(threshold):
    rng = np.random.default_rng(0)
    base = [rng.choice(500, 40) for _ in range(40)]
    records = []
    for number in range(240):
        text = [f"w{i}" for i in base[rng.integers(40)]]
        for place in rng.choice(40, rng.integers(0, 5), replace=False):
            text[place] = f"w{rng.integers(500)}"
        records.append(Record(" ".join(text[:8]), (" ".join(text[8:]).title(),), id=str(number)))
    kept, dropped = sieved(records, NearDuplicates(threshold))
    left, missed, similar = [], 0, 0
    for record in records:
        nearest = max((jaccard(record, other) for other in left), default=0.0)
        if record in kept:
            left.append(record)
            missed += nearest >= threshold
        else:
            assert nearest >= threshold  # by an earlier one that is kept, never by a mere chance of hashes
        similar += nearest >= threshold
    assert dropped.counts["near duplicate"] == len(records) - len(kept) > 30
    assert missed <= 0.05 * similar
    assert len(dropped.examples["near duplicate"]) == SHOWN


def test_near_duplicates_without_letters():
    records = [
        Record(query, (positive,)) for query, positive in (("?", "\U0001f600 !"), ("...", "***"), ("?", "\U0001f600!"))
    ]
    kept, _ = sieved([*records, Record("word", ("***",)), Record(" ", (" ",))], NearDuplicates(0.8))
    assert [record.query for record in kept] == ["?", "...", "word", " "]


def test_bands_find_most_pairs_at_the_threshold():
    for threshold in (0.1, 0.5, 0.8, 0.95, 1.0):
        count, rows = bands(threshold)
        assert count * rows <= 128 and 1 - (1 - threshold**rows) ** count >= 0.95


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_texts_of_evaluation_sets(tmp_path):
    run = " ".join(f"word{i}" for i in range(13))
    sts = lines(tmp_path / "sts-dev.jsonl", [{"sentence1": "A man, plays!", "sentence2": "...", "score": 1}])
    beir = tmp_path / "beir"
    beir.mkdir()
    lines(beir / "corpus.jsonl", [{"_id": "1", "title": "Some title", "text": f"before {run} after"}])
    lines(beir / "queries.jsonl", [{"_id": "1", "text": "what is it"}])
    lines(beir / "other.txt.bak", [])
    train = lines(tmp_path / "x-train.jsonl", [{"text": "first class", "label": "a"}])
    test = lines(tmp_path / "x-test.jsonl", [{"text": "second class", "label": "b"}])
    pairs = str(tmp_path / "pairs.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"query": ["pair one"], "positive": [["pair two", "pair three"]]}), pairs)
    rule = Contamination([sts, str(beir), f"{train}:{test}", pairs], 13)
    wanted = {
        "a MAN plays": "text of sts-dev",
        "What is it?": "text of beir",
        f"Some title before {run} after": "text of beir",
        f"other words, {run.upper()}, other words": "13 words of beir",
        run.replace("word12", "word13"): "",
        "first class": "text of x-test",
        "second class.": "text of x-test",
        "pair three": "text of pairs",
        "...": "",
        "a": "",
        "Some title": "",
    }
    assert {text: rule.reason(text) for text in wanted} == wanted
    assert Contamination([str(beir)], 0).reason(f"other {run}") == ""
    records = [
        Record("good", ("fine", "A man plays")),
        Record("what is it", ("fine",)),
        Record("good", ("fine",), ("pair one", "better"), scores=(3, 2, 1), negative_queries=("x", "y")),
    ]
    kept, dropped = sieved(records, rule)
    assert kept == [Record("good", ("fine",), ("better",), scores=(3, 1), negative_queries=("y",))]
    assert {reason: count for reason, count in dropped.counts.items() if count} == {
        "text of sts-dev": 1,
        "text of beir": 1,
    }
    assert len(dropped.counts) == 8 and dropped.texts == 1


def test_evaluation_sets_that_cannot_be_read(tmp_path):
    other = lines(tmp_path / "other.jsonl", [{"title": "a", "label": "b"}])
    for spec, message in (
        ("nowhere.jsonl", "--against: no such file or folder: nowhere.jsonl"),
        (f"{other}:nowhere", "--against: no such file or folder: nowhere"),
        (other, r"other.jsonl:1: no text in title, label: wants one of sentence1"),
    ):
        with pytest.raises(UserError, match=message):
            Contamination([spec], 13)


@pytest.mark.parametrize("pool", [1000, 9])
def test_consistency(pool):
    embedder = word_models.make("bert")
    texts = word_models.sentences(60, 4)
    records = [Record(texts[i], (texts[30 + i],)) for i in range(20)]
    records += [Record(texts[20 + i], (texts[20 + i].upper(), texts[50 + i], texts[51 + i])) for i in range(4)]
    records += [Record(texts[0], (texts[55],), (texts[56],), scores=(2, 1)), Record(texts[25], (texts[56],), group="g")]
    records += [Record(texts[26], (texts[57], texts[58]), group="g", scores=(0.5, 0.25))]
    dropped = Dropped()
    kept = consistent(records, embedder, ("", ""), 3, pool, dropped)
    documents = list(dict.fromkeys(text for r in records for text in (*r.positives, *r.negatives)))
    chosen = [documents[i] for i in drawn(documents, pool)]
    assert len(chosen) == min(pool, len(documents))
    queries = {r.query: embedder.encode_query(r.query) for r in records}
    vectors = {text: embedder.encode_document(text) for text in documents}
    score = lambda q, d: float(queries[q] @ vectors[d]) / np.linalg.norm(queries[q]) / np.linalg.norm(vectors[d])  # noqa: E731
    want, cut = [], 0
    for r in records:
        known = {text for other in records if other.query == r.query for text in other.positives} | {r.query.upper()}
        known |= {t for other in records if r.group and other.group == r.group for t in other.positives}
        others = [text for text in chosen if text not in known]
        found = [sum(score(r.query, t) > score(r.query, p) for t in others) < 3 for p in r.positives]
        if any(found):
            cut += found.count(False)
            positives = tuple(p for p, good in zip(r.positives, found) if good)
            scores = tuple(s for s, good in zip(r.scores, [*found, True]) if good)
            want.append((r.query, positives, r.negatives, scores))
    assert [(r.query, r.positives, r.negatives, r.scores) for r in kept] == want
    assert dropped.counts["positive not among the first 3"] == len(records) - len(kept) > 0
    assert kept and dropped.texts == cut
