"""A short name of a folder's weights, by which a change of them shows."""

import hashlib
from collections.abc import Mapping

import numpy as np

PLACES, BYTES = 5, 4096  # what is read of each tensor: so many pieces of so many bytes, from its first to its last


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Returns a SHA-256, in hex, of tensors' names, dtypes, shapes and a part of their values.

    Each tensor is looked at in a few places, so that models far larger than memory take seconds. How they are spread
    over files does not show. A change of a few numbers may pass; other weights do not.

    Args:
      tensors: name → array, such as a view of a memory-mapped file.
    """
    known = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        known.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        content = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        last = max(content.size - BYTES, 0)
        for place in sorted({last * i // (PLACES - 1) for i in range(PLACES)}):
            known.update(content[place : place + BYTES].tobytes())
    return known.hexdigest()
