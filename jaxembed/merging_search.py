"""Weights of a merge that are found by gradient: how much of what each model has learned serves a probe of pairs best.

The merged weights are base + s Σ pᵢ (modelᵢ - base), p a softmax: a place in the space that the models' task vectors
span, and how far to go there. Only p and s are trained, by the contrastive loss of batches of the probe, through the
whole model: Self Positioning (Li et al. 2024, arXiv:2410.15035). They start at the models' mean, s = 1.

Texts are encoded in device batches of any number: first all vectors of a batch of pairs, then the loss's gradient by
these, then one device batch after another its part of the coefficients' gradient, as a gradient cache does (Gao et al.
2021, arXiv:2101.06983). So only a few shapes are compiled, and a batch may be larger than memory allows for a model's
gradient. On the mesh lie the base, each model's task vector, and the merged weights with their gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxembed.data.batch import Rows
from jaxembed.embedder import Embedder
from jaxembed.encoding import DeviceBatch, device_batches
from jaxembed.merging import Seen, Source
from jaxembed.models.text_encoder import ModelFactory, Params
from jaxembed.sharding import ROWS, batch_shards, put
from jaxembed.vectors.record_pairs import NONE, Pairs, endless, loss_of

Coefficients = dict[str, jax.Array]  # 'logits' float32 [M], 'scale' float32 scalar


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """How coefficients are searched for.

    Attributes:
      steps: batches.
      batch_size: pairs in each.
      learning_rate: of Adam, of the logits and the scale.
      temperature: divides the similarities.
      seed: of the order of the pairs.
    """

    steps: int = 100
    batch_size: int = 64
    learning_rate: float = 0.05
    temperature: float = 0.05
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
      weights: of each model's task vector: s pᵢ. Task arithmetic with these gives the same model.
      losses: the mean loss over the probe: of the base, of each model, of the models' mean, of what was found.
      model: the merged model.
    """

    weights: tuple[float, ...]
    losses: tuple[float, ...]
    model: Embedder


def search(
    base: Source,
    models: Sequence[Source],
    pairs: Pairs,
    settings: SearchSettings,
    unit: bool,
    mesh: jax.sharding.Mesh,
    seen: Seen | None = None,
    done: Callable[[float], object] = lambda loss: None,
) -> Found:
    """Searches for the coefficients that serve the probe best.

    Args:
      base: what the models began with.
      models: from `merging.open_sources`, with the base; prompts and all but weights are the first one's.
      pairs: the probe.
      settings: how.
      unit: whether vectors are compared by cosine, and not by dot products.
      mesh: where to compute.
      seen: is shown every model.
      done: called with the loss of each step.

    Raises:
      UserError: a model's weights are damaged.
    """
    start = base.read(mesh, seen)
    with jax.set_mesh(mesh):
        towards = tuple(_difference(model.read(mesh, seen), start) for model in models)
    space = Space(models[0].with_params(start, mesh), towards, unit, settings.temperature)
    coefficients = {"logits": jnp.zeros(len(models)), "scale": jnp.ones(())}
    alone = np.eye(len(models), dtype=np.float32)
    first = [np.zeros(len(models), np.float32), *alone, weights_of(coefficients)]
    losses = [space.mean_loss(weights, pairs, settings.batch_size) for weights in first]
    optimizer = optax.adam(settings.learning_rate)
    state = optimizer.init(coefficients)
    size = min(settings.batch_size, len(pairs))
    for _, chosen in zip(range(settings.steps), endless(len(pairs), size, settings.seed)):
        loss, by_weights = space.gradient(weights_of(coefficients), pairs.part(chosen))
        gradient = jax.vjp(weights_of, coefficients)[1](by_weights)[0]
        updates, state = optimizer.update(gradient, state)
        coefficients = optax.apply_updates(coefficients, updates)
        done(loss)
    weights = weights_of(coefficients)
    losses.append(space.mean_loss(weights, pairs, settings.batch_size))
    model = models[0].with_params(space.at(weights), mesh)
    return Found(tuple(np.asarray(weights).tolist()), tuple(losses), model)


def weights_of(coefficients: Coefficients) -> jax.Array:
    """Returns the task vectors' weights, float32 [M]."""
    return coefficients["scale"] * jax.nn.softmax(coefficients["logits"])


