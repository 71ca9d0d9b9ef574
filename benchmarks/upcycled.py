"""An encoder made sparse against its dense parent: the same pairs, steps and seeds; scores, loads of experts, time.

    python benchmarks/upcycled.py --model=FOLDER --steps=300 --seeds=0,1

Trains `configs/nomic_moe.py:minilm` and the same without experts on captions, questions and entailed sentences, and
prints a table. FOLDER is all-MiniLM-L6-v2, or any other BERT.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

import jax
from rich.console import Console
from rich.table import Table

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAIN = ("captions_train", "quora_duplicates", "nli_triplets")
STS, PAIRS = "sts/stsb-dev.jsonl.gz", "pairs/captions_val.jsonl.gz"
SCORES = ("eval/sts/stsb-dev", "eval/pairs/captions_val")
LAST = 20  # steps over which loads are averaged
KINDS = {
    "dense": [
        "--config.model.experts.upcycle=0",
        "--config.model.experts.every=1",
        "--config.optimizer.by_regex=()",
    ],
    "8 experts, top 2, every 2nd layer": [],
}


def run(options: argparse.Namespace, data: pathlib.Path, kind: str, seed: int, workdir: pathlib.Path) -> list[dict]:
    """Trains; returns the lines of metrics."""
    command = [
        *(sys.executable, "-m", "jaxembed.train", "--config=configs/nomic_moe.py:minilm", f"--workdir={workdir}"),
        f"--data={','.join(f'{data}/pairs/{name}.jsonl.gz' for name in TRAIN)}",
        *(f"--config.model.init=hf:{options.model}", f"--config.steps={options.steps}", f"--config.seed={seed}"),
        *(f"--config.eval.every={options.steps}", f"--config.eval.sts=('{data / STS}',)"),
        *(f"--config.eval.pairs=('{data / PAIRS}',)", "--config.export=False", "--config.log_to=()"),
        *KINDS[kind],
    ]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def told(lines: list[dict]) -> list[str]:
    """Returns what the table says of a run: scores, loss, loads, balance, speed."""
    first, last, end = lines[0], lines[-1], lines[-LAST:]
    scores = [f"{first[name]:.2f} → {last[name]:.2f}" for name in SCORES]
    loads, balance = "", ""
    if "router/load" in last:
        layers = zip(*(line["router/load"] for line in end))
        mean = [[statistics.mean(each) for each in zip(*layer)] for layer in layers]
        loads = f"{min(map(min, mean)):.2f} … {max(map(max, mean)):.2f}"
        balance = f"{statistics.mean(line['router/balance'] for line in end):.3f}"
    speed = statistics.median(line["pairs_per_s"] for line in lines[5:] if "pairs_per_s" in line)
    return [*scores, f"{statistics.mean(line['loss'] for line in end):.3f}", loads, balance, f"{speed:.0f}"]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", default="0")
    options = parser.parse_args()
    data = pathlib.Path(os.environ.get("JAXEMBED_DATA", ROOT.parent / "shared" / "data"))
    table = Table(title=f"{options.steps} steps of 128 pairs; jax {jax.__version__}, {platform.machine()}")
    for column in ("model", "seed", "STS-B dev", "captions nDCG@10", "loss", "loads", "balance", "pairs/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    with tempfile.TemporaryDirectory() as folder:
        for seed in map(int, options.seeds.split(",")):
            for i, kind in enumerate(KINDS):
                lines = run(options, data, kind, seed, pathlib.Path(folder) / f"{i}-{seed}")
                table.add_row(kind, str(seed), *told(lines))
    Console().print(table)


if __name__ == "__main__":
    main()
