"""Time of the contrastive loss beside the matrix products that it must do, taking turns; medians.

    python -m benchmarks.loss_time [--batch=16384] [--width=768] [--rounds=5] [--precision=float32]

Value and gradient of InfoNCE over B queries and B documents. Whatever computes it without keeping the B x B scores
multiplies four times: scores, scores again in the backward pass, and two gradients. Here these are one plain product
each, of B x B x E, in the same precision, in slices that fit the memory. The plain loss stands beside as far as its
B x B matrices fit. On a GPU the fraction of the products' rate is what the loss reaches of it.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags
from rich.console import Console
from rich.table import Table

from jaxembed.losses.library import compute, describe

BATCH = flags.DEFINE_multi_integer("batch", [16_384], "B, queries and documents; may be given several times.")
WIDTH = flags.DEFINE_integer("width", 768, "E, of the vectors.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Times that each is measured.")
PRECISION = flags.DEFINE_enum("precision", "float32", ["float32", "bfloat16"], "Of the products' factors.")
TILE = flags.DEFINE_integer("tile", 2048, "Edge of the loss's tiles.")
PLAIN_BYTES = flags.DEFINE_float("plain_bytes", 5e9, "Memory that the plain loss's matrices may take.")
SLICE_SCORES = 2**28  # scores that a plain product makes at a time

Vectors = tuple[jax.Array, jax.Array]


def tiled(vectors: Vectors, temperature: jax.Array) -> jax.Array:
    """The loss of this package."""
    queries_NxE, documents_NxE = vectors
    texts = describe(queries_NxE, documents_NxE[:, None])
    return compute("infonce", texts, temperature=temperature, precision=PRECISION.value, tile=TILE.value)[0]


def plain(vectors: Vectors, temperature: jax.Array) -> jax.Array:
    """The formula as it stands in papers, with its B x B matrix."""
    queries_NxE, documents_NxE = (x.astype(PRECISION.value) for x in vectors)
    scores = _product(queries_NxE, documents_NxE.T) / temperature
    return (jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores)).mean()


def products(vectors: Vectors) -> Vectors:
    """Four products of B x B x E, a slice of rows at a time, so that no B x B matrix is held."""
    queries_NxE, documents_NxE = (x.astype(PRECISION.value) for x in vectors)

    def rows(d_documents: jax.Array, some_SxE: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores_SxN = _product(some_SxE, documents_NxE.T)
        again_SxN = _product(some_SxE, jax.lax.optimization_barrier(documents_NxE).T)
        scores_SxN, again_SxN = (x.astype(PRECISION.value) for x in (scores_SxN, again_SxN))
        return d_documents + _product(again_SxN.T, some_SxE), _product(scores_SxN, documents_NxE)

    n, width = queries_NxE.shape
    slices = queries_NxE.reshape(-1, min(n, max(1, SLICE_SCORES // n)), width)
    d_documents, d_queries = jax.lax.scan(rows, jnp.zeros(documents_NxE.shape), slices)
    return d_queries, d_documents


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision="highest", preferred_element_type=jnp.float32)


def seconds(f: Callable, *args: jax.Array | Vectors) -> float:
    """Returns the time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    return time.perf_counter() - start


def measure(batch: int) -> dict[str, float]:
    """Returns medians of seconds, by what was measured."""
    keys = jax.random.split(jax.random.key(0))
    vectors = tuple(jax.random.normal(key, (batch, WIDTH.value)) for key in keys)
    vectors = tuple(x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in vectors)
    gradient = lambda loss: jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))  # noqa: E731
    temperature = jnp.float32(0.05)
    calls = {
        "products": functools.partial(jax.jit(products), vectors),
        "tiled": functools.partial(gradient(tiled), vectors, temperature),
    }
    if 3 * 4 * batch**2 <= PLAIN_BYTES.value:
        calls["plain"] = functools.partial(gradient(plain), vectors, temperature)
    for call in calls.values():  # compiles
        seconds(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS.value):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values) for name, values in times.items()}


def main(_: list[str]) -> None:
    what = f"InfoNCE and its gradient, width {WIDTH.value}, {PRECISION.value}"
    table = Table(title=f"{what}, {jax.devices()[0].device_kind}, medians of {ROUNDS.value}")
    for column in ("batch", "four products s", "tiled s", "tiled / products", "TFLOP/s, tiled", "plain s"):
        table.add_column(column, justify="right")
    ratios = {}
    for batch in BATCH.value:
        times = measure(batch)
        ratios[batch] = times["tiled"] / times["products"]
        rate = 4 * 2 * batch**2 * WIDTH.value / times["tiled"] / 1e12
        plain_time = f"{times['plain']:.3f}" if "plain" in times else "does not fit"
        table.add_row(
            f"{batch:,}",
            f"{times['products']:.3f}",
            f"{times['tiled']:.3f}",
            f"{ratios[batch]:.3f}",
            f"{rate:.3f}",
            plain_time,
        )
    Console(width=120).print(table)
    result = {f"time_over_matmuls_{batch // 1024}k": round(ratio, 4) for batch, ratio in ratios.items()}
    result |= {f"fraction_of_rate_{batch // 1024}k": round(1 / ratio, 4) for batch, ratio in ratios.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
