"""Tries wrong inputs, each as a command of its own, and the same commands corrected; writes docs/errors.md.

    python -m benchmarks.wrong_inputs

Every wrong one must leave with code 2 and one line, every corrected one with code 0. Takes some minutes.
"""

import dataclasses
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

CONFIG = """from jaxembed.config import default_config

def get_config(arg=None):
    c = default_config()
    c.steps, c.batch_size = 2, 8
    c.model.arch, c.model.shape, c.tokenizer = "bert", {shape}, "file:{folder}/tokenizer.json"
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


@dataclasses.dataclass(frozen=True)
class Case:
    """A mistake.

    Attributes:
      what: it is, in a few words.
      wrong, right: arguments added to the command; a flag given twice counts as it is given last.
      command: 'train', on a tiny model and pairs, 'evaluate', 'export' …
      bare: the arguments are all there are.
    """

    what: str
    wrong: tuple[str, ...]
    right: tuple[str, ...] = ()
    command: str = "train"
    bare: bool = False


DENSE_BERT = ("--config.model.init=hf:{}/model", "--config.tokenizer=auto", "--config.model.arch=auto")
SCRATCH = ("--config={}/scratch.py", "--workdir={}/run", "--data={}/pairs.jsonl")
CASES = (
    Case("unknown flag", ("--wrokdir=x",)),
    Case("no config", ("--workdir={}/run",), right=SCRATCH, bare=True),
    Case("no workdir", (SCRATCH[0], SCRATCH[2]), right=SCRATCH, bare=True),
    Case("stray argument", ("now",)),
    Case("unknown config key", ("--config.bach_size=8",), ("--config.batch_size=8",)),
    Case("unknown nested key", ("--config.loss.temprature=0.1",), ("--config.loss.temperature=0.1",)),
    Case("text for a number", ("--config.batch_size=many",)),
    Case("fraction for a whole number", ("--config.batch_size=1.5",)),
    Case("neither true nor false", ("--config.export=perhaps",), ("--config.export=false",)),
    Case("index out of range", ("--config.data.train[7].path=x",)),
    Case("unknown choice", ("--config.model.pooling=maen",), ("--config.model.pooling=mean",)),
    Case("config file missing", ("--config=configs/nowhere.py",)),
    Case("config file with a syntax error", ("--config={}/syntax.py",)),
    Case("config file that raises", ("--config={}/raises.py",)),
    Case("unknown argument of a config", ("--config=configs/finetune_pairs.py:huge",)),
    Case("steps and epochs", ("--config.epochs=1.0",)),
    Case("temperature 0", ("--config.loss.temperature=0.0",)),
    Case("temperature of scores without bounds", ("--config.model.normalize=false",)),
    Case("unknown loss", ("--config.loss.name=infonse",), ("--config.loss.name=infonce",)),
    Case(
        "field that a loss does not take",
        ("--config.loss.name=cosent", "--config.loss.margin=0.1", "--data={}/sts.jsonl"),
        ("--config.loss.name=cosent", "--data={}/sts.jsonl"),
    ),
    Case("loss of scores, pairs without", ("--config.loss.name=cosent",), ("--config.loss.name=infonce",)),
    Case(
        "scores that are no cosines",
        ("--config.loss.name=cosine", "--data={}/sts.jsonl"),
        ("--config.loss.name=angle", "--data={}/sts.jsonl"),
    ),
    Case("triplets without a margin", ("--config.loss.name=triplet",)),
    Case(
        "loss of a teacher, without one",
        ("--config.loss.name=match",),
        ("--config.loss.name=match", "--config.teacher.init=hf:{}/model"),
    ),
    Case(
        "teacher that is nowhere",
        ("--config.loss.name=match", "--config.teacher.init=hf:{}/nowhere"),
        ("--config.loss.name=match", "--config.teacher.init=hf:{}/model"),
    ),
    Case("teacher that no loss uses", ("--config.teacher.init=hf:{}/model",)),
    Case("vectors cut to more than they have", ("--config.matryoshka.dims=(64,)",), ("--config.matryoshka.dims=(8,)",)),
    Case("part of a step above 1", ("--config.data.one_source=2.0",), ("--config.data.one_source=1.0",)),
    Case("batch of one pair", ("--config.batch_size=1",)),
    Case("micro-batches that do not divide the batch", ("--config.grad_cache=3",), ("--config.grad_cache=2",)),
    Case("more devices than there are", ("--config.mesh.fsdp=2",)),
    Case(
        "last-token pooling without an end token",
        ("--config.model.pooling=last", "--config.tokenizer=file:{}/no_end.json"),
    ),
    Case("an encoder made causal", ("--config.model.attention=causal",), ("--config.model.attention=bidirectional",)),
    Case(
        "attention that no folder can say",
        ("--config.model.arch=llama", "--config.model.attention=prefix"),
        ("--config.model.arch=llama", "--config.model.attention=prefix", "--config.export=false"),
    ),
    Case(
        "modes for more layers than there are",
        ("--config.model.arch=llama", "--config.model.attention_layers=('causal','bidirectional')"),
        ("--config.model.arch=llama", "--config.model.attention_layers=('bidirectional',)"),
    ),
    Case(
        "adapters to a model from scratch",
        ("--config.model.lora.rank=2",),
        ("--config.model.lora.rank=2", "--config.model.init=hf:{}/model", "--config.tokenizer=auto"),
    ),
    Case(
        "adapters to layers that are not there",
        (
            "--config.model.lora.rank=2",
            "--config.model.init=hf:{}/model",
            "--config.tokenizer=auto",
            "--config.model.lora.targets=q_proj",
        ),
        (
            "--config.model.lora.rank=2",
            "--config.model.init=hf:{}/model",
            "--config.tokenizer=auto",
            "--config.model.lora.targets=query",
        ),
    ),
    Case(
        "template without the text",
        ("--config.model.template=in one word",),
        ("--config.model.template=in one word: {text}",),
    ),
    Case(
        "heads that do not divide the width",
        ("--config.model.pooling=latent", "--config.model.latent_heads=5"),
        ("--config.model.pooling=latent", "--config.model.latent_heads=4", "--config.model.latents=8"),
    ),
    Case("layers that are not there", ("--config.model.pool_layers=9",), ("--config.model.pool_layers=0",)),
    Case(
        "tokenizer that transformers would not use",
        ("--config.model.arch=qwen2",),
        ("--config.model.arch=qwen3",),
    ),
    Case(
        "texts longer than the model takes",
        ("--config.data.max_length.query=600",),
        ("--config.data.max_length.query=30",),
    ),
    Case("rows shorter than a text", ("--config.data.row_length=4",), ("--config.data.row_length=64",)),
    Case("best checkpoint of nothing", ("--config.checkpoint.best=eval/sts/dev",)),
    Case("unknown optimizer", ("--config.optimizer.name=adamm",), ("--config.optimizer.name=lion",)),
    Case(
        "regex that matches nothing",
        ("--config.optimizer.by_regex=(('laier',0.0),)",),
        ("--config.optimizer.by_regex=(('layers',0.0),)",),
    ),
    Case("unknown architecture", ("--config.model.arch=bort",)),
    Case(
        "a token takes more experts than there are",
        (*DENSE_BERT, "--config.model.experts.upcycle=2", "--config.model.experts.top_k=3"),
        (*DENSE_BERT, "--config.model.experts.upcycle=2"),
    ),
    Case(
        "experts that the mesh does not divide",
        (*DENSE_BERT, "--config.model.experts.upcycle=6", "--config.mesh.data=1", "--config.mesh.expert=4"),
        (*DENSE_BERT, "--config.model.experts.upcycle=6", "--config.mesh.expert=1"),
    ),
    Case(
        "unknown routing of experts",
        (*DENSE_BERT, "--config.model.experts.upcycle=2", "--config.model.experts.routing=nearest"),
        (*DENSE_BERT, "--config.model.experts.upcycle=2", "--config.model.experts.routing=expert_choice"),
    ),
    Case("copies of a model from scratch", ("--config.model.experts.upcycle=2",)),
    Case("settings of experts without any", ("--config.model.experts.top_k=1",)),
    Case("routing weights of a dense model", ("--config.model.moee=sum", "--config.export=false")),
    Case("stage that changes the mesh", ("--config={}/stages.py:mesh",), ("--config={}/stages.py",)),
    Case("unknown key in a stage", ("--config={}/stages.py:typo",), ("--config={}/stages.py",)),
    Case("data file missing", ("--data={}/nowhere.jsonl",)),
    Case("glob without a match", ("--data={}/nowhere/*.jsonl",), ("--data={}/pair*.jsonl",)),
    Case("empty data file", ("--data={}/empty.jsonl",)),
    Case("folder of two kinds of files", ("--data={}/mixed",), ("--data={}/pairs",)),
    Case(
        "broken JSON line", ("--data={}/broken.jsonl",), ("--data={}/broken.jsonl", "--config.data.on_bad_record=skip")
    ),
    Case("empty text", ("--data={}/blank.jsonl",), ("--data={}/blank.jsonl", "--config.data.on_bad_record=skip")),
    Case("not UTF-8", ("--data={}/latin.jsonl",), ("--data={}/latin.jsonl", "--config.data.on_bad_record=skip")),
    Case(
        "other names of columns",
        ("--data={}/columns.jsonl",),
        (
            "--data={}/columns.jsonl",
            """--config.data.train[0].columns={'query': 'q', 'positive': 'a'}""",
        ),
    ),
    Case("gzip file cut short", ("--data={}/cut.jsonl.gz",)),
    Case("unknown tfds data set", ("--data=tfds:py_dokstrings",)),
    Case("data set that is on no disk", ("--data=hf:nobody/nothing",)),
    Case("unknown tokenizer", ("--config.tokenizer=train:wordpiece:500",), ("--config.tokenizer=train:bpe:500",)),
    Case("model folder missing", ("--config.model.init=hf:{}/nowhere",), ("--config.model.init=hf:{}/model",)),
    Case("model on no disk", ("--config.model.init=hf:nobody/nothing",), ("--config.model.init=hf:{}/model",)),
    Case("model folder without weights", ("--config.model.init=hf:{}/empty",), ("--config.model.init=hf:{}/model",)),
    Case("missing tensors", ("--config.model.init=hf:{}/missing",), ("--config.model.init=hf:{}/model",)),
    Case("tensors too many", ("--config.model.init=hf:{}/extra",), ("--config.model.init=hf:{}/model",)),
    Case("tensor of another shape", ("--config.model.init=hf:{}/shape",), ("--config.model.init=hf:{}/model",)),
    Case("weights cut short", ("--config.model.init=hf:{}/short",), ("--config.model.init=hf:{}/model",)),
    Case(
        "tokenizer larger than the weights' table",
        ("--config.model.init=hf:{}/model", "--config.tokenizer=file:{}/large.json"),
        ("--config.model.init=hf:{}/model",),
    ),
    Case(
        "unknown architecture in a folder", ("--config.model.init=hf:{}/unknown",), ("--config.model.init=hf:{}/model",)
    ),
    Case("run without a checkpoint", ("--config.model.init=run:{}/empty",), ("--config.model.init=run:{}/done",)),
    Case("step that was not kept", ("--config.model.init=run:{}/done@1",), ("--config.model.init=run:{}/done@2",)),
    Case("workdir of another config", ("--workdir={}/done", "--config.seed=7"), ("--workdir={}/done",)),
    Case("workdir that is a file", ("--workdir={}/pairs.jsonl",)),
    Case("cache folder that is a file", ("--config.data.cache_dir={}/pairs.jsonl",)),
    Case("logger that is not installed", ("--config.log_to=('wandb',)",), ("--config.log_to=()",)),
    Case("full disk while saving", ("--workdir={}/disk/run",)),
    Case(
        "evaluation file missing",
        ("--config.eval.every=1", "--config.eval.sts=('nowhere.jsonl',)"),
        ("--config.eval.every=1", "--config.eval.sts=('{}/sts.jsonl',)"),
    ),
    Case(
        "nothing to evaluate on",
        ("--model={}/model",),
        ("--model={}/model", "--sts={}/sts.jsonl"),
        "evaluate",
        bare=True,
    ),
    Case("no model", ("--sts={}/sts.jsonl",), ("--model={}/model", "--sts={}/sts.jsonl"), "evaluate", bare=True),
    Case(
        "score that is no number",
        ("--model={}/model", "--sts={}/badsts.jsonl"),
        ("--model={}/model", "--sts={}/sts.jsonl"),
        "evaluate",
        bare=True,
    ),
    Case(
        "folder without judgements",
        ("--model={}/model", "--retrieval={}/empty"),
        ("--model={}/model", "--retrieval={}/beir"),
        "evaluate",
        bare=True,
    ),
    Case(
        "unknown MTEB task",
        ("--model={}/model", "--mteb=STSBenchmrk"),
        ("--model={}/model", "--sts={}/sts.jsonl"),
        "evaluate",
        bare=True,
    ),
    Case("export to nowhere", ("--workdir={}/done",), ("--workdir={}/done", "--out={}/out"), "export", bare=True),
    Case(
        "export over something else",
        ("--workdir={}/done", "--out={}/beir"),
        ("--workdir={}/done", "--out={}/out"),
        "export",
        bare=True,
    ),
    Case(
        "adapters of a run that has none",
        ("--workdir={}/done", "--out={}/out", "--adapter"),
        ("--workdir={}/done", "--out={}/out", "--dtype=bfloat16"),
        "export",
        bare=True,
    ),
    Case(
        "unknown type of numbers",
        ("--workdir={}/done", "--out={}/out", "--dtype=int8"),
        ("--workdir={}/done", "--out={}/out", "--dtype=bfloat16"),
        "export",
        bare=True,
    ),
    Case(
        "unknown template",
        ("--model={}/model", "--sts={}/sts.jsonl", "--template=prompt_eal"),
        ("--model={}/model", "--sts={}/sts.jsonl", "--template=prompt_eol"),
        "evaluate",
        bare=True,
    ),
    Case("folder without a fingerprint", ("--verify={}/beir",), ("--verify={}/model",), "export", bare=True),
    Case("report of no run", ("--workdir={}/empty",), ("--workdir={}/done",), "report", bare=True),
)


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
        "scratch.py": CONFIG.format(folder=str(folder), shape=SHAPE).splitlines(),
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
