"""From the config's sources to batches on the mesh: caches, plan, rungs, builder."""

import dataclasses
import math
from typing import Any

import jax

from jaxembed import sharding
from jaxembed.config import AUTO, Config, MaxLength, PromptConfig, SourceConfig
from jaxembed.data.batch import Batch
from jaxembed.data.cache import TokenCache, build_or_open
from jaxembed.data.loader import BatchBuilder
from jaxembed.data.plan import Plan
from jaxembed.data.rungs import choose_row_length
from jaxembed.errors import UserError
from jaxembed.model_source import Blueprint
from jaxembed.models.layers.attention import KERNEL_BLOCK


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The training texts, ready to be batched.

    Attributes:
      caches: one per source.
      plan: which pairs step n holds.
      builder: makes step n's batch.
      meta: what a checkpoint keeps, so that a resumed run compiles the same shapes.
    """

    caches: tuple[TokenCache, ...]
    plan: Plan
    builder: BatchBuilder
    meta: dict[str, Any]

    def to_device(self, batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
        """Lays a host batch onto the mesh, each shard straight to its device."""
        put = sharding.put
        return Batch(
            rows=jax.tree.map(lambda x: put(x, mesh, sharding.MICRO_ROWS), batch.rows),
            queries=jax.tree.map(lambda x: put(x, mesh, sharding.TEXTS), batch.queries),
            documents=jax.tree.map(lambda x: put(x, mesh, sharding.TEXTS), batch.documents),
        )

    def record_names(self, step: int) -> list[str]:
        """Returns 'FILE:LINE' of each record in a step."""
        planned = self.plan.step(step)
        return [self.caches[s].record_name(r) for s, r in zip(planned.source_B, planned.record_B)]


def open_data(config: Config, blueprint: Blueprint, mesh: jax.sharding.Mesh, meta: dict[str, Any]) -> TrainingData:
    """Tokenises what is not cached yet, and plans.

    Args:
      config: the run's.
      blueprint: gives tokenizer, prompts and limits.
      mesh: decides into how many bins a batch is dealt.
      meta: a checkpoint's; {} for a fresh run.

    Raises:
      UserError: bad sources, or a batch that the mesh does not divide.
    """
    lengths = MaxLength(
        query=config.data.max_length.query or blueprint.max_length,
        document=config.data.max_length.document or blueprint.max_length,
    )
    caches = tuple(_open_cache(config, i, source, blueprint, lengths) for i, source in enumerate(config.data.train))
    plan = Plan(
        caches,
        config.data.train,
        batch_size=config.batch_size,
        positives=config.data.positives,
        negatives=config.data.negatives,
        seed=config.seed,
    )
    layout = {
        "shards": sharding.batch_shards(mesh),
        "micro_batches": config.grad_cache,
        "row_length": _row_length(config, caches, mesh.shape["sequence"]),
    }
    builder = BatchBuilder(plan, **layout, rungs=meta["rungs"] if meta.get("layout") == layout else None)
    return TrainingData(caches, plan, builder, {"layout": layout, "rungs": list(builder.rungs)})


def _open_cache(
    config: Config, index: int, source: SourceConfig, blueprint: Blueprint, lengths: MaxLength
) -> TokenCache:
    def prompt(name: str, said: str) -> str:
        return blueprint.prompts.get(name, "") if said == AUTO else said

    return build_or_open(
        source,
        blueprint.tokenizer,
        PromptConfig(prompt("query", source.prompt.query), prompt("document", source.prompt.document)),
        lengths,
        config.data.cache_dir,
        config.data.on_bad_record,
        show_progress=jax.process_index() == 0,
        where=f"config.data.train[{index}]",
    )


def _row_length(config: Config, caches: tuple[TokenCache, ...], sequence_shards: int) -> int:
    if config.data.row_length == AUTO:
        # The kernels of accelerators want multiples of 128; on CPU attention costs in proportion to the length.
        multiple = 8 if jax.default_backend() == "cpu" else KERNEL_BLOCK
        return choose_row_length(caches, math.lcm(multiple, sequence_shards))
    length = int(config.data.row_length)
    if length % sequence_shards:
        raise UserError(f"config.data.row_length = {length} is no multiple of the mesh's {sequence_shards} (sequence)")
    return length
