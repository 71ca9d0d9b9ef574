"""Filling masked words in, the most confident ones first.

In each of some rounds every masked place is predicted, the words that the model is surest of are put in, and the rest
stays masked: MaskGIT's sampler (Chang et al. 2022, arXiv:2202.04200), which LLaDA calls low-confidence remasking (Nie
et al. 2025, arXiv:2502.09992). Scores of words are made for a few masked places at a time, never for all tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxembed.blueprint import Blueprint
from jaxembed.data.batch import Rows
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.evaluation.likelihood import asking, numbers_of, packed, predictable, require_language
from jaxembed.hashing import mix, uniform
from jaxembed.losses.cross_entropy import BIAS, TABLE
from jaxembed.models.language_head import LanguageConfig
from jaxembed.models.text_encoder import ModelFactory, Params, TextEncoder
from jaxembed.sharding import BATCH, ROWS, STATES, put

PLACES = 128  # whose words are scored at once
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How words are filled in.

    Attributes:
      steps: rounds, over which a text's masked words are spread evenly; 0 = one word in each round.
      temperature: of the words that are drawn; 0 takes each place's best word.
      seed: of what is drawn.
    """

    steps: int = 0
    temperature: float = 0.0
    seed: int = 0

    def due(self, masked: int, number: int) -> int:
        """Returns how many of a text's `masked` words are put in, in the round of this number, from 0."""
        steps = min(self.steps or masked, masked)
        return masked // steps + (number < masked % steps)

    def rounds(self, masked: int) -> int:
        """Returns the rounds that a text with so many masked words takes."""
        return min(self.steps or masked, masked)


def require_filling(blueprint: Blueprint, where: str) -> LanguageConfig:
    """Returns how a model predicts words.

    Raises:
      UserError: it does not predict masked ones; `where` says what wants it.
    """
    if blueprint.language is not None and blueprint.causal:
        raise UserError(
            f"{where}: the model is causal, it sees nothing behind a masked word: train one with "
            "config.model.attention = 'bidirectional' and a loss over masked words (masked_diffusion, masked_lm …)"
        )
    return require_language(blueprint, where)[0]


def fill(
    embedder: Embedder,
    texts: Sequence[np.ndarray],
    masked: Sequence[np.ndarray],
    how: Sampling,
    after_round: Callable[[], object] = lambda: None,
) -> list[np.ndarray]:
    """Fills masked words in. What is filled in a text depends on it and its number alone, not on mesh or packing.

    A word's confidence is its probability among the words that are offered: those that the tokenizer knows, special
    tokens left out. With a temperature, words are drawn by Gumbel noise, and their confidence is without it.

    Args:
      embedder: a model that predicts masked words.
      texts: tokens of each, integers [n].
      masked: which of them are to be found, bool [n] each; what the texts have there is not looked at.
      how: rounds, temperature, seed.
      after_round: is called after each round.

    Returns:
      The texts' tokens, int32 [n] each.

    Raises:
      UserError: the model predicts no masked words, or the first token of a text is masked in one that predicts a word
        from the state before it.
    """
    language = require_filling(embedder.blueprint, "filling masked words in")
    if language.shift and any(places[:1].any() for places in masked):
        raise UserError("the first token of a text is masked: this model predicts a word from those before it")
    filled = [np.where(places, language.mask_id, ids).astype(np.int32) for ids, places in zip(texts, masked)]
    left = [np.array(places, bool) for places in masked]
    totals = [int(places.sum()) for places in left]
    with jax.set_mesh(embedder.mesh):
        offered = put(_offered(embedder.blueprint, language), embedder.mesh, P(None))
        for number in range(max(map(how.rounds, totals), default=0)):
            open_ = [i for i, places in enumerate(left) if places.any()]
            for i, words, sure in _predictions(embedder, offered, open_, filled, left, how, number):
                chosen = np.argsort(-sure, kind="stable")[: how.due(totals[i], number)]
                places = np.flatnonzero(left[i])[chosen]
                filled[i][places], left[i][places] = words[chosen], False
            after_round()
    return filled


def mask_some(texts: Sequence[np.ndarray], language: LanguageConfig, rate: float, seed: int) -> list[np.ndarray]:
    """Masks a part of the words of texts, by their numbers: at least one of each that has any.

    Args:
      texts: tokens of each, [n].
      language: says which tokens are words.
      rate: part of each text's words, rounded.
      seed: of which are drawn.

    Returns:
      bool [n] for each text.
    """
    chosen = []
    for number, ids in enumerate(texts):
        words = np.flatnonzero(predictable(ids, language))
        count = min(len(words), max(1, round(rate * len(words))))
        masked = np.zeros(len(ids), bool)
        masked[np.random.default_rng((seed, number)).permutation(words)[:count]] = True
        chosen.append(masked)
    return chosen


def chances(texts: Sequence[np.ndarray], language: LanguageConfig) -> tuple[float, float]:
    """Returns what guesses restore that know the words' frequencies p in the texts, and nothing else.

    Returns:
      The largest p, by always guessing that word; and Σ p², by drawing words.
    """
    words = np.concatenate([ids[predictable(ids, language)] for ids in texts]).astype(np.int64)
    part = np.bincount(words) / max(len(words), 1)
    return float(part.max(initial=0)), float(part @ part)


def _offered(blueprint: Blueprint, language: LanguageConfig) -> np.ndarray:
    """Returns which rows of the table of words may be put in: bool [V']."""
    barred = {*language.framing, *blueprint.tokenizer.special_ids, language.mask_id}
    offered = np.zeros(blueprint.backbone.padded_vocab, bool)
    token = blueprint.tokenizer.token
    offered[: language.words] = [i not in barred and token(i) != "" for i in range(language.words)]
    return offered


