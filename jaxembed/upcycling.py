"""Dense checkpoints become sparse ones, and the experts of sources dense ones again.

Every expert starts as a copy of the layer's feed-forward part (sparse upcycling, Komatsuzaki et al. 2022,
arXiv:2212.05055). A token's weights sum to 1, so that the sparse model gives the dense model's vectors whatever its
fresh routers say; their noise is what first tells the experts apart.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxembed.blueprint import Blueprint
from jaxembed.config import ExpertsConfig
from jaxembed.errors import UserError
from jaxembed.hf.architectures import architecture_of
from jaxembed.hf.source_experts import dense_config, with_source_experts
from jaxembed.hf.sparse_kin import SPARSE_KIN
from jaxembed.models.layers.parts import DENSE, LAYERS, SPARSE
from jaxembed.models.options import ModelOptions, per_layer
from jaxembed.models.text_encoder import BACKBONE, ModelFactory, Params, flatten, unflatten

Loader = Callable[[ModelFactory], Params]
OUT_BIAS = "out/bias"  # of experts: behind all of them


def sparse_layers(c: ExpertsConfig, layers: int) -> tuple[int, ...]:
    """Returns the numbers of the layers that become sparse.

    Raises:
      UserError: there are none, or the model has no such layers.
    """
    chosen = c.layers or tuple(i for i in range(layers) if (i + 1) % c.every == 0)
    if not chosen or max(chosen) >= layers:
        field = f"layers = {c.layers}" if c.layers else f"every = {c.every}"
        raise UserError(f"config.model.experts.{field}: the model has layers 0 … {layers - 1}, so none of these")
    return tuple(sorted(chosen))


def sparse_blueprint(blueprint: Blueprint, c: ExpertsConfig) -> Blueprint:
    """Returns the blueprint of the sparse model that a dense one becomes.

    Args:
      blueprint: the dense model's.
      c: how many experts, in which layers.

    Raises:
      UserError: the architecture has no sparse kin, or that cannot be what is asked for.
    """
    name = blueprint.architecture.model_type
    if blueprint.experts:
        raise UserError(f"config.model.experts.upcycle = {c.upcycle}: config.model.init is sparse already: leave it 0")
    if name not in SPARSE_KIN:
        known = ", ".join(SPARSE_KIN)
        raise UserError(f"config.model.experts.upcycle = {c.upcycle}: from {name} none is made; from {known} it is")
    at = sparse_layers(c, blueprint.backbone.layers)
    hf_config = SPARSE_KIN[name](blueprint.hf_config, c.upcycle, c.top_k, at)
    if c.routing == "source":
        hf_config = with_source_experts(hf_config, blueprint.hf_config, c.served)
    return dataclasses.replace(blueprint, hf_config=hf_config, unused={})


def sparse_loader(blueprint: Blueprint, load: Loader, c: ExpertsConfig, seed: int) -> Loader:
    """Returns what puts the sparse model's weights onto the mesh.

    Args:
      blueprint: the dense model's.
      load: puts its weights onto the mesh.
      c: how many experts, in which layers.
      seed: of the routers' noise.
    """
    at = sparse_layers(c, blueprint.backbone.layers)

    def load_sparse(factory: ModelFactory) -> Params:
        wanted = flatten(factory.abstract())
        dtype = wanted[f"{BACKBONE}{SPARSE}/up/kernel"].dtype
        dense = flatten(load(blueprint.factory(ModelOptions(param_dtype=dtype.name))))
        return unflatten({path: _leaf(path, like, dense, at, c, seed) for path, like in wanted.items()})

    return load_sparse


def _leaf(
    path: str,
    like: jax.ShapeDtypeStruct,
    dense: Mapping[str, jax.Array],
    at: tuple[int, ...],
    c: ExpertsConfig,
    seed: int,
) -> jax.Array:
    """Makes a leaf of the sparse model."""
    inner, layout = path.removeprefix(BACKBONE), like.sharding.spec
    stack, _, rest = inner.partition("/")
    if stack not in (DENSE, SPARSE):
        return dense[path]
    of_expert = stack == SPARSE and rest != OUT_BIAS

    def make(source: jax.Array | None) -> jax.Array:
        if rest == "router/kernel":
            return c.router_noise * jax.random.normal(jax.random.key(seed), like.shape, like.dtype, out_sharding=layout)
        if source is None:  # the kin has a bias that the dense model has not
            return jnp.zeros(like.shape, like.dtype, out_sharding=layout)
        numbers = at if stack == SPARSE else tuple(i for i in range(len(source)) if i not in at)
        chosen = jnp.stack([source[i] for i in numbers])
        return jnp.broadcast_to(chosen[:, None], like.shape, out_sharding=layout) if of_expert else chosen

    # A token's weights sum to 1, so one bias behind all experts is each one's.
    return jax.jit(make)(dense.get(f"{BACKBONE}{LAYERS}/mlp/{'down/bias' if rest == OUT_BIAS else rest}"))


def only_expert(blueprint: Blueprint, params: Params, expert: int) -> tuple[Blueprint, Params]:
    """Returns the dense model that a text meets whose source has this expert.

    Args:
      blueprint: of a model whose texts' sources pick the experts.
      params: its parameters; both need a mesh set.
      expert: the expert's number.
    """
    hf_config = dense_config(blueprint.hf_config)
    hf_config = architecture_of(hf_config).with_attention(hf_config, blueprint.backbone.attention)
    dense = dataclasses.replace(blueprint, hf_config=hf_config)
    leaves, wanted = flatten(params), flatten(dense.factory(ModelOptions()).abstract())
    sparse = per_layer(blueprint.backbone.sparse, blueprint.backbone.layers)

    def leaf(path: str, layout: P) -> jax.Array:
        if not path.startswith(f"{BACKBONE}{LAYERS}/mlp/"):
            return leaves[path]
        rest = path.removeprefix(f"{BACKBONE}{LAYERS}/mlp/")
        experts = leaves[f"{BACKBONE}{SPARSE}/{OUT_BIAS if rest == 'down/bias' else rest}"]
        others = leaves.get(f"{BACKBONE}{DENSE}/{rest}")

        def pick(experts: jax.Array, others: jax.Array | None) -> jax.Array:
            if rest != "down/bias":
                one = jnp.full(1, expert)  # one number alone would be a slice, which a sharded axis cannot have
                experts = experts.at[:, one].get(out_sharding=P(layout[0], None, *layout[1:]))[:, 0]
            of_layers, dense_ones = iter(experts), iter(() if others is None else others)
            return jnp.stack([next(of_layers) if is_sparse else next(dense_ones) for is_sparse in sparse])

        return jax.jit(pick)(experts, others)

    return dense, unflatten({path: leaf(path, like.sharding.spec) for path, like in wanted.items()})
