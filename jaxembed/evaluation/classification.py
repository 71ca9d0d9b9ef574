"""Classification: how well does a linear classifier on the model's vectors tell classes apart?"""

import dataclasses
import itertools
import pathlib
import re
from typing import TYPE_CHECKING

import numpy as np

from jaxembed.errors import UserError
from jaxembed.evaluation.lines import find_file, id_of, read_objects, stem, text_of
from jaxembed.evaluation.vectors import NO_PROMPT, Encode, finite_vectors

if TYPE_CHECKING:
    import jax

C = 1.0  # inverse strength of the L2 penalty: scikit-learn's and MTEB's
MAX_ITERATIONS = 10_000
# Where no component of the gradient of the summed loss is larger, fitting ends. The penalty makes the objective's
# curvature at least 1 / C, so that the coefficients are then about as near to the optimum.
TOLERANCE = 1e-4


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


def split_spec(spec: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the training and the test file of 'TRAIN:TEST' or of a folder with train.jsonl and test.jsonl (or .gz).

    Raises:
      UserError: neither of both, or a file that is not there.
    """
    folder = pathlib.Path(spec).expanduser()
    if folder.is_dir():
        return find_file(folder, "train.jsonl"), find_file(folder, "test.jsonl")
    train, colon, test = spec.partition(":")
    if not colon:
        raise UserError(f"{spec}: wants TRAIN_FILE:TEST_FILE, or a folder of train.jsonl and test.jsonl")
    paths = pathlib.Path(train).expanduser(), pathlib.Path(test).expanduser()
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
    return paths


def read_classification(spec: str) -> ClassificationData:
    """Reads two files of {"text", "label"} lines, .jsonl or .jsonl.gz; labels are strings or whole numbers.

    Args:
      spec: 'TRAIN_FILE:TEST_FILE' or a folder, see `split_spec`.

    Raises:
      UserError: no such file, a bad row (named FILE:LINE), an empty file, or only one label in the training file.
    """
    train, test = split_spec(spec)
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


def fit(features_NxE: np.ndarray, classes_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits a multinomial logistic regression with an L2 penalty on the weights, by L-BFGS in float64.

    Minimises C · Σ cross-entropy + |weights|² / 2, as scikit-learn's LogisticRegression does. With two classes the
    first one's logit is 0, as there: the penalty is then on the difference between the classes' weights.

    Args:
      features_NxE: float32.
      classes_N: integers 0 … classes - 1, each at least once.

    Returns:
      Weights [classes, E] and biases [classes], float64.
    """
    import jax
    import jax.numpy as jnp
    from scipy.optimize import minimize

    n_classes, width = int(classes_N.max()) + 1, features_NxE.shape[1]
    n_free = 1 if n_classes == 2 else n_classes

    with jax.enable_x64(True), jax.default_device(_host()), jax.set_mesh(_mesh_of_one(_host())):
        features = jnp.asarray(features_NxE, jnp.float64)
        classes = jnp.asarray(classes_N)

        @jax.jit
        @jax.value_and_grad
        def objective(flat: jax.Array, features: jax.Array, classes: jax.Array) -> jax.Array:
            free = flat.reshape(n_free, width + 1)
            logits = features @ free[:, :-1].T + free[:, -1]
            if n_classes == 2:
                logits = jnp.pad(logits, ((0, 0), (1, 0)))
            chosen = jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]
            cross_entropy = jax.nn.logsumexp(logits, axis=1) - chosen
            return C * cross_entropy.sum() + (free[:, :-1] ** 2).sum() / 2

        def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = objective(flat, features, classes)
            return float(value), np.asarray(gradient)

        found = minimize(
            value_and_gradient,
            np.zeros(n_free * (width + 1)),
            method="L-BFGS-B",
            jac=True,
            options={"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "gtol": TOLERANCE, "ftol": 0.0},
        )
    free = found.x.reshape(n_free, width + 1)
    whole = np.pad(free, ((1, 0), (0, 0))) if n_classes == 2 else free
    return whole[:, :-1], whole[:, -1]


def _macro_f1(predicted_N: np.ndarray, wanted_N: np.ndarray) -> float:
    """Returns the mean F1 over the labels that occur in either array, as scikit-learn's f1_score(average='macro')."""
    scores = []
    for label in np.union1d(predicted_N, wanted_N):
        predicted, wanted = predicted_N == label, wanted_N == label
        scores.append(2 * (predicted & wanted).sum() / (predicted.sum() + wanted.sum()))
    return float(np.mean(scores))


def _read(path: pathlib.Path) -> tuple[list[str], list[str]]:
    texts, labels = [], []
    for where, row in read_objects(path):
        texts.append(text_of(row, "text", where))
        labels.append(id_of(row, "label", where))
    if not texts:
        raise UserError(f"{path}: the file is empty")
    return texts, labels


def _name(train: pathlib.Path, test: pathlib.Path) -> str:
    """Returns 'trec' of trec-train.jsonl and trec-test.jsonl, the folder's name of train.jsonl and test.jsonl."""
    words = (re.split(r"[-_.]", stem(path)) for path in (train, test))
    common = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*words))]
    return "-".join(common) or test.resolve().parent.name
