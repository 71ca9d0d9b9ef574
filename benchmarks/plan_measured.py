"""The planner's estimate of a step beside the measured step, on this machine's CPU.

    python -m benchmarks.plan_measured [--rounds=5]

The real trainer's steps on pairs of random words: the quickstart's model, a small decoder, an encoder of MiniLM's size
at three batch sizes. What the processor reaches is measured in turns with the steps, so that both see what else the
machine does; medians. Each case has a process of its own. A table, and one JSON line last: the ratios, which are to lie
within 1.5.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console
from rich.table import Table

os.environ["JAX_PLATFORMS"] = "cpu"
BERT = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
DECODER = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
}
QUICKSTART = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 256}
STEPS = 4  # in a round
# Architecture, shape, pairs in a batch, micro-batches.
CASES: dict[str, tuple[str, dict[str, int], int, int]] = {
    "quickstart's model, 256 pairs": ("bert", QUICKSTART, 256, 1),
    "small decoder, 64 pairs": ("qwen3", DECODER, 64, 1),
    "small decoder, 64 pairs in 4": ("qwen3", DECODER, 64, 4),
    "MiniLM's size, 16 pairs": ("bert", BERT, 16, 1),
    "MiniLM's size, 64 pairs": ("bert", BERT, 64, 1),
    "MiniLM's size, 128 pairs": ("bert", BERT, 128, 1),
}


def write_pairs(path: pathlib.Path, n: int = 2000) -> None:
    """Writes pairs of random words, queries of 4 … 12, positives of 10 … 60."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(3000)]
    with path.open("w") as file:
        for _ in range(n):
            query, positive = (" ".join(draw.choices(words, k=draw.randint(*span))) for span in ((4, 12), (10, 60)))
            file.write(json.dumps({"query": query, "positive": positive}) + "\n")


def run_case(pipe: Connection, name: str, rounds: int, scratch: str) -> None:
    """Sends estimate and measurement of a case."""
    from jaxembed.host_memory import keep_freed_memory

    keep_freed_memory()
    import jax

    from benchmarks.our_trainer import OurTrainer
    from jaxembed import config as config_lib
    from jaxembed.models.flops import StepFlops
    from jaxembed.planning import cpu_rates, roofline
    from jaxembed.planning.planner import plan
    from jaxembed.planning.topology import parse

    arch, shape, pairs, micro = CASES[name]
    c = config_lib.default_config()
    c.steps, c.batch_size, c.grad_cache = 1000, pairs, micro
    c.data.train[0].path, c.data.cache_dir = f"{scratch}/pairs.jsonl", f"{scratch}/cache"
    c.data.max_length.query = c.data.max_length.document = 128
    c.model.arch, c.model.shape, c.tokenizer, c.model.pooling = arch, shape, "train:bpe:4096", "mean"
    config = config_lib.load(c)
    planned = plan(config, parse("cpu:1"), read_data=True).planned[-1]
    trainer = OurTrainer(config, pathlib.Path(scratch))
    trainer.compile(steps=4)
    with jax.set_mesh(trainer.mesh):
        flops = StepFlops.of(trainer.blueprint, trainer.factory)
    seconds, estimates = [], []
    for _ in range(rounds):
        rates = cpu_rates.measure(trainer.blueprint.backbone.width, *flops.heads, 1)
        estimates.append(roofline.estimate(planned.program, rates).step)
        for _ in range(STEPS):
            begun = time.perf_counter()
            info = trainer.step()
            if info.rows_per_bin == planned.load.rows:
                seconds.append(time.perf_counter() - begun)
    pipe.send({"estimate": statistics.median(estimates), "measured": statistics.median(seconds)})


def in_process(name: str, rounds: int, scratch: str) -> dict[str, Any]:
    """Runs a case in a fresh process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run_case, args=(there, name, rounds, scratch))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise SystemExit(f"{name} broke off: see above") from None
    finally:
        process.join()


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    arguments = parser.parse_args()
    table = Table("", "estimate, s", "measured, s", "ratio", title="A step on this CPU")
    ratios = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_pairs(pathlib.Path(scratch) / "pairs.jsonl")
        for name in CASES:
            if arguments.only in name:
                found = in_process(name, arguments.rounds, scratch)
                ratios[name] = ratio = found["estimate"] / found["measured"]
                print(f"{name}: {found}", file=sys.stderr, flush=True)
                table.add_row(name, f"{found['estimate']:.3f}", f"{found['measured']:.3f}", f"{ratio:.2f}")
    Console(width=120).print(table)
    worst = max(max(ratio, 1 / ratio) for ratio in ratios.values())
    print(json.dumps({"ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}, "worst": round(worst, 3)}))


if __name__ == "__main__":
    main()
