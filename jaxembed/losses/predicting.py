"""Losses over tokens: what a language model reads of a text, and what it is asked.

Masks are hashes of (seed of the step, number of the text in the global batch, position in the text), so that packing,
micro-batches and the number of devices do not change them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxembed.hashing import below, mix
from jaxembed.sharding import BATCH, ROWS

_MASK, _REPLACE, _WORD, PART = range(4)  # what a hash is for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of some rows, all arrays [R, L].

    Attributes:
      ids: int32, the texts' tokens.
      texts: int32, 1 + the text's number in the global batch, 0 for padding.
      positions: int32, 0, 1, … inside each text.
      words: bool, the tokens that may be asked for, or masked: not padding, nor prompts, nor special tokens, nor those
        of texts that the loss does not serve.
      served: bool, all tokens of the texts that it serves.
      seed: uint32 scalar, new for every step and loss.
      mask_id: of the mask token.
      vocabulary: tokens known, for random ones.
      shift: whether a token is predicted from the state of the one before it.
      stride: how far the numbers of the texts that are served lie apart.
    """

    ids: jax.Array
    texts: jax.Array
    positions: jax.Array
    words: jax.Array
    served: jax.Array
    seed: jax.Array
    mask_id: int = dataclasses.field(metadata={"static": True})
    vocabulary: int = dataclasses.field(metadata={"static": True})
    shift: bool = dataclasses.field(metadata={"static": True})
    stride: int = dataclasses.field(default=1, metadata={"static": True})

    def uniform(self, what: int, *, each: str = "token") -> jax.Array:
        """Returns uint32 [R, L], evenly spread, one for each token or, `each` = 'text', for all of a text."""
        bits = mix(mix(self.seed ^ mix(jnp.uint32(what))) ^ self.texts.astype(jnp.uint32))
        return bits if each == "text" else mix(bits ^ self.positions.astype(jnp.uint32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Questions:
    """What the model reads, and what it is asked. Arrays are [R, L], in places of states.

    Attributes:
      ids: int32, what it reads.
      targets: int32, the word that the state in this place is to predict.
      weights: float32, how much that counts; 0 = not asked.
      total: float32 scalar, by whose sum over the global batch the weighted sum of losses is divided.
    """

    ids: jax.Array
    targets: jax.Array
    weights: jax.Array
    total: jax.Array


def masked_lm(tokens: Tokens, mask_rate: float, random_rate: float, keep_rate: float) -> Questions:
    """Masked words, each predicted from its own state (BERT, Devlin et al. 2019, arXiv:1810.04805).

    The loss is the mean over the predicted words of the global batch.

    Args:
      tokens: of the texts.
      mask_rate: part of the words that are to be predicted.
      random_rate: part of these in whose place another word is read.
      keep_rate: part of these that are read as they are; the others are read as the mask token.
    """
    return _masked(dataclasses.replace(tokens, shift=False), mask_rate, random_rate, keep_rate)


def masked_next_token(tokens: Tokens, mask_rate: float, random_rate: float, keep_rate: float) -> Questions:
    """Masked words, each predicted from the state before it (MNTP of LLM2Vec, BehnamGhader et al. 2024, 2404.05961).

    Arguments and result as for `masked_lm`. The first token of a text, which has none before it, is never masked.
    """
    return _masked(dataclasses.replace(tokens, shift=True), mask_rate, random_rate, keep_rate)


def next_token(tokens: Tokens) -> Questions:
    """Every token of a text but the first, predicted from those before it; of use in a causal model alone."""
    asked = tokens.served & (tokens.positions > 0)
    return questions(dataclasses.replace(tokens, shift=True), tokens.ids, asked.astype(jnp.float32))


def maskable(tokens: Tokens) -> jax.Array:
    """Returns which tokens can be asked for: bool [R, L], words that have a state to predict them from."""
    return tokens.words & (tokens.positions > 0) if tokens.shift else tokens.words


def questions(tokens: Tokens, read: jax.Array, weights: jax.Array, total: jax.Array | None = None) -> Questions:
    """Moves what is asked to where the states are that answer it.

    Args:
      tokens: of the texts; `shift` says where the states are.
      read: int32 [R, L], what the model reads.
      weights: float32 [R, L], by the place of the token that is asked for; with `shift` 0 for first tokens of texts.
      total: what the loss is divided by; None: the number of weights that are not 0.
    """
    total = (weights != 0).sum().astype(jnp.float32) if total is None else total
    targets = tokens.ids
    if tokens.shift:
        targets, weights = _one_back(targets), _one_back(weights)
    return Questions(read, targets, weights, total)


def _masked(tokens: Tokens, rate: float, random_rate: float, keep_rate: float) -> Questions:
    chosen = maskable(tokens) & (tokens.uniform(_MASK) < below(rate))
    draw = tokens.uniform(_REPLACE)
    other = (tokens.uniform(_WORD) % jnp.uint32(tokens.vocabulary)).astype(jnp.int32)
    read = jnp.where(draw < below(random_rate), other, tokens.mask_id)
    read = jnp.where(draw >= below(1 - keep_rate), tokens.ids, read) if keep_rate else read
    return questions(tokens, jnp.where(chosen, read, tokens.ids), chosen.astype(jnp.float32))


def masked_part(tokens: Tokens, part: jax.typing.ArrayLike) -> jax.Array:
    """Returns which words are masked, bool [R, L]: each with probability `part`, a number or one for each token."""
    return maskable(tokens) & (tokens.uniform(_MASK) < below(part))


def _one_back(x_RxL: jax.Array) -> jax.Array:
    """Returns what stands in the next place of the row, 0 in the last; for small arrays: whole rows are needed."""
    whole = jax.sharding.reshard(x_RxL, P(BATCH, None))
    moved = jnp.concatenate([whole[:, 1:], jnp.zeros_like(whole[:, :1])], axis=1)
    return jax.sharding.reshard(moved, ROWS)
