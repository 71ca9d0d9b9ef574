"""CoSENT and AnglE against the sum over all comparisons of all devices, and sentence-transformers."""

import dataclasses

import numpy as np
import pytest
import torch
from embedded_cases import MESHES, assert_same, define, emptied, evaluate, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.losses.embedded import Embedded
from jaxembed.losses.ranking import angle, cosent


def cosine_of(a, b):
    return a @ b / (a.norm() * b.norm())


def angle_of(a, b):
    """As the paper has it, with complex numbers."""
    half = len(a) // 2
    z, w = torch.complex(a[:half], a[half:]), torch.complex(b[:half], b[half:])
    quotient = (z * w.conj()).sum() / (a.norm() * b.norm())
    return (quotient.real + quotient.imag).abs()


def define_order(e: Embedded, similarity, temperature):
    items = [
        (int(e.query_texts.source[i]), float(e.document_texts.score[i, j]), similarity(e.queries[i], e.documents[i, j]))
        for i in range(len(e.queries))
        for j in range(e.documents.shape[1])
        if e.weights[i] > 0 and e.present[i, j] and not torch.isnan(e.document_texts.score[i, j])
    ]
    source, score, s = zip(*items)
    source, score, s = torch.tensor(source), torch.tensor(score), torch.stack(s) / temperature
    compared = (source[:, None] == source) & (score[:, None] > score)
    return torch.logsumexp(torch.cat([torch.zeros(1), (s - s[:, None])[compared]]), 0)


LOSSES = {
    "cosent": (cosent, lambda e, *, temperature: define_order(e, cosine_of, temperature)),
    "angle": (angle, lambda e, *, temperature: define_order(e, angle_of, temperature)),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.mark.parametrize("mesh", MESHES)
@each_loss
def test_loss_and_gradients_equal_the_definition(name, mesh):
    loss, definition = LOSSES[name]
    case = make_case(1, unit=False)
    learned = {"temperature": 0.2}
    assert_same(evaluate(loss, case, mesh, learned), define(definition, case, learned))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(2, 10**6), levels=st.sampled_from([1, 2, 3, 1000]))
@each_loss
def test_whatever_is_void_or_tied(name, seed, levels):
    loss, definition = LOSSES[name]
    case = make_case(seed, unit=False)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, levels, case.present.shape) * rng.choice([1e-6, 1, 1e6])  # scores of any scale
    score = np.where(np.isnan(case.document_texts.score), np.nan, drawn - 0.5 * drawn.max()).astype(np.float32)
    case = dataclasses.replace(case, document_texts=dataclasses.replace(case.document_texts, score=score))
    learned = {"temperature": 0.2}
    assert_same(evaluate(loss, case, "1", learned), define(definition, case, learned), 2e-5)


@each_loss
def test_low_temperatures_neither_overflow_nor_lose_the_gradient(name):
    loss, definition = LOSSES[name]
    case, learned = make_case(2, unit=False), {"temperature": 0.01}
    got, want = evaluate(loss, case, "1", learned), define(definition, case, learned)
    assert want.value > 20
    assert_same(got, want, 1e-4)  # float32 cosines are known to 1e-7, which 1 / temperature makes 1e-5


@each_loss
def test_an_empty_step_costs_nothing(name):
    got = evaluate(LOSSES[name][0], emptied(make_case(1, unit=False)), "1", {"temperature": 0.2})
    assert got.value == 0 and not any(x.any() for x in got.gradients.values())


@pytest.mark.parametrize(("name", "width"), [("cosent", 8), ("angle", 8), ("angle", 7)])
def test_equals_sentence_transformers(name, width):
    from sentence_transformers.sentence_transformer import losses

    case = make_case(3, positives=1, negatives=0, width=width, unit=False)
    texts = dataclasses.replace(case.query_texts, source=np.zeros_like(case.query_texts.source))
    documents = dataclasses.replace(case.document_texts, source=np.zeros_like(case.document_texts.source))
    case = dataclasses.replace(case, query_texts=texts, document_texts=documents)
    kept = (case.weights > 0) & ~np.isnan(documents.score[:, 0])
    peer = losses.CoSENTLoss(None, 20.0) if name == "cosent" else losses.AnglELoss(None, 20.0)
    vectors = [torch.tensor(case.queries[kept]), torch.tensor(case.documents[kept, 0])]
    want = peer.compute_loss_from_embeddings(vectors, torch.tensor(documents.score[kept, 0]))
    assert evaluate(LOSSES[name][0], case, "1", {"temperature": 0.05}).value == pytest.approx(float(want), rel=1e-5)
