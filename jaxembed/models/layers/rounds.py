"""Items to the devices that hold their experts, and what becomes of them back, in rounds of bounded size.

With static shapes, moving all items at once would take room for all of them at every destination. So a device sends
each destination a little more than a balanced share at a time, and all devices take as many rounds as the fullest
needs. Imbalance costs time, never memory, and never an item.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxembed.models.layers.blocks import evenly
from jaxembed.sharding import AXES

Rows = tuple[jax.Array, ...]  # arrays [N, …]
# From items sorted by the device's own experts, and how many each of these has, to outputs and what is summed: a tree.
Compute = Callable[[Rows, jax.Array], tuple[Rows, Any]]


def exchange(
    compute: Compute,
    items: Rows,
    sizes_X: jax.Array,
    outputs: Rows,
    sums: Any,
    capacity: float,
) -> tuple[Rows, Any]:
    """Computes items where their experts lie; called inside a `shard_map` over all of the mesh.

    Args:
      compute: what a device does with the items that came.
      items: arrays [N, …] sorted by expert; what lies beyond the sum of the sizes is void.
      sizes_X: int32, of all experts; a device has X / n of them, in the order of the mesh's axis `expert`.
      outputs: zeros of the outputs' shapes and dtypes, [N, …].
      sums: zeros of the sums' shapes.
      capacity: what a device sends to another in one round, as a multiple of N / n.

    Returns:
      The outputs, 0 where void, and the sums over all rounds.
    """
    n = jax.lax.axis_size("expert")
    n_items, n_own = len(items[0]), len(sizes_X) // n
    room = min(-int(-capacity * n_items // n), n_items)  # C, items to one destination in a round
    ends_X = jnp.cumsum(sizes_X)
    counts_n = sizes_X.reshape(n, n_own).sum(1)
    starts_n = ends_X.reshape(n, n_own)[:, -1] - counts_n
    n_rounds = jax.lax.pmax(-(-counts_n.max() // room), AXES)
    # Where each item travels: the round, and its slot among the n C of it.
    expert_N = jnp.searchsorted(ends_X, jnp.arange(n_items), side="right")
    to_N = jnp.minimum(expert_N // n_own, n - 1)
    rank_N = jnp.arange(n_items) - starts_n[to_N]
    round_N = jnp.where(expert_N < len(sizes_X), rank_N // room, -1)
    slot_N = to_N * room + rank_N % room

    def one_round(state: tuple[jax.Array, Rows, Any]) -> tuple[jax.Array, Rows, Any]:
        number, outputs, sums = state
        rank_nxC = number * room + jnp.arange(room)[None]
        item_nxC = jnp.minimum(starts_n[:, None] + rank_nxC, n_items - 1)
        own_nxC = jnp.where(rank_nxC < counts_n[:, None], expert_N[item_nxC] % n_own, n_own)
        came = jax.tree.map(lambda x: _swap(x[item_nxC]), items)
        # What came is sorted from each device: it is brought together by expert, void slots last.
        own_M, order_M = jax.lax.sort((_swap(own_nxC).reshape(-1), jnp.arange(n * room)), num_keys=1)
        ends = jnp.searchsorted(own_M, jnp.arange(n_own), side="right").astype(jnp.int32)
        made, more = compute(tuple(x.reshape(n * room, *x.shape[2:])[order_M] for x in came), jnp.diff(ends, prepend=0))
        place_M = inverse(order_M)
        back = (_swap(x[place_M].reshape(n, room, *x.shape[1:])) for x in made)
        here = round_N == number
        outputs = tuple(
            jnp.where(here.reshape(-1, *[1] * (old.ndim - 1)), x.reshape(n * room, *x.shape[2:])[slot_N], old)
            for old, x in zip(outputs, back)
        )
        return number + 1, outputs, jax.tree.map(jnp.add, sums, more)

    state = jnp.int32(0), outputs, sums
    with evenly(1):
        return jax.lax.while_loop(lambda state: state[0] < n_rounds, one_round, state)[1:]


def inverse(order: jax.Array) -> jax.Array:
    """Returns the inverse of a permutation."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)


def _swap(x_nxC: jax.Array) -> jax.Array:
    """Sends the i-th row to the i-th device of `expert`; returns what these sent here, in their order."""
    return jax.lax.all_to_all(x_nxC, "expert", 0, 0)
