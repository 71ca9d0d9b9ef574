"""The whole train step of each config on the TPU slices that it names, compiled ahead of time: bytes on each chip.

    make test-aot && JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 .venv-aot/bin/python -m benchmarks.step_tpu [--only=NAME]

XLA compiles it here, without a TPU, for the largest rung: every text at its longest. Nothing is run, and no weights are
read: shapes are those of benchmarks/real_shapes.py.
"""

import dataclasses
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from benchmarks.real_shapes import SHAPES, NoTokenizer, get_config
from jaxembed import config as config_lib
from jaxembed import model_source, sharding
from jaxembed.config import Config
from jaxembed.data.batch import Batch, PairShape, Rows, Texts
from jaxembed.data.rungs import worst_case_rows
from jaxembed.hf.architectures import architecture
from jaxembed.losses.objective import loss_params
from jaxembed.models.text_encoder import HeadConfig, split
from jaxembed.optimizer import make_optimizer
from jaxembed.step import init_state, make_step

# Machine → topology, bytes of a chip's memory that programs may use.
TPUS = {"v5e-16": ("v5e:4x4", 15.75e9), "v5p-64": ("v5p:4x4x4", 95.74e9)}
STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of a step on each chip.

    Attributes:
      state: bytes of what the step is given: trained state, frozen base, batch.
      temporaries: bytes of its temporaries, at their peak.
      rows: rows of a micro-batch. length: tokens in each.
      seconds: that the compilation took.
    """

    state: int
    temporaries: int
    rows: int
    length: int
    seconds: float


def compile_step(name: str, machine: str) -> Compiled:
    """Compiles the step of configs/NAME.py:MACHINE."""
    raw = get_config(name, machine)
    raw.data.train[0].path = "pairs.jsonl"
    raw.epochs, raw.steps, raw.model.unroll = 0.0, STEPS, 1
    config = config_lib.load(raw)
    blueprint = make_blueprint(name, config)
    topology, _ = TPUS[machine]
    mesh = make_mesh(config, topology)
    pair = PairShape(1, min(config.data.negatives, 1))  # of each record: a positive, and a hard negative where wanted
    with jax.set_mesh(mesh):
        factory = blueprint.factory(model_source.options(config.model), 0, blueprint.lora(config.model.lora))
        trained, base = split(factory.abstract())
        widths = factory.width, 0
        losses = jax.eval_shape(lambda: loss_params(config, *widths))
        optimizer = make_optimizer(config.optimizer, STEPS, {"model": trained, "loss": losses})
        state = jax.eval_shape(lambda model: init_state(config, optimizer, model, *widths), trained)
        batch = abstract_batch(config, pair, mesh)
        step = jax.jit(make_step(config, factory, optimizer, pair, STEPS), donate_argnums=0)
        begun = time.perf_counter()
        args = [jax.tree.map(lambda x: on(mesh, x), tree) for tree in (state, batch, {"base": base})]
        found = step.lower(*args).compile().memory_analysis()
    rows = batch.rows.tokens.shape
    return Compiled(
        found.argument_size_in_bytes, found.temp_size_in_bytes, rows[1], rows[2], time.perf_counter() - begun
    )


def make_blueprint(name: str, config: Config) -> model_source.Blueprint:
    """Returns the model of SHAPES with the config's attention and head; without a tokenizer."""
    model_type, shape = SHAPES[name]
    arch = architecture(model_type)
    hf_config = arch.with_attention(arch.fresh_hf_config(shape, NoTokenizer(), "shape"), (config.model.attention,))
    pooling = "mean" if config.model.pooling == "auto" else config.model.pooling
    expansion, projection = (3072, 768) if name == "embeddinggemma" else (0, config.model.projection)
    head = HeadConfig(pooling, config.model.pool_prompt, expansion=expansion, projection=projection)
    return model_source.Blueprint(hf_config, head, True, 512, {}, "", "cosine", 0, None, {})


def make_mesh(config: Config, topology: str) -> jax.sharding.Mesh:
    """Returns the config's mesh over the chips of a topology."""
    description = topologies.get_topology_desc(topology, "tpu")
    n = len(description.devices)
    sizes = [getattr(config.mesh, axis) for axis in sharding.AXES]
    sizes = [n // math.prod(s for s in sizes if s != -1) if size == -1 else size for size in sizes]
    chips = topologies.make_mesh(description, sizes, sharding.AXES).devices
    return jax.sharding.Mesh(chips, sharding.AXES, axis_types=(AxisType.Explicit,) * len(sharding.AXES))


def abstract_batch(config: Config, pair: PairShape, mesh: jax.sharding.Mesh) -> Batch:
    """Returns the shapes of a batch whose texts are all at their longest."""
    shards, micro = sharding.batch_shards(mesh), config.grad_cache
    length = int(config.data.row_length)
    longest = max(config.data.max_length.query, config.data.max_length.document)
    texts_per_bin = config.batch_size * pair.texts // (shards * micro)
    rows = worst_case_rows(texts_per_bin, length, longest) * shards

    def tokens(dtype: type) -> jax.ShapeDtypeStruct:
        sharded = NamedSharding(mesh, sharding.MICRO_ROWS)
        return jax.ShapeDtypeStruct((micro, rows, length), dtype, sharding=sharded)

    def texts(*shape: int) -> Texts:
        kinds = {"partners": np.int32, "weight": np.float32, "score": np.float32}
        fields = {f.name: kinds.get(f.name, np.int32) for f in dataclasses.fields(Texts)}
        sharded = NamedSharding(mesh, sharding.TEXTS)
        return Texts(
            **{
                name: jax.ShapeDtypeStruct((*shape, 1) if name == "partners" else shape, kind, sharding=sharded)
                for name, kind in fields.items()
            }
        )

    of_rows = {f.name: tokens(jnp.bool if f.name == "prompt_mask" else np.int32) for f in dataclasses.fields(Rows)}
    n = config.batch_size
    return Batch(Rows(**of_rows), texts(n), texts(n, pair.documents))


def on(mesh: jax.sharding.Mesh, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Lays an abstract array on the mesh itself."""
    spec = x.sharding.spec if x.sharding else P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def main(_: list[str]) -> None:
    table = Table(title="GB on each chip, every text at its longest; compiled, not run")
    for column in ("config", "machine", "rows x tokens", "state and batch", "temporaries", "chip", "seconds"):
        table.add_column(column, justify="right")
    result = {}
    for name in SHAPES:
        if flags.FLAGS.only and name != flags.FLAGS.only:
            continue
        for machine, (_, chip) in TPUS.items():
            found = compile_step(name, machine)
            sizes = (found.state, found.temporaries, chip)
            table.add_row(
                name,
                machine,
                f"{found.rows} x {found.length}",
                *(f"{size / 1e9:,.2f}" for size in sizes),
                f"{found.seconds:.0f}",
            )
            result[f"{name}:{machine}"] = {**dataclasses.asdict(found), "fits": sum(sizes[:2]) < chip}
    Console(width=120).print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    flags.DEFINE_string("only", "", "One config's name; '' = all.")
    app.run(main)
