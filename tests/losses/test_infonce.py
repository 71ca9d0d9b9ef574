"""InfoNCE against a float64 loop over every pair, on one device and on eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.data.batch import HARD_NEGATIVE, NO_GROUP, NO_TEXT, SCOPE_ALL, SCOPE_OWN, VOID, Texts
from jaxembed.losses.infonce import infonce

WIDTH, PAIRS, POSITIVES, NEGATIVES = 12, 16, 2, 1
MESHES = {
    "1": MeshConfig(1),
    "data 8": MeshConfig(8),
    "fsdp 8": MeshConfig(1, 8),
    "2x2x2": MeshConfig(2, 2, 2),
    "expert and sequence": MeshConfig(2, 1, 1, 2, 2),
}


def make_texts(rng: np.random.Generator) -> tuple[Texts, Texts]:
    """Two sources, groups, repeated texts, a second positive here and there, hard negatives, two void pairs."""
    pair = np.arange(PAIRS, dtype=np.int32)
    void = np.isin(pair, (3, 11))
    source = (pair % 3 == 0).astype(np.int32)
    scope = source.copy()
    scope[5], scope[6] = SCOPE_ALL, SCOPE_OWN
    group = np.where(pair % 5 == 0, 7, NO_GROUP).astype(np.int32)
    query_text = 100 + pair
    query_text[9] = query_text[1]  # the same query twice
    document_pair = np.repeat(pair, POSITIVES + NEGATIVES)
    rank = np.tile([*range(POSITIVES), HARD_NEGATIVE], PAIRS).astype(np.int32)
    text = 200 + np.arange(len(document_pair), dtype=np.int32)
    text[6 * 3] = text[2 * 3]  # pair 6's positive equals pair 2's
    text[7 * 3 + 2] = text[7 * 3]  # a hard negative that is the positive
    text[8 * 3] = 100 + 4  # a document that equals another pair's query
    gone = void[document_pair] | ((rank == 1) & (document_pair % 2 == 0)) | ((rank < 0) & (document_pair == 10))
    partners = np.stack([np.where(gone[k::3], NO_TEXT, text[k::3]) for k in range(POSITIVES)], 1)
    partners[12, 1] = text[3 * 13]  # a known positive that was not drawn, but is another pair's
    back = np.where((rank >= 0) & ~gone, query_text[document_pair], NO_TEXT)[:, None]

    def side(pair, rank, text, partners, void, weight):
        take = lambda x, default: np.where(void, default, x).astype(np.int32)  # noqa: E731
        return Texts(
            take(pair, VOID), rank, take(text, NO_TEXT), partners.astype(np.int32), take(group[pair], NO_GROUP),
            source[pair], scope[pair], np.where(void, 0, weight).astype(np.float32),
            np.full(len(pair), np.nan, np.float32),
        )  # fmt: skip

    weight = rng.uniform(0.5, 2, PAIRS)
    queries = side(
        pair, np.zeros(PAIRS, np.int32), query_text, np.where(void[:, None], NO_TEXT, partners), void, weight
    )
    documents = side(document_pair, rank, text, back, gone, np.where(rank >= 0, weight[document_pair], 0))
    return shuffled(rng, queries), shuffled(rng, documents)


def shuffled(rng: np.random.Generator, texts: Texts) -> Texts:
    order = rng.permutation(len(texts.pair))
    return jax.tree.map(lambda x: x[order], texts)


def reference(rows, columns, row: Texts, column: Texts, temperature) -> float:
    """One direction of the loss, in float64, straight from the definition."""
    total = weights = 0.0
    for i in range(len(rows)):
        if row.pair[i] == VOID or row.weight[i] == 0:
            continue
        scores = rows[i] @ columns.T / temperature
        negatives = [j for j in range(len(columns)) if is_negative(row, i, column, j)]
        positives = [j for j in range(len(columns)) if column.pair[j] == row.pair[i] and column.rank[j] >= 0]
        mass = np.exp(scores[negatives]).sum()
        total += row.weight[i] * np.mean([np.log(1 + mass / np.exp(scores[p])) for p in positives])
        weights += row.weight[i]
    return total / weights


def is_negative(row: Texts, i: int, column: Texts, j: int) -> bool:
    if column.pair[j] == VOID:
        return False
    if row.text[i] == column.text[j] or column.text[j] in row.partners[i] or row.text[i] in column.partners[j]:
        return False
    if row.pair[i] == column.pair[j]:
        return column.rank[j] == HARD_NEGATIVE
    if row.group[i] == column.group[j] != NO_GROUP:
        return False
    return row.scope[i] == SCOPE_ALL or row.scope[i] == column.source[j]


def make_case():
    rng = np.random.default_rng(0)
    queries, documents = make_texts(rng)
    unit = lambda n: (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True))(rng.normal(size=(n, WIDTH)))  # noqa: E731
    return unit(PAIRS), unit(len(documents.pair)), queries, documents, 0.3


def numeric_gradient(f, x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (f(up) - f(down)) / (2 * step)
    return gradient


@functools.cache
def expected(symmetric: bool):
    q, d, queries, documents, t = make_case()

    def loss(q, d, t):
        one = reference(q, d, queries, documents, t)
        return (one + reference(d, q, documents, queries, t)) / 2 if symmetric else one

    gradients = (
        numeric_gradient(lambda x: loss(x, d, t), q),
        numeric_gradient(lambda x: loss(q, x, t), d),
        numeric_gradient(lambda x: loss(q, d, x), np.asarray(t)),
    )
    return loss(q, d, t), gradients


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("tile", [2048, 5])
@pytest.mark.parametrize("mesh_name", MESHES)
def test_loss_and_gradients_equal_the_definition(mesh_name, tile, symmetric):
    config = MESHES[mesh_name]
    size = np.prod([getattr(config, axis) for axis in sharding.AXES])
    mesh = sharding.make_mesh(config, jax.devices()[:size])
    q, d, queries, documents, t = make_case()
    with jax.set_mesh(mesh):

        def put(x):
            return sharding.put(np.asarray(x, np.int32 if x.dtype == np.int32 else np.float32), mesh, sharding.TEXTS)

        args = jax.tree.map(put, (q, d, queries, documents))
        loss = jax.jit(
            jax.value_and_grad(
                lambda q, d, t, *texts: infonce(q, d, *texts, t, POSITIVES, symmetric, tile)[0], argnums=(0, 1, 2)
            )
        )
        value, gradients = loss(args[0], args[1], jnp.float32(t), *args[2:])
    want, want_gradients = expected(symmetric)
    assert abs(value - want) <= 1e-6 * abs(want)
    for got, wanted in zip(gradients, want_gradients):
        assert np.abs(got - wanted).max() <= 2e-6 * np.abs(wanted).max()


def test_a_pair_without_negatives_costs_nothing_and_stays_finite():
    q, d, queries, documents, t = make_case()
    alone = dataclasses.replace(queries, scope=np.full_like(queries.scope, SCOPE_OWN))
    no_hard = dataclasses.replace(documents, pair=np.where(documents.rank < 0, VOID, documents.pair).astype(np.int32))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1), jax.devices()[:1])):
        value, gradient = jax.value_and_grad(
            lambda q: infonce(q, jnp.float32(d), alone, no_hard, jnp.float32(t), 2)[0]
        )(jnp.float32(q))
    assert value == 0 and not gradient.any()


def test_accuracy_counts_queries_whose_positives_beat_every_negative():
    q = np.eye(4, WIDTH, dtype=np.float32)
    pair, none = np.arange(4, dtype=np.int32), np.full(4, NO_GROUP, np.int32)
    one = Texts(pair, 0 * pair, 10 + pair, np.full((4, 1), NO_TEXT, np.int32), none, 0 * pair, 0 * pair,
                np.ones(4, np.float32), np.zeros(4, np.float32))  # fmt: skip
    two = dataclasses.replace(one, text=20 + pair)
    d = q[[0, 1, 3, 2]]  # pairs 2 and 3 are swapped
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1), jax.devices()[:1])):
        _, metrics = infonce(jnp.asarray(q), jnp.asarray(d), one, two, jnp.float32(0.1))
    assert metrics["accuracy"] == 0.5
