"""From token states to one vector per span.

Every mode is a weighted mean over the span's tokens, so one function serves all: weights per token, summed by slot.
The modes mean what sentence-transformers' Pooling means by them, prompts left out or not. Before it, `LayerMean` may
mix the states of several layers, and `latent_attention.LatentAttention` may transform them.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxembed.data.batch import Rows
from jaxembed.sharding import BATCH, ROWS, STATES

MODES = ("mean", "cls", "last", "weighted_mean")  # 'latent' is the mean after latent attention


class LayerMean(nnx.Module):
    """A trained weighted mean of the states of several layers: sum(w_l · h_l) / sum(w_l).

    As sentence-transformers' WeightedLayerPooling has it; the idea of mixing layers is that of ELMo (Peters et al.
    2018, arXiv:1802.05365). The weights, n of them, start at 1; they are float32 whatever the others are.
    """

    def __init__(self, layers: int) -> None:
        self.scale = nnx.Param(jnp.ones(layers, jnp.float32, out_sharding=P(None)))

    def __call__(self, hidden_NxRxLxD: jax.Array) -> jax.Array:
        """Returns the mean [R, L, D] in float32."""
        weights = self.scale[...]
        return jnp.einsum("n,nrld->rld", weights, hidden_NxRxLxD.astype(jnp.float32)) / weights.sum()


def token_weights(rows: Rows, mode: str, pool_prompt: bool) -> jax.Array:
    """Returns how much each token counts in its span's vector: float32 [R, L].

    Args:
      rows: arrays [R, L]. Spans are contiguous in their row.
      mode: 'mean': all tokens alike; 'cls': the first token; 'last': the last one; 'weighted_mean': token i of the
        text (from 1) counts i (SGPT, Muennighoff 2022, arXiv:2202.08904).
      pool_prompt: False leaves out the prompt's tokens; first and last are then those of the rest.
    """
    # First and last need a token's neighbours: these small integers are gathered along a sharded row.
    spans, prompts = (jax.sharding.reshard(x, P(BATCH, None)) for x in (rows.span_ids, rows.prompt_mask))
    if not pool_prompt:
        spans = jnp.where(prompts, -1, spans)
    counted = spans >= 0
    if mode == "cls":
        counted &= spans != jnp.pad(spans, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    elif mode == "last":
        counted &= spans != jnp.pad(spans, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
    weights = jax.sharding.reshard(counted.astype(jnp.float32), ROWS)
    return weights * (rows.positions + 1).astype(jnp.float32) if mode == "weighted_mean" else weights


def pool(hidden_RxLxD: jax.Array, rows: Rows, slots: int, mode: str, pool_prompt: bool) -> jax.Array:
    """Pools token states into vectors.

    Args:
      hidden_RxLxD: token states, any float dtype.
      rows: their rows; `span_ids` count from 0 in each shard's bin.
      slots: vectors per bin.
      mode: one of MODES.
      pool_prompt: whether the prompt's tokens count.

    Returns:
      float32 [S, slots, D], S the number of batch shards. A slot without tokens gets the zero vector.
    """

    def local(hidden: jax.Array, weights: jax.Array, spans: jax.Array) -> jax.Array:
        slot_T = jnp.where(spans < 0, slots, spans).reshape(-1)  # tokens of no span fall into a slot that is cut off
        weight_T = weights.reshape(-1, 1)
        weighted_TxD = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32) * weight_T
        total = jax.ops.segment_sum(weighted_TxD, slot_T, slots + 1)[:slots]
        mass = jax.ops.segment_sum(weight_T, slot_T, slots + 1)[:slots]
        total, mass = jax.lax.psum((total, mass), "sequence")
        return (total / jnp.maximum(mass, 1e-9))[None]

    weights = token_weights(rows, mode, pool_prompt)
    sum_spans = jax.shard_map(local, in_specs=(STATES, ROWS, ROWS), out_specs=P(BATCH, None, None))
    return sum_spans(hidden_RxLxD, weights, rows.span_ids)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Scales the last axis to length 1, in float32; a zero vector stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
