"""A shuffle without a table: keyed bijections of 0 … n-1, computed where they are needed."""

import numpy as np
import numpy.typing as npt

_ROUNDS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(*parts: npt.ArrayLike) -> np.ndarray:
    """Hashes integers into 64 bits, each part broadcast against the others.

    The parts are chained through the finaliser of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
    number generators", 2014).

    Args:
      *parts: integers ≥ 0 below 2**64, or arrays of such.

    Returns:
      uint64, of the shape that the parts broadcast to.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64; NumPy warns for scalars
        hashed = np.uint64(0)
        for part in parts:
            hashed = _finalise((hashed ^ np.asarray(part, np.uint64)) + _GOLDEN)
    return np.asarray(hashed)


def permute(index: npt.ArrayLike, n: npt.ArrayLike, key: npt.ArrayLike) -> np.ndarray:
    """Returns where a shuffle of n things, chosen by `key`, puts the thing number `index`.

    For each (n, key) a bijection of 0 … n-1: a Feistel network of four rounds on the least even number of bits that
    holds n - 1, walked along its cycles until it lands below n (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002), then rotated by a hash of the key, so that on a small domain too every place is equally likely.
    Work and memory grow with the number of indices, not with n.

    Args:
      index: integers in 0 … n-1.
      n: how many things there are, 1 … 2**60; one number, or one per index.
      key: which shuffle, integers ≥ 0 below 2**64; one number, or one per index.

    Returns:
      int64, of the shape that the arguments broadcast to.
    """
    n, key = np.asarray(n, np.int64), np.asarray(key, np.uint64)
    # frexp's exponent of n - 1 is its bit length (float64 may round 2**53 and more up, which costs a bit at the most).
    half = np.maximum((np.frexp((n - 1).astype(np.float64))[1] + 1) // 2, 1).astype(np.uint64)
    parameters = (n.astype(np.uint64), half, mix(key, _ROUNDS), *(mix(key, i) for i in range(_ROUNDS)))
    index, *parameters = np.broadcast_arrays(np.asarray(index).astype(np.uint64), *parameters)
    shape = index.shape
    n, half, shift, *round_keys = (p.reshape(-1) for p in parameters)
    value = _feistel(index.reshape(-1), half, round_keys)
    outside = np.flatnonzero(value >= n)
    while outside.size:
        value[outside] = _feistel(value[outside], half[outside], [k[outside] for k in round_keys])
        outside = outside[value[outside] >= n[outside]]
    return ((value + shift % n) % n).astype(np.int64).reshape(shape)


def _feistel(value: np.ndarray, half: np.ndarray, round_keys: list[np.ndarray]) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for round_key in round_keys:
        left, right = right, left ^ (_finalise(right + round_key) & mask)
    return (left << half) | right


def _finalise(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
