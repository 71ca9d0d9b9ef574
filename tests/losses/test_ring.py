"""The tour of a grid of devices."""

import numpy as np
import pytest

from jaxembed.losses.ring import ring


@pytest.mark.parametrize("sizes", [(1,), (8,), (2, 1), (16, 16), (3, 4), (4, 3), (2, 3, 4), (3, 3, 2), (1, 4, 1, 2)])
def test_every_device_once_and_each_beside_the_one_before(sizes):
    order = ring(sizes)
    assert sorted(order) == list(range(np.prod(sizes)))
    places = np.array(np.unravel_index(order, sizes)).T
    steps = np.abs(np.diff(places, axis=0)).sum(1)
    assert (steps == 1).all()
    if np.count_nonzero(np.array(sizes) > 1) > 1:  # back to the first, without a way around the edge
        assert np.abs(places[0] - places[-1]).sum() == 1


def test_an_odd_grid_is_still_a_ring():
    assert sorted(ring((3, 5))) == list(range(15))
