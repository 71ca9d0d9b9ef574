"""The engine under all losses that compare every text with every other: in tiles, over all devices' texts.

A row (a query, say) is scored against the columns (documents, say) of all devices, and its scores are reduced to one
number (`reductions.py`), a log-sum-exp for InfoNCE. Rows and columns stay on their shards. Tiles of the similarity
matrix come and go, so B x B never exists; the backward pass computes them anew, as in Inf-CL (Cheng et al. 2024,
arXiv:2410.17243). There are two ways to meet the columns of other devices: `gather` collects them all, `ring` passes
blocks of them round, one hop ahead of the products, and their gradients with them, so that memory does not grow with
the number of devices.

The custom VJP wraps the `shard_map`s and does not sit inside one: with `check_vma=False` inside, gradients of
replicated inputs such as the temperature would silently come out multiplied by the number of devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxembed.losses.embedded import EXACT
from jaxembed.losses.negatives import FILL, Identities, Rule, candidates
from jaxembed.losses.reductions import MASKED, LogSumExp, Reduction, State
from jaxembed.losses.ring import ring

GATHER_BYTES = 2**28  # up to here all columns and their gradient are collected on each device; beyond, the ring


@dataclasses.dataclass(frozen=True)
class Method:
    """How to compute; changes no result but for rounding.

    Attributes:
      axes: mesh axes that rows and columns are sharded over; () for one device.
      exchange: 'gather' | 'ring' | 'auto', by the memory that gathering would take.
      precision: of the products' factors: 'float32' | 'bfloat16'; sums are float32.
      tile: edge of a tile.
    """

    axes: tuple[str, ...] = ()
    exchange: str = "auto"
    precision: str = "float32"
    tile: int = 2048


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Which scores are reduced, and how.

    Attributes:
      rule: which columns count.
      reduction: what a row's scores become.
      hardness: added to the scale of chosen columns, as a weight exp(hardness · similarity) without gradient.
      hardness_of: 'own' hard negatives, others, 'in_batch', or 'all'.
    """

    rule: Rule
    reduction: Reduction
    hardness: float = 0.0
    hardness_of: str = "all"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """Rows or columns, arrays sharded over the method's axes.

    Attributes:
      vectors: float32 [n, E].
      identities: what they are.
      guide: float32 [n, F], a guide's vectors of them, or None; without gradient.
      ceiling: rows only: float32 [n], more similar columns are left out as false negatives; None for no such rule.
        Similarities of the guide decide, where there is one.
      offset: rows only: float32 [n], taken off the row's similarities; without gradient. With the positive's similarity
        as the offset, the gradient of the scale is a sum of small numbers, not the difference of two large ones.
    """

    vectors: jax.Array
    identities: Identities
    guide: jax.Array | None = None
    ceiling: jax.Array | None = None
    offset: jax.Array | None = None


