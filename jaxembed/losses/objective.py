"""A run's objective: a weighted sum of losses, each over the sources that it serves, at all sizes of the vectors."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxembed.config import Config, LossConfig, MatryoshkaConfig
from jaxembed.losses import sides
from jaxembed.losses.contrastive import Method, Scoring, reduce_scores
from jaxembed.losses.embedded import Embedded, spread, weighted_mean
from jaxembed.losses.geometry import unit
from jaxembed.losses.negatives import Rule
from jaxembed.losses.reductions import Divergence
from jaxembed.losses.table import LOSSES, MIN_TEMPERATURE

LossParams = dict[str, dict[str, jax.Array]]  # by the loss's label


@dataclasses.dataclass(frozen=True)
class Term:
    """One loss of the sum.

    Attributes:
      config: its settings.
      label: what metrics, parameters and sources call it.
      sources: numbers of the sources that it serves.
    """

    config: LossConfig
    label: str
    sources: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Size:
    """A size that the vectors serve at.

    Attributes:
      depth: index of the backbone's depth, 0 for the full one.
      layers: that depth in layers, 0 for the full one.
      width: of the vector, 0 for the full one.
    """

    depth: int = 0
    layers: int = 0
    width: int = 0

    @property
    def label(self) -> str:
        """Its name in the metrics, such as 'layers6_dim64'."""
        return "_".join(f"{name}{n}" for name, n in (("layers", self.layers), ("dim", self.width)) if n) or "full"


def terms_of(config: Config, over_tokens: bool = False) -> tuple[Term, ...]:
    """Returns the losses of a run over vectors, or those over tokens."""
    sources = config.data.train
    return tuple(
        Term(loss, loss.title, tuple(i for i, source in enumerate(sources) if source.trains(loss)))
        for loss in config.all_losses
        if LOSSES[loss.name].over_tokens == over_tokens
    )


def weight_of(loss: LossConfig, done: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """Returns a loss's weight in the sum, after the part `done` of a stage's steps."""
    return loss.weight if loss.weight_end < 0 else loss.weight + (loss.weight_end - loss.weight) * done


def sizes_of(config: MatryoshkaConfig) -> tuple[Size, ...]:
    """Returns the sizes that the losses are computed at, the full one first.

    All widths at all depths are 2-D Matryoshka (Li et al. 2024, arXiv:2402.14776), widths alone Matryoshka (Kusupati et
    al. 2022, arXiv:2205.13147), pairs of both Starbucks (Zhuang et al. 2024, arXiv:2410.13230).
    """
    depths = list(enumerate(config.layers, start=1))
    if config.pairs == "zip":
        return Size(), *(Size(i, layers, width) for (i, layers), width in zip(depths, config.dims))
    return tuple(Size(i, layers, width) for i, layers in [(0, 0), *depths] for width in (0, *config.dims))


def loss_params(config: Config, width: int, teacher_width: int) -> LossParams:
    """Returns the losses' own fresh parameters, by label.

    Args:
      config: the run's.
      width: E, of the model's vectors.
      teacher_width: F, of a teacher's; 0 without one.
    """
    params: LossParams = {}
    for term in terms_of(config):
        own = {}
        if term.config.learn_temperature:
            own["log_temperature"] = jnp.log(jnp.float32(term.config.temperature))
        if "bias" in LOSSES[term.config.name].learns:
            own["bias"] = jnp.float32(term.config.bias)
        if "projection" in LOSSES[term.config.name].learns and (width != teacher_width or config.matryoshka.dims):
            key = jax.random.fold_in(jax.random.key(config.seed), len(params))
            own["projection"] = jax.random.normal(key, (width, teacher_width)) / width**0.5
        if own:
            params[term.label] = own
    return params


def objective(
    config: Config, params: LossParams, depths: Sequence[Embedded], done: jax.typing.ArrayLike = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes a step's loss over vectors.

    Several losses are summed by their weights. Over several sizes the result is the mean by `matryoshka.weights`,
    each size but the full one with its divergence from the full one, if asked for.

    Args:
      config: the run's.
      params: the losses' own parameters.
      depths: the texts' vectors, of the full backbone, then of each of `matryoshka.layers`.
      done: part of the stage's steps that are done, on which weights may depend.

    Returns:
      The loss, a float32 scalar, and float32 scalar metrics: those of each loss at full size, `loss/LABEL` of each of
      several losses, `loss/SIZE` of each of several sizes.
    """
    terms, sizes = terms_of(config), sizes_of(config.matryoshka)
    depths = [spread(embedded) for embedded in depths]
    weights = config.matryoshka.weights or (1.0,) * len(sizes)
    metrics: dict[str, jax.Array] = {}
    total = jnp.zeros(())
    for size, weight in zip(sizes, weights):
        embedded = _resized(depths[size.depth], size.width, config.model.normalize)
        values = [_term(term, params.get(term.label, {}), embedded, size.width) for term in terms]
        value = sum(weight_of(term.config, done) * loss for term, (loss, _) in zip(terms, values))
        if size == Size():
            metrics |= _named(terms, values, alone=len(config.all_losses) == 1)
        elif config.matryoshka.kl:
            divergence = _divergence(terms, params, embedded, depths[0])
            metrics[f"divergence/{size.label}"] = divergence
            value += config.matryoshka.kl * divergence
        if len(sizes) > 1:
            metrics[f"loss/{size.label}"] = value
        total += weight * value
    return total / sum(weights), jax.lax.stop_gradient(metrics)


