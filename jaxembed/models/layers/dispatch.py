"""Tokens to their experts and back.

Tokens are sorted by expert, so that each expert's lie together, and their outputs summed by token again. Where experts
lie on several devices, tokens travel (`rounds.py`). A custom VJP wraps two `shard_map`s, inside which everything is
local and nothing is differentiated: the backward pass gathers kernels and tokens anew, and computes hidden layers anew,
so nothing of the size of tokens times width times experts a token is kept, let alone of tokens times experts.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxembed import sharding
from jaxembed.models.layers import grouped
from jaxembed.models.layers.grouped import Kernels
from jaxembed.models.layers.rounds import Compute, Rows, exchange, inverse
from jaxembed.models.layers.routing import NOWHERE, Choice, ExpertOptions

# Logical axes of the experts' weights.
INTO, OUT_OF, BIAS = ("experts", "embed", "mlp"), ("experts", "mlp", "embed"), ("experts", "mlp")


def apply_experts(
    x_RxLxD: jax.Array, choice: Choice, kernels: Kernels, activation: str, options: ExpertOptions
) -> jax.Array:
    """Sends tokens through their experts: sum over a token's experts of weight · down(activation(…)).

    Args:
      x_RxLxD: states, sharded as `sharding.STATES`, of the computation's dtype.
      choice: where they go.
      kernels: the experts', of the parameters' dtype: sharded as INTO, OUT_OF and BIAS.
      activation: a key of `jaxembed.models.layers.mlp.ACTIVATIONS`.
      options: how to compute.

    Returns:
      [R, L, D] in x's dtype, 0 where a token goes nowhere. Differentiable in x, the weights and the kernels.
    """
    dispatch = _Dispatch(activation, options.kernel, options.capacity, choice.per_token)
    return _apply(dispatch, x_RxLxD, choice.experts, choice.weights, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(dispatch: "_Dispatch", *args: Any) -> jax.Array:
    in_specs = (sharding.STATES,) * 3 + (_specs(args[-1]),)
    return jax.shard_map(dispatch.forward, in_specs=in_specs, out_specs=sharding.STATES, check_vma=False)(*args)


def _apply_fwd(dispatch: "_Dispatch", *args: Any) -> tuple[jax.Array, Any]:
    return _apply(dispatch, *args), args


def _apply_bwd(dispatch: "_Dispatch", saved: Any, dy_RxLxD: jax.Array) -> tuple[jax.Array, None, jax.Array, Kernels]:
    # Where nobody trains the kernels, XLA leaves their gradients out, loops and collectives included.
    specs = _specs(saved[-1])
    in_specs, out_specs = (sharding.STATES,) * 4 + (specs,), (sharding.STATES, sharding.STATES, specs)
    f = jax.shard_map(dispatch.backward, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    d_x, d_weights, d_kernels = f(dy_RxLxD, *saved)
    return d_x, None, d_weights, d_kernels


_apply.defvjp(_apply_fwd, _apply_bwd)


@dataclasses.dataclass(frozen=True)
class _Dispatch:
    """Both passes, on one device.

    Attributes:
      activation: a key of `jaxembed.models.layers.mlp.ACTIVATIONS`.
      kernel, capacity: those of `ExpertOptions`.
      per_token: that of `Choice`.
    """

    activation: str
    kernel: str
    capacity: float
    per_token: int

    def forward(
        self, x_RxLxD: jax.Array, experts_RxLxK: jax.Array, weights_RxLxK: jax.Array, kernels: Kernels
    ) -> jax.Array:
        """Returns the outputs [R, L, D]."""
        x_TxD, experts_TxK, weights_TxK = _flat(x_RxLxD), _flat(experts_RxLxK), _flat(weights_RxLxK)
        slots_N, sizes_X = self._sorted(experts_TxK, kernels)
        items_NxD = x_TxD[slots_N // experts_TxK.shape[1]]
        gathered = _gathered(kernels, x_TxD.dtype)

        def compute(items: Rows, sizes_X: jax.Array) -> tuple[Rows, None]:
            return (grouped.forward(*items, sizes_X, gathered, self.activation, self.kernel),), None

        (y_NxD,), _ = self._where_experts_are(compute, (items_NxD,), sizes_X, (jnp.zeros_like(items_NxD),), None)
        y_TxD = jax.lax.psum(self._by_token(y_NxD, slots_N, weights_TxK), _spread("tensor"))
        return y_TxD.astype(x_TxD.dtype).reshape(x_RxLxD.shape)

    def backward(
        self,
        dy_RxLxD: jax.Array,
        x_RxLxD: jax.Array,
        experts_RxLxK: jax.Array,
        weights_RxLxK: jax.Array,
        kernels: Kernels,
    ) -> tuple[jax.Array, jax.Array, Kernels]:
        """Returns the gradients of states, weights and kernels."""
        x_TxD, experts_TxK, weights_TxK = _flat(x_RxLxD), _flat(experts_RxLxK), _flat(weights_RxLxK)
        slots_N, sizes_X = self._sorted(experts_TxK, kernels)
        token_N = slots_N // experts_TxK.shape[1]
        items = x_TxD[token_N], _flat(dy_RxLxD)[token_N], weights_TxK.reshape(-1)[slots_N]
        gathered = _gathered(kernels, x_TxD.dtype)

        def compute(items: Rows, sizes_X: jax.Array) -> tuple[Rows, Kernels]:
            return grouped.backward(*items, sizes_X, gathered, self.activation, self.kernel)

        outputs = jnp.zeros_like(items[0]), jnp.zeros_like(items[2])
        sums = jax.tree.map(lambda kernel: jnp.zeros(kernel.shape, jnp.float32), gathered)
        (dx_NxD, d_weights_N), d_kernels = self._where_experts_are(compute, items, sizes_X, outputs, sums)
        dx_TxD = self._by_token(dx_NxD, slots_N, jnp.ones_like(weights_TxK))
        d_weights = jnp.zeros(weights_TxK.size).at[slots_N].set(d_weights_N, unique_indices=True)
        dx_TxD, d_weights = jax.lax.psum((dx_TxD, d_weights), _spread("tensor"))
        dx = dx_TxD.astype(x_TxD.dtype).reshape(x_RxLxD.shape)
        return dx, d_weights.reshape(weights_RxLxK.shape), _reduced(d_kernels, kernels)

    def _sorted(self, experts_TxK: jax.Array, kernels: Kernels) -> tuple[jax.Array, jax.Array]:
        """Returns the slots of T · K with items, sorted by expert and void ones last, and how many each expert has.

        There are N = T · per_token of them, which is enough where more slots than that are open, too.
        """
        n_experts = len(kernels.up) * jax.lax.axis_size("expert")
        expert = jnp.where(experts_TxK == NOWHERE, n_experts, experts_TxK).reshape(-1)
        expert, slots = jax.lax.sort((expert, jnp.arange(expert.size)), num_keys=1)
        ends = jnp.searchsorted(expert, jnp.arange(n_experts), side="right").astype(jnp.int32)
        return slots[: len(experts_TxK) * self.per_token], jnp.diff(ends, prepend=0)

    def _where_experts_are(
        self, compute: Compute, items: Rows, sizes_X: jax.Array, outputs: Rows, sums: Any
    ) -> tuple[Rows, Any]:
        """Computes items here, or sends them to their experts; see `rounds.exchange`."""
        if jax.lax.axis_size("expert") == 1:
            return compute(items, sizes_X)
        return exchange(compute, items, sizes_X, outputs, sums, self.capacity)

    def _by_token(self, items_NxD: jax.Array, slots_N: jax.Array, weights_TxK: jax.Array) -> jax.Array:
        """Sums items by token, weighted; float32 [T, D]."""
        if weights_TxK.shape[1] == self.per_token:  # all slots are here: gathered, they are summed in a fixed order
            place_KxT = inverse(slots_N).reshape(weights_TxK.shape).T
            # K leads: a TPU would lay out K by D in tiles of 8 by 128, for a small K most of them empty.
            return (items_NxD[place_KxT].astype(jnp.float32) * weights_TxK.T[..., None]).sum(0)
        weighted = items_NxD.astype(jnp.float32) * weights_TxK.reshape(-1)[slots_N, None]
        return jnp.zeros((len(weights_TxK), items_NxD.shape[1])).at[slots_N // weights_TxK.shape[1]].add(weighted)


def _spread(*axes: str) -> tuple[str, ...]:
    """Returns those axes of the mesh that lie over several devices. XLA copies for a collective of one, too."""
    return tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)


def _flat(x_RxLxC: jax.Array) -> jax.Array:
    """[R, L, C] → [T, C]."""
    return x_RxLxC.reshape(-1, x_RxLxC.shape[-1])


def _specs(kernels: Kernels) -> Kernels:
    """Returns the kernels' shardings."""
    return Kernels(
        up=sharding.spec(*INTO),
        down=sharding.spec(*OUT_OF),
        gate=None if kernels.gate is None else sharding.spec(*INTO),
        up_bias=None if kernels.up_bias is None else sharding.spec(*BIAS),
    )


def _gathered(kernels: Kernels, dtype: jnp.dtype) -> Kernels:
    """Casts kernels, and brings together what lies over `fsdp`."""

    def gather(kernel: jax.Array, spec: P) -> jax.Array:
        for axis in set(_spread("fsdp")) & set(spec):
            kernel = jax.lax.all_gather(kernel.astype(dtype), axis, axis=spec.index(axis), tiled=True)
        return kernel.astype(dtype)

    return jax.tree.map(gather, kernels, _specs(kernels))


def _reduced(gradient: Kernels, kernels: Kernels) -> Kernels:
    """Sums the gradient of gathered kernels over all tokens, each device its part; returns it in the kernels' dtype."""

    def reduce(gradient: jax.Array, kernel: jax.Array, spec: P) -> jax.Array:
        gradient = jax.lax.psum(gradient, _spread("data", "sequence"))
        for axis in _spread("fsdp"):
            if axis in spec:
                gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=spec.index(axis), tiled=True)
            else:
                gradient = jax.lax.psum(gradient, axis)
        return gradient.astype(kernel.dtype)

    return jax.tree.map(reduce, gradient, kernels, _specs(kernels))