def reduce_scores(
    rows: Side,
    columns: Side,
    scoring: Scoring,
    method: Method,
    scale: jax.Array,
    bias: jax.Array | float = 0.0,
    guide_scale: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Reduces each row's scores, scale · (similarity - offset) + bias, over the columns that count.

    Args:
      rows: n of them.
      columns: m of them.
      scoring: which scores, and how they are reduced.
      method: how to compute.
      scale: float32 scalar, 1 / temperature.
      bias: float32 scalar, added to the scores.
      guide_scale: float32 scalar, of the guide's scores, for reductions that take them.

    Returns:
      float32 [n], the reduced scores, and float32 [n], the highest similarity among them (MASKED without any), which
      carries no gradient. Differentiable in both sides' vectors, scale and bias.
    """
    engine = _Engine(scoring, _resolved(method, columns), rows.vectors.shape[1])
    scalars = tuple(jnp.asarray(x, jnp.float32) for x in (scale, bias, guide_scale))
    rest = tuple(jax.lax.stop_gradient(dataclasses.replace(side, vectors=None)) for side in (rows, columns))
    return _reduce(engine, rows.vectors, columns.vectors, *scalars, *rest)


def _resolved(method: Method, columns: Side) -> Method:
    if method.exchange != "auto":
        return method
    guide = 0 if columns.guide is None else columns.guide.shape[1]
    numbers = columns.vectors.shape[0] * (columns.vectors.shape[1] + guide)
    gradient = columns.vectors.size * 4  # always float32
    gathered = numbers * jnp.dtype(method.precision).itemsize + gradient
    return dataclasses.replace(method, exchange="gather" if gathered <= GATHER_BYTES else "ring")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduce(engine: "_Engine", *args: Any) -> tuple[jax.Array, jax.Array]:
    return engine.forward(*args)[:2]


def _reduce_fwd(engine: "_Engine", *args: Any) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    value, highest, residual = engine.forward(*args)
    return (value, highest), (*args, residual)


def _reduce_bwd(engine: "_Engine", saved: tuple, cotangent: tuple[jax.Array, jax.Array]) -> tuple:
    return (*engine.backward(*saved, cotangent[0]), None, None, None)


_reduce.defvjp(_reduce_fwd, _reduce_bwd)


@dataclasses.dataclass(frozen=True)
class _Engine:
    """One comparison's static part, and its two passes."""

    scoring: Scoring
    method: Method
    width: int

    def forward(
        self,
        rows: jax.Array,
        columns: jax.Array,
        scale: jax.Array,
        bias: jax.Array,
        guide_scale: jax.Array,
        row_rest: Side,
        column_rest: Side,
    ) -> tuple[jax.Array, jax.Array, tuple]:
        by_row = P(self.method.axes)
        return self._on_shards(self._forward, 2, (by_row, by_row, by_row))(
            self._side(row_rest, rows), self._side(column_rest, columns), scale, bias, guide_scale
        )

    def backward(
        self,
        rows: jax.Array,
        columns: jax.Array,
        scale: jax.Array,
        bias: jax.Array,
        guide_scale: jax.Array,
        row_rest: Side,
        column_rest: Side,
        residual: tuple,
        cotangent: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        by_row = P(self.method.axes)
        sides = self._side(row_rest, rows), self._side(column_rest, columns)
        return self._on_shards(self._backward, 4, (by_row, by_row, P(), P()))(
            *sides, residual, cotangent, scale, bias, guide_scale
        )

    def _side(self, rest: Side, vectors: jax.Array) -> Side:
        """Joins a side's vectors with the rest of it, in the precision of the products."""
        dtype = jnp.dtype(self.method.precision)
        guide = None if rest.guide is None else rest.guide.astype(dtype)
        return dataclasses.replace(rest, vectors=vectors.astype(dtype), guide=guide)

    def _on_shards(self, f: Callable, n_sharded: int, out_specs: tuple) -> Callable:
        """Maps f over the shards: `n_sharded` arguments by row, then three scalars."""
        if not self.method.axes:
            return f
        return jax.shard_map(f, in_specs=(*(P(self.method.axes),) * n_sharded, *(P(),) * 3), out_specs=out_specs)

    def _forward(
        self, rows: Side, columns: Side, scale: jax.Array, bias: jax.Array, guide_scale: jax.Array
    ) -> tuple[jax.Array, jax.Array, tuple]:
        n = rows.vectors.shape[0]
        reduction = self.scoring.reduction
        row_tiles = _tiles(rows, self.method.tile)

        def visit(states: State, block: Side) -> State:
            column_tiles = _tiles(block, self.method.tile)

            def one_row_tile(row_and_state: tuple[Side, State]) -> State:
                row, state = row_and_state

                def one_column_tile(state: State, column: Side) -> tuple[State, None]:
                    similarity, scores, guide, wanted = self._compare(row, column, scale, bias, guide_scale)
                    inner, highest = state
                    inner = reduction.add(inner, scores, wanted, guide)
                    return (inner, self._highest(highest, similarity, wanted)), None

                return jax.lax.scan(one_column_tile, state, column_tiles)[0]

            return jax.lax.map(one_row_tile, (row_tiles, states))

        n_tiles, size = row_tiles.vectors.shape[:2]
        start = (reduction.start(n_tiles * size), jnp.full(n_tiles * size, MASKED))
        start = jax.tree.map(lambda x: x.reshape(n_tiles, size), start)
        states = self._tour(visit, self._varying(start), columns)
        inner, highest = jax.tree.map(lambda x: x.reshape(-1)[:n], states)
        value, residual = reduction.finish(inner)
        if not self._tracks_highest:
            highest = jnp.where(inner[0] > MASKED / 2, (inner[0] - bias) / scale, MASKED)
        return value, highest if rows.offset is None else highest + rows.offset, residual

    def _backward(
        self,
        rows: Side,
        columns: Side,
        residual: tuple,
        cotangent: jax.Array,
        scale: jax.Array,
        bias: jax.Array,
        guide_scale: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        n = rows.vectors.shape[0]
        row_tiles = _tiles(rows, self.method.tile)
        of_rows = _tiles((residual, cotangent), self.method.tile)
        n_tiles, size = row_tiles.vectors.shape[:2]

        def visit(sums: tuple, block: Side) -> tuple[tuple, jax.Array]:
            """Adds what a block gives to the gradients of rows, scale and bias; returns its own."""
            m = block.vectors.shape[0]
            column_tiles = _tiles(block, self.method.tile)

            def one_tile(carry: tuple, place: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
                (d_rows, d_scale, d_bias), d_columns = carry
                i, j = place
                row, (row_residual, row_cotangent) = _at(row_tiles, i), _at(of_rows, i)
                column = _at(column_tiles, j)
                similarity, scores, guide, wanted = self._compare(row, column, scale, bias, guide_scale)
                slope = self.scoring.reduction.slope(row_residual, scores, wanted, guide)
                d_scores = slope * row_cotangent[:, None]
                factor = (scale * d_scores).astype(row.vectors.dtype)
                d_rows = d_rows.at[i].add(_dot(factor, column.vectors))
                d_columns = d_columns.at[j].add(_dot(factor.T, row.vectors))
                sums = (d_rows, d_scale + (d_scores * similarity).sum(), d_bias + d_scores.sum())
                return (sums, d_columns), None

            n_columns = column_tiles.vectors.shape[0]
            places = jnp.divmod(jnp.arange(n_tiles * n_columns), n_columns)
            start = self._varying(jnp.zeros(column_tiles.vectors.shape))
            (sums, d_columns), _ = jax.lax.scan(one_tile, (sums, start), places)
            return sums, d_columns.reshape(-1, self.width)[:m]

        start = self._varying((jnp.zeros((n_tiles, size, self.width)), jnp.zeros(()), jnp.zeros(())))
        (d_rows, d_scale, d_bias), d_columns = self._tour_and_return(visit, start, columns)
        return d_rows.reshape(-1, self.width)[:n], d_columns, self._sum(d_scale), self._sum(d_bias)

    def _compare(
        self, row: Side, column: Side, scale: jax.Array, bias: jax.Array, guide_scale: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
        """Returns a tile's similarities less the offset, scores, the guide's scores, and which count; all [n, m]."""
        similarity = _dot(row.vectors, column.vectors.T)
        guide = None if row.guide is None else _dot(row.guide, column.guide.T)
        wanted = candidates(self.scoring.rule, row.identities, column.identities)
        if row.ceiling is not None:
            wanted &= (similarity if guide is None else guide) <= row.ceiling[:, None]
        above = similarity if row.offset is None else similarity - row.offset[:, None]
        scores = scale * above + bias
        if self.scoring.hardness:
            own = row.identities.pair[:, None] == column.identities.pair
            chosen = {"own": own, "in_batch": ~own, "all": True}[self.scoring.hardness_of]
            scores += jnp.where(chosen, self.scoring.hardness * similarity, 0)
        return above, scores, None if guide is None else guide_scale * guide, wanted

    @property
    def _tracks_highest(self) -> bool:
        """Whether the highest similarity is looked for; a plain log-sum-exp knows it already."""
        return bool(self.scoring.hardness) or not isinstance(self.scoring.reduction, LogSumExp)

    def _highest(self, highest: jax.Array, similarity: jax.Array, wanted: jax.Array) -> jax.Array:
        if not self._tracks_highest:
            return highest
        return jnp.maximum(highest, jnp.where(wanted, similarity, MASKED).max(1))

    def _tour(self, visit: Callable[[Any, Side], Any], carry: Any, columns: Side) -> Any:
        """Visits the columns of all devices: at once, or block by block while the next one is on its way."""
        if self._gathers:
            return visit(carry, self._gather(columns))

        def hop(carry_and_block: tuple[Any, Side], _: None) -> tuple[tuple[Any, Side], None]:
            carry, block = carry_and_block
            coming = self._pass_on(block)  # first, so that it travels while the products are computed
            return (visit(carry, block), coming), None

        (carry, block), _ = jax.lax.scan(hop, (carry, columns), length=self._n_devices - 1)
        return visit(carry, block)

    def _tour_and_return(
        self, visit: Callable[[Any, Side], tuple[Any, jax.Array]], carry: Any, columns: Side
    ) -> tuple[Any, jax.Array]:
        """Visits the columns of all devices, and brings what each visit gives for its block to the block's home."""
        if self._gathers:
            carry, given = visit(carry, self._gather(columns))
            axes = self.method.axes
            return carry, jax.lax.psum_scatter(given, axes, tiled=True) if axes else given

        def hop(state: tuple[Any, Side, jax.Array], _: None) -> tuple[tuple[Any, Side, jax.Array], None]:
            carry, block, collected = state  # collected: of the block before, which is a device further on
            coming, collected = self._pass_on(block), self._pass_on(collected)
            carry, given = visit(carry, block)
            return (carry, coming, collected + given), None

        start = self._varying(jnp.zeros(columns.vectors.shape))
        (carry, block, collected), _ = jax.lax.scan(hop, (carry, columns, start), length=self._n_devices - 1)
        collected = self._pass_on(collected)
        carry, given = visit(carry, block)
        return carry, self._pass_on(collected + given)

    @property
    def _gathers(self) -> bool:
        return self.method.exchange == "gather" or not self.method.axes

    @property
    def _n_devices(self) -> int:
        mesh = jax.sharding.get_abstract_mesh()
        return math.prod(mesh.shape[axis] for axis in self.method.axes)

    def _gather(self, tree: Any) -> Any:
        axes = self.method.axes
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), tree) if axes else tree

    def _pass_on(self, tree: Any) -> Any:
        """Hands arrays to the next device of the ring.

        Identities travel as one: a TPU has few such transfers under way at once, and more would hold up the vectors.
        """
        mesh = jax.sharding.get_abstract_mesh()
        order = ring(tuple(mesh.shape[axis] for axis in self.method.axes))
        hops = list(zip(order, (*order[1:], order[0])))

        def hand(x: Any) -> Any:
            numbers, restore = jax.flatten_util.ravel_pytree(x) if isinstance(x, Identities) else (x, lambda x: x)
            return restore(jax.lax.ppermute(numbers, self.method.axes, hops))

        return jax.tree.map(hand, tree, is_leaf=lambda x: isinstance(x, Identities))

    def _sum(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, self.method.axes) if self.method.axes else x

    def _varying(self, tree: Any) -> Any:
        """Says of constants, which start a loop's carry, that they differ between shards, as what is added will."""
        axes = self.method.axes
        return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree) if axes else tree


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies matrices, summing in float32: exactly for float32 factors, whatever a device's default is."""
    return jnp.dot(a, b, precision=EXACT, preferred_element_type=jnp.float32)


def _at(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _tiles(tree: Any, tile: int) -> Any:
    """Cuts arrays of equal length n into [n_tiles, size, ...], the last tile filled up with empty slots."""
    n = jax.tree.leaves(tree)[0].shape[0]
    count = max(1, -(-n // tile))
    size = -(-n // count)

    def cut(x: jax.Array, fill: float = 0) -> jax.Array:
        if count * size > n:
            widths = [(0, count * size - n)] + [(0, 0)] * (x.ndim - 1)
            x = jnp.pad(x, widths, constant_values=fill)
        return x.reshape(count, size, *x.shape[1:])

    def cut_any(x: Any) -> Any:
        return jax.tree.map(cut, x, FILL) if isinstance(x, Identities) else cut(x)

    return jax.tree.map(cut_any, tree, is_leaf=lambda x: isinstance(x, Identities))
