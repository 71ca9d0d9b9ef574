"""What counts as a row's negative: the relation of texts, tile by tile, without a matrix of all pairs."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxembed.data.batch import HARD_NEGATIVE, NO_GROUP, NO_TEXT, SCOPE_ALL, VOID


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Identities:
    """What the texts of one side of a comparison are; int32 arrays, numbers as in `jaxembed.data.batch.Texts`.

    Attributes:
      pair: [n], VOID for an empty slot, which is nobody's negative and has none.
      rank: [n].
      text: [n].
      matches: [n, W], texts known to match this one, which are never its negatives; NO_TEXT where there are fewer.
      group: [n].
      place: [n], of rows their scope, of columns their pool.
    """

    pair: jax.Array
    rank: jax.Array
    text: jax.Array
    matches: jax.Array
    group: jax.Array
    place: jax.Array


FILL = Identities(VOID, HARD_NEGATIVE, NO_TEXT, NO_TEXT, NO_GROUP, VOID)  # of a slot that fills up a tile


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which columns a row is compared with.

    Attributes:
      own_hard: its pair's hard negatives.
      others_hard: the hard negatives of other pairs in its scope; the other documents always are.
      own_positives: its pair's positives, for reductions over all of a row's documents.
      same_kind: rows and columns are both queries or both documents: then two texts that share a match are no
        negatives either.
    """

    own_hard: bool = False
    others_hard: bool = True
    own_positives: bool = False
    same_kind: bool = False


def candidates(rule: Rule, row: Identities, column: Identities) -> jax.Array:
    """Returns bool [n, m]: which columns are compared with which rows.

    A column is a row's negative if it belongs to another pair, lies in the row's scope and shares no group, or is the
    row's own hard negative; and never if the two texts are equal, or one is a known match of the other.
    """
    same_pair = row.pair[:, None] == column.pair
    in_scope = (row.place[:, None] == column.place) | (row.place == SCOPE_ALL)[:, None]
    # A row without a group gets a number that no column has: one comparison instead of two.
    group = jnp.where(row.group == NO_GROUP, NO_GROUP - 1, row.group)
    wanted = in_scope & (group[:, None] != column.group) & ~same_pair
    if not rule.others_hard:
        wanted &= column.rank >= 0
    if rule.own_hard:
        wanted |= same_pair & (column.rank == HARD_NEGATIVE)
    wanted &= ~_match(rule, row, column)
    if rule.own_positives:
        wanted |= same_pair & (column.rank >= 0)
    return wanted & (row.pair != VOID)[:, None] & (column.pair != VOID)


def _match(rule: Rule, row: Identities, column: Identities) -> jax.Array:
    """Returns bool [n, m]: the texts are equal, or one is a known match of the other."""
    matching = row.text[:, None] == column.text
    for match in row.matches.T:
        matching |= match[:, None] == column.text
    for match in column.matches.T:
        matching |= row.text[:, None] == match
        if rule.same_kind:
            for other in row.matches.T:
                matching |= (other[:, None] == match) & (match != NO_TEXT)
    return matching