def _predictions(
    embedder: Embedder,
    offered: jax.Array,
    numbers: Sequence[int],
    texts: Sequence[np.ndarray],
    left: Sequence[np.ndarray],
    how: Sampling,
    number: int,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Predicts the masked places of some texts.

    Yields:
      A text's number, the word for each of its masked places in their order, int32, and how sure it is, float32.
    """
    shift = embedder.blueprint.language.shift
    readings = [asking(texts[i], texts[i], left[i], shift) for i in numbers]
    starts = np.cumsum([0, *(len(reading.ids) for reading in readings)])
    asked = np.concatenate([reading.asked for reading in readings])
    seed = np.array([how.seed, number], np.uint32)
    for batch in packed(embedder, [reading.ids for reading in readings]):
        of = numbers_of(batch)
        at = np.where(of < 0, 0, starts[of] + batch.rows.positions)
        row, column = np.nonzero(asked[at] & (of >= 0))
        if not len(row):
            continue
        text, place = of[row, column], batch.rows.positions[row, column]
        places = np.stack([row, column, np.array(numbers)[text], place], 1).astype(np.int32)
        rows = jax.tree.map(lambda x: put(x, embedder.mesh, ROWS), batch.rows)
        tiles, temperature = put(_tiles(places), embedder.mesh, P(None, None, None)), np.float32(how.temperature)
        found = _best(embedder.factory, how.temperature > 0, embedder.params, rows, tiles, offered, temperature, seed)
        words, sure = (np.asarray(x).reshape(-1)[: len(row)] for x in found)
        for one in np.unique(text):
            of_text = np.flatnonzero(text == one)
            order = of_text[np.argsort(place[of_text])]
            yield numbers[one], words[order], sure[order]


def _tiles(places_Nx4: np.ndarray) -> np.ndarray:
    """Returns places in tiles [n, PLACES, 4], filled up by place 0; n is a power of two: few shapes are compiled."""
    tiles = 1 << max(0, (len(places_Nx4) - 1) // PLACES).bit_length()
    padded = np.zeros((tiles * PLACES, places_Nx4.shape[1]), places_Nx4.dtype)
    padded[: len(places_Nx4)] = places_Nx4
    return padded.reshape(tiles, PLACES, -1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _best(
    factory: ModelFactory,
    noisy: bool,
    params: Params,
    rows: Rows,
    tiles: jax.Array,
    offered: jax.Array,
    temperature: jax.Array,
    seed: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Finds words for masked places.

    Args:
      factory: the model's.
      noisy: whether words are drawn.
      params: its parameters.
      rows: what it reads, arrays [R, L].
      tiles: int32 [n, A, 4]: row and column of the state that predicts, and for the noise the text's number and the
        state's place in it.
      offered: bool [V'], the words to choose from.
      temperature: float32 scalar.
      seed: uint32 [2], the run's and the round's.

    Returns:
      The words, int32 [n, A], and their probabilities, float32 [n, A], on every device.
    """
    bound = factory.bind(params)
    states, _ = bound.word_states(rows)
    bits = mix(mix(seed[0]) ^ seed[1])

    def of_tile(places_Ax4: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jnp.where(offered, _scores(bound, _states_at(states, places_Ax4)), _LOWEST)
        drawn = scores
        if noisy:
            of_place = mix(mix(bits ^ places_Ax4[:, 2].astype(jnp.uint32)) ^ places_Ax4[:, 3].astype(jnp.uint32))
            of_word = mix(jnp.arange(scores.shape[1], dtype=jnp.uint32))
            noise = -jnp.log(-jnp.log(uniform(mix(of_place[:, None] ^ of_word))))
            drawn = jnp.where(offered, scores + temperature * noise, _LOWEST)
        words = drawn.argmax(1).astype(jnp.int32)
        own = jnp.take_along_axis(scores, words[:, None], 1)[:, 0]
        return words, jnp.exp(own - jax.nn.logsumexp(scores, 1))

    return jax.lax.map(of_tile, tiles)


def _states_at(states_RxLxD: jax.Array, places_Ax4: jax.Array) -> jax.Array:
    """Returns some places' states [A, D] on every device."""

    def local(states: jax.Array, places: jax.Array) -> jax.Array:
        height, length, _ = states.shape
        row = places[:, 0] - jax.lax.axis_index(BATCH) * height
        column = places[:, 1] - jax.lax.axis_index("sequence") * length
        here = (row >= 0) & (row < height) & (column >= 0) & (column < length)
        found = states[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, length - 1)]
        return jax.lax.psum(jnp.where(here[:, None], found, 0), (*BATCH, "sequence"))

    return jax.shard_map(local, in_specs=(STATES, P(None, None)), out_specs=P(None, None))(states_RxLxD, places_Ax4)


def _scores(bound: TextEncoder, states_AxD: jax.Array) -> jax.Array:
    """Returns the words' scores, float32 [A, V'] on every device."""
    table = jax.sharding.reshard(bound.word_table.astype(states_AxD.dtype), TABLE)
    scores = jax.lax.dot_general(
        states_AxD,
        table,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
        out_sharding=P(None, *BIAS),
    )
    if bound.word_bias is not None:
        scores += jax.sharding.reshard(bound.word_bias.astype(jnp.float32), BIAS)
    scores = jax.sharding.reshard(scores, P(None, None))
    softcap = bound.language.config.softcap
    return softcap * jnp.tanh(scores / softcap) if softcap else scores
