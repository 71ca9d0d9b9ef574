"""A walk over items that are sorted by expert, in blocks of consecutive items of one expert.

Of the two walks, one has a loop as long as the data say, which a CPU does not mind. A GPU waits for the host at each
turn of such a loop, so the other takes as many blocks as there can be, some of them void.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp

HEIGHTS = (512, 64)  # items in a block, by data: as many high blocks as an expert's items fill, low ones for the rest
LOWEST, HIGHEST = 64, 2048  # items in a block, by shapes

Rows = tuple[jax.Array, ...]  # arrays [N, …]


@dataclasses.dataclass(frozen=True)
class Walk:
    """What is done with items, all of them zero where there is nothing yet.

    Attributes:
      compute: (an expert's own weights, *a block of the inputs) → (the outputs there, what is added to the expert's
        sums: a tree).
      inputs: [N, …].
      outputs: zeros [N, …].
      sums: zeros, a tree of [X, …].
      weights: a tree of [X, …].
    """

    compute: Callable[..., tuple[Rows, Any]]
    inputs: Rows
    outputs: Rows
    sums: Any
    weights: Any

    def by_data(self, sizes_X: jax.Array) -> tuple[Rows, Any]:
        """Walks through the blocks that there are; returns outputs and sums."""
        n_items = len(self.inputs[0])
        heights = HEIGHTS if n_items >= HEIGHTS[0] else HEIGHTS[-1:]
        inputs = _with_slack(self.inputs, heights[0])
        ends = jnp.cumsum(sizes_X)

        def one_expert(expert: jax.Array, carry: tuple[Rows, Any]) -> tuple[Rows, Any]:
            outputs, all_sums = carry
            block = functools.partial(self._block, inputs, _at(self.weights, expert), ends[expert])
            start = ends[expert] - sizes_X[expert]
            share = n_items // len(sizes_X)
            sums = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), all_sums)
            for height in heights:
                n_blocks, if_even = (
                    -(-n // height) if height == heights[-1] else n // height for n in (ends[expert] - start, share)
                )

                def one_block(
                    i: jax.Array, carry: tuple[Rows, Any], height: int = height, start: jax.Array = start
                ) -> tuple[Rows, Any]:
                    return block(start + i * height, height, *carry)

                with evenly(if_even):
                    outputs, sums = jax.lax.fori_loop(0, n_blocks, one_block, (outputs, sums))
                start += n_blocks * height
                share -= if_even * height
            return outputs, _put(all_sums, expert, sums)

        start = _with_slack(self.outputs, heights[0]), self.sums
        outputs, sums = jax.lax.fori_loop(0, len(sizes_X), one_expert, start)
        return tuple(x[:n_items] for x in outputs), sums

    def by_shape(self, sizes_X: jax.Array) -> tuple[Rows, Any]:
        """Walks through as many blocks as there can be, of which no more than about a fifth are void."""
        n_items, n_experts = len(self.inputs[0]), len(sizes_X)
        height = 2 ** math.floor(math.log2(max(n_items / (4 * n_experts), 1)))
        height = min(max(height, LOWEST), HIGHEST)
        inputs = _with_slack(self.inputs, height)
        ends = jnp.cumsum(sizes_X)
        blocks_X = -(-sizes_X // height)
        last_X = jnp.cumsum(blocks_X)
        number_B = jnp.arange(n_items // height + n_experts)
        expert_B = jnp.minimum((number_B[:, None] >= last_X).sum(1), n_experts - 1)
        start_B = (ends - sizes_X)[expert_B] + (number_B - (last_X - blocks_X)[expert_B]) * height
        start_B = jnp.where(number_B < last_X[-1], start_B, n_items)  # void blocks lie behind all items

        def one_block(i: jax.Array, carry: tuple[Rows, Any]) -> tuple[Rows, Any]:
            outputs, all_sums = carry
            expert = expert_B[i]
            here = _at(self.weights, expert), ends[expert], start_B[i], height
            outputs, sums = self._block(inputs, *here, outputs, _at(all_sums, expert))
            return outputs, _put(all_sums, expert, sums)

        start = _with_slack(self.outputs, height), self.sums
        outputs, sums = jax.lax.fori_loop(0, len(number_B), one_block, start)
        return tuple(x[:n_items] for x in outputs), sums

    def _block(
        self,
        inputs: Rows,
        weights: Any,
        end: jax.Array,
        start: jax.Array,
        height: int,
        outputs: Rows,
        sums: Any,
    ) -> tuple[Rows, Any]:
        """Computes items from `start` on, no further than to their expert's `end`; returns outputs and sums.

        What stands in the outputs beyond is written by blocks to come.
        """
        here = (zero_from(jax.lax.dynamic_slice_in_dim(x, start, height), end - start) for x in inputs)
        made, more = self.compute(weights, *here)
        outputs = tuple(
            jax.lax.dynamic_update_slice_in_dim(x, zero_from(new, end - start).astype(x.dtype), start, 0)
            for x, new in zip(outputs, made)
        )
        return outputs, jax.tree.map(jnp.add, sums, more)


def evenly(turns: int) -> AbstractContextManager[None]:
    """Says how many turns the one loop in the context takes where items spread evenly over experts.

    The data alone say how many it takes. This is for who reads the compiled program (`jaxembed.planning.hlo`).
    """
    return jax.named_scope(f"evenly_{turns}")


def zero_from(x: jax.Array, length: jax.Array) -> jax.Array:
    """Returns rows with 0 from the `length`-th on."""
    real = jnp.arange(len(x)) < length
    return jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def _with_slack(rows: Rows, height: int) -> Rows:
    """Appends what a block may reach beyond the last item."""
    return tuple(jnp.pad(x, [(0, height)] + [(0, 0)] * (x.ndim - 1)) for x in rows)


def _at(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: Any, i: jax.Array, new: Any) -> Any:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), tree, new)
