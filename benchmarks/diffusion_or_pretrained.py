"""Is it diffusion, or is it pre-training? Embedders from one small decoder, further trained in several ways.

    python -m benchmarks.diffusion_or_pretrained [--seed=0 --seed=1] [--start=400] [--more=300] [--pairs=150]

A decoder learns the next token on plain texts; then it goes on with as many tokens of the same texts by each loss:
the next token, masked words, masked diffusion; then each becomes an embedder on the same pairs, one of them jointly
with denoising. Prints the scores, the bound of held-out texts' likelihood before and after, and how many masked words
of these the sampler restores; the last line is JSON. The data are looked for in $JAXEMBED_DATA; runs are kept in --out.
"""

import gzip
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

START = flags.DEFINE_integer("start", 400, "Steps of the next token, from scratch.", lower_bound=2)
MORE = flags.DEFINE_integer("more", 300, "Steps by each loss.", lower_bound=2)
PAIRS = flags.DEFINE_integer("pairs", 150, "Steps on pairs.", lower_bound=2)
TEXTS = flags.DEFINE_integer("texts", 64, "Texts of a step.")
WIDTH = flags.DEFINE_integer("width", 192, "Of the decoder.")
SEEDS = flags.DEFINE_multi_integer("seed", [0], "Seeds; may be given several times.")
OUT = flags.DEFINE_string("out", "", "A folder for the runs; '' = one that is removed.")

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLAIN = ("captions_train", "quora_duplicates", "nli_triplets", "wikisplit", "scitldr_train", "wordnet_example_gloss")
TRAIN = ("captions_train", "quora_duplicates", "nli_triplets")
STS, HELD_OUT_PAIRS = "sts/stsb-dev.jsonl.gz", ("pairs/captions_val.jsonl.gz", "pairs/scitldr_dev.jsonl.gz")
SCORES = ("eval/sts/stsb-dev", "eval/pairs/captions_val", "eval/pairs/scitldr_dev")
HELD_OUT = 1000  # texts
CAUSAL, BOTH = ("causal", "last"), ("bidirectional", "mean")
# Name → the loss that the decoder goes on with, how the embedder attends and pools, and its config.
ARMS: dict[str, tuple[str, tuple[str, str], str]] = {
    "next token; causal, last token": ("next_token", CAUSAL, "finetune_pairs"),
    "next token; then both ways, mean": ("next_token", BOTH, "finetune_pairs"),
    "masked words; mean": ("masked_lm", BOTH, "finetune_pairs"),
    "masked diffusion; mean": ("masked_diffusion", BOTH, "finetune_pairs"),
    "masked diffusion; jointly with denoising, mean": ("masked_diffusion", BOTH, "joint_denoising"),
}


def plain_texts(data: pathlib.Path) -> Iterator[str]:
    """Yields the texts that the decoder learns from."""
    with gzip.open(data / "corpus" / "english.txt.gz", "rt") as lines:
        yield from (line.strip() for line in lines if len(line.split()) > 5)
    for name in PLAIN:
        with gzip.open(data / "pairs" / f"{name}.jsonl.gz", "rt") as lines:
            for record in map(json.loads, lines):
                yield from {record["query"], record["positive"]}


