"""The contrastive loss on 256 TPU chips, compiled ahead of time: bytes on each chip, and what travels between them.

    make test-aot && JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 .venv-aot/bin/python -m benchmarks.loss_tpu

Value and gradient of InfoNCE over B pairs with a hard negative each, width 1,024, for a TPU v5e of 16 x 16 chips. XLA
compiles it here, without a TPU, and says which instructions run in which order; nothing is run.
"""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
from absl import app
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from jaxembed import sharding
from jaxembed.losses.library import compute, describe

TOPOLOGY, CHIPS = "v5e:16x16", (16, 16, 1, 1, 1)  # chips along sharding.AXES
BATCH, DOCUMENTS, WIDTH = 2**16, 2, 1024
CASES = (
    ("gather", "float32", BATCH),
    ("gather", "bfloat16", BATCH),
    ("ring", "float32", BATCH),
    ("ring", "bfloat16", BATCH),
    ("ring", "float32", 16 * BATCH),
)
_ITEM_BYTES = {"pred": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """What chips send each other.

    Attributes:
      kind: such as 'all-gather'.
      shapes: of the arrays that a chip has after it, such as ('f32[512,1024]',).
      repeated: whether it stands in a loop.
      hidden: whether chips go on computing while it is under way.
      products: matrix products among what they compute then, each as one even if it is a loop of them.
    """

    kind: str
    shapes: tuple[str, ...]
    repeated: bool
    hidden: bool
    products: int

    @property
    def bytes(self) -> int:
        """Size of the arrays."""
        return sum(_bytes(shape) for shape in self.shapes)

    @property
    def of_vectors(self) -> bool:
        """Whether texts' vectors or their gradients travel, and not what the texts are to each other, or sums."""
        return any(shape.endswith(f",{WIDTH}]") for shape in self.shapes)


def compile_loss(exchange: str, precision: str, batch: int) -> jax.stages.Compiled:
    """Compiles value and gradient of InfoNCE over `batch` pairs for the chips of TOPOLOGY."""
    chips = topologies.make_mesh(topologies.get_topology_desc(TOPOLOGY, "tpu"), CHIPS, sharding.AXES).devices
    mesh = jax.sharding.Mesh(chips, sharding.AXES, axis_types=(AxisType.Explicit,) * len(sharding.AXES))

    def loss(queries_NxE: jax.Array, documents_NxDxE: jax.Array, temperature: jax.Array) -> jax.Array:
        texts = describe(queries_NxE, documents_NxDxE)
        return compute("infonce", texts, temperature=temperature, exchange=exchange, precision=precision)[0]

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        spec = P(sharding.BATCH, *(None,) * (len(shape) - 1)) if shape else P()
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        return program.lower(array(batch, WIDTH), array(batch, DOCUMENTS, WIDTH), array()).compile()


def memory(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Returns the bytes of a chip's inputs and gradients, and of its temporaries, at their peak."""
    found = compiled.memory_analysis()
    return found.argument_size_in_bytes + found.output_size_in_bytes, found.temp_size_in_bytes


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """Reads from the scheduled program what chips send each other, in the order of the text; scalars are left out."""
    multiplies: set[str] = set()  # computations with a matrix product; XLA writes what is called before what calls it

    def is_product(line: str) -> bool:
        called = re.findall(r"(?:calls|body)=%([\w.\-]+)", line)
        return bool(re.search(r" (dot|convolution)\(", line)) or not multiplies.isdisjoint(called)

    found = []
    for name, lines in _computations(compiled.as_text()).items():
        if any(is_product(line) for line in lines):
            multiplies.add(name)
        for i, line in enumerate(lines):
            match = re.search(rf"%([\w.\-]+) = (.+?) ({'|'.join(_KINDS)})(-start)?\(", line)
            if not match:
                continue
            result, types, kind, started = match.groups()
            shapes = re.findall(r"\w+\[[\d,]+\]", types)
            meanwhile = []
            if started:
                shapes = shapes[1:2]  # of what is sent, what comes, and flags
                done = next(j for j, other in enumerate(lines) if f"{kind}-done(%{result})" in other)
                meanwhile = lines[i + 1 : done]
            if shapes:
                products = sum(map(is_product, meanwhile))
                found.append(Collective(kind, tuple(shapes), name != "ENTRY", bool(started), products))
    return found


def _computations(text: str) -> dict[str, list[str]]:
    """Splits a program's text into its computations: name → instructions."""
    programs: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"(?:(ENTRY) )?%([\w.\-]+) \(.*\{$", line):
            programs[match[1] or match[2]] = lines = []
        elif programs and line.startswith("  "):
            lines.append(line)
    return programs


def _bytes(shape: str) -> int:
    kind, sizes = shape.rstrip("]").split("[")
    return _ITEM_BYTES[kind] * math.prod(map(int, sizes.split(",")))


def main(_: list[str]) -> None:
    title = f"InfoNCE and its gradient, {DOCUMENTS} documents a query, width {WIDTH}, {TOPOLOGY}"
    sizes = Table(title=f"{title}: MB on each chip")
    for column in ("exchange", "precision", "pairs", "inputs + gradients", "temporaries"):
        sizes.add_column(column, justify="right")
    sent = Table(title="What travels (in a loop: once for each of the other chips), and behind what it hides")
    for column in ("exchange", "precision", "pairs", "what", "arrays", "MB", "in a loop", "behind"):
        sent.add_column(column, justify="right")
    result = {}
    for exchange, precision, batch in CASES:
        case = exchange, precision, f"{batch:,}"
        compiled = compile_loss(exchange, precision, batch)
        held, temporaries = memory(compiled)
        sizes.add_row(*case, f"{held / 1e6:,.1f}", f"{temporaries / 1e6:,.1f}")
        result[f"{exchange} {precision} {batch}"] = {"inputs_and_gradients": held, "temporaries": temporaries}
        for c in collectives(compiled):
            hidden = f"products: {c.products}" if c.products else ("other work" if c.hidden else "nothing")
            loop = "yes" if c.repeated else ""
            sent.add_row(*case, c.kind, " ".join(c.shapes), f"{c.bytes / 1e6:,.2f}", loop, hidden)
    console = Console(width=120)
    console.print(sizes)
    console.print(sent)
    print(json.dumps({"chips": TOPOLOGY, "bytes": result}))


if __name__ == "__main__":
    app.run(main)
