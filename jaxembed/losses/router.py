"""Losses of routers: load balance, and small logits.

Both are made of sums over the real tokens of the whole batch, so they depend neither on micro-batches nor on devices,
packing or padding.
"""

import jax
import jax.numpy as jnp

from jaxembed.config import RouterConfig
from jaxembed.models.layers.routing import RouterSums

Metrics = dict[str, jax.Array]


def router_loss(sums: RouterSums, config: RouterConfig) -> tuple[jax.Array, Metrics]:
    """Computes what routers add to a step's loss.

    Load balance is X Σ_e f_e p_e, f_e the part of all choices that took expert e and p_e its mean probability: 1 where
    all experts are alike (Switch Transformer, Fedus et al. 2021, arXiv:2101.03961, with f of all k choices). The z-loss
    is the mean square of the logits' log-sum-exp (ST-MoE, Zoph et al. 2022, arXiv:2202.08906). Both are averaged over
    the sparse layers. Where sources pick the experts there is no router, so neither.

    Args:
      sums: over the batch, each array with an axis 0 of the n sparse layers.
      config: the weights.

    Returns:
      A float32 scalar, and metrics: `router/balance` and `router/z` as above; `router/entropy`, mean over tokens and
      layers, as a part of the highest; `router/busiest` and `router/idlest`, the highest and lowest load of an expert
      of any layer, as a multiple of the mean; `router/dropped`, the part of tokens that no expert took; `router/load`
      [n, X], the loads as multiples of the mean.
    """
    count = sums.load.shape[-1]
    tokens = jnp.maximum(sums.tokens, 1)
    share = sums.load / jnp.maximum(sums.load.sum(-1, keepdims=True), 1)
    load = count * share
    metrics = {
        "router/busiest": load.max(),
        "router/idlest": load.min(),
        "router/dropped": (sums.dropped / tokens).mean(),
        "router/load": load,
    }
    value = jnp.zeros(())
    if sums.probability is not None:
        balance = (count * (share * sums.probability / tokens[:, None]).sum(-1)).mean()
        z = (sums.z / tokens).mean()
        entropy = (sums.entropy / tokens).mean() / jnp.log(max(count, 2))
        metrics |= {"router/balance": balance, "router/z": z, "router/entropy": entropy}
        value = config.balance * balance + config.z * z
    return value, jax.lax.stop_gradient(metrics)
