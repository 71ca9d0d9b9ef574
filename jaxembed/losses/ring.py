"""The order in which devices pass blocks on."""

import functools
import math

import numpy as np


@functools.cache
def ring(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns an order of a grid's devices, numbered row-major, in which each is next to the one before in the grid.

    The last is next to the first too, if some size is even and there are two axes. So a hop is one link, and none wraps
    around: TPU v5e slices of several hosts pass blocks on in the background only by such hops.
    """
    even = next((axis for axis, size in enumerate(sizes) if size % 2 == 0), 0)
    cells = np.moveaxis(np.arange(math.prod(sizes)).reshape(sizes), even, 0).copy()
    while cells.ndim > 2:  # a snake through the other axes makes one axis of them
        cells[:, 1::2] = cells[:, 1::2, ::-1].copy()
        cells = cells.reshape(len(cells), -1, *cells.shape[3:])
    cells = cells.reshape(len(cells), -1)
    rest = cells[::-1, 1:].copy()  # up the first column, and back in a snake through the others
    rest[1::2] = rest[1::2, ::-1].copy()
    return (*cells[:, 0].tolist(), *rest.ravel().tolist())
