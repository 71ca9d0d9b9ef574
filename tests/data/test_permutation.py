import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.data.permutation import mix, permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000, 4095, 4096, 4097, 65_537])
def test_is_a_bijection(n):
    for key in (0, 1, 2**63, 2**64 - 1):
        np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_is_a_bijection_for_any_size_and_key(n, key):
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**40, 2**40 - 1, 2**40 + 1, 10**9, 2**53 + 1, 2**60])
def test_big_domains(n):
    index = np.unique(np.random.default_rng(0).integers(0, n, 10_000))
    image = permute(index, n, 5)
    assert image.min() >= 0 and image.max() < n
    assert np.unique(image).size == index.size
    assert abs(image.mean() / n - 0.5) < 0.02


def test_sizes_and_keys_per_index_equal_one_at_a_time():
    random = np.random.default_rng(0)
    n = random.integers(1, 10**6, 200)
    index, key = random.integers(0, n), random.integers(0, 2**62, 200)
    expected = [int(permute(i, m, k)) for i, m, k in zip(index, n, key)]
    assert permute(index, n, key).tolist() == expected
    assert permute(np.arange(3), n[:5, None] + 3, key[:5, None]).shape == (5, 3)


def test_keys_differ_and_do_not_depend_on_the_request():
    n = 1000
    one, other = permute(np.arange(n), n, 1), permute(np.arange(n), n, 2)
    assert np.mean(one == other) < 0.01
    assert np.mean(one == np.arange(n)) < 0.01
    some = np.array([17, 900, 3])
    np.testing.assert_array_equal(permute(some, n, 1), one[some])


@pytest.mark.parametrize("n", [2, 3, 5, 6, 7, 12])
def test_every_place_is_equally_likely_on_small_domains(n):
    keys = mix(3, np.arange(200_000))
    counts = np.bincount(permute(0, n, keys), minlength=n)
    expected = keys.size / n
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected)), counts


def test_shuffle_leaves_no_trend():
    n = 50_000
    image = permute(np.arange(n), n, 9).astype(float)
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.02
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02


def test_mix_tells_its_parts_apart():
    assert len({int(mix(a, b)) for a in range(50) for b in range(50)}) == 2500
    bits = np.unpackbits(mix(0, np.arange(4096)).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.01
