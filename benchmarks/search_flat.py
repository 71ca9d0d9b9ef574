"""Exact search beside faiss' IndexFlatIP, taking turns: time, memory, and whether they find the same documents.

    python -m benchmarks.search_flat [--documents=1000000] [--queries=1000] [--width=384] [--k=100] [--rounds=3]
    python -m benchmarks.search_flat --documents=100000 --hnsw          (also usearch's HNSW: its time and its recall)

Random vectors of length 1, float32. Both use all cores. Times are medians after a first turn that warms up; memory is
what the peak of the process rises above the vectors themselves while a search is built and run for the first time:
faiss copies the vectors into its index, ours goes through them in blocks. Beside them stands the matrix product alone,
in the tiles of our search. On a machine where others run, look at the ratios. To a graph such as HNSW random directions
are the hardest vectors there are: texts' vectors are found far more often.
"""

import contextlib
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

from jaxembed.host_memory import keep_freed_memory

keep_freed_memory()  # before jax is imported, as in the command

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from jaxembed.vectors.exact import TILE, top_k
from jaxembed.vectors.indexes import Index, Plan, build

DOCUMENTS = flags.DEFINE_integer("documents", 1_000_000, "Documents.")
QUERIES = flags.DEFINE_integer("queries", 1000, "Queries.")
WIDTH = flags.DEFINE_integer("width", 384, "Dimensions.")
K = flags.DEFINE_integer("k", 100, "Documents of each query.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that each is measured.")
HNSW = flags.DEFINE_bool("hnsw", False, "Also usearch's HNSW.")
OURS, FAISS, PRODUCTS, GRAPH = "jaxembed", "faiss IndexFlatIP", "products alone", "usearch HNSW"

Found = tuple[np.ndarray, np.ndarray]


class Source:
    """Vectors that are in memory, for indexes."""

    def __init__(self, vectors_NxE: np.ndarray) -> None:
        self.vectors, self.width = vectors_NxE, vectors_NxE.shape[1]

    def __len__(self) -> int:
        return len(self.vectors)

    def blocks(self) -> Iterator[Found]:
        for start in range(0, len(self.vectors), 1 << 16):
            yield start, self.vectors[start : start + (1 << 16)]


def some_vectors(n: int, seed: int) -> np.ndarray:
    """Random directions, float32 [n, E]."""
    rng, vectors = np.random.default_rng(seed), np.empty((n, WIDTH.value), np.float32)
    for start in range(0, n, 1 << 16):
        part = vectors[start : start + (1 << 16)]
        part[:] = rng.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


@jax.jit
def _product(queries_QxE: jax.Array, documents_NxE: jax.Array) -> jax.Array:
    """Products in tiles, of each tile only the largest score."""
    tiles = documents_NxE.reshape(-1, TILE, documents_NxE.shape[1])
    product = lambda tile: jnp.dot(queries_QxE, tile.T, precision="highest").max(1)  # noqa: E731
    return jax.lax.map(product, tiles)


def products(queries_QxE: np.ndarray, documents_NxE: np.ndarray) -> None:
    """What no search by matrix products can go below: about, as it counts whole tiles only."""
    size = 64 * TILE
    for start in range(0, len(documents_NxE), size):
        block = documents_NxE[start : start + size]
        _product(queries_QxE, block[: len(block) // TILE * TILE]).block_until_ready()


@contextlib.contextmanager
def peak(into: dict[str, float], name: str) -> Iterator[None]:
    """Measures by how many MB the process' resident memory rises within (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    yield
    into[name] = _status("VmHWM") - before


def _status(field: str) -> float:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{field}:"))


def main(_: list[str]) -> None:
    documents, queries = some_vectors(DOCUMENTS.value, 0), some_vectors(QUERIES.value, 1)
    indexes: dict[str, Index] = {}
    memory, built, found = {}, {}, {}
    calls: dict[str, Callable[[], Found]] = {
        OURS: lambda: top_k(queries, documents, K.value),
        FAISS: lambda: indexes[FAISS].search(queries, K.value),
        PRODUCTS: lambda: products(queries, documents),
    }
    plans = {FAISS: Plan("faiss", "Flat", similarity="dot")}
    if HNSW.value:
        plans[GRAPH] = Plan("usearch", similarity="dot")
        calls[GRAPH] = lambda: indexes[GRAPH].search(queries, K.value)
    times = {name: [] for name in calls}
    for name, call in calls.items():
        with peak(memory, name):
            start = time.perf_counter()
            if name in plans:
                indexes[name] = build(plans[name], Source(documents))
                built[name] = time.perf_counter() - start
            found[name] = call()
    for _ in range(ROUNDS.value):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    _say(times, built, memory, found)


def _say(times: dict[str, list[float]], built: dict, memory: dict, found: dict) -> None:
    shape = f"{DOCUMENTS.value:,} x {WIDTH.value} documents, {QUERIES.value:,} queries, k = {K.value}"
    table = Table(title=f"Search among {shape}, {os.cpu_count()} cores")
    for column in (
        "",
        "built in s",
        "seconds",
        "fastest",
        "queries/s",
        "x faiss",
        "GFLOP/s",
        "memory MB",
        "same ids %",
    ):
        table.add_column(column, justify="right" if column else "left")
    flops, result = 2 * DOCUMENTS.value * WIDTH.value * QUERIES.value, {"load": os.getloadavg()[0]}
    for name, each in times.items():
        seconds, ratio = statistics.median(each), min(each) / min(times[FAISS])
        same = _same(found[name], found[OURS]) if found[name] else None
        table.add_row(
            name,
            f"{built[name]:.1f}" if name in built else "",
            f"{seconds:.2f}",
            f"{min(each):.2f}",
            f"{QUERIES.value / seconds:,.0f}",
            f"{ratio:.2f}",
            f"{flops / seconds / 1e9:,.0f}" if name != GRAPH else "",
            f"{memory[name]:,.0f}" if name != PRODUCTS else "",
            "" if same is None else f"{100 * same:.3f}",
        )
        figures = {"seconds": seconds, "fastest": min(each), "fastest_over_faiss": ratio, "memory_mb": memory[name]}
        result[name] = {key: round(value, 6) for key, value in (figures | {"same_ids": same or 0.0}).items()}
    Console(width=140).print(table)
    print(json.dumps(result))


def _same(ours: Found, theirs: Found) -> float:
    """Returns the part of a query's documents that the other has too, wherever in its ranking."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(ours[1], theirs[1])]))


if __name__ == "__main__":
    app.run(main)
