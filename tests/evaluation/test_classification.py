"""Classification against scikit-learn, and what its files may hold."""

import gzip
import json

import numpy as np
import pytest

from jaxembed.errors import UserError
from jaxembed.evaluation.classification import evaluate_classification, read_classification
from jaxembed.evaluation.logistic import fit


def blobs(n_classes, n=300, width=8):
    """Overlapping classes of unequal size, with features that are far from mean 0."""
    rng = np.random.default_rng(n_classes)
    classes = rng.choice(n_classes, n, p=np.arange(1, n_classes + 1) / np.arange(1, n_classes + 1).sum())
    centres = rng.normal(size=(n_classes, width))
    return (centres[classes] + rng.normal(size=(n, width)) + 3).astype(np.float32), classes


@pytest.mark.parametrize("n_classes", [2, 5])
def test_fit_is_that_of_scikit_learn(n_classes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, classes = blobs(n_classes)
    weights, biases = fit(features, classes)
    peer = linear_model.LogisticRegression(C=1.0, max_iter=10_000, tol=1e-10).fit(features.astype(np.float64), classes)
    coefficients, intercepts = peer.coef_, peer.intercept_
    if n_classes == 2:
        assert not weights[0].any() and biases[0] == 0
        weights, biases = weights[1:], biases[1:]
    np.testing.assert_allclose(weights, coefficients, atol=1e-3)
    np.testing.assert_allclose(biases - biases.mean(), intercepts - intercepts.mean(), atol=1e-3)


def test_fit_leaves_float64_behind():
    import jax.numpy as jnp

    fit(*blobs(2, 20))
    assert jnp.ones(2).astype(float).dtype == np.float32


def write(folder, name, rows):
    text = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder / name


def encode(texts, prompt_name):
    """One dimension per word; no prompt may be asked for."""
    assert prompt_name == ""
    return np.array([[10.0 * (word in text) for word in ("cat", "dog", "bird")] for text in texts], np.float32)


TRAIN = [("a cat", "feline"), ("cat!", "feline"), ("a dog", 7), ("dog!", 7), ("the bird", "avian"), ("bird", "avian")]


def test_scores_by_hand(tmp_path):
    train = write(tmp_path, "pets-train.jsonl.gz", TRAIN)
    # The last label is unheard of, so its text is wrongly taken for a dog.
    test = write(
        tmp_path, "pets-test.jsonl", [("cat", "feline"), ("big dog", "7"), ("bird", "avian"), ("dog", "hound")]
    )
    data = read_classification(f"{train}:{test}")
    assert data.name == "pets" and data.train_labels == ["feline"] * 2 + ["7"] * 2 + ["avian"] * 2
    scores = evaluate_classification(data, encode)
    assert scores == pytest.approx({"accuracy": 75.0, "f1": 100 * (1 + 1 + 2 / 3 + 0) / 4})


def test_a_folder_of_both(tmp_path):
    write(tmp_path, "train.jsonl", TRAIN)
    write(tmp_path, "test.jsonl.gz", TRAIN[:3])
    data = read_classification(str(tmp_path))
    assert data.name == tmp_path.name and len(data.test_texts) == 3
    assert evaluate_classification(data, encode)["accuracy"] == 100


def test_names(tmp_path):
    for train, test, name in (
        ("sst2-train.jsonl.gz", "sst2-dev.jsonl", "sst2"),
        ("a_b.train.jsonl", "a_b.test.jsonl", "a-b"),
        ("toxic.jsonl", "topic.jsonl", tmp_path.name),
    ):
        paths = write(tmp_path, train, TRAIN), write(tmp_path, test, TRAIN)
        assert read_classification(":".join(map(str, paths))).name == name


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([("a", "x"), ("b", "x")], r"train\.jsonl: all its labels are 'x'"),
        ([("a", "x"), ("b", None)], r"train\.jsonl:2: 'label' wants"),
        ([("a", "x"), ("b", 0.5)], r"train\.jsonl:2: 'label' wants"),
        ([("a", "x"), (3, "y")], r"train\.jsonl:2: 'text' wants a string"),
        ([], r"train\.jsonl: the file is empty"),
    ],
)
def test_refuses(tmp_path, train, message):
    write(tmp_path, "test.jsonl", TRAIN)
    with pytest.raises(UserError, match=message):
        read_classification(f"{write(tmp_path, 'train.jsonl', train)}:{tmp_path}/test.jsonl")


def test_names_what_is_missing(tmp_path):
    train = write(tmp_path, "train.jsonl", TRAIN)
    with pytest.raises(UserError, match="no such file or folder: nowhere"):
        read_classification(f"{train}:nowhere")
    with pytest.raises(UserError, match=r"no such file or folder: .* \(wants TRAIN_FILE:TEST_FILE"):
        read_classification(str(train))
    with pytest.raises(UserError, match=r"there is no test\.jsonl"):
        read_classification(str(tmp_path))
