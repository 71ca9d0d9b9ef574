"""What every rule of cleaning shares: records in, records out, and how many each reason has taken, with examples."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from jaxembed.data.record_formats import Record

SHOWN = 3  # examples kept of each reason


class Dropped:
    """Counts of what was dropped.

    Attributes:
      counts: records by reason, in the order in which reasons were named.
      examples: the first few of each.
      texts: positives and negatives that were left out of records that stay.
    """

    def __init__(self) -> None:
        self.texts = 0
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def name(self, reasons: Iterable[str]) -> None:
        """Names reasons that may come, so that a count of 0 is said too."""
        for reason in reasons:
            self.counts.setdefault(reason, 0)

    def add(self, reason: str, record: Record, why: str = "") -> None:
        """Counts a record; `why` says more of it."""
        self.counts[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < SHOWN:
            shown.append(f"{record.query[:80]} → {record.positives[0][:80]}" + (f" ({why})" if why else ""))


class Rule(Protocol):
    """Something that looks at one record after the other.

    Attributes:
      reasons: why it may drop a record.
    """

    reasons: Sequence[str]

    def __call__(self, record: Record, dropped: Dropped) -> Record | None:
        """Returns the record, or what is left of it; None where it is dropped, which it counts."""
        ...


def sieve(records: Iterable[Record], rules: Sequence[Rule], dropped: Dropped) -> Iterator[Record]:
    """Yields the records that no rule drops; a rule does not see what an earlier one has dropped."""
    for rule in rules:
        dropped.name(rule.reasons)
    for record in records:
        for rule in rules:
            record = rule(record, dropped)
            if record is None:
                break
        else:
            yield record


def part_of(record: Record, positives: Sequence[bool], negatives: Sequence[bool]) -> Record:
    """Returns a record with some of its positives and negatives, and what belongs to them."""
    every = [*positives, *negatives]
    return dataclasses.replace(
        record,
        positives=_chosen(record.positives, positives),
        negatives=_chosen(record.negatives, negatives),
        scores=_chosen(record.scores, every),
        negative_queries=_chosen(record.negative_queries, negatives),
    )


def _chosen(values: tuple, chosen: Sequence[bool]) -> tuple:
    return tuple(value for value, kept in zip(values, chosen) if kept)
