"""Latent attention (NV-Embed, Lee et al. 2024, arXiv:2405.17428): every token state asks a trained dictionary.

Token states are the queries of a cross attention whose keys and values are r trained vectors, the latents; then comes a
gated feed-forward layer (GEGLU, Shazeer 2020, arXiv:2002.05202). Both are pre-norm with a residual, as in the model's
public code (nvidia/NV-Embed-v2, modeling_nvembed.py). Unlike there a head is D / H wide, as in other attention: heads
of the full width D would add eight times the weights. Each token is on its own, so packed texts cannot mix; pooling is
the mean of what comes out.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxembed import sharding
from jaxembed.models.layers.attention import HEADS
from jaxembed.models.layers.linear import LayerNorm, Linear

NORM_EPSILON = 1e-5
MLP_FACTOR = 4


class LatentAttention(nnx.Module):
    """Latent attention over token states.

    Args:
      key: PRNG key of fresh weights.
      width: D, of a token state and of a latent.
      latents: r, how many.
      heads: H, a divisor of D. They lie on the mesh axis `tensor` where it divides H.
      stddev: of fresh kernels; fresh latents are standard normal.
      dtype: of the parameters.
    """

    def __init__(self, key: jax.Array, width: int, latents: int, heads: int, stddev: float, dtype: jnp.dtype) -> None:
        keys = jax.random.split(key, 7)
        divides = heads % jax.sharding.get_abstract_mesh().shape["tensor"] == 0
        inputs, by_head = (("embed", width),), (("heads" if divides else None, heads), (None, width // heads))
        hidden = ("mlp", MLP_FACTOR * width)
        self.latents = nnx.Param(
            jax.random.normal(keys[0], (latents, width), dtype, out_sharding=sharding.spec(None, "embed"))
        )
        self.query_norm, self.latent_norm, self.mlp_norm = (LayerNorm(width, NORM_EPSILON, dtype) for _ in range(3))
        self.query, self.key, self.value = (
            Linear(k, inputs, by_head, stddev, dtype, use_bias=False) for k in keys[1:4]
        )
        self.out = Linear(keys[4], by_head, inputs, stddev, dtype, use_bias=False)
        self.up = Linear(keys[5], inputs, ((None, 2), hidden), stddev, dtype)  # the value, then what gates it
        self.down = Linear(keys[6], (hidden,), inputs, stddev, dtype)
        self.heads_spec = HEADS if divides else P(*HEADS[:2], None, None)

    def __call__(self, hidden_RxLxD: jax.Array) -> jax.Array:
        """Returns token states [R, L, D], in the dtype of those given."""
        x = hidden_RxLxD + self._attend(self.query_norm(hidden_RxLxD))
        value, gate = jnp.split(self.up(self.mlp_norm(x), P(*HEADS[:2], None, "tensor")), 2, axis=2)
        return x + self.down((value * jax.nn.gelu(gate, approximate=False))[:, :, 0], sharding.STATES)

    def _attend(self, x: jax.Array) -> jax.Array:
        axis = self.heads_spec[2]
        latents = jax.sharding.reshard(self.latents[...], P(None, None)).astype(x.dtype)
        latents = self.latent_norm(latents)
        query_RxLxHxK = self.query(x, self.heads_spec)
        key_NxHxK, value_NxHxK = (project(latents, P(None, axis, None)) for project in (self.key, self.value))
        query_RxLxHxK *= query_RxLxHxK.shape[-1] ** -0.5
        scores = jnp.einsum("rlhk,nhk->rlhn", query_RxLxHxK, key_NxHxK, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        out = jnp.einsum("rlhn,nhk->rlhk", weights, value_NxHxK, out_sharding=self.heads_spec)
        return self.out(out, sharding.STATES)
