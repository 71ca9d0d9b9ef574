"""The engine under the contrastive losses: masked log-sum-exp over all devices' texts, in tiles.

For every row (a query, say) it returns the log-sum-exp of its scores against its negatives and the scores of its
positives, which is all that InfoNCE and its kin need. The rows and columns stay on their shards; each shard gathers
the columns of all devices and walks over tiles of the similarity matrix with an online log-sum-exp (Milakov &
Gimelshein 2018, arXiv:1805.02867), so B x B never exists. The backward pass computes the scores anew, as in
Inf-CL (Cheng et al. 2024, arXiv:2410.17243).

The custom VJP wraps the `shard_map`s and does not sit inside one: with `check_vma=False` inside, gradients of
replicated inputs such as the temperature would silently come out multiplied by the number of devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxembed.data.batch import HARD_NEGATIVE, NO_GROUP, NO_TEXT, SCOPE_ALL, VOID, Texts
from jaxembed.sharding import AXES, BATCH

MASKED = -1e30  # finite: with -inf a row without negatives would give NaN, and 0 * NaN is NaN
EXACT = jax.lax.Precision.HIGHEST  # float32 scores also where the default is bfloat16 passes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowScores:
    """What a row needs for its loss.

    Attributes:
      negatives: float32 [N], log-sum-exp of scaled scores over the row's negatives, MASKED without any.
      hardest: float32 [N], the highest of those scores; carries no gradient.
      positives: float32 [N, P], the scaled score of positive 0 ... P-1, 0 where there is none.
      found: float32 [N, P], 1 where there is one; carries no gradient.
    """

    negatives: jax.Array
    hardest: jax.Array
    positives: jax.Array
    found: jax.Array


def loss_axes(*counts: int) -> tuple[str, ...]:
    """Returns the mesh axes that texts are spread over for the loss: all of size > 1, as far as they divide `counts`.

    The batch axes always divide them. Spreading over tensor and sequence too keeps those from repeating the work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = list(BATCH)
    for axis in AXES:
        size = math.prod(mesh.shape[a] for a in axes) * mesh.shape[axis]
        if axis not in axes and all(count % size == 0 for count in counts):
            axes.append(axis)
    return tuple(axes)


def row_scores(
    rows_NxE: jax.Array,
    columns_MxE: jax.Array,
    row_texts: Texts,
    column_texts: Texts,
    scale: jax.Array,
    n_positives: int,
    tile: int = 2048,
) -> RowScores:
    """Scores every row against the columns of all devices.

    A column is a row's negative if both are real and it is the pair's own hard negative, or it belongs to another pair,
    lies in the row's scope (same source, unless the source says otherwise) and shares no group; and never if its
    text equals the row's, or one of the row's partners, or the row is a known partner of it.

    Args:
      rows_NxE: float32 vectors, sharded over the batch axes.
      columns_MxE: the vectors they are compared with, likewise.
      row_texts: what the rows are, N entries in the same order.
      column_texts: what the columns are, M entries.
      scale: scalar that dot products are multiplied by, 1 / temperature.
      n_positives: P, the most positives of a row among the columns.
      tile: edge of the tiles, per device.

    Returns:
      `RowScores`, arrays sharded over `loss_axes(N, M)`. Differentiable in rows, columns and scale.
    """
    axes = loss_axes(rows_NxE.shape[0], columns_MxE.shape[0])
    spread = lambda x: jax.sharding.reshard(x, P(axes, *(None,) * (x.ndim - 1)))  # noqa: E731
    rows_NxE, columns_MxE, row_texts, column_texts = jax.tree.map(
        spread, (rows_NxE, columns_MxE, row_texts, column_texts)
    )
    engine = _Engine(axes, n_positives, tile)
    return _row_scores(engine, rows_NxE, columns_MxE, scale, row_texts, column_texts)


