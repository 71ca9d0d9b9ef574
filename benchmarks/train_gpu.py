"""Training speed on a GPU: a Qwen3-0.6B-shaped model in bfloat16, all weights and LoRA, beside sentence-transformers.

    python -m benchmarks.train_gpu [--steps=30] [--batch=256] [--pairs=FILE] [--tiny]

Questions and answers of MedQuAD (or FILE) in packed rows of 512 tokens, with gradient caching. The peer trains the same
folder on the same pairs, in bfloat16, with CachedMultipleNegativesRankingLoss in chunks of as many texts; it pads. Each
engine has a process of its own, one after the other. Utilisation counts the operations of real tokens only, and no
recomputation, against a GPU's 989 TFLOP/s (H100 and H200 in dense bfloat16) and against what a large product reached in
this run. The last line is JSON. `--tiny` tries all of it in float32 on a CPU, with a small model.
"""

import argparse
import gzip
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console
from rich.table import Table

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # each engine's peak is its own
PEAK = 989e12
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
}
WARM_UP = 3
CHUNKS = 8  # micro-batches of a step
LORA = {"rank": 16, "alpha": 32.0}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def our_config(arguments: argparse.Namespace, scratch: str, init: str) -> Any:
    """Returns our config: 'scratch' makes the model that both train, 'hf:FOLDER' trains it."""
    from jaxembed import config as config_lib
    from jaxembed.planning.shapes import SHAPES

    c = config_lib.default_config()
    c.steps, c.batch_size, c.grad_cache = arguments.steps + WARM_UP, arguments.batch, CHUNKS
    c.data.train[0].path = arguments.pairs
    c.data.negatives, c.data.cache_dir = 0, f"{scratch}/cache"
    c.data.max_length.query = c.data.max_length.document = arguments.row_length
    c.data.row_length = str(arguments.row_length)
    c.model.init, c.model.pooling = init, "mean"
    if init == "scratch":
        c.model.arch, c.tokenizer = "qwen3", "train:bpe:8192"
        c.model.shape = TINY if arguments.tiny else dict(SHAPES["Qwen/Qwen3-0.6B-Base"].fields)
    c.model.attention = "bidirectional"
    if not arguments.tiny:
        c.model.dtype = "bfloat16"
    c.model.remat = "full"
    return c


def make_folder(pipe: Connection, arguments: argparse.Namespace, scratch: str) -> None:
    """Writes the model that all engines train."""
    import jax

    from jaxembed import config as config_lib
    from jaxembed import model_source, sharding
    from jaxembed.embedder import Embedder
    from jaxembed.models.options import ModelOptions

    config = config_lib.load(our_config(arguments, scratch, "scratch"))
    blueprint, load = model_source.open_source(config, pathlib.Path(scratch))
    factory, mesh = blueprint.factory(ModelOptions()), sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        Embedder(blueprint, factory, load(factory), mesh).save(f"{scratch}/model")
    pipe.send({})


def product_rate(pipe: Connection, arguments: argparse.Namespace, scratch: str) -> None:
    """Sends the operations a second of a large product."""
    import jax
    import jax.numpy as jnp

    n, dtype = (1024, jnp.float32) if arguments.tiny else (8192, jnp.bfloat16)
    a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    repeats = 20
    many = jax.jit(lambda a: jax.lax.fori_loop(0, repeats, lambda _, x: (a @ x) / math.sqrt(n), a))
    many(a).block_until_ready()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        many(a).block_until_ready()
        seconds.append((time.perf_counter() - begun) / repeats)
    pipe.send({"rate": 2 * n**3 / statistics.median(seconds), "device": jax.devices()[0].device_kind})


def ours(pipe: Connection, arguments: argparse.Namespace, scratch: str, lora: bool) -> None:
    """Trains with jaxembed and sends its figures."""
    import jax

    from benchmarks.our_trainer import OurTrainer
    from jaxembed import config as config_lib
    from jaxembed.models.flops import StepFlops

    c = our_config(arguments, scratch, f"hf:{scratch}/model")
    if lora:
        c.model.lora.update(LORA)
    config = config_lib.load(c)
    trainer = OurTrainer(config, pathlib.Path(scratch))
    trainer.compile()
    seconds, tokens, operations = [], [], []
    with jax.set_mesh(trainer.mesh):
        flops = StepFlops.of(trainer.blueprint, trainer.factory, trainer.blueprint.lora(config.model.lora))
    for step in range(arguments.steps + WARM_UP):
        lengths = trainer.data.plan.step(step).lengths_BxT
        begun = time.perf_counter()
        info = trainer.step()
        seconds.append(time.perf_counter() - begun)
        tokens.append(info.real_tokens)
        operations.append(flops.training(lengths))
    rates = [n / s for n, s in zip(tokens, seconds)][WARM_UP:]
    done = [n / s for n, s in zip(operations, seconds)][WARM_UP:]
    stats = jax.devices()[0].memory_stats() or {}
    pipe.send(
        {
            "tokens_per_s": statistics.median(rates),
            "pairs_per_s": arguments.batch / statistics.median(seconds[WARM_UP:]),
            "flops_per_s": statistics.median(done),
            "peak_bytes": stats.get("peak_bytes_in_use", 0),
            "padding_waste": 1 - trainer.real / trainer.padded,
            "tokens_per_pair": sum(tokens) / len(tokens) / arguments.batch,
        }
    )


