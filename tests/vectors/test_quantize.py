"""Vectors in fewer bytes, against sentence-transformers, and back."""

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings

from jaxembed.vectors.quantize import CALIBRATED, DTYPES, PACKED, dequantize, quantize, ranges_of

VECTORS = np.random.default_rng(0).normal(size=(50, 13)).astype(np.float32)
SAMPLE = VECTORS[:20] * np.float32(0.9)  # so that some values lie beyond the ranges


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "float16"])
def test_the_same_bytes_as_sentence_transformers(dtype):
    theirs = quantize_embeddings(VECTORS, dtype, calibration_embeddings=SAMPLE)
    ours = quantize(VECTORS, dtype, ranges_of(SAMPLE))
    assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_back(dtype):
    ranges = ranges_of(VECTORS)
    back = dequantize(quantize(VECTORS, dtype, ranges), dtype, 13, ranges)
    assert back.dtype == np.float32 and back.shape == VECTORS.shape
    if dtype in PACKED:
        assert np.array_equal(back, np.where(VECTORS > 0, 1, -1))
    elif dtype in CALIBRATED:  # no further than half a step; the largest value of all is a step of its own
        steps = (ranges[1] - ranges[0]) / 255
        assert (np.abs(back - VECTORS) <= 0.5001 * steps).all()
    else:
        assert np.abs(back - VECTORS).max() <= {"float32": 0, "float16": 2e-3}[dtype]


def test_a_dimension_that_never_changes():
    constant = np.full((4, 2), 0.25, np.float32)
    assert np.array_equal(
        quantize(constant, "int8", ranges_of(constant)), quantize_embeddings(constant, "int8", ranges_of(constant))
    )
