"""From token states to scores of words: the head of a language model.

The scores are products with a table of vectors, one per word: the token table (tied, Press & Wolf 2017,
arXiv:1608.05859) or one of its own. Encoders have a layer and a norm before it (BERT, arXiv:1810.04805). No scores are
made here: tokens x words is more than a device holds, see `jaxembed.losses.cross_entropy`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxembed import sharding
from jaxembed.models.layers.linear import Embedding, LayerNorm, Linear
from jaxembed.models.layers.mlp import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """How a model predicts words.

    Attributes:
      own_table: whether the head has a table of its own; else it is the token table.
      transform: activation of a layer [D, D] before the product, which a norm follows; '' for no such layer.
      transform_bias: whether that layer and its norm have biases.
      norm_eps: epsilon of that norm.
      bias: whether every word has a bias.
      softcap: scores s become softcap · tanh(s / softcap); 0 = off.
      shift: whether a token is predicted from the state of the one before it, as models of the next token do.
      words: V, the words that there are.
      mask_id: of the token that stands for masked ones; -1 for none.
      predicts: whether it has learned to; False where words are masked and none predicted.
      framing: tokens that are neither masked nor, but by models of the next token, predicted: special ones.
    """

    own_table: bool = False
    transform: str = ""
    transform_bias: bool = True
    norm_eps: float = 1e-12
    bias: bool = False
    softcap: float = 0.0
    shift: bool = False
    words: int = 0
    mask_id: int = -1
    predicts: bool = True
    framing: tuple[int, ...] = ()


class LanguageHead(nnx.Module):
    """The parameters of the head.

    Args:
      key: PRNG key of fresh weights.
      config: which there are.
      rows: V', of the token table.
      width: D.
      stddev: of fresh weights.
      dtype: of the parameters.
    """

    def __init__(
        self, key: jax.Array, config: LanguageConfig, rows: int, width: int, stddev: float, dtype: jnp.dtype
    ) -> None:
        self.config = config
        keys = jax.random.split(key, 2)
        if config.own_table:
            self.table = Embedding(keys[0], rows, width, stddev, dtype, "vocab")
        if config.transform:
            inputs, outputs = (("embed", width),), ((None, width),)
            self.dense = Linear(keys[1], inputs, outputs, stddev, dtype, config.transform_bias)
            self.norm = LayerNorm(width, config.norm_eps, dtype, config.transform_bias)
        if config.bias:
            self.bias = nnx.Param(jnp.zeros(rows, dtype, out_sharding=sharding.spec("vocab")))

    def __call__(self, hidden_RxLxD: jax.Array) -> jax.Array:
        """Returns what the products with the table are made of: [R, L, D] in the states' dtype."""
        if not self.config.transform:
            return hidden_RxLxD
        return self.norm(ACTIVATIONS[self.config.transform](self.dense(hidden_RxLxD, sharding.STATES)))
