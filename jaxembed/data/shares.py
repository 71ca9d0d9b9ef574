"""Whole numbers in proportion: how many pairs of a step, or draws of a pattern, each source gets."""

from collections.abc import Sequence
from fractions import Fraction

from jaxembed.errors import UserError


def share_out(shares: Sequence[int | Fraction], total: int) -> list[int]:
    """Returns whole numbers of the sum `total`, in proportion to `shares`, rounded by largest remainder (Hamilton)."""
    exact = [Fraction(share) * total / sum(shares) for share in shares]
    whole = [int(x) for x in exact]
    by_remainder = sorted(range(len(whole)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def pairs_by_share(shares: Sequence[float], batch_size: int) -> list[int]:
    """Returns how many pairs of every step each source gives, where sources have fixed shares.

    Args:
      shares: `config.data.train[i].share` of each source, above 0; they need not sum to 1.
      batch_size: pairs in a step.

    Raises:
      UserError: the batch is so small that a source would give none.
    """
    pairs = share_out([Fraction(str(share)) for share in shares], batch_size)
    for i, (share, n) in enumerate(zip(shares, pairs)):
        if n == 0:
            raise UserError(
                f"config.data.train[{i}].share = {share:g} of {sum(shares):g} is no whole pair of config.batch_size = "
                f"{batch_size}: raise one of them"
            )
    return pairs
