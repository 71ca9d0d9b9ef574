"""Dropout whose mask is a hash of what is dropped, not of where it lies.

The mask of a token's channel is a function of (seed of the step, place in the model, number of the text in the global
batch, position in the text, channel). So packing, micro-batches and the number of devices do not change a result. The
hash is a few xor-shift-multiply rounds (the finaliser of MurmurHash3, Appleby; constants of Wellons' hash-prospector)
on uint32: far cheaper than a threefry key per token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxembed.hashing import below, mix
from jaxembed.sharding import BATCH


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """What makes one step's masks.

    Attributes:
      seed: uint32 scalar, new for every step.
      texts: int32 [R, L], the number of each token's text (`segment_ids`).
      positions: int32 [R, L], its place in the text.
      ahead: float32 scalar, the part of what lies behind a token that its attention sees already, while that grows from
        causal to what it is; None where it does not.
    """

    seed: jax.Array
    texts: jax.Array
    positions: jax.Array
    ahead: jax.Array | None = None


def step_seed(seed: int, step: jax.Array) -> jax.Array:
    """Returns the uint32 seed of a step's masks."""
    return mix(mix(jnp.uint32(seed) ^ jnp.uint32(0x9E3779B9)) ^ step.astype(jnp.uint32))


def layer_place(index: jax.Array) -> jax.Array:
    """Returns the first of the 16 places of layer `index`: + 0 attention's weights, 1 and 2 the sub-layers' outputs.

    From 3 on they are the inputs of linear layers, for adapters: query, key, value, out, then those of the MLP. Places
    below 16 are those before the first layer, and the last of them, 15, what attention sees while it grows.
    """
    return 16 * (index.astype(jnp.uint32) + 1)


def dropout(x: jax.Array, rate: float, noise: Noise | None, place: jax.Array) -> jax.Array:
    """Drops channels of x [R, L, D]. `place` is a uint32 number of the call's place in the model."""
    if noise is None or rate == 0:
        return x
    channels = jnp.arange(x.shape[-1], dtype=jnp.uint32)
    bits = mix(_token_hash(noise, place)[..., None] ^ mix(channels))
    return _drop(x, bits, rate)


def dropout_weights(weights_RxHxLxL: jax.Array, rate: float, noise: Noise | None, place: jax.Array) -> jax.Array:
    """Drops attention weights [R, H, query, key]; the key's position in its text enters, not its place in the row."""
    if noise is None or rate == 0:
        return weights_RxHxLxL
    heads = jnp.arange(weights_RxHxLxL.shape[1], dtype=jnp.uint32)[None, :, None, None]
    query = _token_hash(noise, place)[:, None, :, None]
    key_positions = jax.sharding.reshard(noise.positions, P(BATCH, None))
    key = mix(key_positions.astype(jnp.uint32))[:, None, None, :]
    return _drop(weights_RxHxLxL, mix(mix(query ^ mix(heads)) + key), rate)


def seen_ahead(noise: Noise) -> jax.Array:
    """Returns which tokens see which others wherever these are, bool [R, query, key]: the part `ahead` of pairs.

    Attention that grows from causal sees these beside what is before (DiffuLLaMA, Gong et al. 2024, arXiv:2410.17891).
    The pairs are the same ones in all layers, and drawn anew in each step.
    """
    key_positions = jax.sharding.reshard(noise.positions, P(BATCH, None))
    key = mix(key_positions.astype(jnp.uint32))[:, None, :]
    bits = mix(_token_hash(noise, jnp.uint32(15))[:, :, None] + key)
    return (bits < below(noise.ahead)) | (noise.ahead >= 1)


def _token_hash(noise: Noise, place: jax.Array) -> jax.Array:
    h = mix(noise.seed ^ mix(jnp.asarray(place, jnp.uint32)))
    return mix(mix(h ^ noise.texts.astype(jnp.uint32)) ^ noise.positions.astype(jnp.uint32))


def _drop(x: jax.Array, bits: jax.Array, rate: float) -> jax.Array:
    keep = bits >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
