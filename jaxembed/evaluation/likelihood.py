"""The likelihood of held-out texts: what a model that predicts words makes of them, in nats per word.

A causal model that predicts each token from the state before it says log p(text) itself. Of others there is a lower
bound, that of masked diffusion (LLaDA, Nie et al. 2025, arXiv:2502.09992, equation 6): m of a text's n words are
masked, any m of them alike, m evenly drawn from 1 … n, and the sum of the masked words' log-likelihoods is weighted by
n / m. Its mean is that of masking each word with probability t, evenly drawn from (0, 1], with the weight 1 / t (as
`losses.masked_diffusion` does it), without the large weights of draws that happen to have small t or many words.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxembed.blueprint import Blueprint
from jaxembed.config import SourceConfig
from jaxembed.data.batch import Rows
from jaxembed.data.records import RecordReader
from jaxembed.data.sources import parse_spec
from jaxembed.embedder import Embedder
from jaxembed.encoding import DeviceBatch, TokenizedTexts, device_batches
from jaxembed.errors import UserError
from jaxembed.evaluation.lines import read_lines
from jaxembed.evaluation.pairs import set_name
from jaxembed.evaluation.sets import is_plain, plain_name
from jaxembed.losses.predicting import Questions
from jaxembed.models.language_head import LanguageConfig
from jaxembed.models.text_encoder import ModelFactory, Params
from jaxembed.reading import predict
from jaxembed.sharding import ROWS, batch_shards, put
from jaxembed.storage import path_of

SEED = 20_250_214  # of the masks
WINDOW = 4_096  # texts masked and packed together


@dataclasses.dataclass(frozen=True)
class TextsData:
    """Texts that were held out.

    Attributes:
      name: the file's name without its endings.
      texts: distinct ones.
    """

    name: str
    texts: list[str]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a model reads of a text, once, and what it is asked. Arrays are [n], n tokens.

    Attributes:
      ids: int, what it reads.
      targets: int, the token that the state in each place is to predict.
      asked: bool, the states that are asked.
    """

    ids: np.ndarray
    targets: np.ndarray
    asked: np.ndarray


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How a model answered. N texts that have words, K draws of each.

    Attributes:
      bounds_NxK: float64, lower bounds of the texts' log-likelihoods, in nats.
      words_N: int64, words of each.
      right: part of the words asked for, over all draws, whose right word had the highest score.
    """

    bounds_NxK: np.ndarray
    words_N: np.ndarray
    right: float


def read_texts(spec: str, where: str) -> TextsData:
    """Reads texts to predict: the lines of a plain .txt file (or .txt.gz), or the texts of records.

    Of records whose key is 'text' these are the texts, of others the queries and positives. Texts that are equal are
    one.

    Args:
      spec: a file, folder or glob, 'tfds:NAME[:SPLIT]' or 'hf:NAME[:SPLIT]': see `sources.parse_spec`.
      where: the flag or config field that names it, for messages.

    Raises:
      UserError: nothing there, no text in it, or a bad record (named FILE:LINE).
    """
    if is_plain(spec):
        path = path_of(spec)
        texts = list(dict.fromkeys(line.strip() for _, line in read_lines(path)))
        if not texts:
            raise UserError(f"{where}: {path}: no line of it has text")
        return TextsData(plain_name(path), texts)
    source = SourceConfig(**parse_spec(spec))
    keys = next((row for _, row in RecordReader(source, "error", where).source.rows(_all_columns)), {})
    if isinstance(keys, dict) and "text" in keys and "query" not in keys:
        source = dataclasses.replace(source, format="texts")
    records = RecordReader(source, "error", where)
    texts = dict.fromkeys(text for record in records for text in (record.query, *record.positives))
    return TextsData(set_name(source), list(texts))


def evaluate_likelihood(
    data: TextsData, embedder: Embedder, draws: int, show_progress_bar: bool = False
) -> dict[str, float]:
    """Bounds the log-likelihood of texts from below.

    Words are the tokens of a text but the special ones, which are given, and the first where words are predicted from
    the state before them. Texts are cut to the model's length and read without a prompt. The masks depend on a text's
    number and nothing else, so that figures of one set can be compared between models, steps, meshes and packings.

    Args:
      data: the texts.
      embedder: the model.
      draws: K, masks of each text; a causal model needs none.
      show_progress_bar: on standard error.

    Returns:
      'elbo', the lower bound of the log-likelihood per word, in nats, higher is better; 'elbo_stderr', its standard
      error, see `mean_bound`; 'perplexity', exp(-elbo); and 'right', the part of the words asked for whose right word
      had the highest score.

    Raises:
      UserError: the model predicts no words, a text's loss is not finite, or no text has a word to predict.
    """
    task = f"texts/{data.name}"
    found = bounds_of(data.texts, embedder, draws, task, show_progress_bar=show_progress_bar)
    elbo, stderr = mean_bound(found.bounds_NxK, found.words_N)
    perplexity = math.exp(min(-elbo, 700.0))
    return {"elbo": elbo, "elbo_stderr": stderr, "perplexity": perplexity, "right": found.right}


def mean_bound(bounds_NxK: np.ndarray, words_N: np.ndarray) -> tuple[float, float]:
    """Averages texts' bounds per word: Σ bounds / Σ words.

    Its standard error is that of a ratio, by the delta method: with e = bound - mean · words of each text, the bound
    being the mean over its draws, sqrt(N / (N - 1) · Σ e²) / Σ words. Draws of different texts are independent, so a
    text's e holds what its own draws add, and texts and draws are both counted: the error says how far another N texts
    with other masks would lie. Of a single text it is that of its draws alone, their spread / sqrt(K) (too large,
    rather, as they are spread evenly), and 0 of one draw.

    Args:
      bounds_NxK: float64, in nats.
      words_N: words of each text.

    Returns:
      The mean and its standard error.
    """
    count, draws = bounds_NxK.shape
    words = float(words_N.sum())
    mean = float(bounds_NxK.mean(1).sum()) / words
    if count > 1:
        error_N = bounds_NxK.mean(1) - mean * words_N
        return mean, math.sqrt(count / (count - 1) * float(error_N @ error_N)) / words
    return mean, float(bounds_NxK.std(ddof=1)) / math.sqrt(draws) / words if draws > 1 else 0.0


def bounds_of(
    texts: Sequence[str], embedder: Embedder, draws: int, task: str, seed: int = SEED, show_progress_bar: bool = False
) -> Bounds:
    """Bounds the log-likelihood of each text; see `evaluate_likelihood`.

    Args:
      texts: any strings; those without a word to predict are left out.
      embedder: the model.
      draws: K, of a model that is not causal.
      task: for messages.
      seed: of the masks.
      show_progress_bar: on standard error.
    """
    from rich.console import Console
    from rich.progress import Progress

    language, exact = require_language(embedder.blueprint, task)
    bounds, words, right, asked = [], [], 0, 0
    with Progress(console=Console(stderr=True), transient=True, disable=not show_progress_bar) as progress:
        bar = progress.add_task(task, total=len(texts))
        for first in range(0, len(texts), WINDOW):
            part = texts[first : first + WINDOW]
            drawn = [
                (counted, readings)
                for number, ids in enumerate(_tokens(part, embedder), first)
                if (counted := int(predictable(ids, language).sum()))
                for readings in [_readings(ids, language, 0 if exact else draws, (seed, number))]
            ]
            readings = [reading for _, of_text in drawn for reading in of_text]
            losses, rights = answer(embedder, readings)
            each = np.array([reading.asked.sum() for reading in readings], np.int64)
            words.append(np.array([counted for counted, _ in drawn], np.int64))
            bounds.append((-losses / each).reshape(-1, 1 if exact else draws) * words[-1][:, None])
            right, asked = right + int(rights.sum()), asked + int(each.sum())
            progress.advance(bar, len(part))
    if not asked:
        raise UserError(f"{task}: no text has a word to predict")
    bounds_NxK = np.concatenate(bounds)
    if not np.isfinite(bounds_NxK).all():
        raise UserError(f"{task}: the model's losses are not finite: its weights are broken, or training diverged")
    return Bounds(bounds_NxK, np.concatenate(words), right / asked)


def require_language(blueprint: Blueprint, task: str) -> tuple[LanguageConfig, bool]:
    """Returns how a model predicts words, and whether it says the likelihood of a text itself.

    Raises:
      UserError: it does not predict any, or neither is causal nor has a mask token; `task` says what wants it.
    """
    language = blueprint.language
    if language is None or not language.predicts:
        raise UserError(
            f"{task}: the model predicts no words: train it with a loss over tokens (masked_diffusion, masked_lm …), "
            "and name the run's folder"
        )
    exact = blueprint.causal and language.shift
    if not exact and language.mask_id < 0:
        raise UserError(
            f"{task}: the model is not causal, and has no mask token: train it with a loss over masked words, and set "
            "config.model.mask_token where its tokenizer has none"
        )
    return language, exact


def predictable(ids: np.ndarray, language: LanguageConfig) -> np.ndarray:
    """Returns which tokens of a text [n] can be asked for: bool [n], words that there is a state to predict from."""
    words = ~np.isin(ids, (*language.framing, language.mask_id))
    if language.shift:
        words[:1] = False
    return words


def asking(read: np.ndarray, ids: np.ndarray, asked: np.ndarray, shift: bool) -> Reading:
    """Moves what is asked of a text to where the states are that answer it.

    Args:
      read: [n], what the model reads.
      ids: [n], what is right.
      asked: bool [n], by the place of the token that is asked for.
      shift: whether a token is predicted from the state before it; then the first cannot be asked for.
    """
    ids = ids.astype(np.int32)
    if shift:
        ids, asked = np.append(ids[1:], ids[:1]), np.append(asked[1:], False)
    return Reading(read.astype(np.int32), ids, asked)


def answer(embedder: Embedder, readings: Sequence[Reading]) -> tuple[np.ndarray, np.ndarray]:
    """Lets a model read and answer, on its mesh.

    Returns:
      Of each reading the sum of the cross-entropies in nats, float64 [n], and how many answers were right, int64 [n].
    """
    losses, rights = np.zeros(len(readings)), np.zeros(len(readings), np.int64)
    with jax.set_mesh(embedder.mesh):
        running: list[tuple[np.ndarray, tuple[jax.Array, jax.Array]]] = []
        for number_RxL, rows, targets, asked in _batches(embedder, readings):
            running.append((number_RxL, _predict(embedder.factory, embedder.params, rows, targets, asked)))
            if len(running) > 1:  # the device computes one batch while the host prepares the next
                _add(*running.pop(0), losses, rights)
        for numbers_and_answers in running:
            _add(*numbers_and_answers, losses, rights)
    return losses, rights


def numbers_of(batch: DeviceBatch) -> np.ndarray:
    """Returns the number of each token's text, int64 [R, L], -1 for padding."""
    spans = batch.rows.span_ids
    shard = np.arange(len(spans))[:, None] // (len(spans) // len(batch.texts))
    return np.where(spans < 0, -1, batch.texts[shard, spans])


