"""What a row's scores against its negatives are reduced to, tile by tile, and how that depends on each score.

A reduction walks over tiles of scores with a state per row, so that a row's scores never exist all at once: an online
log-sum-exp (Milakov & Gimelshein 2018, arXiv:1805.02867), a sum, or an online divergence of two distributions.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: with -inf a row without negatives would give NaN, and 0 * NaN is NaN
_FLOOR = MASKED / 2  # above it is what some negative gave

State = Any  # a tuple of float32 arrays [n]


class Reduction(Protocol):
    """What the engine asks of a reduction."""

    def start(self, n: int) -> State:
        """Returns the state of n rows before the first tile."""

    def add(self, state: State, scores: jax.Array, wanted: jax.Array, guide: jax.Array | None) -> State:
        """Takes in a tile of scores [n, m], those where `wanted` holds, with a guide's scores where there is one."""

    def finish(self, state: State) -> tuple[jax.Array, State]:
        """Returns each row's value [n], and what `slope` needs."""

    def slope(self, residual: State, scores: jax.Array, wanted: jax.Array, guide: jax.Array | None) -> jax.Array:
        """Returns d value / d score [n, m], 0 where not wanted."""


@dataclasses.dataclass(frozen=True)
class LogSumExp:
    """log of the sum of exp(score); MASKED without any."""

    def start(self, n: int) -> State:
        return jnp.full(n, MASKED), jnp.zeros(n)

    def add(self, state: State, scores: jax.Array, wanted: jax.Array, guide: jax.Array | None) -> State:
        top, total = state
        scores = jnp.where(wanted, scores, MASKED)
        new_top = jnp.maximum(top, scores.max(1))
        # Below the floor nothing was wanted yet; measured from there, exp gives 0 and not exp(MASKED - MASKED) = 1.
        level = jnp.maximum(new_top, _FLOOR)
        total = total * jnp.exp(top - level) + jnp.exp(scores - level[:, None]).sum(1)
        return new_top, total

    def finish(self, state: State) -> tuple[jax.Array, State]:
        top, total = state
        value = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), MASKED)
        return value, (jnp.maximum(value, _FLOOR),)

    def slope(self, residual: State, scores: jax.Array, wanted: jax.Array, guide: jax.Array | None) -> jax.Array:
        return jnp.exp(jnp.where(wanted, scores - residual[0][:, None], MASKED))


@dataclasses.dataclass(frozen=True)
class SoftplusSum:
    """The sum of log(1 + exp(score))."""

    def start(self, n: int) -> State:
        return (jnp.zeros(n),)

    def add(self, state: State, scores: jax.Array, wanted: jax.Array, guide: jax.Array | None) -> State:
        return (state[0] + jnp.where(wanted, jax.nn.softplus(scores), 0).sum(1),)

    def finish(self, state: State) -> tuple[jax.Array, State]:
        return state[0], ()

    def slope(self, residual: State, scores: jax.Array, wanted: jax.Array, guide: jax.Array | None) -> jax.Array:
        return jnp.where(wanted, jax.nn.sigmoid(scores), 0)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """KL(softmax(guide) || softmax(score)) over a row's wanted columns; 0 without any. The guide has no gradient."""

    def start(self, n: int) -> State:
        low, zero = jnp.full(n, MASKED), jnp.zeros(n)
        return low, zero, low, zero, zero

    def add(self, state: State, scores: jax.Array, wanted: jax.Array, guide: jax.Array | None) -> State:
        *own, top, total, cross = state
        own = LogSumExp().add(tuple(own), scores, wanted, None)
        new_top, new_total = LogSumExp().add((top, total), guide, wanted, None)
        level = jnp.maximum(new_top, _FLOOR)
        share = jnp.exp(jnp.where(wanted, guide, MASKED) - level[:, None])
        cross = cross * jnp.exp(top - level) + (share * (guide - scores)).sum(1)
        return *own, new_top, new_total, cross

    def finish(self, state: State) -> tuple[jax.Array, State]:
        *own, top, total, cross = state
        (log_sum, (own_level,)), (guide_sum, (guide_level,)) = (
            LogSumExp().finish(pair) for pair in (tuple(own), (top, total))
        )
        value = jnp.where(total > 0, cross / jnp.maximum(total, 1e-30) - guide_sum + log_sum, 0)
        return value, (own_level, guide_level)

    def slope(self, residual: State, scores: jax.Array, wanted: jax.Array, guide: jax.Array | None) -> jax.Array:
        own = jnp.exp(jnp.where(wanted, scores - residual[0][:, None], MASKED))
        return own - jnp.exp(jnp.where(wanted, guide - residual[1][:, None], MASKED))
