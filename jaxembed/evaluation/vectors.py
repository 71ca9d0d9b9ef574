"""What the evaluations ask of a model: texts in, one vector per text out."""

from typing import Protocol

import numpy as np

from jaxembed.errors import UserError

NO_PROMPT = ""  # no prompt asked for by name: the model's default prompt, where it has one
MIN_NORM = 1e-12  # a shorter vector is not scaled up to length 1, as in torch.nn.functional.normalize


class Encode(Protocol):
    """Encodes texts: `encode(texts, prompt_name)` with 'query', 'document' or NO_PROMPT → float32 [n, E]."""

    def __call__(self, texts: list[str], prompt_name: str) -> np.ndarray: ...


def unit_vectors(encode: Encode, texts: list[str], prompt_name: str) -> np.ndarray:
    """Encodes texts and brings their vectors to length 1, so that dot products are cosine similarities.

    Returns:
      float32 [n, E].

    Raises:
      UserError: a vector is not finite.
    """
    vectors_NxE = np.array(encode(texts, prompt_name), np.float32)  # a copy, which is then changed in place
    norms_N = np.sqrt(np.einsum("ne,ne->n", vectors_NxE, vectors_NxE, dtype=np.float64))
    broken = int((~np.isfinite(norms_N)).sum())
    if broken:
        raise UserError(
            f"{broken} of {len(texts)} vectors are not finite: the model's weights are broken, or overflow in its dtype"
        )
    vectors_NxE /= np.maximum(norms_N, MIN_NORM).astype(np.float32)[:, None]
    return vectors_NxE
