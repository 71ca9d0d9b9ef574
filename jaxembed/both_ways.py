"""Causal state-space models become ones that read both ways: their kin, with a second mixer in every layer."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxembed.blueprint import Blueprint
from jaxembed.config import Config, SsmConfig
from jaxembed.errors import UserError
from jaxembed.hf import mamba
from jaxembed.models.hybrid import HybridConfig
from jaxembed.models.lora import is_adapter
from jaxembed.models.mamba import MambaConfig
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import BACKBONE, ModelFactory, Params, flatten, unflatten

FORWARD, BACKWARD = f"{BACKBONE}layers/mixer/", f"{BACKBONE}layers/backward/"
ATTENTION = "config.model.attention = 'bidirectional'"


def becomes_both_ways(blueprint: Blueprint, c: Config) -> bool:
    """Whether the config makes a model that reads both ways of one that reads forwards.

    Raises:
      UserError: fields of `config.model.ssm` that do not go with the model.
    """
    backbone, usual = blueprint.backbone, SsmConfig()
    causal = isinstance(backbone, MambaConfig) and backbone.backward == "none"
    becomes = causal and c.model.attention == "bidirectional"
    for field in ("kernel", "chunk"):
        value = getattr(c.model.ssm, field)
        if value != getattr(usual, field) and not isinstance(backbone, MambaConfig | HybridConfig):
            raise UserError(f"config.model.ssm.{field} = {value!r}: the model has no state-space layers: leave it")
    if c.model.ssm.directions != usual.directions and not becomes:
        why = f"it is for a causal mamba, mamba2 or falcon_mamba made so by {ATTENTION}"
        raise UserError(f"config.model.ssm.directions = {c.model.ssm.directions!r}: {why}; leave it alone")
    return becomes


def both_ways_blueprint(blueprint: Blueprint, c: SsmConfig) -> Blueprint:
    """Returns the blueprint of a causal model's kin that reads both ways."""
    hf_config = mamba.both_ways(blueprint.hf_config, c.directions == "shared")
    return dataclasses.replace(blueprint, hf_config=hf_config)


def both_ways_loader(blueprint: Blueprint, load: Callable[[ModelFactory], Params]) -> Callable[[ModelFactory], Params]:
    """Returns what puts the weights onto the mesh: those of the causal model, and copies for the backward mixers.

    Args:
      blueprint: the causal model's.
      load: puts its weights onto the mesh.
    """

    def load_both(factory: ModelFactory) -> Params:
        wanted = flatten(factory.abstract())
        dtype = wanted[f"{FORWARD}skip"].dtype.name
        before = dataclasses.replace(blueprint, language=factory.language)  # its head is the checkpoint's too
        causal = flatten(load(before.factory(ModelOptions(param_dtype=dtype))))
        second = [path for path in wanted if path.startswith(BACKWARD) and not is_adapter(path)]
        copies = {path: causal[FORWARD + path.removeprefix(BACKWARD)] for path in second}
        copies = jax.jit(lambda leaves: jax.tree.map(jnp.copy, leaves))(copies)  # buffers of their own
        return unflatten({path: x.astype(wanted[path].dtype) for path, x in (causal | copies).items()})

    return load_both
