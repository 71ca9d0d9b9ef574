"""Experts that are not trained: of their kernels' gradients nothing is left in the compiled program.

The dispatch's backward pass makes them, in a scan of checkpointed layers and loops within; XLA is to leave them out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.models.layers.dispatch import INTO, OUT_OF, apply_experts
from jaxembed.models.layers.grouped import Kernels
from jaxembed.models.layers.routing import Choice, ExpertOptions
from jaxembed.planning.hlo import Program

LAYERS, ROWS, LENGTH, WIDTH, HIDDEN, EXPERTS, TOP_K = 2, 4, 16, 24, 40, 8, 2


def loss(scales, kernels, x, experts, weights):
    """As adapters see it: what is trained stands before frozen experts, in every layer."""

    def layer(x, own):
        kernels, scale = own
        choice = Choice(experts, weights, TOP_K)
        return x + apply_experts(x * scale, choice, kernels, "silu", ExpertOptions()), None

    return jnp.square(jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, (kernels, scales))[0]).sum()


@pytest.mark.parametrize("config", [MeshConfig(1), MeshConfig(1, 1, 1, 2)], ids=["1", "expert 2"])
def test_kernels_that_nobody_trains_have_no_gradient(config):
    rng = np.random.default_rng(0)
    n_devices = config.data * config.expert
    mesh = sharding.make_mesh(config, jax.devices()[:n_devices])
    with jax.set_mesh(mesh):

        def put(array, *spec):
            return jax.device_put(jnp.asarray(array), NamedSharding(mesh, P(*spec)))

        def kernel(names, *shape):
            array = rng.normal(size=(LAYERS, EXPERTS, *shape)) / np.sqrt(shape[0])
            return put(jnp.asarray(array, jnp.float32), None, *sharding.spec(*names))

        into = kernel(INTO, WIDTH, HIDDEN), kernel(INTO, WIDTH, HIDDEN)
        kernels = Kernels(into[0], kernel(OUT_OF, HIDDEN, WIDTH), into[1], None)
        x = put(np.float32(rng.normal(size=(ROWS, LENGTH, WIDTH))), *sharding.STATES)
        experts = put(np.int32(rng.random((ROWS, LENGTH, EXPERTS)).argsort(-1)[..., :TOP_K]), *sharding.STATES)
        weights = put(np.float32(rng.random((ROWS, LENGTH, TOP_K))), *sharding.STATES)
        args = put(np.float32([1.5, 0.5]), None), kernels, x, experts, weights
        alone = jax.jit(jax.grad(loss)).lower(*args).compile()
        both = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile()
        got, (want, d_kernels) = alone(*args), both(*args)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(d_kernels))
    # Three products forward, and backward the hidden layer's two anew, one into it, two out of it: of which only the
    # kernels' own three are left out.
    products = [
        sum(w.count * w.flops for w in Program(p.as_text(), n_devices, LENGTH).work if w.flops) for p in (alone, both)
    ]
    assert products[0] / products[1] == pytest.approx(8 / 11, rel=0.02)
    held = [p.memory_analysis().temp_size_in_bytes for p in (alone, both)]
    one_layer = 3 * 4 * EXPERTS // config.expert * WIDTH * HIDDEN
    assert held[1] - held[0] > 0.9 * one_layer
