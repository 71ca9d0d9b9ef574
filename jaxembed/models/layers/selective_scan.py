"""The selective scan of Mamba (Gu & Dao 2023, arXiv:2312.00752), over packed rows.

Every channel has N states of its own, which decay by exp(Δ A): h = exp(Δ A) h + Δ x B, y = C · h + D x. Two forms of a
chunk, equal but for rounding: an associative scan over its tokens, log Q passes over [Q, N, I], for accelerators; and
token after token, whose state stays in a CPU's cache. States lie as [N, I], channels last: those are many.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxembed.models.layers import recurrence
from jaxembed.models.layers.recurrence import Borders, Inputs
from jaxembed.sharding import ROWS, spec

CHANNELS = spec("batch", "sequence", "mlp")  # [R, L, I]
STATES = spec("batch", "sequence", None)  # [R, L, N]


def selective_scan(
    x_RxLxI: jax.Array,
    step_RxLxI: jax.Array,
    a_IxN: jax.Array,
    write_RxLxN: jax.Array,
    read_RxLxN: jax.Array,
    skip_I: jax.Array,
    borders: Borders,
    *,
    chunk: int,
    associative: bool,
    reverse: bool = False,
) -> jax.Array:
    """Runs the scan over every text of the rows.

    Args:
      x_RxLxI: what is written, any float dtype.
      step_RxLxI: Δ > 0, float32.
      a_IxN: A < 0, float32.
      write_RxLxN: B, by which tokens write into states.
      read_RxLxN: C, by which they read.
      skip_I: D, the part of x that goes by the states.
      borders: of the texts.
      chunk: Q, tokens in a chunk.
      associative: which form.
      reverse: whether texts are read from their ends.

    Returns:
      [R, L, I] in x's dtype.
    """

    def local(inputs: Inputs, a: jax.Array, skip: jax.Array) -> jax.Array:
        # XLA's code for CPUs takes five times as long for a row alone: it goes as two rows of half the channels.
        parts = 2 if not associative and len(inputs["x"]) == 1 and len(skip) % 2 == 0 else 1
        cell = _Cell(_parted(a.T[None], parts), _parted(skip[None, None], parts), associative)
        halves = {name: _parted(inputs[name], parts) for name in ("x", "step")}
        whole = {name: jnp.repeat(inputs[name], parts, axis=0) for name in ("write", "read", "resets")}
        out = recurrence.run(cell, halves | whole, chunk, reverse)
        return jnp.moveaxis(out.reshape(parts, -1, *out.shape[1:]), 0, -2).reshape(inputs["x"].shape)

    specs = {"x": CHANNELS, "step": CHANNELS, "write": STATES, "read": STATES, "resets": ROWS}
    tokens = (x_RxLxI, step_RxLxI, write_RxLxN, read_RxLxN, borders.resets(reverse))
    mapped = jax.shard_map(local, in_specs=(specs, spec("mlp", None), spec("mlp")), out_specs=CHANNELS)
    return mapped(dict(zip(specs, tokens)), a_IxN, skip_I)


def _parted(x: jax.Array, parts: int) -> jax.Array:
    """[1, n, I] → [parts, n, I / parts]; a single part is x as it is, of any number of rows."""
    return x if parts == 1 else jnp.moveaxis(x[0].reshape(x.shape[1], parts, -1), 1, 0)


@dataclasses.dataclass(frozen=True)
class _Cell:
    """The recurrence over a shard's channels; states [r, N, I] in the dtype of A.

    Attributes:
      a: A, [1, N, I], or another for each row.
      skip: D, [1, 1, I] or the same.
      associative: which form.
    """

    a: jax.Array
    skip: jax.Array
    associative: bool

    def fresh(self, inputs: Inputs) -> jax.Array:
        return jnp.zeros((len(inputs["x"]), *self.a.shape[1:]), self.a.dtype)

    def chunk(self, state: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        state, out = self._walk(state, inputs)
        out += self.skip * inputs["x"]
        return state, out.astype(inputs["x"].dtype)

    def state(self, state: jax.Array, inputs: Inputs) -> jax.Array:
        return self._walk(state, inputs)[0]

    def kept(self, inputs: Inputs) -> jax.Array:
        kept = jnp.exp(inputs["step"].sum(1)[:, None] * self.a)
        return jnp.where(inputs["resets"].any(1)[:, None, None], 0, kept)

    def _walk(self, state: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """Returns the state behind the chunk and what is read from states [r, Q, I]."""
        tokens = {name: x.swapaxes(0, 1) for name, x in inputs.items()}  # [Q, r, …]
        if self.associative:
            decay, written = self._token(tokens)
            kept, own = jax.lax.associative_scan(_after, (decay, written))
            states = kept * state + own
            read = (states * tokens["read"][..., None]).sum(-2)
            return states[-1], read.swapaxes(0, 1)

        @jax.checkpoint  # else every token's decay and what it writes would be held too
        def one(state: jax.Array, token: Inputs) -> tuple[jax.Array, jax.Array]:
            decay, written = self._token(token)
            state = decay * state + written
            return state, (state * token["read"][..., None]).sum(-2)

        state, read = jax.lax.scan(one, state, tokens)
        return state, read.swapaxes(0, 1)

    def _token(self, tokens: Inputs) -> tuple[jax.Array, jax.Array]:
        """Returns decay and what is written, [..., N, I] each."""
        step = tokens["step"]
        decay = jnp.where(tokens["resets"][..., None, None], 0, jnp.exp(step[..., None, :] * self.a))
        return decay, (step * tokens["x"])[..., None, :] * tokens["write"][..., None]


def _after(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Two stretches of tokens as one: (decay, what is written) of both."""
    return first[0] * second[0], second[0] * first[1] + second[1]