def _term(
    term: Term, params: Mapping[str, jax.Array], embedded: Embedded, width: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes one loss over the pairs of its sources."""
    source = embedded.query_texts.source
    serves = jnp.isin(source, jnp.array(term.sources, jnp.int32))
    texts = dataclasses.replace(embedded.query_texts, weight=jnp.where(serves, embedded.weights, 0))
    embedded = dataclasses.replace(embedded, query_texts=texts)
    entry = LOSSES[term.config.name]
    arguments: dict[str, Any] = {field: getattr(term.config, field) for field in entry.takes}
    metrics = {}
    if "temperature" in arguments:
        metrics["temperature"] = arguments["temperature"] = _temperature(term, params)
    if "bias" in entry.learns:
        arguments["bias"] = params["bias"]
    if "projection" in entry.learns:
        projection = params.get("projection")
        arguments["projection"] = projection[:width] if projection is not None and width else projection
    loss, found = entry.load()(embedded, **arguments)
    return loss, found | metrics


def _temperature(term: Term, params: Mapping[str, jax.Array]) -> jax.Array:
    if not term.config.learn_temperature:
        return jnp.float32(term.config.temperature)
    learned = jnp.exp(params["log_temperature"])
    # The gradient passes the bound, so that a temperature which met it can rise again.
    return learned + jax.lax.stop_gradient(jnp.maximum(learned, MIN_TEMPERATURE) - learned)


def _named(
    terms: Sequence[Term], values: Sequence[tuple[jax.Array, dict[str, jax.Array]]], alone: bool
) -> dict[str, jax.Array]:
    """Returns the metrics of a loss as they are where it is the only one over vectors, of several under their labels.

    Beside them stands each one's loss, but for one that is `alone` in the run.
    """
    metrics = {} if alone else {f"loss/{term.label}": loss for term, (loss, _) in zip(terms, values)}
    if len(terms) == 1:
        return metrics | values[0][1]
    for term, (_, found) in zip(terms, values):
        metrics |= {f"{name}/{term.label}": value for name, value in found.items()}
    return metrics


def _resized(embedded: Embedded, width: int, normalize: bool) -> Embedded:
    """Cuts the vectors to a width, and makes them unit vectors anew."""
    if not width:
        return embedded

    def cut(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        return unit(x[..., :width]) if normalize else x[..., :width]

    names = ("queries", "documents", "negative_queries")
    return dataclasses.replace(embedded, **{name: cut(getattr(embedded, name)) for name in names})


def _divergence(terms: Sequence[Term], params: LossParams, small: Embedded, full: Embedded) -> jax.Array:
    """Returns the mean over queries of KL(full || small), of the distributions over the documents in a query's scope.

    As in Starbucks' training for retrieval (Zhuang et al. 2024, arXiv:2410.13230); the full size gets no gradient.
    Temperature and scope are those of the first loss that has a temperature.
    """
    term = next(term for term in terms if "temperature" in LOSSES[term.config.name].takes)
    scale = 1 / jax.lax.stop_gradient(_temperature(term, params.get(term.label, {})))
    c = term.config
    scoring = Scoring(Rule(own_hard=True, others_hard=c.hard_negatives == "all", own_positives=True), Divergence())
    taught = dataclasses.replace(small, teacher_queries=full.queries, teacher_documents=full.documents)
    rows, columns = sides.rows(taught, "q", guided=True), sides.columns(taught, "d", "q", guided=True)
    method = Method(small.axes, c.exchange, c.precision, c.tile)
    value, _ = reduce_scores(rows, columns, scoring, method, scale, guide_scale=scale)
    return weighted_mean(value, small.weights)
