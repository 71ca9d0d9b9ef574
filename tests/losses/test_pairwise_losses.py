"""Triplet, cosine regression, the penalty of CLP and the spread-out term against their definitions, and their peers."""

import dataclasses

import numpy as np
import pytest
import torch
from embedded_cases import MESHES, assert_same, define, emptied, evaluate, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.losses.embedded import Embedded
from jaxembed.losses.infonce import infonce
from jaxembed.losses.penalty import clp
from jaxembed.losses.regression import cosine
from jaxembed.losses.spread_out import spread_out
from jaxembed.losses.triplet import triplet


def angle_between(a, b):
    return a @ b / (a.norm() * b.norm())


def mean_of_pairs(e: Embedded, values: list[list]):
    """The mean by weight of the pairs' means, over pairs that have values."""
    means = [(w, sum(v) / len(v)) for w, v in zip(e.weights, values) if w > 0 and v]
    return sum(w * v for w, v in means) / sum(w for w, _ in means)


def define_triplet(e, *, margin, distance):
    def apart(q, d):
        return 1 - angle_between(q, d) if distance == "cosine" else (q - d).norm()

    return mean_of_pairs(e, [
        [
            torch.relu(margin + apart(e.queries[i], e.documents[i, p]) - apart(e.queries[i], e.documents[i, n]))
            for p in range(e.positives) for n in range(e.positives, e.documents.shape[1])
            if e.weights[i] > 0 and e.present[i, p] and e.present[i, n]
        ]
        for i in range(len(e.queries))
    ])  # fmt: skip


def define_cosine(e):
    return mean_of_pairs(e, [
        [
            (angle_between(e.queries[i], e.documents[i, j]) - e.document_texts.score[i, j]) ** 2
            for j in range(e.documents.shape[1])
            if e.weights[i] > 0 and not torch.isnan(e.document_texts.score[i, j])
        ]
        for i in range(len(e.queries))
    ])  # fmt: skip


def define_spread_out(e):
    def moment(texts):
        """Of (pair, share of its weight, vector)."""
        pairs = [(a, b) for a in texts for b in texts if a[0] != b[0]]
        total = sum(a[1] * b[1] * angle_between(a[2], b[2]) ** 2 for a, b in pairs)
        return total / sum(a[1] * b[1] for a, b in pairs)

    real = [i for i in range(len(e.queries)) if e.weights[i] > 0]
    positives = [(i, p) for i in real for p in range(e.positives) if e.present[i, p]]
    share = {i: e.weights[i] / sum(j == i for j, _ in positives) for i in real}
    queries = [(i, e.weights[i], e.queries[i]) for i in real]
    return moment(queries) + moment([(i, share[i], e.documents[i, p]) for i, p in positives])


def define_penalty(e):
    return mean_of_pairs(e, [
        [
            1 - angle_between(e.documents[i, e.positives + k], e.negative_queries[i, k])
            for k in range(e.negative_queries.shape[1])
            if e.weights[i] > 0 and e.present[i, e.positives + k]
        ]
        for i in range(len(e.queries))
    ])  # fmt: skip


LOSSES = {
    "triplet cosine": (triplet, define_triplet, {"margin": 0.2, "distance": "cosine"}),
    "triplet euclidean": (triplet, define_triplet, {"margin": 0.5, "distance": "euclidean"}),
    "cosine": (cosine, define_cosine, {}),
    "spread_out": (spread_out, define_spread_out, {}),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def scaled(case: Embedded) -> Embedded:
    """Brings scores to 0 … 1."""
    texts = case.document_texts
    return dataclasses.replace(case, document_texts=dataclasses.replace(texts, score=texts.score / np.float32(5)))


@pytest.mark.parametrize("mesh", MESHES)
@each_loss
def test_loss_and_gradients_equal_the_definition(name, mesh):
    loss, definition, fields = LOSSES[name]
    case = scaled(make_case(1, unit=False))
    assert_same(evaluate(loss, case, mesh, **fields), define(definition, case, **fields))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(2, 10**6))
@each_loss
def test_whatever_is_void(name, seed):
    loss, definition, fields = LOSSES[name]
    case = scaled(make_case(seed, unit=False))
    assert_same(evaluate(loss, case, **fields), define(definition, case, **fields), 2e-5)


@each_loss
def test_an_empty_step_costs_nothing(name):
    loss, _, fields = LOSSES[name]
    got = evaluate(loss, emptied(make_case(1, unit=False)), **fields)
    assert got.value == 0 and not any(x.any() for x in got.gradients.values())


