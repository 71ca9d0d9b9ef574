"""The token that stands for words that are masked: found, named, or added to a model that has none."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxembed.blueprint import Blueprint
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import UserError
from jaxembed.hf.diffusion import MASK_ID
from jaxembed.hf.language_heads import BIAS, TABLE
from jaxembed.hf.table import PadRows
from jaxembed.models.text_encoder import BACKBONE, ModelFactory, Params, flatten, unflatten

Loader = Callable[[ModelFactory], Params]
WORDS = ("vocab_size", "embedding_size")  # of config.json: rows of the token table; the second LLaDA's


def with_mask_token(blueprint: Blueprint, load: Loader, token: str) -> tuple[Blueprint, Loader]:
    """Returns the model with a mask token, which its config.json and its tokenizer's files name.

    A token that the tokenizer does not know comes behind its others. Where the token table has no row for it, it gets
    the mean of the others, and so does its row in the table by which words are predicted, if that is another.

    Args:
      blueprint: the model's.
      load: puts its weights onto the mesh.
      token: config.model.mask_token; '' for the tokenizer's own, else the one that config.json names.

    Raises:
      UserError: no token is named, and the model has none.
    """
    tokenizer = _with_mask(blueprint, token)
    words, needed = blueprint.backbone.vocab_size, tokenizer.mask_id + 1
    hf_config = blueprint.hf_config | {MASK_ID: tokenizer.mask_id}
    if needed > words:
        hf_config |= {field: needed for field in WORDS if hf_config.get(field) is not None}
    new = dataclasses.replace(blueprint, hf_config=hf_config, tokenizer=tokenizer)
    if needed <= words:
        return new, load
    return dataclasses.replace(new, unused=_grown_unused(blueprint, new)), _grown_loader(blueprint, new, load)


def _with_mask(blueprint: Blueprint, token: str) -> Tokenizer:
    """Returns the model's tokenizer with a mask token."""
    tokenizer = blueprint.tokenizer
    if token:
        return tokenizer.with_mask(token)
    if tokenizer.mask_id >= 0:
        return tokenizer
    named = blueprint.hf_config.get(MASK_ID)
    token = tokenizer.token(named) if type(named) is int else ""
    if not token:
        raise UserError(
            "config.model.mask_token = '': the model's tokenizer has no mask token: name one, such as '<|mask|>', "
            "which is added where the tokenizer does not know it"
        )
    return tokenizer.with_mask(token)


@dataclasses.dataclass(frozen=True)
class _Before(ModelFactory):
    """The maker of the model as it was: leaves with a row per word have the shapes that they had.

    Attributes:
      leaves: their paths.
      rows: V' before.
    """

    leaves: frozenset[str]
    rows: int

    def abstract(self) -> Params:
        def before(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (self.rows, *leaf.shape[1:]) if path in self.leaves else leaf.shape
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

        return unflatten({path: before(path, leaf) for path, leaf in flatten(super().abstract()).items()})


def _grown_loader(old: Blueprint, new: Blueprint, load: Loader) -> Loader:
    """Returns what puts the grown model's weights onto the mesh; `load` does it for the model as it was."""
    rows = old.architecture.rows(old.backbone)
    tables = {BACKBONE + ours for row in rows for ours, turned in row.parts if isinstance(turned, PadRows)}
    leaves = frozenset({*tables, TABLE, BIAS})

    def load_grown(factory: ModelFactory) -> Params:
        wanted = flatten(factory.abstract())
        had = flatten(load(_Before(factory.make, leaves, old.backbone.padded_vocab)))
        tables = {path: had[path] for path in leaves & had.keys()}
        shardings = {path: wanted[path].sharding for path in tables}
        sizes = old.backbone.vocab_size, new.backbone.vocab_size, new.backbone.padded_vocab
        grow = jax.jit(lambda found: {path: _grown(x, sizes, shardings[path]) for path, x in found.items()})
        return unflatten(had | grow(tables))

    return load_grown


def _grown(x: jax.Array, sizes: tuple[int, int, int], sharding: NamedSharding) -> jax.Array:
    """Returns the rows [V', ...] with the mean of the words before in the new words' rows.

    Args:
      x: the rows as they were.
      sizes: words before, words now, rows now: those behind the words are zeros.
      sharding: of the result.
    """
    before, now, rows = sizes
    words = jax.sharding.reshard(x, P(*(None,) * x.ndim))[:before]
    mean = words.mean(0, keepdims=True, dtype=jnp.float32).astype(x.dtype)
    padding = jnp.zeros((rows - now, *x.shape[1:]), x.dtype)
    return jax.sharding.reshard(jnp.concatenate([words, jnp.repeat(mean, now - before, 0), padding]), sharding)


def _grown_unused(old: Blueprint, new: Blueprint) -> Mapping[str, Any]:
    """Returns the tensors that the export hands through, those with a row per word as many rows longer."""
    shapes = new.architecture.unused(new.backbone)
    grown = dict(old.unused)
    for name, x in old.unused.items():
        added = shapes[name][0] - len(x)
        if added:
            mean = x.mean(0, keepdims=True, dtype=np.float32).astype(x.dtype)
            grown[name] = np.concatenate([x, mean.repeat(added, 0)])
    return grown
