"""Peak memory of the contrastive loss, tiled and plain, by batch size: what XLA says of the compiled programs.

    python -m benchmarks.loss_memory

Value and gradient of InfoNCE over B queries and B documents of width 1,024 in float32, on one device and on eight.
Nothing is run, so that the largest batch needs no memory here. `inputs + gradients` are the vectors and what comes
back; all else that the program needs at its peak are temporaries.
"""

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.losses.library import compute, describe

WIDTH = flags.DEFINE_integer("width", 1024, "E, of the vectors.")
BATCHES = [2**k for k in range(10, 19)]


def tiled(queries_NxE: jax.Array, documents_NxE: jax.Array, temperature: jax.Array) -> jax.Array:
    """The loss of this package."""
    return compute("infonce", describe(queries_NxE, documents_NxE[:, None]), temperature=temperature)[0]


def plain(queries_NxE: jax.Array, documents_NxE: jax.Array, temperature: jax.Array) -> jax.Array:
    """The formula as it stands in papers, with its B x B matrix."""
    axis = jax.typeof(queries_NxE).sharding.spec[0]
    everyone = jax.sharding.reshard(documents_NxE, P(None, None))
    scores = jnp.dot(queries_NxE, everyone.T, precision="highest", out_sharding=P(axis, None)) / temperature
    own = jnp.einsum("ne,ne->n", queries_NxE, documents_NxE, precision="highest") / temperature
    return (jax.nn.logsumexp(scores, axis=1) - own).mean()


def compiled_bytes(loss: Callable, batch: int, devices: int) -> tuple[int, int]:
    """Returns the bytes of a device's inputs and gradients, and of its temporaries, at their peak."""
    mesh = sharding.make_mesh(MeshConfig(devices), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        vectors = jax.ShapeDtypeStruct((batch, WIDTH.value), jnp.float32, sharding=_on(mesh, P(sharding.BATCH, None)))
        temperature = jax.ShapeDtypeStruct((), jnp.float32, sharding=_on(mesh, P()))
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(vectors, vectors, temperature)
        memory = program.compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes, memory.temp_size_in_bytes


def _on(mesh: jax.sharding.Mesh, spec: P) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, spec)


def main(_: list[str]) -> None:
    table = Table(title=f"InfoNCE and its gradient, width {WIDTH.value}, float32: MB on each device, by XLA's account")
    for column in ("batch", "devices", "inputs + gradients", "temporaries, tiled", "bound", "temporaries, plain"):
        table.add_column(column, justify="right")
    by_batch: dict[str, dict[str, float]] = {}
    for devices in (1, 8):
        for batch in BATCHES:
            held, temporaries = compiled_bytes(tiled, batch, devices)
            _, matrix = compiled_bytes(plain, batch, devices)
            bound = 1.5 * held + 256e6
            row = {
                "inputs_and_gradients": held,
                "tiled": temporaries,
                "plain": matrix,
                "within_bound": temporaries <= bound,
            }
            by_batch[f"{batch} on {devices}"] = row
            shown = (held, temporaries, bound, matrix)
            table.add_row(f"{batch:,}", str(devices), *(f"{x / 1e6:,.1f}" for x in shown))
    Console(width=120).print(table)
    at_64k = by_batch[f"{2**16} on 1"]
    print(json.dumps({"plain_over_tiled_bytes_64k": at_64k["plain"] / at_64k["tiled"], "bytes_by_batch": by_batch}))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    app.run(main)