def test_accuracy_is_the_share_of_triplets_in_order():
    case = make_case(3)
    got = evaluate(triplet, case, margin=0.2, distance="cosine")
    similarity = np.einsum("ne,nde->nd", case.queries, case.documents)
    triplets = [(p, n) for p in (0, 1) for n in (2, 3, 4)]
    in_order = [
        [float(similarity[i, p] > similarity[i, n]) for p, n in triplets if case.present[i, p] and case.present[i, n]]
        for i in range(len(case.queries))
    ]
    assert got.metrics["accuracy"] == pytest.approx(mean_of_pairs(case, in_order), rel=1e-6)


def test_a_document_that_equals_its_query_has_a_finite_gradient():
    case = make_case(4)
    documents = case.documents.copy()
    documents[:, 0] = case.queries
    got = evaluate(triplet, dataclasses.replace(case, documents=documents), margin=0.5, distance="euclidean")
    assert all(np.isfinite(x).all() for x in got.gradients.values())


CLP = {"hard_negatives": "all", "exchange": "gather", "precision": "float32", "tile": 5}


@pytest.mark.parametrize("mesh", MESHES)
def test_clp_is_infonce_and_its_penalty(mesh):
    case = make_case(5, negative_queries=True)
    learned = {"temperature": 0.3}
    got = evaluate(clp, case, mesh, learned, penalty=0.7, **CLP)
    want, pull = evaluate(infonce, case, mesh, learned, **CLP), define(define_penalty, case)
    gradients = {name: x + 0.7 * pull.gradients.get(name, 0) for name, x in want.gradients.items()}
    assert_same(got, dataclasses.replace(want, value=want.value + 0.7 * pull.value, gradients=gradients))
    assert got.metrics["negative_cosine"] == pytest.approx(1 - pull.value, rel=1e-5)


def peers_case():
    """Pairs of weight 1 with one positive and two hard negatives, all scored: what sentence-transformers can take."""
    case = make_case(6, positives=1, negatives=2)
    rng = np.random.default_rng(6)
    kept = (case.weights > 0) & case.present.all(1) & (np.abs(case.queries).sum(1) > 0)
    texts = dataclasses.replace(case.query_texts, weight=kept.astype(np.float32))
    score = np.where(case.present, rng.uniform(0, 1, case.present.shape), np.nan).astype(np.float32)
    case = dataclasses.replace(
        case, query_texts=texts, document_texts=dataclasses.replace(case.document_texts, score=score)
    )
    return case, kept, torch.tensor(case.queries[kept]), torch.tensor(case.documents[kept])


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_triplet_equals_sentence_transformers(distance):
    from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric, TripletLoss

    case, _, queries, documents = peers_case()
    metric = {"cosine": TripletDistanceMetric.COSINE, "euclidean": TripletDistanceMetric.EUCLIDEAN}[distance]
    peer = TripletLoss(None, metric, 0.4)
    want = sum(peer.compute_loss_from_embeddings([queries, documents[:, 0], documents[:, n]], None) for n in (1, 2)) / 2
    assert evaluate(triplet, case, margin=0.4, distance=distance).value == pytest.approx(float(want), rel=1e-4)


def test_spread_out_equals_sentence_transformers():
    from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss

    case, kept, _, _ = peers_case()
    case = dataclasses.replace(case, queries=case.queries + 0.5, documents=case.documents + 0.5)  # the peer has a hinge
    queries, documents = torch.tensor(case.queries[kept]), torch.tensor(case.documents[kept])
    peer = GlobalOrthogonalRegularizationLoss(None, mean_weight=None, aggregation="sum")
    got = evaluate(spread_out, case).value
    above = peer.compute_loss_from_embeddings([queries, documents[:, 0]])["gor_second_moment"]
    assert got == pytest.approx(float(above) + 2 / queries.shape[1], rel=1e-5)


def test_cosine_equals_sentence_transformers():
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    case, kept, queries, documents = peers_case()
    scores = torch.tensor(case.document_texts.score[kept])
    peer = CosineSimilarityLoss(None)
    want = np.mean(
        [float(peer.compute_loss_from_embeddings([queries, documents[:, j]], scores[:, j])) for j in range(3)]
    )
    assert evaluate(cosine, case).value == pytest.approx(want, rel=1e-5)