def packed(embedder: Embedder, ids: Sequence[np.ndarray]) -> Iterator[DeviceBatch]:
    """Packs texts into device batches of the model's mesh; to be called with the mesh set."""
    longest = embedder.blueprint.tokenizer.longest(embedder.blueprint.max_length)
    texts = TokenizedTexts(ids, np.zeros(len(ids), np.int64), longest)
    return device_batches(texts, batch_shards(embedder.mesh))


def _tokens(texts: Sequence[str], embedder: Embedder) -> list[np.ndarray]:
    return embedder.blueprint.tokenizer.encode(texts, embedder.blueprint.max_length)


def _readings(ids: np.ndarray, language: LanguageConfig, draws: int, seed: tuple[int, int]) -> list[Reading]:
    """Returns the readings of a text of n words: one for each draw, or, of 0 draws, one of the whole text.

    The draws mask as many words as 1 … n are divided into even steps, from a start that is drawn.
    """
    words = predictable(ids, language)
    if not draws:
        return [asking(ids, ids, words, language.shift)]
    rng = np.random.default_rng(seed)
    places = np.flatnonzero(words)
    part = (rng.random() + np.arange(draws) / draws) % 1
    readings = []
    for count in np.minimum((part * len(places)).astype(int) + 1, len(places)):
        masked = np.zeros(len(ids), bool)
        masked[rng.permutation(places)[:count]] = True
        readings.append(asking(np.where(masked, language.mask_id, ids), ids, masked, language.shift))
    return readings


