"""The train step of a config, compiled for devices that need not be there: the trainer's own step, mesh and shapes."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxembed import model_source, sharding
from jaxembed.blueprint import Blueprint
from jaxembed.config import AUTO, Config
from jaxembed.data.batch import Batch, PairShape, Rows, Texts
from jaxembed.data.rungs import worst_case_rows
from jaxembed.errors import UserError
from jaxembed.losses.table import LOSSES, NEGATIVE_QUERIES
from jaxembed.models.flops import StepFlops
from jaxembed.models.layers.attention import KERNEL_BLOCK
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import ModelFactory, split
from jaxembed.planning import shapes
from jaxembed.reading import passes
from jaxembed.step import build

_UNKNOWN_STEPS = 1000  # of a schedule, where nobody says how many records an epoch has; no shape depends on it


@dataclasses.dataclass(frozen=True)
class Load:
    """One shape of batches, and what they hold.

    Attributes:
      name: for people.
      pair: texts of each pair.
      rows: of a micro-batch, all shards together. length: tokens in a row.
      lengths: tokens of all texts of a step, about which model FLOPs are counted.
    """

    name: str
    pair: PairShape
    rows: int
    length: int
    lengths: np.ndarray


@dataclasses.dataclass(frozen=True)
class Model:
    """What is compiled beside the batch's shapes.

    Attributes:
      config: the stage's.
      mesh: over the planned devices.
      factory: the model's maker. teacher: the teacher's, or None.
      flops: counts the model's operations. teacher_flops: the teacher's, or None.
    """

    config: Config
    mesh: jax.sharding.Mesh
    factory: ModelFactory
    teacher: ModelFactory | None
    flops: StepFlops
    teacher_flops: StepFlops | None

    def model_flops(self, lengths: np.ndarray) -> float:
        """Returns the operations of a step of texts of these lengths, without recomputation."""
        return self.flops.training(lengths) + (self.teacher_flops.forward(lengths) if self.teacher_flops else 0.0)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of a step, on each chip.

    Attributes:
      bytes: parameters, optimizer, given, batch, temporaries, other (results that reuse no memory, the program); where
        the step does not fit, only what is known before it is compiled.
      used: bytes in all, as far as known.
      missing: bytes that a chip lacks by the compiler's word, 0 where it compiled.
      text: the program; '' where it did not compile.
      seconds: that the compilation took.
    """

    bytes: dict[str, int]
    used: int
    missing: int
    text: str
    seconds: float


def open_model(config: Config, mesh: jax.sharding.Mesh, blueprint: Blueprint) -> Model:
    """Makes ready what the config's model and teacher are; no weights are read."""
    lora = blueprint.lora(config.model.lora)
    with jax.set_mesh(mesh):
        factory = blueprint.factory(model_source.options(config.model), config.seed, lora)
        flops = StepFlops.of(blueprint, factory, lora, *passes(config))
        if not config.teacher.init:
            return Model(config, mesh, factory, None, flops, None)
        taught = shapes.open_shape(config.teacher.init, config)
        dtype = config.teacher.dtype
        teacher = taught.factory(ModelOptions(dtype=dtype, param_dtype=dtype))
        return Model(config, mesh, factory, teacher, flops, StepFlops.of(taught, teacher))