def write_texts(data: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes texts.jsonl and held_out.jsonl, none of whose texts is in the other."""
    texts = sorted(set(plain_texts(data)))
    order = np.random.default_rng(0).permutation(len(texts))
    for name, chosen in (("held_out", order[:HELD_OUT]), ("texts", order[HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": texts[i]}) + "\n" for i in chosen))


def train(config: str, workdir: pathlib.Path, *flags_: str) -> list[dict[str, Any]]:
    """Trains; returns the lines of metrics."""
    command = [sys.executable, "-m", "jaxembed.train", f"--config={ROOT}/configs/{config}", f"--workdir={workdir}"]
    common = ["--config.log_to=()", "--config.model.unroll=1", "--config.model.dtype=float32", "--config.export=False"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([*command, *common, *flags_], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def pretrain(loss: str, folder: pathlib.Path, workdir: pathlib.Path, seed: int, start: str = "") -> list[dict]:
    """Trains by a loss over tokens, from scratch or from a run."""
    steps, rate = (MORE.value, 5e-4) if start else (START.value, 1e-3)
    shape = {"hidden_size": WIDTH.value, "num_hidden_layers": 4, "num_attention_heads": WIDTH.value // 32}
    given = [f"--config.model.init=run:{start}", "--config.tokenizer=auto"] if start else []
    if not start:
        sizes = shape | {"intermediate_size": 8 * WIDTH.value // 3 // 64 * 64, "max_position_embeddings": 512}
        given = [f"--config.model.shape.{name}={size}" for name, size in sizes.items()]
        given += ["--config.tokenizer=train:bpe:8192"]
    anneal = [f"--config.model.anneal_attention={steps // 5}"] if loss != "next_token" else []
    return train(
        f"pretrain_decoder.py:{loss}",
        workdir,
        f"--data={folder / 'texts.jsonl'}",
        *given,
        *anneal,
        *(f"--config.seed={seed}", f"--config.steps={steps}", f"--config.batch_size={TEXTS.value}"),
        *("--config.grad_cache=1", "--config.data.max_length.query=96", f"--config.optimizer.learning_rate={rate}"),
        *(f"--config.optimizer.warmup_steps={steps // 10}", f"--config.checkpoint.every={steps}"),
        *(f"--config.eval.every={steps}", f"--config.eval.texts=('{folder / 'held_out.jsonl'}',)"),
    )


def embed(arm: str, data: pathlib.Path, start: pathlib.Path, workdir: pathlib.Path, seed: int) -> list[dict]:
    """Makes an embedder of a run."""
    _, (attention, pooling), config = ARMS[arm]
    held_out = ",".join(f"'{data / name}'" for name in HELD_OUT_PAIRS)
    joint = ["--config.model.mask_token=", "--config.grad_cache=1", "--config.model.remat=none"]
    return train(
        f"{config}.py",
        workdir,
        f"--data={','.join(f'{data}/pairs/{name}.jsonl.gz' for name in TRAIN)}",
        *(joint if config == "joint_denoising" else ["--config.epochs=0.0"]),
        *(f"--config.model.init=run:{start}", f"--config.model.attention={attention}"),
        *(f"--config.model.pooling={pooling}", "--config.data.row_length=auto"),
        *(f"--config.seed={seed}", f"--config.steps={PAIRS.value}", f"--config.batch_size={TEXTS.value}"),
        *("--config.data.max_length.query=64", "--config.data.max_length.document=64"),
        *("--config.optimizer.learning_rate=3e-4", f"--config.optimizer.warmup_steps={PAIRS.value // 10}"),
        *(f"--config.eval.every={PAIRS.value}", f"--config.eval.sts=('{data / STS}',)"),
        f"--config.eval.pairs=({held_out})",
    )


def restored(run: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Fills masked words of held-out texts; returns the command's last line."""
    command = [sys.executable, "-m", "jaxembed.sample", f"--model={run}", f"--texts={folder / 'held_out.jsonl'}"]
    done = subprocess.run(
        [*command, "--mask_rate=0.15", "--show=3"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    print(done.stdout, file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run_seed(data: pathlib.Path, folder: pathlib.Path, seed: int) -> tuple[list[dict], list[dict]]:
    """Runs all arms; returns a line per arm, and a line per loss over tokens."""
    runs = folder / f"seed{seed}"
    first = pretrain("next_token", folder, runs / "start", seed)
    losses = [{"loss": "start: next_token", "seed": seed, **bound(first)}]
    for loss in dict.fromkeys(loss for loss, *_ in ARMS.values()):
        lines = pretrain(loss, folder, runs / loss, seed, start=str(runs / "start"))
        losses.append({"loss": loss, "seed": seed, **bound(lines)})
        if loss != "next_token":
            losses[-1] |= {"restored": restored(runs / loss, folder)}
        print(losses[-1], file=sys.stderr)
    arms = []
    for i, (arm, (loss, *_)) in enumerate(ARMS.items()):
        lines = embed(arm, data, runs / loss, runs / f"arm{i}", seed)
        scores = {score: (lines[0][score], lines[-1][score]) for score in SCORES}
        arms.append({"arm": arm, "seed": seed, **scores})
        print(arms[-1], file=sys.stderr)
    return arms, losses


def bound(lines: list[dict]) -> dict[str, Any]:
    """Returns the likelihood's figures before and after."""
    of = {
        name.removeprefix("eval/texts/held_out"): name for name in lines[-1] if name.startswith("eval/texts/held_out")
    }
    return {
        (short.strip("/") or "elbo"): [line[name] for line in (lines[0], lines[-1])] for short, name in of.items()
    } | {"tokens": sum(line["tokens"] for line in lines if "tokens" in line)}


def main(_: list[str]) -> None:
    """Runs the benchmark."""
    data = pathlib.Path(os.environ.get("JAXEMBED_DATA", ROOT.parent / "shared" / "data")).resolve()
    arms, losses = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(OUT.value or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        write_texts(data, folder)
        for seed in SEEDS.value:
            more_arms, more_losses = run_seed(data, folder, seed)
            arms, losses = arms + more_arms, losses + more_losses
    title = (
        f"{START.value} + {MORE.value} steps of texts, {PAIRS.value} of {TEXTS.value} pairs; jax {jax.__version__}, "
    )
    table = Table(title=title + platform.machine())
    for column in ("pre-trained by; embedder", *(score.removeprefix("eval/") for score in SCORES), "mean"):
        table.add_column(column, justify="left" if column.startswith("pre") else "right")
    for arm in ARMS:
        values = np.array([[line[score][1] for score in SCORES] for line in arms if line["arm"] == arm])
        cells = [f"{x.mean():.2f} ± {x.std():.2f}" for x in [*values.T, values.mean(1)]]
        table.add_row(arm, *cells)
    Console(width=140).print(table)
    print(json.dumps({"arms": arms, "losses": losses}))


if __name__ == "__main__":
    app.run(main)
