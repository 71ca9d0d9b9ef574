"""Classification: how well does a linear classifier on the model's vectors tell classes apart?"""

import dataclasses
import itertools
import re

import numpy as np

from jaxembed.errors import UserError
from jaxembed.evaluation.lines import id_of, read_objects, stem, text_of
from jaxembed.evaluation.logistic import fit
from jaxembed.evaluation.sets import classification_files
from jaxembed.evaluation.vectors import NO_PROMPT, Encode, finite_vectors
from jaxembed.storage import AnyPath


@dataclasses.dataclass(frozen=True)
class ClassificationData:
    """Labelled texts.

    Attributes:
      name: what the names of both files begin with.
      train_texts, train_labels: to fit the classifier on; at least two labels.
      test_texts, test_labels: to score it on. Labels are compared as strings.
    """

    name: str
    train_texts: list[str]
    train_labels: list[str]
    test_texts: list[str]
    test_labels: list[str]


def read_classification(spec: str) -> ClassificationData:
    """Reads two files of {"text", "label"} lines, .jsonl or .jsonl.gz; labels are strings or whole numbers.

    Args:
      spec: 'TRAIN_FILE:TEST_FILE' or a folder, see `classification_files`.

    Raises:
      UserError: no such file, a bad row (named FILE:LINE), an empty file, or only one label in the training file.
    """
    train, test = classification_files(spec)
    (train_texts, train_labels), (test_texts, test_labels) = _read(train), _read(test)
    if len(set(train_labels)) < 2:
        raise UserError(f"{train}: all its labels are {train_labels[0]!r}: nothing to tell apart")
    return ClassificationData(_name(train, test), train_texts, train_labels, test_texts, test_labels)


def evaluate_classification(data: ClassificationData, encode: Encode) -> dict[str, float]:
    """Fits a logistic regression on the training texts' vectors and scores it on the test texts.

    As in MTEB the texts are encoded without naming a prompt and the vectors taken as they are; but where MTEB fits on
    ten small samples, this fits once on the whole training set, so that the scores are higher than there.

    Returns:
      'accuracy' and 'f1' (the mean over the labels), times 100. A test label that training lacks is never predicted.

    Raises:
      UserError: the model's vectors are not finite.
    """
    labels, classes_N = np.unique(data.train_labels, return_inverse=True)
    weights_CxE, biases_C = fit(finite_vectors(encode, data.train_texts, NO_PROMPT), classes_N)
    logits_NxC = finite_vectors(encode, data.test_texts, NO_PROMPT) @ weights_CxE.T + biases_C
    predicted_N, wanted_N = labels[logits_NxC.argmax(axis=1)], np.array(data.test_labels)
    return {"accuracy": 100 * float((predicted_N == wanted_N).mean()), "f1": 100 * _macro_f1(predicted_N, wanted_N)}


def _macro_f1(predicted_N: np.ndarray, wanted_N: np.ndarray) -> float:
    """Returns the mean F1 over the labels that occur in either array, as scikit-learn's f1_score(average='macro')."""
    scores = []
    for label in np.union1d(predicted_N, wanted_N):
        predicted, wanted = predicted_N == label, wanted_N == label
        scores.append(2 * (predicted & wanted).sum() / (predicted.sum() + wanted.sum()))
    return float(np.mean(scores))


def _read(path: AnyPath) -> tuple[list[str], list[str]]:
    texts, labels = [], []
    for where, row in read_objects(path):
        texts.append(text_of(row, "text", where))
        labels.append(id_of(row, "label", where))
    if not texts:
        raise UserError(f"{path}: the file is empty")
    return texts, labels


def _name(train: AnyPath, test: AnyPath) -> str:
    """Returns 'trec' of trec-train.jsonl and trec-test.jsonl, the folder's name of train.jsonl and test.jsonl."""
    words = (re.split(r"[-_.]", stem(path)) for path in (train, test))
    common = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*words))]
    return "-".join(common) or test.resolve().parent.name