@dataclasses.dataclass(frozen=True)
class _Engine:
    """The static part: mesh axes, positives per row, tile edge."""

    axes: tuple[str, ...]
    n_positives: int
    tile: int

    def _shard_map(self, f: Callable, n_sharded: int, n_outputs: tuple[bool, ...]) -> Callable:
        """Maps f over the shards: `n_sharded` arguments by row, then the scale; outputs by row where True."""
        by_row = P(self.axes)
        return jax.shard_map(
            f,
            in_specs=(*(by_row,) * n_sharded, P()),
            out_specs=tuple(by_row if sharded else P() for sharded in n_outputs),
        )

    def forward(
        self, rows: jax.Array, columns: jax.Array, scale: jax.Array, row_texts: Texts, column_texts: Texts
    ) -> RowScores:
        return self._shard_map(self._forward, 4, (True,))(rows, columns, row_texts, column_texts, scale)[0]

    def _forward(
        self, rows: jax.Array, columns: jax.Array, row_texts: Texts, column_texts: Texts, scale: jax.Array
    ) -> tuple[RowScores]:
        column_tiles = _tiles((self._gather(columns), self._gather(column_texts)), self.tile)

        def one_row_tile(row_tile: tuple[jax.Array, Texts]) -> RowScores:
            row, row_text = row_tile

            def one_column_tile(carry: tuple, column_tile: tuple[jax.Array, Texts]) -> tuple[tuple, None]:
                top, total, positives, found = carry
                column, column_text = column_tile
                scores = _scores(row, column, scale)
                negative = _negatives(row_text, column_text)
                scores_negative = jnp.where(negative, scores, MASKED)
                new_top = jnp.maximum(top, scores_negative.max(1))
                share = jnp.where(negative, jnp.exp(scores_negative - new_top[:, None]), 0)
                total = total * jnp.exp(top - new_top) + share.sum(1)
                ranks = _positives(row_text, column_text)
                here = [ranks == k for k in range(self.n_positives)]
                positives += jnp.stack([jnp.where(is_k, scores, 0).sum(1) for is_k in here], 1)
                found += jnp.stack([is_k.any(1) for is_k in here], 1).astype(jnp.float32)
                return (new_top, total, positives, found), None

            n = row.shape[0]
            pair = (n, self.n_positives)
            start = (jnp.full(n, MASKED), jnp.zeros(n), jnp.zeros(pair), jnp.zeros(pair))
            (top, total, *positives_found), _ = jax.lax.scan(one_column_tile, self._varying(start), column_tiles)
            log_sum = jnp.where(total > 0, top + jnp.log(jnp.maximum(total, 1e-30)), MASKED)
            return RowScores(log_sum, top, *positives_found)

        out = jax.lax.map(one_row_tile, _tiles((rows, row_texts), self.tile))
        n = rows.shape[0]
        return (jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], out),)

    def backward(
        self,
        rows: jax.Array,
        columns: jax.Array,
        scale: jax.Array,
        row_texts: Texts,
        column_texts: Texts,
        log_sum: jax.Array,
        cotangent: RowScores,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        backward = self._shard_map(self._backward, 7, (True, True, False))
        return backward(
            rows, columns, row_texts, column_texts, log_sum, cotangent.negatives, cotangent.positives, scale
        )

    def _backward(
        self,
        rows: jax.Array,
        columns: jax.Array,
        row_texts: Texts,
        column_texts: Texts,
        log_sum: jax.Array,
        d_negatives: jax.Array,
        d_positives: jax.Array,
        scale: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        n = rows.shape[0]
        gathered = self._gather(columns)
        column_tiles = _tiles((gathered, self._gather(column_texts)), self.tile)
        row_tiles = _tiles((rows, row_texts, log_sum, d_negatives, d_positives), self.tile)

        def one_row_tile(carry: tuple, row_tile: tuple) -> tuple[tuple, jax.Array]:
            d_columns, d_scale = carry
            row, row_text, log_sum, d_negative, d_positive = row_tile

            def one_column_tile(carry: tuple, column_tile: tuple) -> tuple[tuple, jax.Array]:
                d_row, d_scale = carry
                column, column_text, d_column = column_tile
                scores = _scores(row, column, scale)
                negative = _negatives(row_text, column_text)
                share = jnp.exp(jnp.where(negative, scores - log_sum[:, None], MASKED))
                d_scores = share * d_negative[:, None]
                ranks = _positives(row_text, column_text)
                for k in range(self.n_positives):
                    d_scores += jnp.where(ranks == k, d_positive[:, k : k + 1], 0)
                d_row += scale * jnp.dot(d_scores, column, precision=EXACT)
                d_column += scale * jnp.dot(d_scores.T, row, precision=EXACT)
                # scores = scale * dot, so d loss / d scale = sum(d_scores * dot)
                return (d_row, d_scale + (d_scores * scores).sum() / scale), d_column

            start = (self._varying(jnp.zeros(row.shape)), d_scale)
            (d_row, d_scale), d_columns = jax.lax.scan(one_column_tile, start, (*column_tiles, d_columns))
            return (d_columns, d_scale), d_row

        start = self._varying((jnp.zeros_like(column_tiles[0]), jnp.zeros(())))
        (d_columns, d_scale), d_rows = jax.lax.scan(one_row_tile, start, row_tiles)
        d_columns = d_columns.reshape(-1, columns.shape[1])[: gathered.shape[0]]
        d_columns = jax.lax.psum_scatter(d_columns, self.axes, tiled=True)
        return d_rows.reshape(-1, rows.shape[1])[:n], d_columns, jax.lax.psum(d_scale, self.axes)

    def _varying(self, tree: tuple | jax.Array) -> tuple | jax.Array:
        """Says of constants, which start a loop's carry, that they differ between shards, as what is added will."""

        def cast(x: jax.Array) -> jax.Array:
            missing = tuple(axis for axis in self.axes if axis not in jax.typeof(x).mat.varying)
            return jax.lax.pcast(x, missing, to="varying") if missing else x

        return jax.tree.map(cast, tree)

    def _gather(self, tree: jax.Array | Texts) -> jax.Array | Texts:
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axes, tiled=True), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_scores(
    engine: _Engine,
    rows: jax.Array,
    columns: jax.Array,
    scale: jax.Array,
    row_texts: Texts,
    column_texts: Texts,
) -> RowScores:
    return engine.forward(rows, columns, scale, row_texts, column_texts)


def _row_scores_fwd(engine: _Engine, *args: jax.Array | Texts) -> tuple[RowScores, tuple]:
    scores = engine.forward(*args)
    return scores, (*args, scores.negatives)


def _row_scores_bwd(engine: _Engine, residuals: tuple, cotangent: RowScores) -> tuple:
    return (*engine.backward(*residuals, cotangent), None, None)


_row_scores.defvjp(_row_scores_fwd, _row_scores_bwd)


def _scores(rows: jax.Array, columns: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * jnp.dot(rows, columns.T, precision=EXACT)


def _negatives(row: Texts, column: Texts) -> jax.Array:
    """Returns bool [n, m]: which columns are negatives of which rows."""
    same_pair = row.pair[:, None] == column.pair
    own = same_pair & (column.rank == HARD_NEGATIVE)
    in_scope = (row.scope[:, None] == column.source) | (row.scope == SCOPE_ALL)[:, None]
    same_group = (row.group[:, None] == column.group) & (row.group != NO_GROUP)[:, None]
    wanted = own | (in_scope & ~same_group & ~same_pair)
    real = (row.pair != VOID)[:, None] & (column.pair != VOID)
    return wanted & real & ~_equal_text(row, column)


def _equal_text(row: Texts, column: Texts) -> jax.Array:
    """Returns bool [n, m]: the texts are equal, or one is a known match of the other."""
    equal = row.text[:, None] == column.text
    for partner in row.partners.T:
        equal |= partner[:, None] == column.text
    for partner in column.partners.T:
        equal |= row.text[:, None] == partner
    return equal


def _positives(row: Texts, column: Texts) -> jax.Array:
    """Returns int32 [n, m]: k where the column is the row's positive number k, else -1."""
    match = (row.pair[:, None] == column.pair) & (row.pair != VOID)[:, None] & (row.rank >= 0)[:, None]
    return jnp.where(match, column.rank, -1)


def _tiles(tree: tuple, tile: int) -> tuple:
    """Cuts arrays of equal length n into [n_tiles, size, ...], the last tile filled up with void texts and zeros."""
    n = jax.tree.leaves(tree)[0].shape[0]
    count = max(1, -(-n // tile))
    size = -(-n // count)

    def cut(x: jax.Array, fill: float) -> jax.Array:
        widths = [(0, count * size - n)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, widths, constant_values=fill).reshape(count, size, *x.shape[1:])

    def cut_any(x: jax.Array | Texts) -> jax.Array | Texts:
        return jax.tree.map(cut, x, VOID_TEXT) if isinstance(x, Texts) else cut(x, 0)

    return tuple(cut_any(x) for x in tree)


VOID_TEXT = Texts(VOID, HARD_NEGATIVE, NO_TEXT, NO_TEXT, NO_GROUP, -1, -1, 0, 0)  # fills up a tile
