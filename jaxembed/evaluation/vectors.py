"""What the evaluations ask of a model: texts in, one vector per text out, and how vectors are compared.

A model says how its vectors are meant to be compared (`similarity`), as in sentence-transformers: by 'cosine', 'dot'
product, 'euclidean' or 'manhattan' distance. Higher is nearer: distances count with a minus.
"""

from typing import Protocol

import numpy as np

from jaxembed.errors import UserError

NO_PROMPT = ""  # no prompt asked for by name: the model's default prompt, where it has one
MIN_NORM = 1e-12  # a shorter vector is not scaled up to length 1, as in torch.nn.functional.normalize


class Encode(Protocol):
    """Encodes texts: `encode(texts, prompt_name)` with 'query', 'document' or NO_PROMPT → float32 [n, E]."""

    def __call__(self, texts: list[str], prompt_name: str) -> np.ndarray: ...


def finite_vectors(encode: Encode, texts: list[str], prompt_name: str) -> np.ndarray:
    """Encodes texts.

    Returns:
      float32 [n, E].

    Raises:
      UserError: a vector is not finite.
    """
    vectors_NxE = np.asarray(encode(texts, prompt_name), np.float32)
    broken = int((~np.isfinite(vectors_NxE)).any(axis=1).sum())
    if broken:
        raise UserError(
            f"{broken} of {len(texts)} vectors are not finite: the model's weights are broken, or overflow in its dtype"
        )
    return vectors_NxE


def pair_similarities(a_NxE: np.ndarray, b_NxE: np.ndarray, similarity: str) -> np.ndarray:
    """Compares each vector of `a` with its partner in `b`: float64 [N]."""
    if similarity == "cosine":
        a_NxE, b_NxE = _unit(a_NxE), _unit(b_NxE)
    if similarity in ("cosine", "dot"):
        return np.einsum("ne,ne->n", a_NxE, b_NxE, dtype=np.float64)
    order = 1 if similarity == "manhattan" else 2
    return -np.linalg.norm(a_NxE.astype(np.float64) - b_NxE, ord=order, axis=1)


def for_search(
    queries_QxE: np.ndarray, documents_NxE: np.ndarray, similarity: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors whose dot products rank the documents for each query as `similarity` does.

    Of the square of the Euclidean distance, |q|² - 2 q·d + |d|², the first term does not change a query's ranking; the
    last becomes one more dimension: (q, 1) · (d, -|d|²/2).

    Raises:
      UserError: Manhattan distances, which no dot product stands for.
    """
    if similarity == "cosine":
        return _unit(queries_QxE), _unit(documents_NxE)
    if similarity == "dot":
        return queries_QxE, documents_NxE
    if similarity == "euclidean":
        squares_N = np.einsum("ne,ne->n", documents_NxE, documents_NxE, dtype=np.float64)
        ones_Q = np.ones(len(queries_QxE))
        return (
            np.column_stack([queries_QxE, ones_Q]).astype(np.float32),
            np.column_stack([documents_NxE, -squares_N / 2]).astype(np.float32),
        )
    raise UserError(f"the model compares vectors by {similarity} distance, which the search for documents cannot")


def _unit(vectors_NxE: np.ndarray) -> np.ndarray:
    norms_N = np.sqrt(np.einsum("ne,ne->n", vectors_NxE, vectors_NxE, dtype=np.float64))
    return vectors_NxE / np.maximum(norms_N, MIN_NORM).astype(np.float32)[:, None]
