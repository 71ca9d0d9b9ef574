"""Time of the contrastive loss beside the matrix products that it must do, taking turns; medians.

    python -m benchmarks.loss_time [--batch=16384] [--width=768] [--rounds=5] [--precision=float32]

Value and gradient of InfoNCE over B queries and B documents. Whatever computes it without keeping the B x B scores
multiplies four times: scores, scores again in the backward pass, and two gradients. Here these are plain products of
B x B x E in the same precision, whole (as far as the memory allows) and in the loss's tiles; the faster of both counts.
The plain loss stands beside as far as its B x B matrices fit. On a GPU the fraction of the products' rate is what the
loss reaches of it.
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
WHOLE = 2**28  # scores that a plain product makes at a time

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


def products(vectors: Vectors, rows: int, columns: int) -> Vectors:
    """Four products of B x B x E, in tiles of rows x columns."""
    (queries, n), (documents, m) = ((x.astype(PRECISION.value), x.shape[0]) for x in vectors)
    queries, documents = queries.reshape(n // rows, rows, -1), documents.reshape(m // columns, columns, -1)

    def one_row_tile(d_documents: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one_tile(d_row: jax.Array, column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            document, d_document = column
            scores = _product(row, document.T).astype(PRECISION.value)
            again = _product(row, jax.lax.optimization_barrier(document).T).astype(PRECISION.value)
            return d_row + _product(scores, document), d_document + _product(again.T, row)

        d_row, d_documents = jax.lax.scan(one_tile, jnp.zeros(row.shape), (documents, d_documents))
        return d_documents, d_row

    d_documents, d_queries = jax.lax.scan(one_row_tile, jnp.zeros(documents.shape), queries)
    return d_queries.reshape(n, -1), d_documents.reshape(m, -1)


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
    shapes = {"whole": (min(batch, WHOLE // batch), batch), "in tiles": (min(batch, TILE.value),) * 2}
    calls = {
        name: functools.partial(jax.jit(products, static_argnums=(1, 2)), vectors, *shape)
        for name, shape in shapes.items()
    }
    calls["tiled"] = functools.partial(gradient(tiled), vectors, temperature)
    if 3 * 4 * batch**2 <= PLAIN_BYTES.value:
        calls["plain"] = functools.partial(gradient(plain), vectors, temperature)
    for call in calls.values():  # compiles
        seconds(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS.value):
        for name, call in calls.items():
            times[name].append(seconds(call))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {"products": min(medians[name] for name in shapes)}


def main(_: list[str]) -> None:
    what = f"InfoNCE and its gradient, width {WIDTH.value}, {PRECISION.value}"
    table = Table(title=f"{what}, {jax.devices()[0].device_kind}, medians of {ROUNDS.value}")
    for column in (
        "batch",
        "products, whole s",
        "in tiles s",
        "loss s",
        "loss / products",
        "TFLOP/s, loss",
        "plain loss s",
    ):
        table.add_column(column, justify="right")
    ratios = {}
    for batch in BATCH.value:
        times = measure(batch)
        ratios[batch] = times["tiled"] / times["products"]
        rate = 4 * 2 * batch**2 * WIDTH.value / times["tiled"] / 1e12
        plain_time = f"{times['plain']:.3f}" if "plain" in times else "does not fit"
        table.add_row(
            f"{batch:,}",
            f"{times['whole']:.3f}",
            f"{times['in tiles']:.3f}",
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
