"""Semantic textual similarity: does the model rank sentence pairs as people do?"""

import dataclasses
import pathlib

import numpy as np
from scipy.stats import rankdata

from jaxembed.errors import UserError
from jaxembed.evaluation.lines import number_of, read_objects, stem, text_of
from jaxembed.evaluation.vectors import NO_PROMPT, Encode, finite_vectors
from jaxembed.similarity import pairwise
from jaxembed.storage import path_of


@dataclasses.dataclass(frozen=True)
class StsData:
    """Scored sentence pairs.

    Attributes:
      name: the file's name without its endings.
      sentences1, sentences2: n texts each.
      scores: float64 [n], people's, on any scale.
    """

    name: str
    sentences1: list[str]
    sentences2: list[str]
    scores: np.ndarray


def read_sts(path: str | pathlib.Path) -> StsData:
    """Reads a file of {"sentence1", "sentence2", "score"} lines, .jsonl or .jsonl.gz.

    Raises:
      UserError: no such file, a bad row (named FILE:LINE), or scores that are all equal.
    """
    path = path_of(path)
    sentences1, sentences2, scores = [], [], []
    for where, row in read_objects(path):
        sentences1.append(text_of(row, "sentence1", where))
        sentences2.append(text_of(row, "sentence2", where))
        scores.append(number_of(row, "score", where))
    if len(set(scores)) < 2:
        raise UserError(f"{path}: has {len(scores)} rows, none with another score than the rest: nothing to rank")
    return StsData(stem(path), sentences1, sentences2, np.array(scores))


def evaluate_sts(data: StsData, encode: Encode, similarity: str) -> dict[str, float]:
    """Correlates the similarities of the pairs with their scores.

    The figures are those of sentence-transformers' EmbeddingSimilarityEvaluator with that similarity. As there, the
    texts are encoded without naming a prompt: neither sentence is the query of the other.

    Args:
      data: the scored pairs.
      encode: the model.
      similarity: 'cosine', 'dot', 'euclidean' or 'manhattan'.

    Returns:
      'spearman' and 'pearson', times 100; 0 where the model finds all pairs equally similar.

    Raises:
      UserError: the model's vectors are not finite.
    """
    n = len(data.scores)
    vectors = finite_vectors(encode, data.sentences1 + data.sentences2, NO_PROMPT)
    similarities_N = pairwise(vectors[:n], vectors[n:], similarity)
    return {
        "spearman": 100 * _pearson(rankdata(similarities_N), rankdata(data.scores)),  # equals share their mean rank
        "pearson": 100 * _pearson(similarities_N, data.scores),
    }


def _pearson(x_N: np.ndarray, y_N: np.ndarray) -> float:
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    scale = float(np.linalg.norm(x_N) * np.linalg.norm(y_N))
    return float(x_N @ y_N) / scale if scale else 0.0
