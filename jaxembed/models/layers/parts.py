"""Feed-forward parts of models with sparse layers: which layers have which, and what a layer does with its own.

In such a model they lie in stacks of their own beside that of all layers, each over the layers that have it.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from jaxembed.data.batch import Rows
from jaxembed.models.layers.dropout import Noise
from jaxembed.models.layers.experts import Experts
from jaxembed.models.layers.mlp import Mlp
from jaxembed.models.layers.routing import ExpertsShape, Routed
from jaxembed.models.options import ModelOptions, per_layer

# The stacks of layers, by their names in the model.
LAYERS = "layers"  # what all layers have
DENSE, SPARSE = "mlps", "experts"  # the feed-forward parts, in models with sparse layers


def parts_of_layers(experts: ExpertsShape | None, sparse: tuple[bool, ...], layers: int) -> tuple[str, ...]:
    """Returns for each layer the stack that its feed-forward part lies in.

    Args:
      experts: those of sparse layers; None where there are no such layers.
      sparse: whether layers are sparse, one value for all or one for each.
      layers: n.
    """
    if experts is None:
        return (LAYERS,) * layers
    return tuple(SPARSE if is_sparse else DENSE for is_sparse in per_layer(sparse, layers))


def make_parts(
    key: jax.Array, names: Sequence[str], makers: Mapping[str, Callable[[jax.Array], nnx.Module]]
) -> dict[str, nnx.Module]:
    """Makes the stacks of fresh feed-forward parts.

    Args:
      key: PRNG key of the fresh weights.
      names: the stack of each layer's part.
      makers: stack → (key) → one layer's part.
    """
    keys = jax.random.split(key, len(names))
    return {name: jax.vmap(makers[name])(keys[np.array(names) == name]) for name in dict.fromkeys(names)}


def feed(
    part: Mlp | Experts, x: jax.Array, rows: Rows, options: ModelOptions, noise: Noise | None, place: jax.Array
) -> tuple[jax.Array, Routed | None]:
    """Returns a part's output [R, L, D] for x of that shape, and what its router did, if it has one."""
    if isinstance(part, Experts):
        return part(x, rows, options.experts, noise, place)
    return part(x, noise, place), None
