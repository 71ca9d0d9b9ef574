"""The sparse layer on TPUs, compiled ahead of time and never run: it multiplies what tokens take, and no more.

In a tier of its own, `make test-aot`: XLA's compiler for TPUs is a 200 MB download.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding

from jaxembed import sharding
from jaxembed.models.layers.dispatch import BIAS, INTO, OUT_OF, apply_experts
from jaxembed.models.layers.grouped import Kernels
from jaxembed.models.layers.routing import Choice, ExpertOptions

MESHES = {"data 4": (4, 1, 1, 1, 1), "expert 4": (1, 1, 1, 4, 1), "expert 2 x tensor 2": (1, 1, 2, 2, 1)}
ROWS, LENGTH, WIDTH, HIDDEN, TOP_K = 32, 512, 768, 2048, 2
ROOM = 1.25  # slots of a round, as a multiple of the items that there are on average


@functools.cache
def compile_layer(mesh: str, n_experts: int, dtype: str, gated: bool) -> jax.stages.Compiled:
    """Compiles the layer and its gradients for a TPU v5e of 2 x 2 chips."""
    sizes = MESHES[mesh]
    chips = topologies.make_mesh(topologies.get_topology_desc("v5e:2x2", "tpu"), sizes, sharding.AXES).devices
    on = jax.sharding.Mesh(chips, sharding.AXES, axis_types=(AxisType.Explicit,) * len(sharding.AXES))

    def array(dtype: str, names: tuple, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(on, sharding.spec(*names)))

    states = ("batch", "sequence", None)
    into = array("float32", INTO, n_experts, WIDTH, HIDDEN)
    kernels = Kernels(
        up=into,
        down=array("float32", OUT_OF, n_experts, HIDDEN, WIDTH),
        gate=into if gated else None,
        up_bias=None if gated else array("float32", BIAS, n_experts, HIDDEN),
    )

    def passes(x: jax.Array, weights: jax.Array, kernels: Kernels, experts: jax.Array, dy: jax.Array) -> tuple:
        f = lambda *args: apply_experts(  # noqa: E731
            args[0], Choice(experts, args[1], TOP_K), args[2], "silu", ExpertOptions(capacity=ROOM)
        )
        y, pull = jax.vjp(f, x, weights, kernels)
        return y, pull(dy)

    x, experts, weights = (
        array(kind, states, ROWS, LENGTH, n) for kind, n in ((dtype, WIDTH), ("int32", TOP_K), ("float32", TOP_K))
    )
    with jax.set_mesh(on):
        return jax.jit(passes).lower(x, weights, kernels, experts, x).compile()


CASES = [("data 4", "bfloat16", True), ("expert 4", "float32", False), ("expert 2 x tensor 2", "bfloat16", True)]


@pytest.mark.parametrize(("mesh", "dtype", "gated"), CASES)
def test_multiplies_what_tokens_take(mesh, dtype, gated):
    few, many = (compile_layer(mesh, n_experts, dtype, gated) for n_experts in (8, 64))
    _, _, tensor, expert, _ = MESHES[mesh]
    items = ROWS * LENGTH * TOP_K / (4 / tensor) * (ROOM if expert > 1 else 1)
    product = 2 * items * WIDTH * HIDDEN / tensor
    kernels = 3 if gated else 2
    for compiled in (few, many):
        # Each kernel three times, and those into the hidden layer once more where that is computed anew: in one program
        # the compiler may find that it is there already.
        assert 3 * kernels <= compiled.cost_analysis()["flops"] / product < 1.02 * (3 * kernels + kernels - 1)
    # Kernels lie in memory several times: in the dtype of the products, and their gradients. Tokens times experts in
    # any width would be far more.
    memory = [compiled.memory_analysis().temp_size_in_bytes for compiled in (few, many)]
    assert memory[1] - memory[0] < 3 * 4 * (64 - 8) // expert * kernels * WIDTH * HIDDEN // tensor
