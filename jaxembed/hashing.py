"""A hash in place of a random key, where what is drawn must not depend on where it is drawn.

A draw is a function of numbers (the step's seed, a text's number, a position …), so packing, micro-batches and the
number of devices do not change it, and it costs a few integer operations.
"""

import jax
import jax.numpy as jnp


def mix(h: jax.Array) -> jax.Array:
    """Returns a bijection of uint32 that scatters its bits: same shape, uint32.

    Two rounds of xor-shift-multiply (the finaliser of MurmurHash3, Appleby; constants of Wellons' hash-prospector).
    """
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def uniform(h: jax.Array) -> jax.Array:
    """Turns hashes, uint32, into float32 numbers evenly spread inside (0, 1), ends left out."""
    return ((h >> 9).astype(jnp.float32) + 0.5) / 2**23  # of 24 bits the last would round up to 1


def below(part: jax.typing.ArrayLike) -> jax.Array:
    """Returns the uint32 below which this part of all hashes lies, a number in [0, 1]; in steps of 2⁻²⁴."""
    return jnp.minimum(jnp.asarray(part, jnp.float32) * 2.0**32, 2.0**32 - 256).astype(jnp.uint32)
