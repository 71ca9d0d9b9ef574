"""How vectors are compared.

A model says how its vectors are meant to be compared, as in sentence-transformers: by 'cosine', 'dot' product,
'euclidean' or 'manhattan' distance. Higher is nearer, so that distances count with a minus.
"""

import numpy as np

from jaxembed.errors import UserError

MIN_NORM = 1e-12  # a shorter vector is not scaled up to length 1, as in torch.nn.functional.normalize


def unit(vectors_NxE: np.ndarray) -> np.ndarray:
    """Brings vectors to length 1: float32 [N, E]."""
    norms_N = np.sqrt(np.einsum("ne,ne->n", vectors_NxE, vectors_NxE, dtype=np.float64))
    return vectors_NxE / np.maximum(norms_N, MIN_NORM).astype(np.float32)[:, None]


def all_pairs(a_NxE: np.ndarray, b_MxE: np.ndarray, similarity: str) -> np.ndarray:
    """Compares all of `a` with all of `b`, float32 both: float32 [N, M]."""
    if similarity == "cosine":
        a_NxE, b_MxE = unit(a_NxE), unit(b_MxE)
    if similarity in ("cosine", "dot"):
        return a_NxE @ b_MxE.T
    order = 1 if similarity == "manhattan" else 2
    distances = [np.linalg.norm(a_E - b_MxE, ord=order, axis=1) for a_E in a_NxE]
    return -np.stack(distances) if distances else np.zeros((0, len(b_MxE)), np.float32)


def pairwise(a_NxE: np.ndarray, b_NxE: np.ndarray, similarity: str) -> np.ndarray:
    """Compares each of `a` with its partner in `b`, float32 both: float64 [N]."""
    if similarity == "cosine":
        a_NxE, b_NxE = unit(a_NxE), unit(b_NxE)
    if similarity in ("cosine", "dot"):
        return np.einsum("ne,ne->n", a_NxE, b_NxE, dtype=np.float64)
    order = 1 if similarity == "manhattan" else 2
    return -np.linalg.norm(a_NxE.astype(np.float64) - b_NxE, ord=order, axis=1)


def for_search(
    queries_QxE: np.ndarray, documents_NxE: np.ndarray, similarity: str, centre_E: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors whose dot products rank the documents for each query as `similarity` does, float32.

    Of the square of the Euclidean distance, |q|² - 2 q·d + |d|², the first term does not change a query's ranking; the
    last becomes one more dimension: (q, 1) · (d, -|d|²/2). That loses the digits of small distances between long
    vectors, unless both are measured from a point near the documents.

    Args:
      queries_QxE: float32.
      documents_NxE: float32.
      similarity: 'cosine', 'dot' or 'euclidean'.
      centre_E: that point, the same for all queries and documents: see `centre_of`; None = 0.

    Raises:
      UserError: Manhattan distances, which no dot product stands for.
    """
    if similarity == "cosine":
        return unit(queries_QxE), unit(documents_NxE)
    if similarity == "dot":
        return queries_QxE, documents_NxE
    if similarity == "euclidean":
        if centre_E is not None:
            queries_QxE, documents_NxE = queries_QxE - centre_E, documents_NxE - centre_E
        squares_N = np.einsum("ne,ne->n", documents_NxE, documents_NxE, dtype=np.float64)
        queries = np.column_stack([queries_QxE, np.ones(len(queries_QxE), np.float32)])
        return queries, np.column_stack([documents_NxE, (-squares_N / 2).astype(np.float32)])
    raise UserError(f"the model compares vectors by {similarity} distance: retrieval cannot be scored by that")


def centre_of(vectors_NxE: np.ndarray) -> np.ndarray:
    """Returns the mean of vectors, float32 [E]; 0 of none."""
    return vectors_NxE.mean(0, dtype=np.float64).astype(np.float32) if len(vectors_NxE) else np.float32(0)