class Space:
    """The models that weights of some task vectors stand for, and the loss of pairs there."""

    def __init__(self, base: Embedder, towards: tuple[Params, ...], unit: bool, temperature: float) -> None:
        """Joins what the space is made of.

        Args:
          base: the model at weights 0.
          towards: task vectors, on the base's mesh.
          unit: whether vectors are compared by cosine.
          temperature: of the loss.
        """
        self._base, self._towards = base, towards
        loss = functools.partial(_loss, temperature=temperature, unit=unit)
        self._loss = jax.jit(loss)
        self._loss_and_gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    def at(self, weights: jax.typing.ArrayLike) -> Params:
        """Returns the model's parameters at these weights [M]."""
        with jax.set_mesh(self._base.mesh):
            return _moved(self._base.params, self._towards, jnp.asarray(weights))

    def mean_loss(self, weights: jax.typing.ArrayLike, pairs: Pairs, batch_size: int) -> float:
        """Returns the mean of the losses of batches of all pairs in their order; the rest behind them counts too."""
        params, total = self.at(weights), 0.0
        for first in range(0, len(pairs), batch_size):
            part = pairs.part(np.arange(first, min(first + batch_size, len(pairs))))
            queries, documents = (self._vectors(params, side) for side in self._sides(part))
            total += len(part) * float(self._loss(queries, *_own(documents, part)))
        return total / len(pairs)

    def gradient(self, weights: jax.typing.ArrayLike, pairs: Pairs) -> tuple[float, jax.Array]:
        """Returns the loss of a batch of pairs, and its gradient by the weights, float32 [M]."""
        params = self.at(weights)
        sides = self._sides(pairs)
        queries, documents = (self._vectors(params, side) for side in sides)
        documents, arrays = _own(documents, pairs)
        loss, (by_queries, by_documents) = self._loss_and_gradient(queries, documents, arrays)
        total = np.zeros(len(self._towards), np.float32)
        by_text = np.zeros((len(pairs) * documents.shape[1], queries.shape[1]), np.float32)
        by_text[:] = np.asarray(by_documents).reshape(by_text.shape)
        for side, by_vectors in zip(sides, (np.asarray(by_queries), by_text)):
            for batch in side:
                total += np.asarray(self._pulled_back(params, batch, by_vectors))
        return float(loss), jnp.asarray(total)

    def _sides(self, pairs: Pairs) -> tuple[list[DeviceBatch], list[DeviceBatch]]:
        """Returns the texts of the queries [N], and of their documents [N * D], as device batches."""
        numbers = np.concatenate([pairs.positive[:, None], pairs.negatives], axis=1).reshape(-1)
        base = self._base
        texts = {
            "query": [pairs.queries[i] for i in pairs.query],
            "document": [pairs.documents[i] if i != NONE else "" for i in numbers],
        }
        sides = []
        for name, side in texts.items():
            (tokenized,) = base.tokenize(side, base.prompts[name])
            if name == "document":  # what is not there has no tokens either, and is left out
                kept = [ids if number != NONE else ids[:0] for ids, number in zip(tokenized.tokens, numbers)]
                tokenized = dataclasses.replace(tokenized, tokens=kept)
            sides.append(list(device_batches(tokenized, batch_shards(base.mesh))))
        return tuple(sides)

    def _vectors(self, params: Params, side: list[DeviceBatch]) -> np.ndarray:
        """Returns the vectors of the texts in device batches, float32 [n, E]; zeros where a text has no tokens."""
        mesh, factory = self._base.mesh, self._base.factory
        n = 1 + max(int(batch.texts.max()) for batch in side)
        vectors = np.zeros((n, self._base.width), np.float32)
        with jax.set_mesh(mesh):
            for batch in side:
                found = np.asarray(factory.encoder(params, self._put(batch), batch.slots))
                there = batch.texts >= 0
                vectors[batch.texts[there]] = found[there]
        return vectors

    def _pulled_back(self, params: Params, batch: DeviceBatch, by_vectors_NxE: np.ndarray) -> jax.Array:
        """Returns what the texts of a device batch add to the gradient by the weights."""
        there = (batch.texts >= 0)[..., None]
        by_slots_SxTxE = np.where(there, by_vectors_NxE[np.maximum(batch.texts, 0)], 0).astype(np.float32)
        base = self._base
        with jax.set_mesh(base.mesh):
            return _by_weights(base.factory, batch.slots, params, self._towards, self._put(batch), by_slots_SxTxE)

    def _put(self, batch: DeviceBatch) -> Rows:
        mesh = self._base.mesh
        return jax.tree.map(lambda x: put(x, mesh, ROWS), batch.rows)


def _own(documents_NDxE: np.ndarray, pairs: Pairs) -> tuple[np.ndarray, dict[str, jax.Array]]:
    """Returns the documents as [N, D, E], and the arrays that say what the pairs are."""
    depth = 1 + pairs.negatives.shape[1]
    missing = len(pairs) * depth - len(documents_NDxE)  # the last ones, where they are not there
    documents = np.pad(documents_NDxE, ((0, missing), (0, 0))).reshape(len(pairs), depth, -1)
    return documents, pairs.arrays()


def _loss(
    queries_NxE: jax.Array, documents_NxDxE: jax.Array, arrays: dict[str, jax.Array], temperature: float, unit: bool
) -> jax.Array:
    return loss_of(queries_NxE, documents_NxDxE, Pairs((), (), **arrays), temperature, unit)


@jax.jit
def _moved(base: Params, towards: tuple[Params, ...], weights_M: jax.Array) -> Params:
    def sum_of(x: jax.Array, *moves: jax.Array) -> jax.Array:
        return x + sum(weights_M[i] * move for i, move in enumerate(moves))

    return jax.tree.map(sum_of, base, *towards)


@functools.partial(jax.jit, donate_argnums=0)
def _difference(model: Params, base: Params) -> Params:
    return jax.tree.map(lambda x, y: x - y, model, base)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_weights(
    factory: ModelFactory,
    slots: int,
    params: Params,
    towards: tuple[Params, ...],
    rows: Rows,
    by_slots_SxTxE: jax.Array,
) -> jax.Array:
    """Returns Σ ∂vectors/∂weights · by_slots: the parameters' gradient along each task vector, float32 [M]."""

    def through(params: Params) -> jax.Array:
        return (factory.encoder(params, rows, slots) * by_slots_SxTxE).sum()

    gradient = jax.grad(through)(params)
    along = [jax.tree.map(lambda g, move: (g * move).sum(), gradient, move) for move in towards]
    return jnp.stack([sum(jax.tree.leaves(tree)) for tree in along])
