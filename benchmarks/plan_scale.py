"""What a step of the plan costs over a thousand million records: time and memory.

    python -m benchmarks.plan_scale [--records=1000000000] [--step=1000000]

The lengths of the texts lie in a memory-mapped file (sparse, so it takes no room; a formula is added to the zeros it
reads as). All else that the plan reads is computed from the index. Timed, for each batch size, are first sights of
steps far into the run: which texts (plan), and where they lie (layout: dealt to 8 shards and packed). The last line is
JSON: `batch_ms` is plan and layout together for the smallest batch, the median of the steps; `rss_growth_mb` what the
process takes in the end beside the mapped pages of the file, and `peak_alloc_mb` the most that NumPy and Python held
during a step of the biggest batch; `mapped_mb` the pages touched, which the system can take back. Linux only (/proc).
"""

import argparse
import json
import mmap
import pathlib
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxembed.config import SourceConfig
from jaxembed.data.loader import lay_out
from jaxembed.data.plan import Plan

BATCHES = (1024, 4096, 8192)
STEPS = 7
SHARDS = 8
ROW_LENGTH = 128
LONGEST = 64


class Formula:
    """An array that is computed where it is read."""

    def __init__(self, of_index: Callable[[np.ndarray], np.ndarray]) -> None:
        self._of_index = of_index

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self._of_index(index)


class HugeCache:
    """Stands in for a token cache: a query and a positive in each record."""

    max_positives = 1
    max_negatives = 0
    negative_queries = False
    max_length = LONGEST

    def __init__(self, n_records: int, file: pathlib.Path) -> None:
        self.n_records = n_records
        with file.open("w+b") as handle:
            handle.truncate(2 * n_records * np.dtype(np.uint16).itemsize)
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)  # else each read drags in its neighbourhood
        on_disk = np.frombuffer(mapped, np.uint16)
        self.first_text = Formula(lambda record: 2 * record)
        self.n_positives = Formula(lambda record: np.ones(record.shape, np.uint16))
        self.lengths = Formula(lambda text: on_disk[text] + 5 + text * 7919 % (LONGEST - 4))


def resident_mb(field: str) -> float:
    """Reads a field of /proc/self/status: RssAnon, the process's own memory, or RssFile, mapped pages of files."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=10**9)
    parser.add_argument("--step", type=int, default=10**6)
    parser.add_argument("--dir", default=None, help="where the sparse file may lie; the system's default otherwise")
    args = parser.parse_args()

    results = []
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        cache = HugeCache(args.records, pathlib.Path(folder) / "lengths.bin")
        lay_out(Plan([cache], [SourceConfig()], batch_size=8, positives=1, negatives=0, seed=1).step(0), 8, ROW_LENGTH)
        own, mapped = resident_mb("RssAnon"), resident_mb("RssFile")
        for batch_size in BATCHES:
            plan = Plan([cache], [SourceConfig()], batch_size=batch_size, positives=1, negatives=0, seed=0)
            plan_ms, layout_ms = [], []
            for n in range(args.step, args.step + STEPS):
                start = time.perf_counter()
                step = plan.step(n)
                planned = time.perf_counter()
                lay_out(step, SHARDS, ROW_LENGTH)
                plan_ms.append(1000 * (planned - start))
                layout_ms.append(1000 * (time.perf_counter() - planned))
            results.append((batch_size, plan_ms[0], statistics.median(plan_ms), statistics.median(layout_ms)))
        own, mapped = resident_mb("RssAnon") - own, resident_mb("RssFile") - mapped
        tracemalloc.start()
        lay_out(plan.step(args.step), SHARDS, ROW_LENGTH)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()

    table = Table("pairs", "plan, first ms", "plan ms", "layout ms")
    for batch_size, *figures in results:
        table.add_row(f"{batch_size:,}", *(f"{figure:.1f}" for figure in figures))
    Console().print(table)
    figures = {
        "batch_ms": results[0][2] + results[0][3],
        "rss_growth_mb": own,
        "peak_alloc_mb": peak,
        "mapped_mb": mapped,
    }
    print(json.dumps({"records": args.records, **{name: round(value, 2) for name, value in figures.items()}}))


if __name__ == "__main__":
    main()
