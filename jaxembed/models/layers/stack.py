"""A stack of equal layers, applied by `lax.scan`.

Layers may differ in kind (what their attention sees, which feed-forward part they have): a stack whose kinds repeat is
scanned a period at a time, so that each kind stays static inside the loop. Where there is no one period, the stack
falls into a few, one behind the other.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxembed.models.options import REMAT, ModelOptions, TokenStates

Kind = TypeVar("Kind", bound=Hashable)
Kept = tuple[jax.Array, tuple[jax.Array, ...]]  # states of the layer before, and of the chosen layers so far


class Own(Protocol):
    """A kind of layer that has parameters of its own, beside those that all layers have."""

    @property
    def part(self) -> str:
        """The key in `apply_layers`' `parts` of the stack that holds them."""


@dataclasses.dataclass(frozen=True)
class States:
    """What a stack of layers gives.

    Attributes:
      last: the last layer's output [R, L, D].
      chosen: those of the layers asked for, as they were asked for.
      said: what layers say beside their states, stacked on axis 0 in their order; None where none says anything.
    """

    last: jax.Array
    chosen: tuple[jax.Array, ...]
    said: Any


def apply_layers(
    layers: nnx.Module,
    x: jax.Array,
    kinds: Sequence[Kind],
    apply: Callable[..., Any],
    options: ModelOptions,
    chosen: tuple[int, ...] = (),
    parts: Mapping[str, nnx.Module] | None = None,
) -> States:
    """Applies layers one after another.

    Args:
      layers: a layer whose parameters are stacked on axis 0, n of each.
      x: the first layer's input [R, L, D].
      kinds: what is static about each layer, n of them.
      apply: (x, layer, its number, its kind) → x. The number is traced. With `parts`: (x, layer, its number, its own
        part, its kind) → (x, what it says: a tree of arrays, the same for all layers that say anything, or None).
      options: what is recomputed in the backward pass, and how far the loop is unrolled.
      chosen: layers whose states are wanted too; 0 is `x`, i the output of the i-th layer.
      parts: parameters that not all layers have: stacks, each over those layers only whose kind names it, an `Own`.
    """
    appliers = {kind: functools.partial(apply, kind=kind) for kind in kinds}
    if options.remat != "none":
        policy = REMAT[options.remat]
        appliers = {kind: jax.checkpoint(f, policy=policy, prevent_cse=False) for kind, f in appliers.items()}

    def body(kinds: Sequence[Kind], carry: Kept, block: Any) -> tuple[Kept, Any]:
        x, kept = carry
        layers, numbers, own = block
        said = []
        for j, kind in enumerate(kinds):
            layer, number = (layers, numbers) if len(kinds) == 1 else (_pick(layers, j), numbers[j])
            if parts is None:
                x = appliers[kind](x, layer, number)
            else:
                same = [other.part for other in kinds]
                part = own[kind.part]
                part = part if same.count(kind.part) == 1 else _pick(part, same[:j].count(kind.part))
                x, words = appliers[kind](x, layer, number, part)
                said += [] if words is None else [words]
            # Kept as they come: as outputs of the scan the states of all layers would be held. The predicates are
            # scalars, so the backward pass holds nothing large for them.
            kept = tuple(jax.lax.select(number + 1 == i, x, y) for i, y in zip(chosen, kept))
        return (x, kept), jax.tree.map(lambda *each: jnp.stack(each), *said) if said else None

    carry, said = (x, (x,) * len(chosen)), []
    for first, period, repeats in periods(kinds):
        here = kinds[first : first + period]
        blocks = _blocks((layers, jnp.arange(len(kinds))), first, period, repeats)
        own = {}
        for name in dict.fromkeys(kind.part for kind in here) if parts is not None else ():
            of_part = [kind.part == name for kind in kinds]
            own[name] = _blocks(parts[name], sum(of_part[:first]), sum(of_part[first : first + period]), repeats)
        unroll = min(repeats, -(-options.layers_per_iteration(len(kinds)) // period))
        carry, words = jax.lax.scan(functools.partial(body, here), carry, (*blocks, own), length=repeats, unroll=unroll)
        if words is not None:  # [repeats, those of a period that say something, …]
            said.append(jax.tree.map(_merged, words))
    return States(*carry, jax.tree.map(lambda *each: jnp.concatenate(each), *said) if said else None)


def finished(
    states: States, chosen: tuple[int, ...], n_layers: int, finish: Callable[[jax.Array], jax.Array]
) -> TokenStates:
    """Makes a backbone's output of what `apply_layers` returns.

    Args:
      states: the stack's; what layers said is a `Routed`, if anything.
      chosen: which these are.
      n_layers: n, the number of the last layer.
      finish: the backbone's closing norm, or what leaves states as they are.
    """
    last = finish(states.last)
    kept = [last if i == n_layers else hidden for i, hidden in zip(chosen, states.chosen)]
    return TokenStates(last, jnp.stack(kept) if chosen else None, states.said)


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


def _blocks(stack: Any, first: int, period: int, repeats: int) -> Any:
    """Cuts arrays [n, …] to [repeats, …], or [repeats, period, …] for a period above 1, from the `first` on."""

    def cut(leaf: jax.Array) -> jax.Array:
        if period * repeats < len(leaf):
            leaf = leaf[first : first + period * repeats]
        return leaf if period == 1 else leaf.reshape(repeats, period, *leaf.shape[1:])

    return jax.tree.map(cut, stack)


def _pick(stack: Any, j: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[j], stack)


def _merged(leaf: jax.Array) -> jax.Array:
    """[repeats, n, …] → [repeats · n, …], neither of which is sharded."""
    layout = jax.typeof(leaf).sharding.spec
    shape = leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]
    return jax.lax.reshape(leaf, shape, out_sharding=P(*layout[1:]))