def peer(pipe: Connection, arguments: argparse.Namespace, scratch: str, lora: bool) -> None:
    """Trains with sentence-transformers and sends its figures."""
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Clock(TrainerCallback):
        begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.begun)
            self.begun = time.perf_counter()

    with (gzip.open if arguments.pairs.endswith(".gz") else open)(arguments.pairs, "rt") as file:
        lines = [json.loads(line) for line in file]
    rows = Dataset.from_list([{"query": row["query"], "positive": row["positive"]} for row in lines])
    kind = {"dtype": "bfloat16"} if lora and not arguments.tiny else {}  # a frozen base is cast once, as ours
    device = "cpu" if arguments.tiny else "cuda"
    model = SentenceTransformer(f"{scratch}/model", device=device, model_kwargs=kind)
    model.max_seq_length = arguments.row_length
    if lora:
        from peft import LoraConfig, TaskType

        adapters = LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION,
            r=LORA["rank"],
            lora_alpha=LORA["alpha"],
            target_modules=LORA_TARGETS,
        )
        model.add_adapter(adapters)
    chunk = max(1, 2 * arguments.batch // CHUNKS)  # texts: as many as one of our micro-batches holds
    training = SentenceTransformerTrainingArguments(
        output_dir=f"{scratch}/peer",
        max_steps=arguments.steps + WARM_UP,
        per_device_train_batch_size=arguments.batch,
        learning_rate=2e-5,
        bf16=not arguments.tiny,
        use_cpu=arguments.tiny,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=10**6,
    )
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=chunk)
    SentenceTransformerTrainer(model=model, args=training, train_dataset=rows, loss=loss, callbacks=[Clock()]).train()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    pipe.send({"pairs_per_s": arguments.batch / statistics.median(seconds[WARM_UP:]), "peak_bytes": peak})


def in_process(work: Callable[..., None], *args: Any) -> dict[str, Any]:
    """Runs work(pipe, *args) in a fresh process and returns what it sends."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, *args))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise SystemExit(f"{work.__name__} {args[2:]} broke off: see above") from None
    finally:
        process.join()


def main() -> None:
    """Runs the benchmark and prints a table, and one JSON line last."""
    data = pathlib.Path(os.environ.get("JAXEMBED_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each")
    parser.add_argument("--batch", type=int, default=256, help="pairs in a batch")
    parser.add_argument("--row-length", type=int, default=512, help="tokens in a row, and in the longest text")
    parser.add_argument("--pairs", default=str(data / "pairs" / "medquad.jsonl.gz"), help="query and positive")
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU, to try the benchmark itself")
    parser.add_argument("--no-peer", action="store_true", help="jaxembed alone")
    arguments = parser.parse_args()
    if arguments.tiny:
        os.environ["JAX_PLATFORMS"] = "cpu"
    figures: dict[str, Any] = {"steps": arguments.steps, "batch": arguments.batch, "row_length": arguments.row_length}
    with tempfile.TemporaryDirectory() as scratch:
        in_process(make_folder, arguments, scratch)
        figures |= in_process(product_rate, arguments, scratch)
        for lora in (False, True):
            name = "lora" if lora else "full"
            figures[name] = mine = in_process(ours, arguments, scratch, lora)
            mine["mfu_of_peak"] = mine["flops_per_s"] / PEAK
            mine["mfu_of_product"] = mine["flops_per_s"] / figures["rate"]
            if not arguments.no_peer:
                figures[f"{name}_peer"] = theirs = in_process(peer, arguments, scratch, lora)
                theirs["tokens_per_s"] = theirs["pairs_per_s"] * mine["tokens_per_pair"]
                mine["ratio"] = mine["pairs_per_s"] / theirs["pairs_per_s"]
    title = f"{figures['device']}: a large product {figures['rate'] / 1e12:.1f} TFLOP/s"
    table = Table("", "real tokens/s", "pairs/s", "peak GB", "of 989 TFLOP/s", "of the product", "x peer", title=title)
    for name in ("full", "full_peer", "lora", "lora_peer"):
        if name in figures:
            row = figures[name]
            shares = [f"{row[key]:.1%}" if key in row else "" for key in ("mfu_of_peak", "mfu_of_product")]
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
            rates = f"{row['tokens_per_s']:,.0f}", f"{row['pairs_per_s']:.1f}", f"{row['peak_bytes'] / 1e9:.1f}"
            table.add_row(name.replace("_peer", ", sentence-transformers"), *rates, *shares, ratio)
    Console(width=120).print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
