"""Time and memory of a sparse feed-forward layer beside a dense one of the same active width, taking turns.

    python -m benchmarks.expert_layer [--tokens=4096] [--experts=8] [--gated] [--rounds=7]
    python -m benchmarks.expert_layer --tokens=65536 --width=1024 --hidden=2816 --dtype=bfloat16 --gated   (a GPU)

Forward and backward, with gradients of states and weights. The sparse layer is whole: its router, sorting, the experts'
products, and the sum by token. The dense one is k times as wide as an expert: what a token meets is the same. It is
there as our layer and as plain products over [T, D], of which XLA makes a faster backward pass on a CPU; the faster one
counts. Medians, and the ratio of the fastest turns, which other programs on the machine disturb less. Where the peak of
the device is known, also the share of it that the layer's own products reach (MFU: 3 x the forward pass, which does not
count that the hidden layer is computed twice).
"""

import json
import statistics
import time
from collections.abc import Callable

from jaxembed.host_memory import keep_freed_memory

keep_freed_memory()  # before jax is imported, as in training

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.data.batch import Rows
from jaxembed.hardware import chip_of
from jaxembed.models.layers.experts import Experts
from jaxembed.models.layers.mlp import Mlp
from jaxembed.models.layers.routing import ExpertOptions, ExpertsShape

TOKENS = flags.DEFINE_multi_integer("tokens", [4096, 8192], "Tokens; may be given several times.")
EXPERTS = flags.DEFINE_multi_integer("experts", [8, 16, 32, 64], "Experts; may be given several times.")
TOP_K = flags.DEFINE_integer("top_k", 2, "Experts that a token takes.")
WIDTH = flags.DEFINE_integer("width", 384, "D.")
HIDDEN = flags.DEFINE_integer("hidden", 1536, "F of an expert.")
GATED = flags.DEFINE_bool("gated", None, "Whether there are gates; both unless given.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the products.")
KERNEL = flags.DEFINE_enum("kernel", "auto", ["auto", "blocks", "ragged"], "Of the grouped products.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that each is measured.")
ROW = 128  # tokens in a row

STDDEVS = (0.02, 0.02)
DENSE, PLAIN = "dense", "dense, [T, D]"


def sparse(experts: int, gated: bool) -> tuple[nnx.Module, Callable]:
    """Returns the sparse layer, and (layer, states, rows) → states."""
    activation = "silu" if gated else "gelu"
    shape = ExpertsShape(experts, TOP_K.value, HIDDEN.value, True, activation, gated)
    options = ExpertOptions(kernel=KERNEL.value)
    layer = jax.jit(lambda: Experts(jax.random.key(0), WIDTH.value, shape, STDDEVS, jnp.float32))()
    return layer, lambda layer, x, rows: layer(x, rows, options, None, jnp.int32(0))[0]


def dense(gated: bool) -> tuple[nnx.Module, Callable]:
    """Returns the dense layer, and the same."""
    hidden, activation = TOP_K.value * HIDDEN.value, "silu" if gated else "gelu"
    settings = hidden, activation, STDDEVS, jnp.float32, gated, (False, False)
    layer = jax.jit(lambda: Mlp(jax.random.key(0), WIDTH.value, *settings))()
    return layer, lambda layer, x, _: layer(x, None, jnp.int32(0))


def plain(gated: bool) -> tuple[nnx.Module, Callable]:
    """Returns the dense layer's weights, and (weights, states, rows) → states by plain products."""
    layer, _ = dense(gated)

    def hidden(into: list[jax.Array]) -> jax.Array:
        return jax.nn.silu(into[1]) * into[0] if gated else jax.nn.gelu(into[0], approximate=False)

    def apply(layer: nnx.Module, x: jax.Array, _: Rows) -> jax.Array:
        x_TxD = x.reshape(-1, WIDTH.value)
        down, *into = (
            jax.sharding.reshard(linear.kernel[...].astype(x.dtype), P(None, None))
            for linear in (layer.down, layer.up, *([layer.gate] if gated else []))
        )
        return (jax.checkpoint(hidden)([x_TxD @ kernel for kernel in into]) @ down).reshape(x.shape)

    return layer, apply


def measure(tokens: int, gated: bool) -> dict[str | int, tuple[list[float], int]]:
    """Returns the times of each layer in seconds, and the bytes of its temporaries."""
    mesh = jax.sharding.get_mesh()
    numbers = sharding.put(np.ones((tokens // ROW, ROW), np.int32), mesh, sharding.ROWS)
    rows = Rows(numbers, segment_ids=numbers, positions=numbers, span_ids=numbers, prompt_mask=numbers)
    shape = *numbers.shape, WIDTH.value
    x = jax.random.normal(jax.random.key(1), shape, DTYPE.value, out_sharding=sharding.STATES)
    calls, memory = {}, {}
    for name in (DENSE, PLAIN, *EXPERTS.value):
        known = {DENSE: dense, PLAIN: plain}
        layer, apply = known[name](gated) if name in known else sparse(name, gated)

        def passes(layer: nnx.Module, x: jax.Array, rows: Rows, apply: Callable = apply) -> tuple:
            y, pull = jax.vjp(lambda layer, x: apply(layer, x, rows), layer, x)
            return y, pull(y)

        program = jax.jit(passes).lower(layer, x, rows).compile()
        calls[name] = lambda program=program, layer=layer: program(layer, x, rows)
        memory[name] = program.memory_analysis().temp_size_in_bytes
    times = {name: [] for name in calls}
    for turn in range(ROUNDS.value + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: (times[name], memory[name]) for name in calls}


def main(_: list[str]) -> None:
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)
    title = f"Sparse layer of {WIDTH.value} → {HIDDEN.value}, top-{TOP_K.value}, {DTYPE.value}, {device.device_kind}"
    table = Table(title=f"{title}: forward and backward, medians of {ROUNDS.value}")
    for column in ("tokens", "gated", "experts", "ms", "x dense", "x dense, fastest", "temporaries MB", "MFU %"):
        table.add_column(column, justify="right")
    result = {}
    for gated in (False, True) if GATED.value is None else (GATED.value,):
        for tokens in TOKENS.value:
            with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1), [device])):
                found = measure(tokens, gated)
            of_dense = min((found[name][0] for name in (DENSE, PLAIN)), key=statistics.median)
            for name, (times, memory) in found.items():
                seconds = statistics.median(times)
                flops = 3 * 2 * tokens * TOP_K.value * WIDTH.value * HIDDEN.value * (3 if gated else 2)
                ratio, fastest = seconds / statistics.median(of_dense), min(times) / min(of_dense)
                mfu = f"{100 * flops / seconds / chip.flops[DTYPE.value]:.1f}" if chip else "unknown"
                case = f"{tokens:,}", "yes" if gated else "", str(name)
                table.add_row(
                    *case, f"{seconds * 1e3:.1f}", f"{ratio:.2f}", f"{fastest:.2f}", f"{memory / 1e6:,.0f}", mfu
                )
                result[f"{name}_{'gated' if gated else 'plain'}_{tokens}"] = {
                    "seconds": round(seconds, 5),
                    "time_over_dense": round(ratio, 3),
                    "fastest_over_dense": round(fastest, 3),
                    "temporary_bytes": memory,
                }
    Console(width=120).print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
