"""Small sets of records for tests of mining, and a miner in plain Python."""

import numpy as np

from jaxembed.data.record_formats import Record

WORDS = ("alpha", "beta", "gamma", "delta")


def text(rng: np.random.Generator, n: int = 12) -> str:
    """One of n texts, spelled in one of several ways that are the same once normalised."""
    i = int(rng.integers(n))
    words = f"{WORDS[i % 4]} {i}"
    return (words, words.upper(), f" {words.title()} ", words.replace(" ", "\u00a0"))[int(rng.integers(4))]


def records(seed: int, n: int = 12, named: bool = True) -> list[Record]:
    """Random records whose texts often meet, with instructions, groups, labels and negatives."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        pick = lambda least, most: tuple(text(rng) for _ in range(rng.integers(least, most + 1)))  # noqa: E731
        instruction = ("", "", "find")[int(rng.integers(3))]
        name = {0: {"group": f"g{rng.integers(3)}"}, 1: {"label": f"g{rng.integers(3)}"}}.get(int(rng.integers(6)), {})
        made.append(
            Record(text(rng), pick(1, 3), pick(0, 2), id=f"r{i}", instruction=instruction, **(name if named else {}))
        )
    return made


def same(a: str, b: str) -> bool:
    """Whether texts are equal but for case and spaces; enough for those of `text`."""
    return a.lower().split() == b.lower().split()


def why_not(record: Record, document: str, everything: list[Record], keep_given: bool) -> str:
    """Returns why a document is no negative of a record, whatever its score; '' where it may be one."""

    def among(texts):
        return any(same(document, other) for other in texts)

    def name(other):
        return ("group", other.group) if other.group else ("label", other.label) if other.label else None

    if among([record.query, *record.positives]):
        return "equal text"
    alike = [other for other in everything if same(other.query, record.query)]
    asking = [other.query for other in everything if any(same(record.query, p) for p in other.positives)]
    if among([p for other in alike for p in other.positives] + asking):
        return "known positive"
    names = {name(other) for other in alike} - {None}
    if among([t for other in everything if name(other) in names for t in (*other.positives, *other.negatives)]):
        return "same group"
    return "given already" if keep_given and among(record.negatives) else ""


def mix(h: int) -> int:
    """`hashing.mix` in whole numbers."""
    h = (h ^ h >> 16) * 0x7FEB352D % 2**32
    h = (h ^ h >> 15) * 0x846CA68B % 2**32
    return h ^ h >> 16


def by_hand(everything, documents, scores, decisive, settings, hash_of):
    """Mines with loops.

    Args:
      everything: all records.
      documents: their texts, in order.
      scores: (record, document) → the first model's score for the record's query.
      decisive: (record, document) → the score that margins are about.
      settings: a `Settings`.
      hash_of: text → its hash.

    Returns:
      Per record the texts that are taken, and the counts of what each rule dropped.
    """
    taken, dropped = [], {}
    for record in everything:
        ranked = sorted(range(len(documents)), key=lambda i: (-scores(record, documents[i]), i))
        left, reasons, seen = [], [], []
        for i in ranked:
            if len(left) == settings.last:
                break
            reason = why_not(record, documents[i], everything, not settings.replace)
            if not reason and any(same(documents[i], other) for other in seen):
                reason = "repeated text"
            (reasons if reason else left).append(reason or documents[i])
            seen.append(documents[i])
        alike = [other for other in everything if same(other.query, record.query)]
        lowest = min(decisive(other, p) for other in alike for p in other.positives)
        rest = []
        for rank, document in enumerate(left):
            score = decisive(record, document)
            s = settings
            if rank < s.first:
                reasons.append("before the window")
            elif s.absolute_margin is not None and score > lowest - s.absolute_margin:
                reasons.append("absolute margin")
            elif s.relative_margin is not None and score > lowest - s.relative_margin * abs(lowest):
                reasons.append("relative margin")
            elif s.max_score is not None and score > s.max_score:
                reasons.append("above --max_score")
            elif s.min_score is not None and score < s.min_score:
                reasons.append("below --min_score")
            else:
                rest.append(document)
        wanted = max(0, settings.negatives - (0 if settings.replace else len(record.negatives)))
        if settings.sampling == "random":
            draw = {d: mix(mix(mix(hash_of(record.query) ^ settings.seed)) ^ hash_of(d)) for d in rest}
            chosen = sorted(rest, key=draw.__getitem__)[:wanted]
            rest = [d for d in rest if d in chosen]
        taken.append(rest[:wanted])
        for reason in reasons:
            dropped[reason] = dropped.get(reason, 0) + 1
    return taken, dropped
