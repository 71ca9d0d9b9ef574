"""What tests of experts share: activations and their slopes in float64."""

import math

import numpy as np
from scipy.special import erf


def silu(x):
    s = 1 / (1 + np.exp(-x))
    return x * s, s * (1 + x * (1 - s))


def gelu(x):
    half = 0.5 * (1 + erf(x / math.sqrt(2)))
    return x * half, half + x * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


ACTIVATIONS = {"silu": silu, "gelu": gelu}  # (value, slope)
