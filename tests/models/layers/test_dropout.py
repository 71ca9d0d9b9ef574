"""Dropout masks: their statistics, what they depend on, and what they must not depend on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MESHES, alone, make_mesh, pack, put_rows

from jaxembed import sharding
from jaxembed.models.layers.dropout import Noise, dropout, dropout_weights, step_seed
from jaxembed.sharding import STATES

RATE = 0.1
TEXTS, LENGTH, WIDTH = 32, 24, 32


def noise_of(texts: np.ndarray, positions: np.ndarray, step: int = 0, seed: int = 0) -> Noise:
    return Noise(step_seed(seed, jnp.int32(step)), jnp.asarray(texts), jnp.asarray(positions))


def mask(step: int = 0, place: int = 1, seed: int = 0, rate: float = 0.5) -> np.ndarray:
    """Which entries [text, position, channel] survive."""
    texts = np.broadcast_to(np.arange(1, TEXTS + 1, dtype=np.int32)[:, None], (TEXTS, LENGTH))
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (TEXTS, LENGTH))
    ones = jnp.ones((TEXTS, LENGTH, WIDTH))
    return np.asarray(dropout(ones, rate, noise_of(texts, positions, step, seed), jnp.uint32(place))) > 0


def weight_mask(step: int = 0, place: int = 0) -> np.ndarray:
    """Which attention weights [text, head, query, key] survive at rate 0.5."""
    texts = np.broadcast_to(np.arange(1, TEXTS + 1, dtype=np.int32)[:, None], (TEXTS, LENGTH))
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (TEXTS, LENGTH))
    ones = jnp.ones((TEXTS, 4, LENGTH, LENGTH))
    with jax.set_mesh(make_mesh()):
        dropped = dropout_weights(ones, 0.5, noise_of(texts, positions, step), jnp.uint32(place))
    return np.asarray(dropped) > 0


def assert_independent(a: np.ndarray, b: np.ndarray) -> None:
    """Two masks of rate 0.5 agree in half of their entries, to within 4.5 standard deviations."""
    assert abs((a == b).mean() - 0.5) <= 4.5 * 0.5 / np.sqrt(a.size)


def test_mean_and_variance():
    for rate in (0.1, 0.5, 0.9):
        kept = mask(rate=rate)
        assert abs(kept.mean() - (1 - rate)) <= 4 * np.sqrt(rate * (1 - rate) / kept.size)
        # Counts per token, per channel and per text scatter as a binomial's do.
        for axes in ((2,), (0, 1), (1, 2)):
            n = np.prod([kept.shape[axis] for axis in axes])
            counts = kept.sum(axes)
            assert abs(counts.var() / (n * rate * (1 - rate)) - 1) <= 5 * np.sqrt(2 / counts.size)


def test_survivors_are_scaled_and_keep_their_dtype():
    x = jnp.full((1, 4, 256), 2, jnp.bfloat16)
    noise = noise_of(np.ones((1, 4), np.int32), np.arange(4, dtype=np.int32)[None])
    out = np.asarray(dropout(x, 0.5, noise, jnp.uint32(0)))
    assert out.dtype == jnp.bfloat16 and set(np.unique(out.astype(float))) == {0.0, 4.0}
    assert dropout(x, 0.0, noise, jnp.uint32(0)) is x and dropout(x, 0.5, None, jnp.uint32(0)) is x


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shift", [1, 2, 8, 16])
def test_neighbours_are_independent(axis, shift):
    kept = mask()
    assert_independent(
        kept.take(range(shift, kept.shape[axis]), axis), kept.take(range(kept.shape[axis] - shift), axis)
    )


def test_seeds_steps_and_places_are_independent():
    masks = [mask(), mask(step=1), mask(step=2), mask(place=2), mask(place=5), mask(seed=1), mask(step=1, place=2)]
    for a, b in itertools.combinations(masks, 2):
        assert_independent(a, b)


def test_step_seeds_differ():
    seeds = {int(step_seed(seed, jnp.int32(step))) for seed in range(8) for step in range(128)}
    assert len(seeds) == 8 * 128


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_weights_of_neighbours_are_independent(axis):
    kept = weight_mask()
    n = kept.shape[axis]
    assert abs(kept.mean() - 0.5) <= 4 * 0.5 / np.sqrt(kept.size)
    assert_independent(kept.take(range(1, n), axis), kept.take(range(n - 1), axis))


def test_weights_differ_by_step_and_layer_and_by_who_looks_at_whom():
    kept = weight_mask()
    assert_independent(kept, weight_mask(step=1))
    assert_independent(kept, weight_mask(place=4))
    above = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    assert_independent(kept[:, :, above], kept.swapaxes(2, 3)[:, :, above])


TEXT_LENGTHS = [5, 3, 8, 1, 7, 2, 6, 4, 5, 5, 3, 9, 2, 8, 1, 4]
LAYOUT = [[3, 0], [1, 2], [5, 4], [7, 6], [9, 8], [11], [13, 10], [15, 12, 14]]


def dropped_by_text(layout, mesh_config=None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Masks of each text: of its channels [l, D], and of its attention weights [H, l, l]."""
    packed = pack([np.full(n, 9, np.int32) for n in TEXT_LENGTHS], layout, 12)
    mesh = make_mesh(mesh_config) if mesh_config else make_mesh()
    heads = sharding.spec("batch", "heads", "sequence", None)

    @jax.jit
    def masks(rows, states, weights):
        noise = Noise(step_seed(0, jnp.int32(3)), rows.segment_ids, rows.positions)
        return dropout(states, RATE, noise, jnp.uint32(6)), dropout_weights(weights, RATE, noise, jnp.uint32(4))

    with jax.set_mesh(mesh):
        states = sharding.put(np.ones((len(layout), 12, 16), np.float32), mesh, STATES)
        weights = sharding.put(np.ones((len(layout), 4, 12, 12), np.float32), mesh, heads)
        states, weights = (np.asarray(x) for x in masks(put_rows(packed.rows), states, weights))
    found = []
    for text, n in enumerate(TEXT_LENGTHS):
        row, here = packed.row[text], slice(packed.start[text], packed.start[text] + n)
        found.append((states[row, here], weights[row, :, here, here]))
    return found


@pytest.mark.parametrize("mesh", [None, *MESHES.values()], ids=["1", *MESHES])
def test_masks_do_not_depend_on_packing_or_devices(mesh):
    want = dropped_by_text(alone(TEXT_LENGTHS))
    got = dropped_by_text(LAYOUT, mesh)
    for text in range(len(TEXT_LENGTHS)):
        np.testing.assert_array_equal(got[text][0], want[text][0])
        np.testing.assert_array_equal(got[text][1], want[text][1])
