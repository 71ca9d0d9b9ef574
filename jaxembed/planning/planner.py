"""A config on a topology: its stages' steps compiled for the batches that matter, and what that takes."""

import dataclasses
import os
import pathlib
import tempfile
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np

from jaxembed import model_source
from jaxembed.blueprint import Blueprint
from jaxembed.config import Config
from jaxembed.data.batch import PairShape
from jaxembed.data.rungs import rung_for
from jaxembed.errors import UserError
from jaxembed.models.layers.ssm import Mamba2Shape
from jaxembed.planning import compiling, cpu_rates, roofline, shapes
from jaxembed.planning.compiling import Load, Model
from jaxembed.planning.hlo import Program
from jaxembed.planning.report import Planned
from jaxembed.planning.roofline import Rates
from jaxembed.planning.topology import Topology
from jaxembed.stages import stages_of
from jaxembed.training_data import open_data

MEMORY_SHARE = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # jax's names, the newer one first
_SAMPLED_STEPS = 64
_XLA_DTYPES = {"bfloat16": "bf16", "float32": "f32"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
      planned: a step for each stage and shape of batches: of each stage the largest, then where data were read the
        most frequent.
      assumptions: a line each.
    """

    planned: tuple[Planned, ...]
    assumptions: tuple[str, ...]


def plan(config: Config, topology: Topology, read_data: bool = False) -> Plan:
    """Compiles a config's steps for a topology, and estimates their times.

    Args:
      config: the run's. Without `read_data` the places of its data are not looked at.
      topology: where it is to run.
      read_data: whether the training data and the tokenizer are at hand, and tell how long texts are.

    Raises:
      UserError: a set-up that cannot be, a model that cannot be found, a compiler that is not installed.
    """
    mesh = topology.mesh(config.mesh)
    with tempfile.TemporaryDirectory() as folder:
        if read_data:
            blueprint, _ = model_source.open_source(config, pathlib.Path(folder))
        else:
            blueprint = shapes.adapted(shapes.open_shape(config.model.init, config), config)
    rates = None
    planned = []
    for stage in stages_of(config):
        model = compiling.open_model(stage.config, mesh, blueprint)
        if rates is None:
            rates = _rates(topology, mesh, model, blueprint)
        loads = _loads(stage.config, mesh, blueprint) if read_data else _longest(stage.config, mesh, blueprint)
        planned += [_planned(stage.name, model, load, topology, rates) for load in loads]
    return Plan(tuple(planned), tuple(_assumptions(config, topology, rates, planned, read_data)))


def chip_bytes(topology: Topology) -> int:
    """Returns the bytes of each device that programs may use."""
    if topology.chip is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // topology.shape[0]
    return int(topology.chip.memory_bytes * _share(topology))


def _share(topology: Topology) -> float:
    """Returns the part of a device's memory that jax takes."""
    said = next((os.environ[name] for name in MEMORY_SHARE if name in os.environ), "0.75")
    try:
        return float(said) if topology.chip.platform == "gpu" else 1.0
    except ValueError as error:
        raise UserError(f"{MEMORY_SHARE[0]}={said!r}: wants a part of a GPU's memory, such as 0.9") from error


def _longest(config: Config, mesh: jax.sharding.Mesh, blueprint: Blueprint) -> list[Load]:
    return [compiling.longest_load(config, mesh, blueprint.max_length)]


def _loads(config: Config, mesh: jax.sharding.Mesh, blueprint: Blueprint) -> list[Load]:
    """Returns the largest batches that the data can give, and the most frequent ones."""
    data = open_data(config, blueprint, mesh, {})
    plan, builder = data.plan, data.builder
    pair = PairShape(plan.positives, plan.negatives, plan.negative_queries)
    rungs = [rung_for(builder.layout(n).rows_needed, builder.rungs) for n in range(_SAMPLED_STEPS)]
    usual, times = Counter(rungs).most_common(1)[0]
    lengths = plan.step(rungs.index(usual)).lengths_BxT.reshape(-1)
    largest = np.full(lengths.size, plan.max_length)

    def load(name: str, rung: int, lengths: np.ndarray) -> Load:
        return Load(name, pair, rung * builder.shards, builder.row_length, lengths)

    longest = load("every text at its longest", builder.rungs[-1], largest)
    if usual == builder.rungs[-1]:
        return [dataclasses.replace(longest, name="all steps", lengths=lengths)]
    return [longest, load(f"usual ({times / _SAMPLED_STEPS:.0%} of steps)", usual, lengths)]


def _rates(topology: Topology, mesh: jax.sharding.Mesh, model: Model, blueprint: Blueprint) -> Rates:
    if topology.chip is None:
        return cpu_rates.measure(blueprint.backbone.width, *_heads(model, blueprint), topology.shape[0])
    return roofline.rates_of(topology.chip, mesh, topology.shape)


def _heads(model: Model, blueprint: Blueprint) -> tuple[int, int]:
    """Returns H and K of a step's many small products: attention's, else those of Mamba-2's mixers, else any."""
    if all(model.flops.heads):
        return model.flops.heads
    mixer = blueprint.backbone.mixer
    return (mixer.heads, mixer.head_width) if isinstance(mixer, Mamba2Shape) else (1, 64)


def _planned(stage: str, model: Model, load: Load, topology: Topology, rates: Rates) -> Planned:
    compiled = compiling.compile_step(model, load)
    chips, dtype = model.mesh.devices.size, model.config.model.dtype
    program = Program(compiled.text, chips, load.length) if compiled.text else None
    return Planned(
        stage=stage,
        load=load,
        pairs=model.config.batch_size,
        compiled=compiled,
        chips=chips,
        chip_bytes=chip_bytes(topology),
        peak_flops=topology.chip.flops[dtype] if topology.chip else rates.flops[_XLA_DTYPES[dtype]],
        model_flops=model.model_flops(load.lengths),
        program=program,
        estimate=roofline.estimate(program, rates) if program else None,
    )


def _assumptions(
    config: Config, topology: Topology, rates: Rates, planned: Sequence[Planned], read_data: bool
) -> list[str]:
    chip, lines = topology.chip, []
    if not read_data:
        pair = planned[0].load.pair
        lines.append(
            f"every record has {pair.documents} documents, and every text is as long as the config lets it be; give "
            "--data for those of your texts"
        )
        if config.model.init in {f"hf:{name}" for name in shapes.SHAPES}:
            lines.append("the model's shape is that of its public config.json, kept here; nothing was fetched")
    if chip is None:
        lines.append(
            f"measured here just now, of each of {topology.shape[0]} devices: float32 products "
            f"{rates.flops['f32'] / 1e9:,.0f} GFLOP/s, attention's {rates.of_batched:.0%} of that, norms and "
            f"activations {rates.memory / 1e9:,.1f} GB/s, an instruction {rates.launch * 1e6:.1f} µs; MFU is of these "
            "products"
        )
    else:
        dtype = config.model.dtype
        lines.append(
            f"{dtype} products reach {roofline.OF_PRODUCTS:.0%} of {chip.flops[dtype] / 1e12:,.0f} TFLOP/s, memory "
            f"{roofline.OF_MEMORY:.0%} of {chip.memory_bandwidth / 1e9:,.0f} GB/s, links {roofline.OF_LINKS:.0%} of "
            f"{chip.link_bandwidth / 1e9:,.0f} GB/s; an instruction costs {rates.launch * 1e6:.0f} µs; data sheets"
        )
    if chip and chip.platform == "gpu":
        lines += [
            f"jax takes {_share(topology):.0%} of the GPU's memory ({MEMORY_SHARE[0]})",
            "kernels are chosen without trying them out, and no cuBLAS or cuDNN: times and temporaries may differ",
        ]
    if config.teacher.init:
        lines.append("the teacher reads the model's own rows: with another tokenizer or other prompts it has its own")
    lines += [
        "an instruction takes the longer of its products and its memory traffic; instructions take turns",
        "collectives pass blocks round rings; those that are started early hide behind all other work",
        "attention kernels compute every block of a row; the XLA attention moves its scores through memory",
        "MFU counts the model's own operations on real tokens: no padding, no recomputation, no loss",
        "data, checkpoints and evaluation never hold a step up; what evaluation takes beside the state is not counted",
    ]
    if any(p.program.even_loops for p in planned if p.program):
        lines.append("tokens spread evenly over experts; where they do not, loops over them take more turns")
    loops = sum(p.program.uncounted_loops for p in planned if p.program)
    return lines + [f"{loops} loops whose length the program does not say count once"] * bool(loops)
