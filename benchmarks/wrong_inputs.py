"""Tries wrong inputs, each as a command of its own, and the same commands corrected; writes docs/errors.md.

    python -m benchmarks.wrong_inputs

Every wrong one must leave with code 2 and one line, every corrected one with code 0. Takes some minutes.
"""

import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow.parquet
import tokenizers
from rich.console import Console
from rich.progress import track
from safetensors.numpy import load_file, save_file

from benchmarks.wrong_input_cases import CASES, SCRATCH, Case

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
WORDS = ["red", "green", "blue", "light", "dark", "stone", "river", "house", "tree", "bird", "cloud", "door", "road"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
STATES = {"hidden_size": 18, "num_hidden_layers": 1, "state_size": 4}
HYBRID = SHAPE | {"num_hidden_layers": 2, "num_key_value_heads": 2, "mamba_d_state": 4, "mamba_d_head": 8}

CONFIG = """from jaxembed.config import default_config

def get_config(arg=None):
    c = default_config()
    c.steps, c.batch_size = 2, 8
    c.model.arch, c.model.shape, c.tokenizer = "{arch}", {shape}, "file:{folder}/tokenizer.json"
    c.data.cache_dir = "{folder}/cache"
    return c
"""
STAGES = """import os, sys
sys.path.insert(0, os.path.dirname(__file__))
import scratch

def get_config(arg=None):
    c = scratch.get_config()
    further = {"mesh": {"mesh": {"data": 1}}, "typo": {"loss": {"temprature": 0.1}}}
    c.stages = ({"name": "weak"}, {"name": "hard", "steps": 3, **further.get(arg, {})})
    return c
"""


def main() -> None:
    """Runs all cases and writes the page."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prepare(folder)
        corrected: dict[tuple[str, ...], int] = {}
        rows = []
        for case in track(CASES, "Trying", console=console):
            code, output, seconds = run(command(case, case.wrong, folder), folder)
            right = command(case, case.right, folder)
            if right not in corrected:
                corrected[right], shown, _ = run(right, folder)
                if corrected[right]:
                    console.print(f"{case.what}, corrected: {corrected[right]}: {shown}")
            rows.append(
                (case, code, output.replace(f"{folder}/", "").replace(str(folder), "."), seconds, corrected[right])
            )
        subprocess.run(["umount", folder / "disk"], capture_output=True)
    good = [row for row in rows if row[1] == 2 and len(row[2].splitlines()) == 1 and row[4] == 0]
    PAGE.write_text(page(rows))
    for case, code, output, *_ in (row for row in rows if row not in good):
        console.print(f"[red]{case.what}[/]: code {code}: {output}")
    print(json.dumps({"wrong_inputs": len(rows), "one_line_code_2_and_corrected_code_0": len(good)}))


def command(case: Case, arguments: tuple[str, ...], folder: pathlib.Path) -> tuple[str, ...]:
    """Returns a command's arguments."""
    first = () if case.bare else SCRATCH
    # "{}" in an argument is the folder of the files.
    return (case.command, *(argument.replace("{}", str(folder)) for argument in (*first, *arguments)))


def run(arguments: tuple[str, ...], folder: pathlib.Path) -> tuple[int, str, float]:
    """Runs a command; returns its code, what it printed as an error, and its seconds."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    program = [sys.executable, "-m", f"jaxembed.{arguments[0]}", *arguments[1:]]
    start = time.perf_counter()
    result = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    # Before the error may come what any run says of its progress.
    *progress, last = result.stderr.splitlines() or [""]
    traceback = any("Traceback" in line for line in progress)
    return result.returncode, result.stderr if traceback else last, seconds


def prepare(folder: pathlib.Path) -> None:
    """Writes the files that the cases read, and trains a model for them."""
    rng = np.random.default_rng(0)
    sentence = lambda: " ".join(rng.choice(WORDS, 6))  # noqa: E731
    pairs = [{"query": sentence(), "positive": sentence()} for _ in range(40)]
    sts = [{"sentence1": sentence(), "sentence2": sentence(), "score": float(i)} for i in range(10)]
    lines = [json.dumps(row) for row in pairs]
    for name in ("empty", "mixed", "pairs", "beir", "disk"):
        (folder / name).mkdir()
    texts = {
        "pairs.jsonl": lines,
        "pairs/a.jsonl": lines,
        "mixed/a.jsonl": lines,
        "broken.jsonl": [*lines, '{"query": "a", "positive": "b"'],
        "blank.jsonl": [*lines, '{"query": "a", "positive": " "}'],
        "columns.jsonl": [json.dumps({"q": row["query"], "a": row["positive"]}) for row in pairs],
        "empty.jsonl": [],
        "sts.jsonl": list(map(json.dumps, sts)),
        "badsts.jsonl": [*map(json.dumps, sts), '{"sentence1": "a", "sentence2": "b", "score": "high"}'],
        "beir/corpus.jsonl": [json.dumps({"_id": f"d{i}", "text": row["positive"]}) for i, row in enumerate(pairs)],
        "beir/queries.jsonl": [json.dumps({"_id": f"q{i}", "text": row["query"]}) for i, row in enumerate(pairs)],
        "beir/qrels.tsv": ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(40))],
        "syntax.py": ["def get_config(:"],
        "raises.py": ["def get_config():", "    raise RuntimeError('no luck')"],
        **{
            f"{name}.py": CONFIG.format(folder=str(folder), arch=arch, shape=shape).splitlines()
            for name, arch, shape in (
                ("scratch", "bert", SHAPE),
                ("mamba", "mamba", STATES),
                ("bamba", "bamba", HYBRID),
            )
        },
        "stages.py": STAGES.splitlines(),
    }
    for name, content in texts.items():
        (folder / name).write_text("".join(f"{line}\n" for line in content))
    (folder / "latin.jsonl").write_bytes((folder / "pairs.jsonl").read_bytes() + '{"query": "é"}\n'.encode("latin-1"))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-20])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs), folder / "mixed" / "b.parquet")
    write_tokenizer(folder / "tokenizer.json")
    write_tokenizer(folder / "no_end.json", template="[CLS] $A")
    write_tokenizer(folder / "large.json", further=[f"word{i}" for i in range(1000)])
    code, output, _ = run(
        ("train", *(a.replace("{}", str(folder)) for a in SCRATCH), f"--workdir={folder}/done"), folder
    )
    if code:
        raise SystemExit(f"the run that all cases change does not train: {output}")
    masked = ("--config.loss.name=masked_diffusion", f"--workdir={folder}/words")
    code, output, _ = run(("train", *(a.replace("{}", str(folder)) for a in SCRATCH), *masked), folder)
    if code:
        raise SystemExit(f"the run that fills words in does not train: {output}")
    spoil_models(folder)
    # A disk of a few kilobytes, where the system lets us make one.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", folder / "disk"], capture_output=True)


def write_tokenizer(path: pathlib.Path, template: str = "[CLS] $A [SEP]", further: list[str] = ()) -> None:
    """Writes a tokenizer.json of whole words."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, *further])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [(token, vocabulary[token]) for token in SPECIAL]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=special)
    backend.save(str(path))


def spoil_models(folder: pathlib.Path) -> None:
    """Copies the exported model, whole and with one thing wrong each."""
    for name in ("model", "missing", "extra", "shape", "short", "unknown"):
        shutil.copytree(folder / "done" / "export", folder / name)
    tensors = load_file(folder / "model" / "model.safetensors")
    first, *rest = sorted(tensors)
    save_file({name: tensors[name] for name in rest}, folder / "missing" / "model.safetensors")
    save_file(tensors | {"surprise.weight": tensors[first]}, folder / "extra" / "model.safetensors")
    save_file(tensors | {first: tensors[first][..., :1].copy()}, folder / "shape" / "model.safetensors")
    whole = (folder / "model" / "model.safetensors").read_bytes()
    (folder / "short" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    hf_config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "unknown" / "config.json").write_text(json.dumps(hf_config | {"model_type": "sbert"}))


def page(rows: list[tuple]) -> str:
    """Returns docs/errors.md."""
    lines = [
        "# Wrong inputs, and what they print",
        "",
        "*Made by `python -m benchmarks.wrong_inputs`, which runs each of these commands, wrong and corrected.*",
        "",
        "A mistake of the user's ends with one line on standard error and exit code 2, before anything is",
        "written. What shows without a look at data or weights is said within three seconds.",
        "",
        "| mistake | given | printed | code | seconds | corrected |",
        "|---|---|---|---|---|---|",
    ]
    for case, code, output, seconds, corrected in rows:
        given = f"{case.command}: " + " ".join(case.wrong).replace("{}/", "")
        cells = (case.what, f"`{given}`", f"`{output}`", code, f"{seconds:.1f}", f"exit {corrected}")
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
