"""Linear layers that are trained on vectors made once: nothing of the model is computed again.

'linear' is x (W + Δ) + b, where W is the identity, or the directions of most variance where the outputs are fewer;
'residual' is x + x A B with A B of low rank (Adapted Dense Retrieval, Khatry et al. 2023, arXiv:2310.05380). Both begin
as if they were not there. Queries alone may go through the layer: then vectors of documents that are indexed stay.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxembed.data.batch import NO_GROUP
from jaxembed.errors import UserError
from jaxembed.similarity import unit as unit_vectors
from jaxembed.vectors.heads import Affine, Sums, principal
from jaxembed.vectors.record_pairs import NONE, Pairs, batches, loss_of

WEIGHT_DECAY = 0.01  # of what the layer adds
MOST_HELD_OUT = 2000  # queries
QUERIES = 256  # ranked at a time

Weights = dict[str, jax.Array]
Arrays = dict[str, jax.Array]  # of `Pairs`


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """How a layer is trained.

    Attributes:
      rank: of the residual; 0 for 'linear'.
      dim: outputs of 'linear'; 0 = as many as inputs.
      queries_alone: whether documents' vectors stay as they are.
      epochs: at most.
      batch_size: pairs in a batch.
      learning_rate: of AdamW.
      temperature: divides the similarities.
      held_out: part of the queries that is kept for judging.
      patience: epochs without a lower loss of held-out pairs, after which training ends.
      seed: of what is held out, of the order of the pairs, and of A.
    """

    rank: int = 0
    dim: int = 0
    queries_alone: bool = False
    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 1e-3
    temperature: float = 0.05
    held_out: float = 0.1
    patience: int = 3
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class TrainedHead:
    """A layer, and what it does for pairs that it was not trained on.

    Attributes:
      layer: the layer of the best epoch.
      pairs, held_out: how many pairs it was trained on, and not.
      epochs: how many were trained.
      best: after which of them the layer is taken; 0 = it begins as if it were not there, and that was best.
      loss: of the held-out pairs, before and after.
      mrr: mean of 1 / rank of each held-out query's best positive among all documents, times 100, before and after.
    """

    layer: Affine
    pairs: int
    held_out: int
    epochs: int
    best: int
    loss: tuple[float, float]
    mrr: tuple[float, float]


def train_head(
    pairs: Pairs,
    queries_QxE: np.ndarray,
    documents_DxE: np.ndarray,
    settings: HeadSettings,
    unit: bool,
    where: str,
    done: Callable[[float], object] = lambda loss: None,
) -> TrainedHead:
    """Trains a layer by the contrastive loss of pairs (InfoNCE), with in-batch and hard negatives.

    Args:
      pairs: what the texts are to each other.
      queries_QxE: vectors of `pairs.queries`, before they are brought to length 1.
      documents_DxE: of `pairs.documents`.
      settings: how.
      unit: whether vectors are compared by cosine, and not by dot products.
      where: the flag that names the pairs, for messages.
      done: called with the held-out pairs' loss after each epoch.

    Raises:
      UserError: too few pairs.
    """
    held = _held_out(pairs, settings, where)
    trained, judged = pairs.part(~held), pairs.part(np.flatnonzero(held)[: 2 * MOST_HELD_OUT])
    fixed, weights = _start(queries_QxE, documents_DxE, settings)
    loss = functools.partial(_loss, settings=settings, unit=unit)
    given = fixed, jnp.asarray(queries_QxE), jnp.asarray(documents_DxE)
    judge = jax.jit(loss)
    optimizer = optax.adamw(settings.learning_rate, weight_decay=WEIGHT_DECAY)

    @jax.jit
    def epoch(weights: Weights, state: Any, given: Any, arrays: Arrays, chosen_SxN: jax.Array) -> tuple[Weights, Any]:
        def step(carry: tuple[Weights, Any], chosen_N: jax.Array) -> tuple[tuple[Weights, Any], None]:
            weights, state = carry
            gradient = jax.grad(loss)(weights, given, {name: x[chosen_N] for name, x in arrays.items()})
            updates, state = optimizer.update(gradient, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (weights, state), chosen_SxN)[0]

    state, size = optimizer.init(weights), min(settings.batch_size, len(trained))
    arrays, of_judged = trained.arrays(), judged.arrays()
    losses, best, number = [float(judge(weights, given, of_judged))], weights, 0
    for number in range(1, settings.epochs + 1):
        weights, state = epoch(weights, state, given, arrays, batches(len(trained), size, settings.seed, number))
        losses.append(float(judge(weights, given, of_judged)))
        done(losses[-1])
        if losses[-1] < min(losses[:-1]):
            best = weights
        if number - int(np.argmin(losses)) >= settings.patience:
            break
    layer = _affine(best, fixed)
    before = reciprocal_rank(pairs, judged, queries_QxE, documents_DxE, unit)
    moved = documents_DxE if settings.queries_alone else layer(documents_DxE)
    after = reciprocal_rank(pairs, judged, layer(queries_QxE), moved, unit)
    at = int(np.argmin(losses))
    return TrainedHead(
        layer, len(trained), len(pairs) - len(trained), number, at, (losses[0], losses[at]), (before, after)
    )


def reciprocal_rank(
    pairs: Pairs, judged: Pairs, queries_QxE: np.ndarray, documents_DxE: np.ndarray, unit: bool
) -> float:
    """Returns the mean over some queries of 1 / rank of their best positive among all documents, times 100.

    Other positives of the query, documents of its group but its own hard negatives, and the query's own text take no
    place in the ranking; what scores just as high as the positive stands before it.

    Args:
      pairs: all pairs.
      judged: those whose queries are ranked.
      queries_QxE: vectors of all queries.
      documents_DxE: of all documents.
      unit: whether they are compared by cosine, and not by dot products.
    """
    if unit:
        queries_QxE, documents_DxE = unit_vectors(queries_QxE), unit_vectors(documents_DxE)
    own = {int(query): [] for query in judged.query}
    for i, query in enumerate(pairs.query.tolist()):
        if query in own:
            own[query].append(i)
    of_group: dict[int, set[int]] = {}
    for group, positive, hard in zip(pairs.group.tolist(), pairs.positive.tolist(), pairs.negatives.tolist()):
        if group != NO_GROUP:
            of_group.setdefault(group, set()).update({positive, *hard} - {NONE})
    numbers, total = list(own), 0.0
    for first in range(0, len(numbers), QUERIES):
        scores_NxD = queries_QxE[numbers[first : first + QUERIES]] @ documents_DxE.T
        for scores, query in zip(scores_NxD, numbers[first : first + QUERIES]):
            rows = pairs.part(np.array(own[query]))
            positives = rows.positive
            out = set().union(*(of_group.get(int(group), ()) for group in rows.group)) - set(rows.negatives.reshape(-1))
            out |= {int(i) for i in rows.query_id if i < len(documents_DxE)} | set(positives)
            best = scores[positives].max()
            scores[[int(i) for i in out]] = -np.inf
            total += 1 / (1 + int((scores >= best).sum()))
    return 100 * total / len(numbers)


def _held_out(pairs: Pairs, settings: HeadSettings, where: str) -> np.ndarray:
    """Returns bool [N], which pairs are judged and not trained on: all pairs of some queries."""
    n = len(pairs.queries)
    count = min(round(settings.held_out * n), MOST_HELD_OUT)
    if count < 1 or n - count < 2:
        raise UserError(
            f"{where}: has {n} queries, of which a part {settings.held_out:g} is held out: wants one or more of these, "
            "and two or more others"
        )
    chosen = np.random.default_rng((settings.seed, 0)).permutation(n)[:count]
    return np.isin(pairs.query, chosen)


def _start(
    queries_QxE: np.ndarray, documents_DxE: np.ndarray, settings: HeadSettings
) -> tuple[dict[str, jax.Array], Weights]:
    """Returns what is not trained, and the weights that change nothing."""
    width = queries_QxE.shape[1]
    length = float(np.linalg.norm(queries_QxE, axis=1).mean())
    if settings.rank:
        draw = np.random.default_rng((settings.seed, 1)).normal(scale=width**-0.5, size=(width, settings.rank))
        weights = {"down": jnp.asarray(draw, jnp.float32), "up": jnp.zeros((settings.rank, width))}
        return {"kernel": jnp.eye(width)}, weights
    start = np.eye(width)
    if settings.dim:
        sums = Sums()
        sums.add(queries_QxE)
        sums.add(documents_DxE)
        start = principal(sums, settings.dim, f"--dim={settings.dim}")[0]
    fixed = {"kernel": jnp.asarray(start, jnp.float32), "length": jnp.float32(length)}
    return fixed, {"kernel": jnp.zeros(start.shape), "bias": jnp.zeros(start.shape[1])}


def _affine(weights: Weights, fixed: dict[str, jax.Array]) -> Affine:
    weights, fixed = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (weights, fixed))
    if "up" in weights:
        return Affine(fixed["kernel"] + weights["down"] @ weights["up"])
    return Affine(fixed["kernel"] + weights["kernel"], fixed["length"] * weights["bias"])


def _apply(weights: Weights, fixed: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    if "up" in weights:
        return x + dot(dot(x, weights["down"]), weights["up"])
    return dot(x, fixed["kernel"] + weights["kernel"]) + fixed["length"] * weights["bias"]


def _loss(
    weights: Weights,
    given: tuple[dict[str, jax.Array], jax.Array, jax.Array],
    arrays: Arrays,
    settings: HeadSettings,
    unit: bool,
) -> jax.Array:
    """Returns the loss of pairs, `given` what is not trained and the vectors of all queries and documents."""
    (fixed, queries_QxE, documents_DxE), pairs = given, Pairs((), (), **arrays)
    numbers = jnp.concatenate([pairs.positive[:, None], pairs.negatives], axis=1)
    queries, documents = queries_QxE[pairs.query], documents_DxE[jnp.maximum(numbers, 0)]
    queries = _apply(weights, fixed, queries)
    if not settings.queries_alone:
        documents = _apply(weights, fixed, documents)
    return loss_of(queries, documents, pairs, settings.temperature, unit)
