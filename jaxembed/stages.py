"""Stages: trainings one after the other, as changes to one config.

NV-Embed (arXiv:2405.17428) and KaLM-Embedding-V2 (arXiv:2506.20923) first train on many weak pairs, then on fewer with
hard negatives. A stage starts from the weights that the stage before would have exported, with a fresh optimizer,
schedule and loss, just as a run of its own with `model.init = 'run:…'` would.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxembed import config as config_lib
from jaxembed.config import Config, nearest
from jaxembed.errors import UserError

# What a stage may change; the rest, such as the model's architecture or the mesh, is the run's.
CHANGEABLE = (
    "seed",
    "steps",
    "epochs",
    "batch_size",
    "grad_cache",
    "data",
    "loss",
    "losses",
    "matryoshka",
    "router",
    "optimizer",
    "model.anneal_attention",
    "model.dropout",
    "model.attention_dropout",
    "model.remat",
)
LENGTHS = ("steps", "epochs")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training of a run.

    Attributes:
      name: for people; '' in a run without stages.
      config: the whole config as this stage sees it, without stages.
    """

    name: str
    config: Config


def stages_of(config: Config) -> tuple[Stage, ...]:
    """Returns the stages of a run: at least one.

    Stage i shuffles and draws its dropout with `config.seed + i`, unless it names a seed.

    Raises:
      UserError: a stage changes what it cannot, or to what cannot be.
    """
    if not config.stages:
        return (Stage("", config),)
    stages = []
    for i, changes in enumerate(config.stages):
        name = changes.get("name", f"stage {i + 1}")
        if not isinstance(name, str) or not name or name in (stage.name for stage in stages):
            raise UserError(f"config.stages[{i}].name = {name!r}: wants a name that no other stage has")
        stages.append(Stage(name, _changed(config, i, changes)))
    return tuple(stages)


def _changed(config: Config, i: int, changes: Mapping[str, Any]) -> Config:
    asked = {key: value for key, value in changes.items() if key != "name"}
    for path in _paths(asked):
        if path not in CHANGEABLE:
            raise UserError(
                f"config.stages[{i}].{path}: no field that a stage can change{nearest(path, CHANGEABLE)}; "
                f"those are {', '.join(CHANGEABLE)}"
            )
    whole = config_lib.to_json(config) | {"stages": (), "seed": (config.seed + i) % 2**32}
    if any(asked.get(length) for length in LENGTHS):  # the stage's own length stands in for the run's
        whole |= dict.fromkeys(LENGTHS, 0)
    if "loss" in asked and "losses" not in asked:  # likewise its loss for the run's several, and the other way round
        whole["losses"] = ()
    elif "losses" in asked and "loss" not in asked:
        whole["loss"] = config_lib.to_json(Config())["loss"]
    try:
        return config_lib.build(_merge(whole, asked))
    except UserError as error:
        raise UserError(f"config.stages[{i}]: {error}") from error


def _paths(changes: Mapping[str, Any]) -> list[str]:
    """Returns the top-level fields that are changed, those of `model` one by one."""
    model = changes.get("model", {})
    inner = [f"model.{key}" for key in model] if isinstance(model, Mapping) else []
    return [key for key in changes if key != "model" or not inner] + inner


def _merge(base: Any, changes: Any) -> Any:
    """Returns `changes` laid over `base`: mappings key by key, anything else as a whole."""
    if isinstance(base, Mapping) and isinstance(changes, Mapping):
        return {**base, **{key: _merge(base.get(key), value) for key, value in changes.items()}}
    return changes
