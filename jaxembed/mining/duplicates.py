"""Records that say what an earlier one says: exactly, or nearly."""

import hashlib

import numpy as np

from jaxembed.data.record_formats import Record
from jaxembed.mining.dropping import Dropped
from jaxembed.mining.text_keys import normalised, shingles

PERMUTATIONS = 128  # of MinHash
SHINGLE = 3  # words
RECALL = 0.95  # of pairs that are just as similar as the threshold, at least so many are looked at


class ExactDuplicates:
    """Drops records whose query and positives equal those of an earlier one, once normalised. A `Rule`."""

    reasons = ("exact duplicate",)

    def __init__(self) -> None:
        self._seen: set[bytes] = set()  # 16 bytes each

    def __call__(self, record: Record, dropped: Dropped) -> Record | None:
        """See `Rule`."""
        texts = "\0".join([normalised(record.query), *sorted(map(normalised, record.positives))])
        key = hashlib.blake2b(texts.encode(), digest_size=16).digest()
        if key in self._seen:
            dropped.add(self.reasons[0], record)
            return None
        self._seen.add(key)
        return record


class NearDuplicates:
    """Drops records that share most of their runs of words with an earlier one that was kept. A `Rule`.

    The similarity of two records is the Jaccard index of their sets of runs of SHINGLE words, of query and positives
    together. Pairs to look at come from MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of
    Massive Datasets, chapter 3), in bands so small that RECALL of them are found at the threshold and more above it.
    Of these the index itself is computed, so that nothing below the threshold is dropped. Memory: a few kilobytes per
    record that is kept.
    """

    reasons = ("near duplicate",)

    def __init__(self, threshold: float) -> None:
        """Takes the Jaccard index from which on records are duplicates, above 0 and at most 1."""
        from datasketch import MinHash, MinHashLSH

        self._threshold = threshold
        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=bands(threshold))
        self._empty = MinHash(num_perm=PERMUTATIONS, hashfunc=int)  # shingles are hashes already
        self._kept: list[tuple[str, np.ndarray]] = []

    def __call__(self, record: Record, dropped: Dropped) -> Record | None:
        """See `Rule`."""
        found = shingles("\n".join([record.query, *record.positives]), SHINGLE)
        signature = self._empty.copy()
        signature.update_batch(found)
        for number in sorted(self._index.query(signature)):
            query, other = self._kept[number]
            shared = len(np.intersect1d(found, other, assume_unique=True))
            index = shared / (len(found) + len(other) - shared)
            if index >= self._threshold:
                dropped.add(self.reasons[0], record, f"{index:.2f} to: {query}")
                return None
        self._index.insert(len(self._kept), signature, check_duplication=False)
        self._kept.append((record.query[:80], found))
        return record


def bands(threshold: float) -> tuple[int, int]:
    """Returns how many bands of how many rows make the fewest candidates of the settings with RECALL at a threshold.

    Two sets of Jaccard index t agree in a band of r rows with probability t^r, in one of b bands with 1 - (1 - t^r)^b.
    """
    fitting = [
        rows for rows in range(1, PERMUTATIONS + 1) if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= RECALL
    ]
    rows = max(fitting, default=1)
    return PERMUTATIONS // rows, rows
