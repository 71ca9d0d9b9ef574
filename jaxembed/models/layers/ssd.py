"""The state-space layer of Mamba-2 in chunks of matrix products (Dao & Gu 2024, arXiv:2405.21060), over packed rows.

Each head has one decay a = exp(Δ A) per token and a state [P, N]: h = a h + Δ x ⊗ B, y = h C + D x. Inside a chunk that
is attention: token i reads C_i · B_j of token j, decayed by the product of a between the two, if both are of one text.
What came before the chunk is read from its state. Sums of log decays between two tokens are made as such, not as
differences of sums from the chunk's start: those of a fast head lose all digits.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxembed.models.layers import recurrence
from jaxembed.models.layers.recurrence import Borders, Inputs
from jaxembed.sharding import ROWS, spec

HEADS = spec("batch", "sequence", "heads", None)  # [R, L, H, P]
STEPS = spec("batch", "sequence", "heads")  # [R, L, H]


def state_space_dual(
    x_RxLxHxP: jax.Array,
    step_RxLxH: jax.Array,
    a_H: jax.Array,
    write_RxLxGxN: jax.Array,
    read_RxLxGxN: jax.Array,
    skip_H: jax.Array,
    borders: Borders,
    *,
    chunk: int,
    groups_axis: str | None,
    reverse: bool = False,
) -> jax.Array:
    """Runs the layer over every text of the rows.

    Args:
      x_RxLxHxP: what is written, any float dtype; products take their factors in it, and add up in float32.
      step_RxLxH: Δ > 0, float32.
      a_H: A < 0, float32.
      write_RxLxGxN: B, by which tokens write into states. Head h is of group h // (H / G).
      read_RxLxGxN: C, by which they read.
      skip_H: D, the part of x that goes by the states.
      borders: of the texts.
      chunk: Q, tokens in a chunk.
      groups_axis: the logical axis of groups; None where each device has all, those of its heads among them.
      reverse: whether texts are read from their ends.

    Returns:
      [R, L, H, P] in x's dtype.
    """
    heads_per_group = x_RxLxHxP.shape[2] // read_RxLxGxN.shape[2]

    def local(inputs: Inputs, a: jax.Array, skip: jax.Array) -> jax.Array:
        own = {name: _own_groups(inputs[name], len(a), heads_per_group) for name in ("write", "read")}
        return recurrence.run(_Cell(a, skip), inputs | own, chunk, reverse)

    groups = spec("batch", "sequence", groups_axis, None)
    specs = {"x": HEADS, "step": STEPS, "write": groups, "read": groups, "resets": ROWS}
    tokens = (x_RxLxHxP, step_RxLxH, write_RxLxGxN, read_RxLxGxN, borders.resets(reverse))
    mapped = jax.shard_map(local, in_specs=(specs, spec("heads"), spec("heads")), out_specs=HEADS)
    return mapped(dict(zip(specs, tokens)), a_H, skip_H)


def _own_groups(y: jax.Array, heads: int, heads_per_group: int) -> jax.Array:
    """Returns of B or C [r, l, G, N] the groups of this device's heads."""
    wanted = max(1, heads // heads_per_group)
    if y.shape[2] == wanted:
        return y
    first = jax.lax.axis_index("tensor") * heads // heads_per_group
    return jax.lax.dynamic_slice_in_dim(y, first, wanted, axis=2)


@dataclasses.dataclass(frozen=True)
class _Cell:
    """The recurrence over a shard's heads; states [r, G, K, P, N], K heads of each group, in the dtype of A."""

    a_H: jax.Array
    skip_H: jax.Array

    def fresh(self, inputs: Inputs) -> jax.Array:
        rows, _, heads, width = inputs["x"].shape
        groups, states = inputs["write"].shape[2:]
        return jnp.zeros((rows, groups, heads // groups, width, states), self.a_H.dtype)

    def chunk(self, state: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        x, read, log = inputs["x"], inputs["read"], self._log_decay(inputs)
        wide = state.dtype
        number = jnp.cumsum(inputs["resets"], axis=1)  # of the text, counted in the chunk
        place = jnp.arange(x.shape[1])
        between = _between(log, place)  # [r, G, K, query, key]
        seen = (place[:, None] >= place) & (number[:, :, None] == number[:, None, :])
        decay = jnp.exp(jnp.where(seen[:, None, None], between, -jnp.inf))
        scores = jnp.einsum("rign,rjgn->rgij", read, inputs["write"], preferred_element_type=wide)
        weights = (scores[:, :, None] * decay).astype(x.dtype)
        stepped = self._stepped(inputs)
        own = jnp.einsum("rgkij,rjgkp->rigkp", weights, stepped.astype(x.dtype), preferred_element_type=wide)
        since = jnp.exp(jnp.cumsum(log, axis=1)) * (number == 0)[..., None, None]  # [r, Q, G, K]
        earlier = jnp.einsum("rign,rgkpn->rigkp", read.astype(wide), state) * since[..., None]
        out = (own + earlier).reshape(x.shape) + self.skip_H[:, None] * x
        left = decay[:, :, :, -1].transpose(0, 3, 1, 2)  # of what each token wrote, at the chunk's end
        return self._add(state, since[:, -1], left, stepped, inputs), out.astype(x.dtype)

    def state(self, state: jax.Array, inputs: Inputs) -> jax.Array:
        log = self._log_decay(inputs)
        number = jnp.cumsum(inputs["resets"], axis=1)
        behind = jax.lax.cumsum(log, axis=1, reverse=True) - log
        left = jnp.exp(behind) * (number == number[:, -1:])[..., None, None]
        return self._add(state, self._kept(log, number[:, -1]), left, self._stepped(inputs), inputs)

    def kept(self, inputs: Inputs) -> jax.Array:
        return self._kept(self._log_decay(inputs), inputs["resets"].sum(1))[..., None, None]

    def _kept(self, log: jax.Array, texts_r: jax.Array) -> jax.Array:
        """Returns the product of the decays, [r, G, K]; `texts_r` begin among the tokens."""
        return jnp.exp(log.sum(1)) * (texts_r == 0)[:, None, None]

    def _log_decay(self, inputs: Inputs) -> jax.Array:
        """Δ A of every token, [r, Q, G, K]."""
        return self._of_groups(inputs["step"] * self.a_H, inputs)

    def _stepped(self, inputs: Inputs) -> jax.Array:
        """Δ x, [r, Q, G, K, P]."""
        return self._of_groups(inputs["step"][..., None] * inputs["x"], inputs)

    def _of_groups(self, x: jax.Array, inputs: Inputs) -> jax.Array:
        """Splits heads [r, Q, H, …] into [r, Q, G, K, …]."""
        rows, length, heads, *rest = x.shape
        groups = inputs["write"].shape[2]
        return x.reshape(rows, length, groups, heads // groups, *rest)

    def _add(self, state: jax.Array, kept: jax.Array, left: jax.Array, stepped: jax.Array, inputs: Inputs) -> jax.Array:
        """Returns the state behind a chunk: what is kept of the one before, and what is left of each token's own."""
        written = (stepped * left[..., None]).astype(inputs["x"].dtype)
        new = jnp.einsum("rjgn,rjgkp->rgkpn", inputs["write"], written, preferred_element_type=state.dtype)
        return kept[..., None, None] * state + new


def _between(log: jax.Array, place: jax.Array) -> jax.Array:
    """Returns the sums of log decays from behind token j up to token i: [r, G, K, i, j], of use where i >= j."""
    log = log.transpose(0, 2, 3, 1)[..., None]
    return jnp.cumsum(jnp.where(place[:, None] > place, log, 0), axis=-2)
