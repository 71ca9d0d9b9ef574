"""Biases by distance against transformers' buckets and the definition of ALiBi."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import make_mesh

from jaxembed.config import MeshConfig
from jaxembed.models.layers.relative_bias import RelativeBias, alibi_bias, alibi_slopes, buckets_by_distance

LENGTH = 700


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 256), (4, 8), (10, 20), (7, 512)])
def test_buckets_equal_transformers(buckets, max_distance):
    torch = pytest.importorskip("torch")
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder
    from transformers.models.t5.modeling_t5 import T5Attention

    ahead = torch.arange(1 - LENGTH, LENGTH)
    ours = buckets_by_distance(LENGTH, buckets, max_distance)
    theirs = T5Attention._relative_position_bucket(ahead, True, buckets, max_distance)
    np.testing.assert_array_equal(ours, theirs.numpy())
    theirs = MPNetEncoder.relative_position_bucket(ahead, buckets, max_distance)
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert ours.min() == 0 and ours.max() < buckets


def test_learned_bias_is_the_tables_entry_on_every_mesh():
    wanted = None
    for mesh in (MeshConfig(1), MeshConfig(1, 4, 2)):
        with jax.set_mesh(make_mesh(mesh)):
            bias = jax.jit(lambda: RelativeBias(jax.random.key(0), 8, 6, 1.0, jnp.float32, 16))()
            got = np.asarray(jax.jit(lambda bias: bias(20))(bias))
            table = np.asarray(bias.bias[...])
        if wanted is None:
            wanted = np.array([table[bucket] for bucket in buckets_by_distance(20, 8, 16)]).T
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (3, [4, 8, 2]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_slopes_are_those_of_the_paper(heads, exponents):
    np.testing.assert_allclose(alibi_slopes(heads), [2**-e for e in exponents], rtol=1e-15)


def test_alibi_falls_with_the_distance_on_both_sides():
    bias = alibi_bias(6, 9)
    assert bias.shape == (6, 17) and bias.dtype == np.float32
    for head, slope in enumerate(alibi_slopes(6)):
        for query in range(9):
            for key in range(9):
                assert bias[head, 8 + key - query] == np.float32(-slope * abs(query - key))
