"""The rules by which a candidate is no hard negative: functions of arrays that tell which candidates they drop.

Arrays are [R, K]: R records, K candidates each, best first. `left` says which candidates no earlier rule has dropped.
"""

import numpy as np

from jaxembed.mining.collection import Lists, Pairs


def equal_text(records_R: np.ndarray, keys_RxK: np.ndarray, own: Pairs) -> np.ndarray:
    """Drops what equals the record's query or one of its positives, once normalised: bool [R, K]."""
    return own.has(records_R[:, None], keys_RxK)


def repeated_text(keys_RxK: np.ndarray) -> np.ndarray:
    """Drops what equals a better candidate, once normalised: bool [R, K]."""
    order = np.argsort(keys_RxK, axis=1, kind="stable")
    ordered = np.take_along_axis(keys_RxK, order, axis=1)
    again = np.zeros(keys_RxK.shape, bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    dropped = np.zeros_like(again)
    np.put_along_axis(dropped, order, again, axis=1)
    return dropped


def known_positive(asked_R: np.ndarray, keys_RxK: np.ndarray, answers: Pairs) -> np.ndarray:
    """Drops what answers the same query in any record, or is a query that this one answers: bool [R, K]."""
    return answers.has(asked_R[:, None], keys_RxK)


def same_group(asked_R: np.ndarray, keys_RxK: np.ndarray, groups: Lists, in_group: Pairs) -> np.ndarray:
    """Drops the documents of all records of a group, or label, that a record of this query is in: bool [R, K]."""
    dropped = np.zeros(keys_RxK.shape, bool)
    counts_R = groups.counts[asked_R]
    for i in range(int(counts_R.max(initial=0))):
        rows = np.flatnonzero(counts_R > i)
        group = groups.values[groups.start[asked_R[rows]] + i]
        dropped[rows] |= in_group.has(group[:, None], keys_RxK[rows])
    return dropped


def given_already(records_R: np.ndarray, keys_RxK: np.ndarray, given: Pairs) -> np.ndarray:
    """Drops what the record has among its own negatives already: bool [R, K]."""
    return given.has(records_R[:, None], keys_RxK)


def before_window(left_RxK: np.ndarray, first: int) -> np.ndarray:
    """Drops the first candidates that are left: bool [R, K]. So what earlier rules have dropped takes up no rank."""
    return left_RxK & (left_RxK.cumsum(axis=1) <= first)


def absolute_margin(scores_RxK: np.ndarray, positive_R: np.ndarray, margin: float) -> np.ndarray:
    """Drops scores above positive − margin (NV-Retriever's TopK-MarginPos, arXiv:2407.15831): bool [R, K]."""
    return scores_RxK > positive_R[:, None].astype(np.float64) - margin


def relative_margin(scores_RxK: np.ndarray, positive_R: np.ndarray, margin: float) -> np.ndarray:
    """Drops scores above positive − margin · |positive|: bool [R, K].

    For positive scores that is positive · (1 − margin), NV-Retriever's TopK-PercPos (arXiv:2407.15831), where 95 % is a
    margin of 0.05; for negative ones, too, the limit lies below the positive's score, as in sentence-transformers.
    """
    positive_R = positive_R.astype(np.float64)
    return scores_RxK > (positive_R - margin * np.abs(positive_R))[:, None]


def above(scores_RxK: np.ndarray, ceiling: float) -> np.ndarray:
    """Drops scores above a ceiling: bool [R, K]."""
    return scores_RxK > np.float64(ceiling)


def below(scores_RxK: np.ndarray, floor: float) -> np.ndarray:
    """Drops scores below a floor: bool [R, K]."""
    return scores_RxK < np.float64(floor)


def choose(left_RxK: np.ndarray, wanted_R: np.ndarray, order_RxK: np.ndarray | None = None) -> np.ndarray:
    """Returns which of the candidates that are left to take: bool [R, K], at most `wanted_R` of each record.

    Args:
      left_RxK: those that no rule drops.
      wanted_R: how many to take.
      order_RxK: uint32; the lowest are taken. None: the best candidates are.
    """
    if order_RxK is not None:
        last = np.where(left_RxK, order_RxK.astype(np.int64), np.int64(1) << 32)
        order = np.argsort(last, axis=1, kind="stable")
        place = np.empty_like(order)
        np.put_along_axis(place, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), axis=1)
    else:
        place = left_RxK.cumsum(axis=1) - 1
    return left_RxK & (place < wanted_R[:, None])