def _batches(
    embedder: Embedder, readings: Sequence[Reading]
) -> Iterator[tuple[np.ndarray, Rows, jax.Array, jax.Array]]:
    """Yields the numbers of the tokens' readings, and on the mesh rows, targets and what is asked, all [R, L]."""
    if not readings:
        return
    starts = np.cumsum([0, *(len(reading.ids) for reading in readings)])
    targets, asked = (np.concatenate([getattr(x, name) for x in readings]) for name in ("targets", "asked"))
    for batch in packed(embedder, [reading.ids for reading in readings]):
        number = numbers_of(batch)
        at = np.where(number < 0, 0, starts[number] + batch.rows.positions)
        arrays = batch.rows, targets[at], asked[at] & (number >= 0)
        yield number, *jax.tree.map(lambda x: put(x, embedder.mesh, ROWS), arrays)


@functools.partial(jax.jit, static_argnums=0)
def _predict(
    factory: ModelFactory, params: Params, rows: Rows, targets: jax.Array, asked: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns losses and which answers are right, [R, L] on every device."""
    questions = Questions(rows.tokens, targets, asked.astype(jnp.float32), jnp.ones(()))
    losses, right, _ = predict(factory, params, rows, questions)
    return jax.sharding.reshard(losses, P(None, None)), jax.sharding.reshard(right, P(None, None))


def _add(number_RxL: np.ndarray, answers: tuple[jax.Array, jax.Array], losses: np.ndarray, rights: np.ndarray) -> None:
    real = number_RxL >= 0
    for of_tokens, sums in zip(answers, (losses, rights)):
        sums += np.bincount(number_RxL[real], np.asarray(of_tokens)[real], len(sums)).astype(sums.dtype)


def _all_columns(_: str, columns: Sequence[str]) -> list[str]:
    return list(columns)
