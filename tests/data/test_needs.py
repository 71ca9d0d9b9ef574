"""What losses need of the records, checked before the run starts."""

import dataclasses

import pytest
from fake_cache import FakeCache, FakeRecord

from jaxembed.config import Config, DataConfig, LossConfig, SourceConfig, TeacherConfig
from jaxembed.errors import UserError
from jaxembed.training_data import check_needs

PAIRS = FakeCache([FakeRecord(1, (2,))])
NEGATIVES = FakeCache([FakeRecord(1, (2,)), FakeRecord(1, (2,), (3,))])
SCORED = FakeCache([FakeRecord(1, (2,), (3,), scores=(1.0, 0.0))])
GRADED = FakeCache([FakeRecord(1, (2,), scores=(5.0,))])
ANSWERED = FakeCache([FakeRecord(1, (2,), (3,), negative_queries=(4,))])


def config(loss, *losses, first_trains=()):
    data = DataConfig(train=(SourceConfig(path="a", losses=first_trains), SourceConfig(path="b")))
    return Config(loss=LossConfig(name=loss), losses=losses, data=data)


@pytest.mark.parametrize(
    ("loss", "caches", "missing"),
    [
        ("infonce", (PAIRS, PAIRS), None),
        ("cosent", (SCORED, PAIRS), r"train\[1\]: .* no 'scores' for every document, which the loss 'cosent' needs"),
        ("cosent", (SCORED, SCORED), None),
        (
            "infonce",
            (SCORED, GRADED),
            r"train\[1\]: .* are graded pairs .* and no matches, which the loss 'infonce' needs",
        ),
        ("cosine", (SCORED, SCORED), None),
        ("cosine", (SCORED, GRADED), r"train\[1\]: .* have 'scores' beyond -1 … 1, which the loss 'cosine' needs"),
        ("cosent", (SCORED, GRADED), None),
        ("triplet", (PAIRS, NEGATIVES), r"train\[0\]: .* no 'negative', which the loss 'triplet' needs"),
        ("triplet", (NEGATIVES, SCORED), None),
        ("clp", (ANSWERED, NEGATIVES), r"train\[1\]: .* no 'negative_query', which the loss 'clp' needs"),
        ("clp", (ANSWERED, ANSWERED), None),
        ("margin_mse", (SCORED, NEGATIVES), r"train\[1\]: .* no 'scores'"),
        ("kl", (SCORED, NEGATIVES), r"train\[1\]: .* no 'scores' for every document, which the loss 'kl' needs"),
        ("kl", (SCORED, SCORED), None),
    ],
)
def test_a_source_lacks_what_its_loss_needs(loss, caches, missing):
    if missing is None:
        check_needs(config(loss), caches)
    else:
        with pytest.raises(UserError, match=missing):
            check_needs(config(loss), caches)


def test_kl_needs_scores_or_a_teacher():
    taught = dataclasses.replace(config("kl"), teacher=TeacherConfig(init="hf:teacher"))
    check_needs(taught, (NEGATIVES, NEGATIVES))
    with pytest.raises(UserError, match=r"train\[1\]: .* no 'negative', which the loss 'kl' needs"):
        check_needs(taught, (NEGATIVES, PAIRS))


@pytest.mark.parametrize(("field", "least"), [("mixed_negatives", 2), ("hardness", 1)])
def test_what_is_about_hard_negatives_needs_some(field, least):
    several = FakeCache([FakeRecord(1, (2,), (3, 4))])
    asked = dataclasses.replace(config("infonce"), loss=LossConfig(**{field: 3}))
    check_needs(asked, (PAIRS, several))
    for caches in ((PAIRS, PAIRS), (PAIRS, NEGATIVES))[:least]:
        with pytest.raises(
            UserError, match=f"the loss 'infonce' has {field} = 3, which is about a pair's hard negatives"
        ):
            check_needs(asked, caches)


def test_only_the_losses_that_a_source_trains_count():
    losses = (LossConfig(name="infonce"), LossConfig(name="cosent", label="graded"))
    caches = (PAIRS, SCORED)
    check_needs(config("triplet", *losses, first_trains=("infonce",)), caches)
    for names in ((), ("graded",), ("infonce", "graded")):
        with pytest.raises(UserError, match=r"train\[0\]: .* which the loss 'graded' needs"):
            check_needs(config("triplet", *losses, first_trains=names), caches)
