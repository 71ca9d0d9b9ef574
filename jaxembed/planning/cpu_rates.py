"""What this machine's processor reaches, measured in two seconds: what an estimate of a step here is made of."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxembed.planning.hlo import Collective, Program
from jaxembed.planning.roofline import Rates

_ROWS, _LENGTH, _SORTS = 32, 128, 64
_SECONDS = 0.3  # of each measurement


def measure(width: int, heads: int, head_width: int, devices: int) -> Rates:
    """Returns what each of some virtual devices reaches while all are busy.

    Products are timed at the model's shapes, [4096, D] by [D, 4 D] and attention's, or those of Mamba-2. Memory is
    timed by a norm, an activation and their gradients, whose bytes are counted as a program's are: on a CPU such loops
    are slower than a copy, and these are what lies between a model's products.

    Args:
      width: D.
      heads: H.
      head_width: K.
      devices: how many share this machine.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        x, kernel = jnp.ones((_ROWS * _LENGTH, width)), jnp.ones((width, 4 * width))
        plain = 8 * x.size * width
        rates = {
            name: plain / _time(jnp.matmul, x.astype(dtype), kernel.astype(dtype))[0]
            for name, dtype in (("f32", jnp.float32), ("bf16", jnp.bfloat16))
        }
        heads_of_rows = jnp.ones((_ROWS, _LENGTH, heads, head_width))
        seconds, _ = _time(lambda q: jnp.einsum("rlhk,rmhk->rhlm", q, q), heads_of_rows)
        batched = 2 * heads_of_rows.size * _LENGTH / seconds / rates["f32"]
        seconds, program = _time(jax.grad(_between_products, (0, 1)), x @ kernel, x)
        memory = sum(work.count * work.bytes for work in program.work) / seconds
        launch = _time(_sorts, jnp.ones(8))[0] / _SORTS

    def network(collective: Collective) -> float:
        return 2 * collective.sent_bytes * devices / memory + launch

    flops = {name: rate / devices for name, rate in rates.items()}
    return Rates(flops, min(1.0, batched), memory / devices, launch * devices, network)


def _between_products(hidden: jax.Array, x: jax.Array) -> jax.Array:
    normed = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    return jnp.square(jax.nn.silu(hidden)).sum() + jnp.square(normed).sum()


def _sorts(x: jax.Array) -> jax.Array:
    for _ in range(_SORTS):  # which are not fused with one another
        x = jnp.sort(x) * 1.01
    return x


def _time(f: Any, *args: jax.Array) -> tuple[float, Program]:
    """Returns the median of the seconds that f takes, and its program."""
    compiled = jax.jit(f).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    seconds, end = [], time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        begun = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds), Program(compiled.as_text(), 1, _LENGTH)
