"""Vectors in fewer bytes, by the same rules as sentence-transformers' `quantize_embeddings`, and back.

'int8' and 'uint8' cut each dimension's range into 255 equal steps; the ranges are the least and the largest value among
vectors that are taken for a sample. 'binary' and 'ubinary' keep the signs, eight to a byte: 'binary' as int8, less 128.
"""

import numpy as np

DTYPES = ("float32", "float16", "int8", "uint8", "binary", "ubinary")
CALIBRATED = ("int8", "uint8")  # those that want ranges
PACKED = ("binary", "ubinary")  # those that keep signs


def ranges_of(sample_NxE: np.ndarray) -> np.ndarray:
    """Returns the least and the largest value of each dimension: float32 [2, E]."""
    return np.stack([sample_NxE.min(axis=0), sample_NxE.max(axis=0)]).astype(np.float32)


def quantize(vectors_NxE: np.ndarray, dtype: str, ranges_2xE: np.ndarray | None = None) -> np.ndarray:
    """Returns vectors as they are stored.

    Args:
      vectors_NxE: float32.
      dtype: one of DTYPES.
      ranges_2xE: float32, from `ranges_of`, where `dtype` is one of CALIBRATED. What lies beyond is cut to them.

    Returns:
      [N, E] of that dtype; of PACKED ones [N, ⌈E / 8⌉] int8 or uint8, the first dimension in the highest bit.
    """
    if dtype in PACKED:
        bits = np.packbits(vectors_NxE > 0, axis=-1)
        return bits if dtype == "ubinary" else (bits - 128).astype(np.int8)
    if dtype not in CALIBRATED:
        return vectors_NxE.astype(dtype)
    starts_E, steps_E = _scale(ranges_2xE)
    levels = np.clip(np.floor((vectors_NxE - starts_E) / steps_E), 0, 255)
    return levels.astype(np.uint8) if dtype == "uint8" else (levels - 128).astype(np.int8)


def dequantize(stored: np.ndarray, dtype: str, width: int, ranges_2xE: np.ndarray | None = None) -> np.ndarray:
    """Returns stored vectors as float32 [N, E]: the middle of each step of a range, 1 and -1 of signs.

    Args:
      stored: from `quantize`.
      dtype: as there.
      width: E.
      ranges_2xE: as there.
    """
    if dtype in PACKED:
        bytes_NxB = stored if dtype == "ubinary" else (stored.astype(np.int16) + 128).astype(np.uint8)
        return 2.0 * np.unpackbits(bytes_NxB, axis=-1, count=width).astype(np.float32) - 1.0
    if dtype not in CALIBRATED:
        return stored.astype(np.float32)
    starts_E, steps_E = _scale(ranges_2xE)
    levels = stored.astype(np.float32) + (128.0 if dtype == "int8" else 0.0)
    return (levels + np.float32(0.5)) * steps_E + starts_E


def _scale(ranges_2xE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where each dimension's steps begin, and their size, both float32 [E]."""
    starts_E, ends_E = ranges_2xE.astype(np.float32)
    steps_E = (ends_E - starts_E) / 255
    return starts_E, np.where(steps_E == 0, np.float32(1), steps_E)
