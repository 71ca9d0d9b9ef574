"""What the evaluations ask of a model: texts in, one vector per text out."""

from typing import Protocol

import numpy as np

from jaxembed.errors import UserError

NO_PROMPT = ""  # no prompt asked for by name: the model's default prompt, where it has one


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
    return require_finite(np.asarray(encode(texts, prompt_name), np.float32))


def require_finite(vectors_NxE: np.ndarray) -> np.ndarray:
    """Returns the vectors.

    Raises:
      UserError: one is not finite.
    """
    broken = int((~np.isfinite(vectors_NxE)).any(axis=1).sum())
    if broken:
        raise UserError(
            f"{broken} of {len(vectors_NxE)} vectors are not finite: the model's weights are broken, or overflow in "
            "its dtype"
        )
    return vectors_NxE
