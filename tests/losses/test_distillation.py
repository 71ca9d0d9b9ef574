"""Margin-MSE, KL and the matching of vectors against their definitions, and sentence-transformers."""

import dataclasses

import numpy as np
import pytest
import torch
from embedded_cases import MESHES, assert_same, define, emptied, evaluate, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pairwise_losses import angle_between, mean_of_pairs, peers_case

from jaxembed.losses.distillation import kl, margin_mse, match
from jaxembed.losses.embedded import Embedded


def scored(e: Embedded, i: int) -> list[int]:
    """The documents of pair i that have a score."""
    if e.weights[i] <= 0:
        return []
    return [j for j in range(e.documents.shape[1]) if e.present[i, j] and not torch.isnan(e.document_texts.score[i, j])]


def define_margin_mse(e):
    errors = (e.queries[:, None] * e.documents).sum(-1) - e.document_texts.score
    return mean_of_pairs(e, [
        [(errors[i, p] - errors[i, n]) ** 2 for p in scored(e, i) for n in scored(e, i) if p < e.positives <= n]
        for i in range(len(e.queries))
    ])  # fmt: skip


def define_kl(e, *, temperature, teacher_temperature):
    values = []
    for i in range(len(e.queries)):
        there = [j for j in range(e.documents.shape[1]) if e.weights[i] > 0 and e.present[i, j]]
        if e.teacher_queries is None:
            there = scored(e, i)
            targets = [e.document_texts.score[i, j] for j in there]
        else:
            targets = [e.teacher_queries[i] @ e.teacher_documents[i, j] for j in there]
        if len(there) < 2:
            values.append([])
            continue
        t = torch.softmax(torch.stack(targets) / teacher_temperature, 0)
        s = torch.softmax(torch.stack([e.queries[i] @ e.documents[i, j] for j in there]) / temperature, 0)
        values.append([sum(t * torch.log(t / s))])
    return mean_of_pairs(e, values)


def define_match(e, *, similarity_weight, projection=None):
    texts = []  # (share of the pair's weight, the model's vector, the teacher's)
    for i in range(len(e.queries)):
        there = [j for j in range(e.documents.shape[1]) if e.weights[i] > 0 and e.present[i, j]]
        share = e.weights[i] / (1 + len(there))
        texts += [(share, e.queries[i], e.teacher_queries[i])] if share > 0 else []
        texts += [(share, e.documents[i, j], e.teacher_documents[i, j]) for j in there]
    total = sum(share for share, _, _ in texts)
    through = (lambda s: s) if projection is None else (lambda s: s @ projection)
    near = sum(share * (1 - angle_between(through(s), t)) for share, s, t in texts) / total
    shares, students, teachers = (torch.stack(x) for x in zip(*texts))
    students, teachers = (x / x.norm(dim=1, keepdim=True) for x in (students, teachers))
    difference = students @ students.T - teachers @ teachers.T
    return near + similarity_weight * (shares[:, None] * shares * difference**2).sum() / total**2


def match_widths(e, *, similarity_weight):
    return match(e, similarity_weight=similarity_weight, projection=None)


PROJECTION = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
LOSSES = {
    "margin_mse": (margin_mse, define_margin_mse, {}, {}, 0),
    "kl of scores": (kl, define_kl, {"temperature": 0.5}, {"teacher_temperature": 0.8}, 0),
    "kl of a teacher": (kl, define_kl, {"temperature": 0.5}, {"teacher_temperature": 0.3}, 6),
    "match, projected": (match, define_match, {"projection": PROJECTION}, {"similarity_weight": 3.0}, 6),
    "match, equal widths": (match_widths, define_match, {}, {"similarity_weight": 0.0}, 8),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.mark.parametrize("mesh", MESHES)
@each_loss
def test_loss_and_gradients_equal_the_definition(name, mesh):
    loss, definition, learned, fields, teacher_width = LOSSES[name]
    case = make_case(1, teacher_width=teacher_width, unit=False)
    assert_same(evaluate(loss, case, mesh, learned, **fields), define(definition, case, learned, **fields))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(2, 10**6))
@each_loss
def test_whatever_is_void(name, seed):
    loss, definition, learned, fields, teacher_width = LOSSES[name]
    case = make_case(seed, teacher_width=teacher_width, unit=False)
    got, want = evaluate(loss, case, "1", learned, **fields), define(definition, case, learned, **fields)
    assert_same(got, want, 2e-5)


@each_loss
def test_an_empty_step_costs_nothing(name):
    loss, _, learned, fields, teacher_width = LOSSES[name]
    got = evaluate(loss, emptied(make_case(1, teacher_width=teacher_width, unit=False)), "1", learned, **fields)
    assert got.value == 0 and not any(x.any() for x in got.gradients.values())


def test_a_model_that_is_its_teacher_has_nothing_to_learn():
    case = make_case(2, teacher_width=8)
    alike = dataclasses.replace(case, teacher_queries=case.queries, teacher_documents=case.documents)
    got = evaluate(match, alike, "1", {"projection": np.eye(8)}, similarity_weight=3.0)
    assert (
        abs(got.value) < 1e-6
        and got.metrics["cosine"] == pytest.approx(1)
        and abs(got.metrics["similarity_error"]) < 1e-7
    )
    assert evaluate(kl, alike, "1", {"temperature": 0.1}, teacher_temperature=0.1).value < 1e-7


def test_margin_mse_equals_sentence_transformers():
    from sentence_transformers.sentence_transformer.losses import MarginMSELoss

    case, kept, queries, documents = peers_case()
    scores = torch.tensor(case.document_texts.score[kept])
    want = MarginMSELoss(None).compute_loss_from_embeddings([queries, *documents.unbind(1)], scores)
    assert evaluate(margin_mse, case).value == pytest.approx(float(want), rel=1e-5)


def test_kl_equals_sentence_transformers():
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss

    case, kept, queries, documents = peers_case()
    scores = torch.tensor(case.document_texts.score[kept])
    peer = DistillKLDivLoss(None, student_temperature=0.2, teacher_temperature=0.4)
    want = peer.compute_loss_from_embeddings([queries, *documents.unbind(1)], scores) / 0.2**2
    got = evaluate(kl, case, "1", {"temperature": 0.2}, teacher_temperature=0.4)
    assert got.value == pytest.approx(float(want), rel=1e-5)
