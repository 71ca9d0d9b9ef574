"""Linear recurrences along the tokens of packed rows: what the state-space layers have in common.

A state h goes from token to token: h = decay · h + what the token writes; outputs are read from it. Rows are walked in
chunks. A chunk gets the state that the one before it left, and the backward pass computes a chunk anew from that state,
so what is held is one state per chunk, not one per token. Where the mesh splits rows, each shard first finds the state
that it would leave if it began with none; these, and what the shard's decays leave of an older state, tell every
shard the state that it begins with.

At the first token of a text the decay is 0: that is all that packing needs, and a shard may end anywhere. A
recurrence that reads texts from their ends walks the whole row backwards, which does the same to every text in it.
"""

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxembed.sharding import AXES, BATCH, ROWS

SEQUENCE = "sequence"
Inputs = dict[str, jax.Array]  # arrays [r, l, …] of a shard's tokens, or [r, Q, …] of a chunk's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Borders:
    """Where texts begin and end in rows [R, L].

    Attributes:
      texts: int32, the text of each token.
      first: bool, whether a token is its text's first.
      last: bool, whether it is its last.
    """

    texts: jax.Array
    first: jax.Array
    last: jax.Array

    @classmethod
    def of(cls, segment_ids_RxL: jax.Array) -> "Borders":
        """Finds them; `segment_ids_RxL`: int32, the text of each token, texts being contiguous."""
        whole = jax.sharding.reshard(segment_ids_RxL, P(BATCH, None))  # neighbours may lie on another shard
        edge = jnp.ones_like(whole[:, :1], bool)
        change = whole[:, 1:] != whole[:, :-1]
        first, last = jnp.concatenate([edge, change], axis=1), jnp.concatenate([change, edge], axis=1)
        return cls(segment_ids_RxL, jax.sharding.reshard(first, ROWS), jax.sharding.reshard(last, ROWS))

    def resets(self, reverse: bool) -> jax.Array:
        """Returns bool [R, L]: the tokens that see nothing of those that come before them in this direction."""
        return self.last if reverse else self.first


class Cell(Protocol):
    """A recurrence over a shard's arrays. All implementations are frozen dataclasses."""

    def fresh(self, inputs: Inputs) -> jax.Array:
        """Returns the state before any token: zeros."""

    def chunk(self, state: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """Returns the state after a chunk, and the chunk's outputs [r, Q, …]."""

    def state(self, state: jax.Array, inputs: Inputs) -> jax.Array:
        """Returns the state after a chunk alone."""

    def kept(self, inputs: Inputs) -> jax.Array:
        """Returns what all tokens together leave of a state: its factor, of a shape that broadcasts to it."""


def run(cell: Cell, inputs: Inputs, chunk: int, reverse: bool = False) -> jax.Array:
    """Runs a recurrence over a shard's tokens; to be called inside `jax.shard_map`.

    Args:
      cell: the recurrence.
      inputs: arrays [r, l, …]. Zeros must change nothing: rows are filled up with them to whole chunks.
      chunk: Q, tokens in a chunk.
      reverse: whether texts are read from their ends.

    Returns:
      [r, l, …], the outputs.
    """
    length = inputs["resets"].shape[1]
    if reverse:
        inputs = jax.tree.map(lambda x: jnp.flip(x, 1), inputs)
    chunk = min(chunk, -(-length // 2))  # two at least: XLA would inline a loop of one, and hold all that it makes
    chunks = {name: _cut(x, chunk) for name, x in inputs.items()}
    # A loop's carry must be said to differ between devices, as what is added to it does.
    state = jax.lax.pcast(cell.fresh(inputs), AXES, to="varying")
    if jax.lax.axis_size(SEQUENCE) > 1:
        one = jax.checkpoint(lambda h, block: (cell.state(h, block), None), prevent_cse=False)
        left, _ = jax.lax.scan(one, state, chunks)
        state = _handed_on(cell.kept(inputs), left, reverse)
    _, out = jax.lax.scan(jax.checkpoint(cell.chunk, prevent_cse=False), state, chunks)
    out = jnp.moveaxis(out, 0, 1)
    out = out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]
    return jnp.flip(out, 1) if reverse else out


def _cut(x: jax.Array, chunk: int) -> jax.Array:
    """[r, l, …] → [chunks, r, Q, …], zeros behind the last token."""
    rows, length, *rest = x.shape
    number = -(-length // chunk)
    x = jnp.pad(x, [(0, 0), (0, number * chunk - length), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(x.reshape(rows, number, chunk, *rest), 1, 0)


def _handed_on(kept: jax.Array, left: jax.Array, reverse: bool) -> jax.Array:
    """Returns the state that a shard begins with.

    Args:
      kept: what this shard's tokens leave of a state.
      left: the state that it leaves, had it begun with none.
      reverse: whether the last shard comes first.
    """
    gather = functools.partial(jax.lax.all_gather, axis_name=SEQUENCE)
    all_kept, all_left = gather(kept), gather(left)
    me = jax.lax.axis_index(SEQUENCE)
    state, mine = jnp.zeros_like(left), jnp.zeros_like(left)
    order = range(len(all_left))
    for i in reversed(order) if reverse else order:
        mine = jnp.where(me == i, state, mine)
        state = all_kept[i] * state + all_left[i]
    return mine


def before(x: jax.Array, count: int, reverse: bool, fill: float = 0) -> jax.Array:
    """Returns the tokens that lie before a shard's own; to be called inside `jax.shard_map`.

    Args:
      x: [r, l, …], the shard's, in the direction of reading (flipped, with `reverse`).
      count: how many are wanted, at most l.
      reverse: whether the shard before this one is the next of the mesh.
      fill: what stands before the first.

    Returns:
      [r, count, …].
    """
    shards = jax.lax.axis_size(SEQUENCE)
    tail = x[:, x.shape[1] - count :]
    if shards == 1:
        return jnp.full_like(tail, fill)
    steps = [(i, i + 1) for i in range(shards - 1)]
    came = jax.lax.ppermute(tail, SEQUENCE, [(b, a) for a, b in steps] if reverse else steps)
    is_first = jax.lax.axis_index(SEQUENCE) == (shards - 1 if reverse else 0)
    return jnp.where(is_first, jnp.full_like(came, fill), came)
