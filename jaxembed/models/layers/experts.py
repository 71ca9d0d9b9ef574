"""Sparse feed-forward parts: a router and experts of which a token takes a few (Shazeer et al. 2017, arXiv:1701.06538).

No token is ever dropped for want of room, so a text's vector does not depend on what else is in the batch.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxembed import sharding
from jaxembed.data.batch import Rows
from jaxembed.errors import UserError
from jaxembed.models.layers.dispatch import BIAS, INTO, OUT_OF, apply_experts
from jaxembed.models.layers.dropout import Noise
from jaxembed.models.layers.grouped import Kernels
from jaxembed.models.layers.linear import Linear
from jaxembed.models.layers.mlp import Mlp
from jaxembed.models.layers.routing import ExpertOptions, ExpertsShape, Routed, choose, sums_of


class ExpertKernels(nnx.Module):
    """The kernels [X, …] of one of the experts' maps, and its biases, if any."""

    def __init__(
        self,
        key: jax.Array,
        names: tuple[str, ...],
        shape: tuple[int, ...],
        stddev: float,
        dtype: jnp.dtype,
        use_bias: bool = False,
    ) -> None:
        sharding.require_shardable(names, shape)
        self.kernel = nnx.Param(stddev * jax.random.normal(key, shape, dtype, out_sharding=sharding.spec(*names)))
        if use_bias:
            bias = jnp.zeros((shape[0], shape[-1]), dtype, out_sharding=sharding.spec(*BIAS))
            self.bias = nnx.Param(bias)


class Bias(nnx.Module):
    """A bias [D] of its own."""

    def __init__(self, width: int, dtype: jnp.dtype) -> None:
        self.bias = nnx.Param(jnp.zeros(width, dtype, out_sharding=P(None)))


class Experts(nnx.Module):
    """A sparse feed-forward part.

    Args:
      key: PRNG key of fresh weights.
      width: D.
      shape: the experts'.
      stddevs: of the initial kernels, into the hidden layers and out of them; the router has the first.
      dtype: of the parameters.

    Raises:
      UserError: the mesh's `expert` does not divide the experts, or `tensor` their width.
    """

    def __init__(
        self, key: jax.Array, width: int, shape: ExpertsShape, stddevs: tuple[float, float], dtype: jnp.dtype
    ) -> None:
        parallel = jax.sharding.get_abstract_mesh().shape["expert"]
        if shape.count % parallel:
            raise UserError(f"config.mesh.expert = {parallel} does not divide the model's {shape.count} experts")
        sharding.require_divisible(shape.width, "channels of an expert")
        keys = jax.random.split(key, 6)
        into, out_of = (shape.count, width, shape.width), (shape.count, shape.width, width)
        self.up = ExpertKernels(keys[0], INTO, into, stddevs[0], dtype, shape.up_bias)
        self.down = ExpertKernels(keys[1], OUT_OF, out_of, stddevs[1], dtype)
        if shape.gated:
            self.gate = ExpertKernels(keys[2], INTO, into, stddevs[0], dtype)
        if not shape.by_source:
            router = (("embed", width),), ((None, shape.count),)
            self.router = Linear(keys[3], *router, stddevs[0], dtype, use_bias=False)
        if shape.out_bias:
            self.out = Bias(width, dtype)
        if shape.shared_width:
            self.shared = Mlp(
                keys[4], width, shape.shared_width, shape.activation, stddevs, dtype, shape.gated, (False, False)
            )
            if shape.shared_gate:
                gate = (("embed", width),), ((None, 1),)
                self.shared_gate = Linear(keys[5], *gate, stddevs[0], dtype, use_bias=False)
        self.shape = shape

    def __call__(
        self, x: jax.Array, rows: Rows, options: ExpertOptions, noise: Noise | None, place: jax.Array
    ) -> tuple[jax.Array, Routed]:
        """Sends tokens through their experts.

        Args:
          x: [R, L, D].
          rows: where each text lies.
          options: how to compute.
          noise: what training adds; None elsewhere, where no expert chooses.
          place: the layer's first place of dropout.

        Returns:
          [R, L, D] in x's dtype, and what the router did.
        """
        shape = self.shape
        logits = probabilities = None
        if not shape.by_source:
            logits = self._logits(x)
            real = (rows.segment_ids > 0)[..., None]
            probabilities = jnp.where(real, jax.nn.softmax(logits), 0)
        choice = choose(probabilities, rows, shape, options.expert_choice and noise is not None)
        sums = sums_of(logits, probabilities, choice, rows, shape.count)
        kernels = Kernels(
            up=self.up.kernel[...],
            down=self.down.kernel[...],
            gate=self.gate.kernel[...] if shape.gated else None,
            up_bias=self.up.bias[...] if shape.up_bias else None,
        )
        y = apply_experts(x, choice, kernels, shape.activation, options)
        if shape.out_bias:
            y += self.out.bias[...].astype(y.dtype)
        if shape.shared_width:
            shared = self.shared(x, noise, place)
            if shape.shared_gate:
                shared *= jax.nn.sigmoid(self.shared_gate(x, sharding.STATES))
            y += shared
        return y, Routed(sums, probabilities if options.keep else None)

    def _logits(self, x: jax.Array) -> jax.Array:
        """Returns the router's logits, float32 [R, L, X]: in bfloat16 near ties would fall to other experts."""
        kernel = jax.sharding.reshard(self.router.kernel[...].astype(jnp.float32), P(None, None))
        highest, contracted = jax.lax.Precision.HIGHEST, (((2,), (0,)), ((), ()))
        states = x.astype(jnp.float32)
        return jax.lax.dot_general(states, kernel, contracted, precision=highest, out_sharding=sharding.STATES)
