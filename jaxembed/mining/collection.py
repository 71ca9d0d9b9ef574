"""Records, their distinct texts by number, and what is known of which text answers which query.

All of it is held in the host's memory. A query is an instruction and a text, and two of them are one where both are
equal as strings, as are documents. Texts that are equal once normalised (`text_keys.normalised`) share a key. What is
known of a query is known of all queries of its key, whatever their instructions.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from jaxembed.data.record_formats import Record
from jaxembed.mining.text_keys import normalised


@dataclasses.dataclass(frozen=True)
class Lists:
    """A list of numbers for each of R owners, one after the other.

    Attributes:
      values: int64 [n].
      start: int64 [R + 1]: those of owner r are values[start[r] : start[r + 1]].
    """

    values: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "Lists":
        """Joins lists."""
        values = np.fromiter((value for each in lists for value in each), np.int64)
        return cls(values, np.cumsum([0, *map(len, lists)], dtype=np.int64))

    def __getitem__(self, owner: int) -> np.ndarray:
        return self.values[self.start[owner] : self.start[owner + 1]]

    @property
    def counts(self) -> np.ndarray:
        """How many each owner has, int64 [R]."""
        return np.diff(self.start)

    @property
    def owners(self) -> np.ndarray:
        """The owner of each value, int64 [n]."""
        return np.repeat(np.arange(len(self.start) - 1), self.counts)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A set of pairs of numbers, to ask for many at once.

    Attributes:
      codes: left · width + right of each pair, int64, rising.
      width: all numbers on the right are below it.
    """

    codes: np.ndarray
    width: int

    @classmethod
    def of(cls, left_N: np.ndarray, right_N: np.ndarray, width: int) -> "Pairs":
        """Makes a set of pairs, both int64 [N]."""
        return cls(np.unique(left_N * np.int64(width) + right_N), width)

    def has(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Tells which pairs are in the set: bool, of the shape that left and right have together."""
        if not len(self.codes):
            return np.zeros(np.broadcast_shapes(left.shape, right.shape), bool)
        asked = left * np.int64(self.width) + right
        found = np.minimum(np.searchsorted(self.codes, asked), len(self.codes) - 1)
        return self.codes[found] == asked


@dataclasses.dataclass(frozen=True)
class Collection:
    """Records and their texts.

    Attributes:
      records: R of them.
      queries: the texts of Q queries.
      instructions: of these queries, '' where there is none; no two queries have the same text and instruction.
      documents: D texts: those of the corpus, then positives and negatives of records that are not among them.
      n_corpus: how many are of the corpus.
      query: int64 [R], the number of each record's query.
      positives, negatives: numbers of each record's documents.
    """

    records: Sequence[Record]
    queries: list[str]
    instructions: list[str]
    documents: list[str]
    n_corpus: int
    query: np.ndarray
    positives: Lists
    negatives: Lists

    @classmethod
    def of(cls, records: Sequence[Record], corpus: Iterable[str] = (), distinct: bool = True) -> "Collection":
        """Numbers the texts of records.

        Args:
          records: whose positives and negatives are documents.
          corpus: more documents.
          distinct: each text of the corpus once; False: all as they come, so that they agree with stored vectors.
        """
        documents: list[str] = list(dict.fromkeys(corpus)) if distinct else list(corpus)
        number: dict[str, int] = {}
        for i, text in enumerate(documents):
            number.setdefault(text, i)
        n_corpus = len(documents)
        queries: dict[tuple[str, str], int] = {}
        for record in records:
            queries.setdefault((record.query, record.instruction), len(queries))
            for text in (*record.positives, *record.negatives):
                if text not in number:
                    number[text] = len(documents)
                    documents.append(text)
        return cls(
            records,
            [text for text, _ in queries],
            [instruction for _, instruction in queries],
            documents,
            n_corpus,
            np.array([queries[record.query, record.instruction] for record in records], np.int64),
            Lists.of([[number[text] for text in record.positives] for record in records]),
            Lists.of([[number[text] for text in record.negatives] for record in records]),
        )

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        """The keys of documents and queries, int64 [D + Q]."""
        keys: dict[str, int] = {}
        texts = itertools.chain(self.documents, self.queries)
        return np.fromiter((keys.setdefault(normalised(text), len(keys)) for text in texts), np.int64)

    @functools.cached_property
    def document_keys(self) -> np.ndarray:
        """The key of each document, int64 [D]."""
        return self._keys[: len(self.documents)]

    @functools.cached_property
    def query_keys(self) -> np.ndarray:
        """The key that a document equal to each query has, int64 [Q]."""
        return self._keys[len(self.documents) :]

    @functools.cached_property
    def _asked(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct keys of queries, int64 [A], rising; and `asked`."""
        return np.unique(self.query_keys, return_inverse=True)

    @functools.cached_property
    def asked(self) -> np.ndarray:
        """The number of each query's key among the A distinct ones, int64 [Q]: what is known goes by it."""
        return self._asked[1]

    @property
    def n_asked(self) -> int:
        """A."""
        return len(self._asked[0])

    def pairs(self, left_N: np.ndarray, keys_N: np.ndarray) -> Pairs:
        """Makes a set of pairs of some number and a document's key."""
        return Pairs.of(left_N, keys_N, len(self._keys))

    @functools.cached_property
    def own(self) -> Pairs:
        """Pairs (record, key): its query and its positives."""
        left = np.concatenate([np.arange(len(self.records)), self.positives.owners])
        return self.pairs(left, np.concatenate([self.query_keys[self.query], self._of_documents(self.positives)]))

    @functools.cached_property
    def given(self) -> Pairs:
        """Pairs (record, key): its negatives."""
        return self.pairs(self.negatives.owners, self._of_documents(self.negatives))

    @functools.cached_property
    def answers(self) -> Pairs:
        """Pairs (`asked`, key): its positives in any record, and the queries that it answers in any record."""
        keys, positive = self._asked[0], self._of_documents(self.positives)
        asking = self.asked[self.query[self.positives.owners]]
        turned = np.minimum(np.searchsorted(keys, positive), max(len(keys) - 1, 0))
        is_query = keys[turned] == positive
        left = np.concatenate([asking, turned[is_query]])
        return self.pairs(left, np.concatenate([positive, keys[asking][is_query]]))

    @functools.cached_property
    def _groups(self) -> np.ndarray:
        """Number of each record's group or, where it has none, label: int64 [R], -1 for neither."""
        numbers: dict[tuple[str, str], int] = collections.defaultdict(lambda: len(numbers))
        named = [("group", r.group) if r.group else ("label", r.label) for r in self.records]
        return np.array([numbers[name] if name[1] else -1 for name in named], np.int64)

    @functools.cached_property
    def groups_asked(self) -> Lists:
        """Numbers of the groups that records of each of the A queries are in."""
        lists: list[dict[int, None]] = [{} for _ in range(self.n_asked)]
        for asked, group in zip(self.asked[self.query].tolist(), self._groups.tolist()):
            if group >= 0:
                lists[asked][group] = None
        return Lists.of([list(each) for each in lists])

    @functools.cached_property
    def in_group(self) -> Pairs:
        """Pairs (group, key): the documents of its records."""
        owners = np.concatenate([self.positives.owners, self.negatives.owners])
        groups = self._groups[owners]
        keys = np.concatenate([self._of_documents(self.positives), self._of_documents(self.negatives)])
        return self.pairs(groups[groups >= 0], keys[groups >= 0])

    @functools.cached_property
    def most_known(self) -> np.ndarray:
        """How many keys are known of each query, or its groups, at the most: int64 [Q]."""
        width, n = self.answers.width, self.n_asked
        per_asked = np.bincount(self.answers.codes // width, minlength=n)
        per_group = np.bincount(self.in_group.codes // width)
        groups = self.groups_asked
        return (1 + per_asked + np.bincount(groups.owners, per_group[groups.values], n).astype(np.int64))[self.asked]

    def _of_documents(self, lists: Lists) -> np.ndarray:
        return self.document_keys[lists.values]
