"""From the config's sources to batches on the mesh: caches, plan, rungs, builder."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxembed import sharding
from jaxembed.blueprint import Blueprint
from jaxembed.config import AUTO, Config, MaxLength, PromptConfig, SourceConfig
from jaxembed.data.batch import Batch
from jaxembed.data.cache import TokenCache, build_or_open
from jaxembed.data.loader import BatchBuilder, TeacherTexts
from jaxembed.data.plan import Plan
from jaxembed.data.rungs import choose_row_length
from jaxembed.errors import UserError
from jaxembed.losses.table import COSINES, LOSSES, MATCHES, NEGATIVE_QUERIES, NEGATIVES, SCORES, SCORES_OR_TEACHER
from jaxembed.models.layers.attention import KERNEL_BLOCK

_SCORES_AT_ONCE = 2**22


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
            teacher_rows=jax.tree.map(lambda x: put(x, mesh, sharding.MICRO_ROWS), batch.teacher_rows),
        )

    def record_names(self, step: int) -> list[str]:
        """Returns 'FILE:LINE' of each record in a step."""
        planned = self.plan.step(step)
        return [self.caches[s].record_name(r) for s, r in zip(planned.source_B, planned.record_B)]


def open_data(
    config: Config,
    blueprint: Blueprint,
    mesh: jax.sharding.Mesh,
    meta: dict[str, Any],
    teacher: Blueprint | None = None,
) -> TrainingData:
    """Tokenises what is not cached yet, and plans.

    A teacher reads the same texts in its own tokens, no longer than it can or the config says, and behind its own
    prompts, but where a source says what to put before its texts. Where all of that is as the model has it, the caches
    are the same ones: then batches have no rows for the teacher (`Batch.teacher_rows` is None), and it reads the
    model's.

    Args:
      config: the run's.
      blueprint: gives tokenizer, prompts and limits.
      mesh: decides into how many bins a batch is dealt.
      meta: a checkpoint's; {} for a fresh run.
      teacher: gives the teacher's tokenizer, prompts and limits; None without one.

    Raises:
      UserError: bad sources, or a batch that the mesh does not divide.
    """
    caches = _open_caches(config, blueprint)
    check_needs(config, caches)
    plan = _plan(config, caches)
    # The kernels of accelerators want multiples of 128; on CPU attention costs in proportion to the length.
    multiple = math.lcm(8 if mesh.devices.flat[0].platform == "cpu" else KERNEL_BLOCK, mesh.shape["sequence"])
    layout = {
        "shards": sharding.batch_shards(mesh),
        "micro_batches": config.grad_cache,
        "row_length": _row_length(config, caches, multiple, mesh.shape["sequence"]),
    }
    texts = _teacher_texts(config, caches, teacher, multiple) if teacher else None
    row_length = texts.row_length if texts else 0
    rungs = None
    if meta.get("layout") == layout and meta.get("teacher_row_length", 0) == row_length:
        rungs = meta["rungs"]
        texts = dataclasses.replace(texts, rungs=meta["teacher_rungs"]) if texts else None
    builder = BatchBuilder(plan, **layout, rungs=rungs, teacher=texts)
    kept = {
        "layout": layout,
        "rungs": list(builder.rungs),
        "teacher_row_length": row_length,
        "teacher_rungs": list(builder.teacher.rungs) if builder.teacher else [],
    }
    return TrainingData(caches, plan, builder, kept)


def _teacher_texts(
    config: Config, caches: Sequence[TokenCache], teacher: Blueprint, multiple: int
) -> TeacherTexts | None:
    """Returns the texts in a teacher's tokens; None where they are the model's.

    Raises:
      UserError: the caches of a source do not number the same texts alike, as bad records were skipped differently.
    """
    read = _open_caches(config, teacher)
    for i, (ours, theirs) in enumerate(zip(caches, read)):
        same = (np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in ("first_text", "hashes"))
        if not all(same):
            reasons = sorted({*ours.skipped_reasons} ^ {*theirs.skipped_reasons})
            raise UserError(
                f"config.data.train[{i}]: the model reads {ours.n_records:,} records of {ours.label}, the teacher "
                f"{theirs.n_records:,}: remove those that only one of them can read ({'; '.join(reasons)})"
            )
    if [cache.path for cache in read] == [cache.path for cache in caches]:
        return None
    return TeacherTexts(_plan(config, read), choose_row_length(read, multiple))


def _open_caches(config: Config, blueprint: Blueprint) -> tuple[TokenCache, ...]:
    """Opens a cache per source, in the tokens of a model, tokenising what is not cached yet."""
    said, limit = config.data.max_length, blueprint.max_length
    lengths = MaxLength(query=min(said.query or limit, limit), document=min(said.document or limit, limit))
    return tuple(_open_cache(config, i, source, blueprint, lengths) for i, source in enumerate(config.data.train))


def _plan(config: Config, caches: Sequence[TokenCache]) -> Plan:
    return Plan(
        caches,
        config.data.train,
        batch_size=config.batch_size,
        positives=config.data.positives,
        negatives=config.data.used_negatives,
        seed=config.seed,
        negative_queries=any(NEGATIVE_QUERIES in LOSSES[loss.name].needs for loss in config.all_losses),
        one_source=config.data.one_source,
    )


def check_needs(config: Config, caches: Sequence[TokenCache]) -> None:
    """Refuses sources whose records lack what a loss that they train needs.

    Args:
      config: its losses, and the sources with the names of the losses that each of them trains.
      caches: one per source.

    Raises:
      UserError: which source, which loss, what is missing.
    """
    for loss in config.all_losses:
        needs = LOSSES[loss.name].needs
        served = [i for i, source in enumerate(config.data.train) if source.trains(loss)]
        hard = max(caches[i].max_negatives for i in served)
        for field, least in (("mixed_negatives", 2), ("hardness", 1 if loss.hardness_of == "own" else 0)):
            if getattr(loss, field) and hard < least:
                raise UserError(
                    f"the loss {loss.title!r} has {field} = {getattr(loss, field):g}, which is about a pair's hard "
                    f"negatives, but its records have {'one' if hard else 'none'}: set it to 0, or add 'negative'"
                )
        for i, cache in ((i, caches[i]) for i in served):
            for need, lacking, there in (
                (MATCHES, "are graded pairs (for cosent, angle or cosine) and no matches", _are_matches),
                (SCORES, "have no 'scores' for every document", lambda c: c.scored),
                (
                    SCORES_OR_TEACHER,
                    "have no 'scores' for every document",
                    lambda c: c.scored or bool(config.teacher.init),
                ),
                (COSINES, "have 'scores' beyond -1 … 1", _scores_are_cosines),
                (NEGATIVES, "have no 'negative'", lambda c: c.max_negatives > 0),
                (NEGATIVE_QUERIES, "have no 'negative_query'", lambda c: c.negative_queries),
            ):
                if need in needs and not there(cache):
                    raise UserError(
                        f"config.data.train[{i}]: the records of {cache.label} {lacking}, which the loss "
                        f"{loss.title!r} needs: change them, or say in config.data.train[{i}].losses what the source "
                        "trains"
                    )


def _are_matches(cache: TokenCache) -> bool:
    """Whether positives are positives. With a score each, and no negative, they may be anything."""
    return cache.max_negatives > 0 or not cache.scored


def _scores_are_cosines(cache: TokenCache) -> bool:
    starts = range(0, cache.n_texts, _SCORES_AT_ONCE)
    return not any((np.abs(cache.scores[i : i + _SCORES_AT_ONCE]) > 1).any() for i in starts)


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


def _row_length(config: Config, caches: Sequence[TokenCache], multiple: int, sequence_shards: int) -> int:
    if config.data.row_length == AUTO:
        return choose_row_length(caches, multiple)
    length = int(config.data.row_length)
    if length % sequence_shards:
        raise UserError(f"config.data.row_length = {length} is no multiple of the mesh's {sequence_shards} (sequence)")
    return length
