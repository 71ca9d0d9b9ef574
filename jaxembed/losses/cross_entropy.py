"""Cross-entropy of words without an array of tokens x words.

A token's loss is log Σ_v exp(s_v) - s_target, its scores s the products of its state with a table of words. The tokens
that are asked come first, in tiles; for each tile the vocabulary runs by in tiles too, under an online log-sum-exp
(Milakov & Gimelshein 2018, arXiv:1805.02867), and the backward pass makes the scores anew (as Cut Your Losses, Wijmans
et al. 2024, arXiv:2411.09009). Tokens that are not asked cost nothing: every device counts its own tiles.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxembed.sharding import BATCH, ROWS, STATES, platform

TOKENS, TOKENS_ON_CPU = 1024, 256  # in a tile; a CPU gains nothing by larger ones, and the last is computed whole
TABLE, BIAS = P("tensor", None), P("tensor")  # every device has all words, or its part of `tensor`
_SPREAD = (*BATCH, "sequence")  # the axes that tokens are sharded over
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Words:
    """What is static about the scores.

    Attributes:
      count: V, words; rows of the table beyond it are none.
      tile: words in a tile.
      softcap: scores s become softcap · tanh(s / softcap); 0 = off.
    """

    count: int
    tile: int = 2048
    softcap: float = 0.0


def cross_entropy(
    states_RxLxD: jax.Array,
    table_VxD: jax.Array,
    bias_V: jax.Array | None,
    targets_RxL: jax.Array,
    asked_RxL: jax.Array,
    words: Words,
) -> tuple[jax.Array, jax.Array]:
    """Computes the loss of each token that is asked.

    To be called in an explicit mesh; the states lie there as `sharding.STATES` says.

    Args:
      states_RxLxD: token states, any float dtype, that of the products; they are summed in float32.
      table_VxD: a vector per word, any float dtype and sharding; rows beyond `words.count` are not looked at.
      bias_V: added to the words' scores; None for none.
      targets_RxL: int32, the word that is right; any number where nothing is asked.
      asked_RxL: bool.
      words: how many there are, and how they are scored.

    Returns:
      float32 [R, L], the negative log-likelihood in nats, 0 where nothing is asked; and bool [R, L], whether the right
      word has the highest score, False likewise.
    """
    dtype = states_RxLxD.dtype
    table_VxD = jax.sharding.reshard(table_VxD.astype(dtype), TABLE)
    if bias_V is None:
        bias_V = jnp.zeros(table_VxD.shape[0], jnp.float32, out_sharding=BIAS)
    bias_V = jax.sharding.reshard(bias_V.astype(jnp.float32), BIAS)
    targets_RxL, asked_RxL = (jax.sharding.reshard(x, ROWS) for x in (targets_RxL, asked_RxL))
    return _cross_entropy(states_RxLxD, table_VxD, bias_V, targets_RxL, asked_RxL, words)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _cross_entropy(
    states: jax.Array, table: jax.Array, bias: jax.Array, targets: jax.Array, asked: jax.Array, words: Words
) -> tuple[jax.Array, jax.Array]:
    return _forward(states, table, bias, targets, asked, words)[0]


def _forward(*arguments: Any) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    *arrays, words = arguments
    local = jax.shard_map(
        functools.partial(_local_forward, words=words),
        in_specs=(STATES, TABLE, BIAS, ROWS, ROWS),
        out_specs=(ROWS, ROWS, ROWS),
        check_vma=False,  # how often the loops turn varies from device to device
    )
    losses, right, lse = local(*arrays)
    return (losses, right), (*arrays, lse)


def _backward(words: Words, saved: tuple, cotangents: tuple[jax.Array, Any]) -> tuple:
    local = jax.shard_map(
        functools.partial(_local_backward, words=words),
        in_specs=(STATES, TABLE, BIAS, ROWS, ROWS, ROWS, ROWS),
        out_specs=(STATES, TABLE, BIAS),
        check_vma=False,
    )
    return (*local(*saved, jax.sharding.reshard(cotangents[0], ROWS)), None, None)


_cross_entropy.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """One device's tokens, those that are asked first, and its words, both in tiles."""

    order_T: jax.Array  # places of the tokens; T is a multiple of a tile's, places beyond the tokens are the last one's
    n_asked: jax.Array
    size: int
    n_words: int
    words: Words

    @classmethod
    def of(cls, asked_T: jax.Array, table: jax.Array, words: Words) -> "_Tiles":
        n = asked_T.shape[0]
        size = min(TOKENS_ON_CPU if platform() == "cpu" else TOKENS, n)
        order = jnp.argsort(~asked_T, stable=True)
        order = jnp.pad(order, (0, -n % size), mode="edge")
        return cls(order, asked_T.sum(), size, table.shape[0], words)

    def each(self, of_tokens: Callable[[jax.Array, tuple], tuple], start: tuple) -> tuple:
        """Folds over the tiles that hold tokens that are asked.

        The loop is as long as all tokens need, so that programs compiled ahead know its length; the tiles behind the
        last token that is asked are passed over.
        """

        def of_tile(i: jax.Array, carry: tuple) -> tuple:
            return jax.lax.cond(i * self.size < self.n_asked, of_tokens, lambda i, carry: carry, i, carry)

        return jax.lax.fori_loop(0, len(self.order_T) // self.size, of_tile, start)

    def tokens(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the places of tile i's tokens, and which of them are asked."""
        first = i * self.size
        places = jax.lax.dynamic_slice_in_dim(self.order_T, first, self.size)
        return places, first + jnp.arange(self.size) < self.n_asked

    def scores(
        self, states: jax.Array, table: jax.Array, bias: jax.Array, j: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns some states' scores of word tile j [A, W], the place of its first word, and its part of the table."""
        width = self.width
        # The last tile begins early enough to be whole; words that were in the tile before it count as none.
        first = jnp.minimum(j * width, self.n_words - width)
        part = jax.lax.dynamic_slice_in_dim(table, first, width)
        scores = jax.lax.dot_general(states, part, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scores += jax.lax.dynamic_slice_in_dim(bias, first, width)
        if self.words.softcap:
            scores = self.words.softcap * jnp.tanh(scores / self.words.softcap)
        number = first + jnp.arange(width)
        real = (number >= j * width) & (self.offset + number < self.words.count)
        return jnp.where(real, scores, _LOWEST), first, part

    @property
    def width(self) -> int:
        """Words in a tile."""
        return min(self.words.tile, self.n_words)

    @property
    def word_tiles(self) -> int:
        """Tiles of this device's words."""
        return math.ceil(self.n_words / self.width)

    @property
    def offset(self) -> jax.Array:
        """The number of this device's first word."""
        return jax.lax.axis_index("tensor") * self.n_words


def _local_forward(
    states: jax.Array, table: jax.Array, bias: jax.Array, targets: jax.Array, asked: jax.Array, words: Words
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One device's losses [R, L], whether the right word is the highest, and the log-sum-exp."""
    shape, flat = asked.shape, asked.reshape(-1)
    tiles = _Tiles.of(flat, table, words)
    states_TxD, targets_T = states.reshape(flat.size, -1), targets.reshape(-1) - tiles.offset

    def of_tokens(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        places, _ = tiles.tokens(i)
        hidden, target = states_TxD[places], targets_T[places]

        def of_words(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest, total, score, best = carry
            scores, first, _ = tiles.scores(hidden, table, bias, j)
            new = jnp.maximum(highest, scores.max(1))
            total = total * jnp.exp(highest - new) + jnp.exp(scores - new[:, None]).sum(1)
            here = (target >= first) & (target < first + tiles.width)
            own = jnp.take_along_axis(scores, jnp.clip(target - first, 0, tiles.width - 1)[:, None], 1)[:, 0]
            # A word in both of the last two tiles counts once: in the second it is none.
            score = jnp.where(here & (own > _LOWEST), own, score)
            best = jnp.where(scores.max(1) > highest, first + scores.argmax(1), best)
            return new, total, score, best

        lowest = jnp.full(tiles.size, _LOWEST, jnp.float32)
        start = lowest, jnp.zeros(tiles.size, jnp.float32), lowest, jnp.full(tiles.size, -1)
        values = jax.lax.fori_loop(0, tiles.word_tiles, of_words, start)
        return tuple(x.at[places].set(value) for x, value in zip(found, values))

    lowest = jnp.full(flat.size, _LOWEST, jnp.float32)
    start = lowest, jnp.ones(flat.size, jnp.float32), lowest, jnp.full(flat.size, -1)
    highest, total, score, best = tiles.each(of_tokens, start)
    overall = jax.lax.pmax(highest, "tensor")
    total = jax.lax.psum(total * jnp.exp(highest - overall), "tensor")
    lse = overall + jnp.log(total)
    losses = jnp.where(flat, lse - jax.lax.pmax(score, "tensor"), 0)
    is_best = jax.lax.pmax(((highest == overall) & (best == targets_T)).astype(jnp.int32), "tensor") > 0
    return losses.reshape(shape), (is_best & flat).reshape(shape), lse.reshape(shape)


def _local_backward(
    states: jax.Array,
    table: jax.Array,
    bias: jax.Array,
    targets: jax.Array,
    asked: jax.Array,
    lse: jax.Array,
    cotangent: jax.Array,
    words: Words,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of one device's states; of its words, summed over the devices that have these."""
    flat = asked.reshape(-1)
    tiles = _Tiles.of(flat, table, words)
    states_TxD, targets_T = states.reshape(flat.size, -1), targets.reshape(-1) - tiles.offset
    lse_T, cotangent_T = lse.reshape(-1), cotangent.reshape(-1)

    def of_tokens(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        places, real = tiles.tokens(i)
        hidden, target = states_TxD[places], targets_T[places]
        weight = jnp.where(real, cotangent_T[places], 0)

        def of_words(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            of_hidden, of_table, of_bias = carry
            scores, first, part = tiles.scores(hidden, table, bias, j)
            is_target = first + jnp.arange(tiles.width) == target[:, None]
            slope = weight[:, None] * (jnp.exp(scores - lse_T[places][:, None]) - is_target)
            if words.softcap:
                slope *= 1 - jnp.square(scores / words.softcap)
            slope = jnp.where(scores > _LOWEST, slope, 0)
            rounded = slope.astype(hidden.dtype)
            of_hidden += jnp.dot(rounded, part, preferred_element_type=jnp.float32)
            added = jnp.dot(rounded.T, hidden, preferred_element_type=jnp.float32)
            return of_hidden, _add(of_table, added, first), _add(of_bias, slope.sum(0), first)

        of_states, of_table, of_bias = sums
        start = jnp.zeros(hidden.shape, jnp.float32), of_table, of_bias
        of_hidden, of_table, of_bias = jax.lax.fori_loop(0, tiles.word_tiles, of_words, start)
        # Places behind the last token that is asked may be there twice; what is added for them is 0.
        return of_states.at[places].add(of_hidden), of_table, of_bias

    start = jnp.zeros(states_TxD.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32), jnp.zeros_like(bias)
    of_states, of_table, of_bias = tiles.each(of_tokens, start)
    of_states = jax.lax.psum(of_states, "tensor").astype(states.dtype).reshape(states.shape)
    of_table, of_bias = (jax.lax.psum(x, _SPREAD) for x in (of_table, of_bias))
    return of_states, of_table.astype(table.dtype), of_bias


def _add(to: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
    """Adds a tile's part, from place `first` on."""
    own = jax.lax.dynamic_slice_in_dim(to, first, part.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(to, own + part, first, 0)
