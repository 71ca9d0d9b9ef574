"""Cost of a token against the length of its text: state-space backbones beside a transformer of the same width.

    python -m benchmarks.ssm_length [--longest=16384] [--longest_attention=4096] [--plot=docs/ssm_length.png]
    python -m benchmarks.ssm_length --width=1024 --layers=8 --dtype=bfloat16 --longest_attention=16384     (a GPU)

Forward and backward pass over rows of one text each, the same number of tokens at every length, all models and lengths
taking turns: medians of nanoseconds per token, and their ratio to the shortest. Memory is what the compiled program of
a single row needs beside its arguments. With --torch also transformers' MambaModel of the same shape, on the same
device. The last line is JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from jaxembed.host_memory import keep_freed_memory

keep_freed_memory()  # before jax is imported, as in training

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.data.batch import Rows
from jaxembed.models.layers.rope import RopeConfig
from jaxembed.models.layers.ssm import Mamba1Shape, Mamba2Shape, SsmOptions
from jaxembed.models.mamba import Mamba, MambaConfig
from jaxembed.models.options import ModelOptions
from jaxembed.models.transformer import Transformer, TransformerConfig

mpl.use("agg")

from matplotlib import pyplot as plt

SHORTEST = flags.DEFINE_integer("shortest", 512, "Tokens of the shortest texts.")
LONGEST = flags.DEFINE_integer("longest", 16384, "Tokens of the longest.")
LONGEST_ATTENTION = flags.DEFINE_integer("longest_attention", 4096, "Longest texts that the transformer is timed on.")
WIDTH = flags.DEFINE_integer("width", 256, "D.")
LAYERS = flags.DEFINE_integer("layers", 4, "Layers of the transformer; the others have twice as many.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that each is measured.")
CHUNK = flags.DEFINE_integer("chunk", 0, "Tokens in a chunk; 0 = the usual number.")
KERNEL = flags.DEFINE_enum("kernel", "auto", ["auto", "associative", "steps"], "Form of Mamba's scan.")
REMAT = flags.DEFINE_enum("remat", "none", ["none", "full"], "What the backward pass recomputes.")
ONLY = flags.DEFINE_string("only", "", "Only the model of this name.")
TORCH = flags.DEFINE_bool("torch", False, "Also transformers' MambaModel; its plain code on CPU takes minutes.")
PLOT = flags.DEFINE_string("plot", "", "A PNG with the curves.")
VOCAB = 1024


def makers() -> dict[str, Callable[[ModelOptions], Any]]:
    """Returns the backbones by name; two mixers have about as many parameters as attention with its MLP."""
    d, n = WIDTH.value, LAYERS.value
    mamba = {"vocab_size": VOCAB, "width": d, "layers": 2 * n}
    one, two = Mamba1Shape(2 * d, 16, -(-d // 16)), Mamba2Shape(2 * d // 64, 64, 128)
    rope = RopeConfig(64)
    transformer = TransformerConfig(VOCAB, d, n, d // 64, d // 64, 64, 3 * d, LONGEST.value, rope, rope)
    key = jax.random.key(0)
    return {
        "mamba": lambda options: Mamba(key, MambaConfig(**mamba, mixer=one), options),
        "mamba2": lambda options: Mamba(key, MambaConfig(**mamba, mixer=two), options),
        "transformer": lambda options: Transformer(key, transformer, options),
    }


def program(make: Callable, rows: int, length: int) -> tuple[Any, tuple]:
    """Compiles forward and backward pass over full rows; returns it with its arguments."""
    options = ModelOptions(dtype=DTYPE.value, unroll=1, remat=REMAT.value, ssm=SsmOptions(KERNEL.value, CHUNK.value))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, length)).astype(np.int32)
    numbers = np.repeat(np.arange(1, rows + 1, dtype=np.int32)[:, None], length, 1)
    places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    arrays = tokens, numbers, places, numbers, np.zeros((rows, length), bool)
    packed = Rows(*(sharding.put(x, jax.sharding.get_mesh(), sharding.ROWS) for x in arrays))
    model = jax.jit(lambda: make(options))()

    def passes(model: Any, packed: Rows) -> Any:
        return jax.grad(lambda model: jnp.square(model(packed).last.astype(jnp.float32)).mean())(model)

    return jax.jit(passes).lower(model, packed).compile(), (model, packed)


def measure() -> dict[str, dict[int, dict[str, float]]]:
    """Returns name → length → nanoseconds per token, bytes of a row's program."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    length = SHORTEST.value
    while length <= LONGEST.value:
        for name, make in makers().items():
            if ONLY.value not in ("", name):
                continue
            one, _ = program(make, 1, length)
            found.setdefault(name, {})[length] = {"row_bytes": one.memory_analysis().temp_size_in_bytes}
            if name != "transformer" or length <= LONGEST_ATTENTION.value:
                compiled, arguments = program(make, LONGEST.value // length, length)
                calls[name, length] = lambda f=compiled, arguments=arguments: jax.block_until_ready(f(*arguments))
        if TORCH.value:
            calls["mamba, transformers", length] = of_torch(LONGEST.value // length, length)
        print(f"compiled for {length:,} tokens", file=sys.stderr, flush=True)
        length *= 2
    for (name, length), seconds in timed(calls).items():
        found.setdefault(name, {}).setdefault(length, {})["ns_per_token"] = seconds / LONGEST.value * 1e9
    return found


def timed(calls: dict[tuple[str, int], Callable[[], Any]]) -> dict[tuple[str, int], float]:
    """Returns medians of seconds, of calls that take turns."""
    times: dict[tuple[str, int], list[float]] = {each: [] for each in calls}
    for turn in range(ROUNDS.value + 1):
        for each, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:  # the first one warms up
                times[each].append(time.perf_counter() - start)
        print(f"round {turn} of {ROUNDS.value}", file=sys.stderr, flush=True)
    return {each: statistics.median(seconds) for each, seconds in times.items()}


def of_torch(rows: int, length: int) -> Callable[[], None]:
    """Returns the same passes of transformers' model; with mamba_ssm's kernels where these are installed."""
    import torch
    from transformers import MambaConfig as TheirConfig
    from transformers import MambaModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"hidden_size": WIDTH.value, "num_hidden_layers": 2 * LAYERS.value, "state_size": 16, "vocab_size": VOCAB}
    model = MambaModel(TheirConfig(**sizes, use_cache=False)).to(device, getattr(torch, DTYPE.value)).train()
    tokens = torch.randint(0, VOCAB, (rows, length), device=device)

    def passes() -> None:
        model.zero_grad()
        model(tokens).last_hidden_state.float().square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return passes


def draw(found: dict[str, dict[int, dict[str, float]]], device: str) -> None:
    """Writes the curves."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, field, scale, what in (
        (axes[0], "ns_per_token", 1e-3, "µs per token, forward + backward"),
        (axes[1], "row_bytes", 1e-6, "MB of a row's program"),
    ):
        for name, by_length in found.items():
            points = [(length, scale * said[field]) for length, said in by_length.items() if field in said]
            if points:
                axis.plot(*zip(*points), marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens in a text")
        axis.set_ylabel(what)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.suptitle(f"Width {WIDTH.value}, {DTYPE.value}, {device}: {LONGEST.value:,} tokens at every length")
    figure.savefig(PLOT.value, dpi=110)


def main(_: list[str]) -> None:
    device = jax.devices()[0]
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1), [device])):
        found = measure()
    table = Table(title=f"Width {WIDTH.value}, {DTYPE.value}, {device.device_kind}, jax {jax.__version__}")
    for column in ("model", "tokens in a text", "µs per token", "x the shortest", "MB of one row", "x the shortest"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, by_length in found.items():
        first = by_length[SHORTEST.value]
        for length, said in by_length.items():
            cells = []
            for field, scale in (("ns_per_token", 1e-3), ("row_bytes", 1e-6)):
                if field in said:
                    cells += [f"{scale * said[field]:,.1f}", f"{said[field] / first[field]:.2f}"]
                else:
                    cells += ["", ""]
            table.add_row(name, f"{length:,}", *cells)
    Console(width=120).print(table)
    if PLOT.value:
        draw(found, device.device_kind)
    print(json.dumps(found))


if __name__ == "__main__":
    app.run(main)
