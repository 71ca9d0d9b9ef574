"""What every backbone takes beside its shape, and what it returns."""

import dataclasses
from collections.abc import Callable

import jax

from jaxembed import sharding
from jaxembed.models.layers.routing import ExpertOptions, Routed
from jaxembed.models.layers.ssm import SsmOptions

REMAT: dict[str, Callable | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How to compute: the fields of `jaxembed.config.ModelConfig` of the same names."""

    attention_kernel: str = "auto"
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    unroll: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    experts: ExpertOptions = dataclasses.field(default_factory=ExpertOptions)
    ssm: SsmOptions = dataclasses.field(default_factory=SsmOptions)

    def layers_per_iteration(self, layers: int) -> int:
        """How many layers an iteration of the layer scan holds."""
        # On CPU a loop's residuals are copied into and out of its stacks, a sixth of a step's time for MiniLM.
        return self.unroll or (layers if sharding.platform() == "cpu" else 1)


def per_layer(values: tuple[str, ...], layers: int) -> tuple[str, ...]:
    """Returns a value for each layer; `values` are one for all, or one for each."""
    return values * layers if len(values) == 1 else values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStates:
    """A backbone's output.

    Attributes:
      last: the last layer's states [R, L, D], in the compute dtype.
      chosen: the states of the layers asked for [n, R, L, D], or None: as the next layer reads them, but for the last
        layer's, which are `last`. A backbone's `finish` makes of an earlier layer's what they would be if it were the
        last.
      routed: what the routers of sparse layers say, stacked over these; None where there are none.
    """

    last: jax.Array
    chosen: jax.Array | None
    routed: Routed | None = None