def longest_load(config: Config, mesh: jax.sharding.Mesh, max_length: int) -> Load:
    """Returns the largest batches that a run can meet: every text at its longest, every record with all negatives.

    Args:
      config: the stage's.
      mesh: the run's.
      max_length: of a text, where the config does not say.

    Raises:
      UserError: the batch does not share out evenly, or no text fits a row.
    """
    said, negative_queries = (
        config.data.max_length,
        any(NEGATIVE_QUERIES in LOSSES[x.name].needs for x in config.all_losses),
    )
    pair = PairShape(config.data.positives, config.data.used_negatives, negative_queries)
    query, document = said.query or max_length, said.document or max_length
    longest, shards, micro = max(query, document), sharding.batch_shards(mesh), config.grad_cache
    multiple = 8 if mesh.devices.flat[0].platform == "cpu" else KERNEL_BLOCK
    multiple = math.lcm(multiple, mesh.shape["sequence"])
    asked = config.data.row_length
    length = math.ceil(longest / multiple) * multiple if asked == AUTO else int(asked)
    if longest > length:
        raise UserError(f"config.data.row_length = {length} does not hold the longest text, {longest} tokens")
    if config.batch_size % (shards * micro):
        raise UserError(
            f"config.batch_size = {config.batch_size} is not a multiple of {shards} shards of the mesh times "
            f"config.grad_cache = {micro}: set a multiple of {shards * micro}"
        )
    rows = worst_case_rows(config.batch_size * pair.texts // (shards * micro), length, longest) * shards
    lengths = np.tile(
        [query] + [document] * pair.documents + [query] * (pair.texts - 1 - pair.documents), config.batch_size
    )
    return Load("every text at its longest", pair, rows, length, lengths)


def compile_step(model: Model, load: Load) -> Compiled:
    """Compiles the stage's step for batches of one shape."""
    config, mesh, factory = model.config, model.mesh, model.factory
    with jax.set_mesh(mesh):
        trained, base = split(factory.abstract())
        given = {"base": base} | ({"teacher": model.teacher.abstract()} if model.teacher else {})
        first_state, step = build(config, factory, load.pair, config.steps or _UNKNOWN_STEPS, model.teacher)
        state = jax.eval_shape(first_state, trained)
        batch = abstract_batch(load, config.batch_size, config.grad_cache, mesh)
        state, batch, given = (jax.tree.map(lambda x: _on(mesh, x), tree) for tree in (state, batch, given))
        held = {
            "parameters": _shard_bytes(state.params),
            "optimizer": _shard_bytes((state.optimizer, state.average, state.step)),
            "given": _shard_bytes(given),
            "batch": _shard_bytes(batch),
        }
        begun = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(state, batch, given)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            used, missing = _of_message(str(error), sum(held.values()))
            return Compiled(held, used, missing, "", time.perf_counter() - begun)
    found = compiled.memory_analysis()
    other = found.output_size_in_bytes - found.alias_size_in_bytes + found.generated_code_size_in_bytes
    held |= {"temporaries": found.temp_size_in_bytes, "other": other}
    return Compiled(held, sum(held.values()), 0, compiled.as_text(), time.perf_counter() - begun)


def abstract_batch(load: Load, pairs: int, micro_batches: int, mesh: jax.sharding.Mesh) -> Batch:
    """Returns the shapes of a batch, as `TrainingData.to_device` lays them onto the mesh."""

    def tokens(dtype: type) -> jax.ShapeDtypeStruct:
        sharded = NamedSharding(mesh, sharding.MICRO_ROWS)
        return jax.ShapeDtypeStruct((micro_batches, load.rows, load.length), dtype, sharding=sharded)

    def texts(*shape: int, partners: int) -> Texts:
        def array(name: str) -> jax.ShapeDtypeStruct:
            dtype = np.float32 if name in ("weight", "score") else np.int32
            whole = (*shape, partners) if name == "partners" else shape
            return jax.ShapeDtypeStruct(whole, dtype, sharding=NamedSharding(mesh, sharding.TEXTS))

        return Texts(**{field.name: array(field.name) for field in dataclasses.fields(Texts)})

    of_rows = {f.name: tokens(jnp.bool if f.name == "prompt_mask" else np.int32) for f in dataclasses.fields(Rows)}
    queries = texts(pairs, partners=load.pair.positives)
    return Batch(Rows(**of_rows), queries, texts(pairs, load.pair.documents, partners=1))


def _on(mesh: jax.sharding.Mesh, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Lays an abstract array on the mesh itself."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec if x.sharding else P()))


def _shard_bytes(tree: Any) -> int:
    """Returns the bytes of a chip's parts of some arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


_SIZE = r"([\d.]+)([KMGT]?)"
_TOO_LARGE = (  # as XLA's compiler for TPUs says it: what is used, and what is missing or what there is
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"total memory required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
)


def _of_message(message: str, held: int) -> tuple[int, int]:
    """Returns bytes used and bytes missing, as the compiler says them of what does not fit.

    Args:
      message: its words.
      held: bytes that are there before the step's temporaries, about which one of the forms is.

    Raises:
      UserError: it says something else.
    """
    for form, before in zip(_TOO_LARGE, (0, held)):
        if said := re.search(form, message):
            used, there = _bytes(said[1], said[2]) + before, _bytes(said[3], said[4])
            return used, used - there
    raise UserError(f"the step does not compile: {' '.join(message.split())[:300]}")


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 2 ** (10 * " KMGT".index(unit or " ")))
