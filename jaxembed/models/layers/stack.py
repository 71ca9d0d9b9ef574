"""A stack of equal layers, applied by `lax.scan`.

Layers may differ in kind (what their attention sees): a stack whose kinds repeat is scanned a period at a time, so that
each kind stays static inside the loop. Where there is no one period, the stack falls into a few, one behind the other.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed.models.options import REMAT, ModelOptions, TokenStates

Kind = TypeVar("Kind", bound=Hashable)
States = tuple[jax.Array, tuple[jax.Array, ...]]  # of the layer before, and of the chosen layers so far


def apply_layers(
    layers: nnx.Module,
    x: jax.Array,
    kinds: Sequence[Kind],
    apply: Callable[[jax.Array, nnx.Module, jax.Array, Kind], jax.Array],
    options: ModelOptions,
    chosen: tuple[int, ...] = (),
) -> States:
    """Applies layers one after another.

    Args:
      layers: a layer whose parameters are stacked on axis 0, n of each.
      x: the first layer's input [R, L, D].
      kinds: what is static about each layer, n of them.
      apply: (x, layer, its number, its kind) → x. The number is traced.
      options: what is recomputed in the backward pass, and how far the loop is unrolled.
      chosen: layers whose states are wanted too; 0 is `x`, i the output of the i-th layer.

    Returns:
      The last layer's output [R, L, D], and those of the chosen layers, as they were asked for.
    """
    appliers = {kind: functools.partial(apply, kind=kind) for kind in kinds}
    if options.remat != "none":
        policy = REMAT[options.remat]
        appliers = {kind: jax.checkpoint(f, policy=policy, prevent_cse=False) for kind, f in appliers.items()}

    def body(kinds: Sequence[Kind], carry: States, block: tuple[nnx.Module, jax.Array]) -> tuple[States, None]:
        x, kept = carry
        layers, numbers = block
        for j, kind in enumerate(kinds):
            layer = layers if len(kinds) == 1 else jax.tree.map(lambda leaf, j=j: leaf[j], layers)
            number = numbers if len(kinds) == 1 else numbers[j]
            x = appliers[kind](x, layer, number)
            # Kept as they come: as outputs of the scan the states of all layers would be held. The predicates are
            # scalars, so the backward pass holds nothing large for them.
            kept = tuple(jax.lax.select(number + 1 == i, x, y) for i, y in zip(chosen, kept))
        return (x, kept), None

    carry = (x, (x,) * len(chosen))
    for first, period, repeats in periods(kinds):
        blocks = jax.tree.map(
            lambda leaf, first=first, period=period, repeats=repeats: _blocks(leaf, first, period, repeats),
            (layers, jnp.arange(len(kinds))),
        )
        unroll = min(repeats, -(-options.layers_per_iteration(len(kinds)) // period))
        carry, _ = jax.lax.scan(
            functools.partial(body, kinds[first : first + period]), carry, blocks, length=repeats, unroll=unroll
        )
    return carry


def finished(
    states: States, chosen: tuple[int, ...], n_layers: int, finish: Callable[[jax.Array], jax.Array]
) -> TokenStates:
    """Makes a backbone's output of what `apply_layers` returns.

    Args:
      states: the last layer's states, and those of the chosen layers.
      chosen: which these are.
      n_layers: n, the number of the last layer.
      finish: the backbone's closing norm, or what leaves states as they are.
    """
    last, kept = finish(states[0]), states[1]
    kept = [last if i == n_layers else hidden for i, hidden in zip(chosen, kept)]
    return TokenStates(last, jnp.stack(kept) if chosen else None)


def periods(kinds: Sequence[Hashable]) -> list[tuple[int, int, int]]:
    """Cuts a sequence into runs that repeat: (first, period, repeats) of each, one behind the other.

    From the front, each run is the longest that repeats at all; among equals that of the shortest period.
    """
    runs, first = [], 0
    while first < len(kinds):
        left = kinds[first:]
        best = (1, 1)
        for period in range(1, len(left) // 2 + 1):
            repeats = 1
            while left[repeats * period : (repeats + 1) * period] == left[:period]:
                repeats += 1
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        runs.append((first, *best))
        first += best[0] * best[1]
    return runs


def _blocks(leaf: jax.Array, first: int, period: int, repeats: int) -> jax.Array:
    """[n, …] → [repeats, …], or [repeats, period, …] for a period above 1."""
    if period * repeats < len(leaf):
        leaf = leaf[first : first + period * repeats]
    return leaf if period == 1 else leaf.reshape(repeats, period, *leaf.shape[1:])
