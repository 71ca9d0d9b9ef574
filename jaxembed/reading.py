"""A step's losses over tokens: what a language model reads of the step's texts, is asked, and how wrong it is.

Each loss reads the texts once more, with its own masks. Everything is a sum over the tokens of the global batch that is
divided once, so neither micro-batches nor devices change a loss or its gradient.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxembed.config import AUTO, Config, LossConfig, MaskConfig
from jaxembed.data.batch import Rows
from jaxembed.hashing import mix
from jaxembed.losses.cross_entropy import Words, cross_entropy
from jaxembed.losses.objective import Term, terms_of, weight_of
from jaxembed.losses.predicting import Questions, Tokens, masked_part
from jaxembed.losses.table import LOSSES
from jaxembed.models.language_head import LanguageConfig
from jaxembed.models.layers.dropout import Noise
from jaxembed.models.layers.routing import RouterSums
from jaxembed.models.text_encoder import ModelFactory, Params

_VIEW, _FIRST = 0x51ED270B, 0x2545F491  # what seeds are for: noised views, and the losses from the first on
QUERY = "query"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """How a model answered, float32 scalars, sums over the batch.

    Attributes:
      loss: of the weighted losses.
      total: by which their sum is divided.
      right: questions whose right word had the highest score.
      asked: questions.
    """

    loss: jax.Array
    total: jax.Array
    right: jax.Array
    asked: jax.Array


def token_losses(
    config: Config,
    factory: ModelFactory,
    model: Params,
    rows: Rows,
    texts_per_pair: int,
    seed: jax.Array,
    noise_seed: jax.Array | None,
    ahead: jax.Array | None,
    done: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array], RouterSums | None]:
    """Computes the losses over tokens of a step.

    Args:
      config: the run's.
      factory: the model's, with a language head.
      model: its parameters.
      rows: the texts' tokens, arrays [M, R, L]; with `source` where losses serve some sources only, or experts go by
        it.
      texts_per_pair: T, a query and what comes with it.
      seed: uint32 scalar, of the step.
      noise_seed: of the dropout masks, and of growing attention; None for neither.
      ahead: how far attention has grown; see `Noise`.
      done: part of the stage's steps that are done.

    Returns:
      The weighted sum of the losses, a float32 scalar; metrics: `loss/LABEL`, `right/LABEL`, the part of questions
      whose right word had the highest score, and `asked/LABEL`, how many there were; and what the routers did, summed.
    """
    language = factory.language
    value, metrics, routers = jnp.zeros(()), {}, None
    for number, term in enumerate(terms_of(config, over_tokens=True)):
        own = mix(seed ^ jnp.uint32(_FIRST + number))

        def answer(rows: Rows, term: Term = term, own: jax.Array = own) -> tuple[Answers, RouterSums | None]:
            asked = ask(term, rows, language, texts_per_pair, own)
            noise = None
            if noise_seed is not None:
                noise = Noise(mix(noise_seed ^ own), rows.segment_ids, rows.positions, ahead)
            by_source = config.model.experts.routing == "source"
            read = dataclasses.replace(rows, tokens=asked.ids, source=rows.source if by_source else None)
            return answers(factory, model, read, asked, noise, term.config.tile)

        found, routed = _over_micro_batches(answer, rows)
        loss = found.loss / jnp.maximum(found.total, 1)
        value += weight_of(term.config, done) * loss
        routers = routed if routers is None else jax.tree.map(operator.add, routers, routed)
        metrics[f"loss/{term.label}"] = loss
        metrics[f"right/{term.label}"] = found.right / jnp.maximum(found.asked, 1)
        metrics[f"asked/{term.label}"] = found.asked
    return value, jax.lax.stop_gradient(metrics), routers


def ask(term: Term, rows: Rows, language: LanguageConfig, texts_per_pair: int, seed: jax.Array) -> Questions:
    """Draws what a loss asks of some rows [R, L]."""
    served = rows.segment_ids > 0
    sides = term.config.sides
    if len(sides) < 2:
        is_query = (rows.segment_ids - 1) % texts_per_pair == 0
        served &= is_query if sides == (QUERY,) else ~is_query
    if rows.source is not None:
        served &= functools.reduce(operator.or_, (rows.source == source for source in term.sources))
    entry = LOSSES[term.config.name]
    arguments = {field: getattr(term.config, field) for field in entry.takes if field not in ("sides", "tile")}
    tokens = tokens_of(rows, served, language, seed)
    return entry.load()(dataclasses.replace(tokens, stride=texts_per_pair if sides == (QUERY,) else 1), **arguments)


def tokens_of(rows: Rows, served: jax.Array, language: LanguageConfig, seed: jax.Array) -> Tokens:
    """Returns the tokens of rows [R, L] as losses see them; `served`, bool [R, L]: those of texts they serve."""
    special = functools.reduce(operator.or_, (rows.tokens == token for token in language.framing), jnp.bool_(False))
    return Tokens(
        ids=rows.tokens,
        texts=rows.segment_ids,
        positions=rows.positions,
        words=served & ~special & ~rows.prompt_mask,
        served=served,
        seed=seed,
        mask_id=language.mask_id,
        vocabulary=language.words,
        shift=language.shift,
    )


def answers(
    factory: ModelFactory, model: Params, rows: Rows, asked: Questions, noise: Noise | None, tile: int
) -> tuple[Answers, RouterSums | None]:
    """Reads rows [R, L] and answers; returns sums, and what the routers did."""
    losses, right, routers = predict(factory, model, rows, asked, noise, tile)
    return Answers((losses * asked.weights).sum(), asked.total, _count(right), _count(asked.weights != 0)), routers


def predict(
    factory: ModelFactory, model: Params, rows: Rows, asked: Questions, noise: Noise | None = None, tile: int = 2048
) -> tuple[jax.Array, jax.Array, RouterSums | None]:
    """Reads rows [R, L]; returns the questions' losses in nats, float32 [R, L], which were right, and the routers'."""
    bound = factory.bind(model)
    language = bound.language.config
    states, routers = bound.word_states(rows, noise)
    words = Words(language.words, tile, language.softcap)
    losses, right = cross_entropy(states, bound.word_table, bound.word_bias, asked.targets, asked.weights != 0, words)
    return losses, right, routers


def noised(rows: Rows, parts: MaskConfig, language: LanguageConfig, texts_per_pair: int, seed: jax.Array) -> Rows:
    """Returns rows [M, R, L] in which a part of the words of queries and of documents is masked."""
    seed = mix(seed ^ jnp.uint32(_VIEW))

    def masked(rows: Rows) -> jax.Array:
        tokens = tokens_of(rows, rows.segment_ids > 0, dataclasses.replace(language, shift=False), seed)
        is_query = (rows.segment_ids - 1) % texts_per_pair == 0
        part = jnp.where(is_query, parts.query, parts.document)
        return jnp.where(masked_part(tokens, part), language.mask_id, rows.tokens)

    return dataclasses.replace(rows, tokens=jax.vmap(masked)(rows))


def passes(config: Config) -> tuple[bool, tuple[float, ...]]:
    """Returns how often a step reads its texts: whether for vectors, and for each loss over tokens once more.

    The numbers are the parts of all tokens that these ask for on average.
    """
    parts = {"masked_diffusion": lambda loss: (1 + loss.mask_least) / 2, "next_token": lambda loss: 1.0}
    over_tokens = [term.config for term in terms_of(config, over_tokens=True)]
    asked = tuple(parts.get(loss.name, lambda loss: loss.mask_rate)(loss) for loss in over_tokens)
    return bool(terms_of(config)), asked


def predicts_next(losses: Sequence[LossConfig], learned: bool) -> bool:
    """Returns whether a model that is trained by these losses predicts a token from the state before it.

    Args:
      losses: in the order of the stages; the last one that says it counts.
      learned: whether it did so before.
    """
    said = {"masked_lm": False, "masked_next_token": True, "next_token": True}
    for loss in losses:
        if loss.name == "masked_diffusion" and loss.predicts != AUTO:
            learned = loss.predicts == "next"
        learned = said.get(loss.name, learned)
    return learned


def _over_micro_batches(
    answer: Callable[[Rows], tuple[Answers, RouterSums | None]], rows: Rows
) -> tuple[Answers, RouterSums | None]:
    """Sums over the micro-batches of rows [M, R, L]; of several, each is recomputed in the backward pass."""
    if rows.tokens.shape[0] == 1:
        return answer(jax.tree.map(lambda x: x[0], rows))
    body = jax.checkpoint(answer, prevent_cse=False)
    _, each = jax.lax.scan(lambda _, rows: (None, body(rows)), None, rows)
    return jax.tree.map(lambda x: x.sum(0), each)


def _count(x: jax.Array) -> jax.Array:
    return x.sum().astype(jnp.float32)
