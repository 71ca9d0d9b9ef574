"""Vectors at several depths: those of models cut to their first layers, packed or not, on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, MESHES, ONE, alone, make_factory, make_mesh, pack, put_rows, random_params, random_texts

from jaxembed import sharding
from jaxembed.models.layers.dropout import Noise, step_seed
from jaxembed.models.text_encoder import HeadConfig, flatten

LENGTH, LAYERS = 24, (2, 1)  # of 3; not in order
TEXTS = random_texts(16, longest=12)
LAYOUT = [[0, 1, 2], [4, 3], [6, 5], [7], [8, 10], [9, 11], [12, 13], [15, 14]]
HEAD = HeadConfig("weighted_mean", projection=24, projection_bias=True)
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
UPSTREAM = np.random.default_rng(9).normal(size=(3, len(TEXTS), 24)).astype(np.float32)  # [depths, n, E]


def run(packed, encode, factory, mesh=ONE):
    """The texts' vectors [depths, n, E], and the parameters' gradient of their product with UPSTREAM."""
    places = np.zeros((packed.shard.max() + 1, packed.slots, len(TEXTS)), np.float32)
    places[packed.shard, packed.slot, np.arange(len(TEXTS))] = 1  # [S, slots, n]

    def loss(params, rows):
        noise = Noise(step_seed(0, jnp.int32(5)), rows.segment_ids, rows.positions)
        vectors = jax.sharding.reshard(encode(params, rows, packed.slots, noise), jax.P(None, None, None, None))
        by_text = jnp.einsum("dste,stn->dne", vectors, places)
        return (by_text * UPSTREAM).sum(), by_text

    with jax.set_mesh(make_mesh(mesh)):
        function = jax.jit(jax.grad(loss, has_aux=True))
        gradient, vectors = function(random_params(factory), put_rows(packed.rows))
        return np.asarray(vectors), flatten(jax.device_get(gradient))


def at_depths(packed, mesh=ONE, **options):
    factory = make_factory(HEAD, **DROPOUT, **options)
    return run(packed, lambda params, *rest: factory.bind(params).at_depths(*rest, LAYERS)[0], factory, mesh)


def assert_near(got, want, tolerance=1e-5):
    """max|a - b| / max|b| of vectors and of every gradient; a key's bias, whose true gradient is 0, by its kernel's."""
    assert np.abs(got[0] - want[0]).max() <= tolerance * np.abs(want[0]).max()
    assert got[1].keys() == want[1].keys()
    for path, b in want[1].items():
        scale = np.abs(want[1][path.replace("bias", "kernel")] if path.endswith("key/bias") else b).max()
        assert np.abs(got[1][path] - b).max() <= tolerance * scale, path


@pytest.fixture(scope="module")
def cut():
    """From models that have so many layers only, run one after the other without any choosing of layers."""
    whole = make_factory(HEAD, **DROPOUT)

    def encode(params, rows, slots, noise):
        vectors = []
        for depth in (CONFIG.layers, *LAYERS):
            model = make_factory(HEAD, dataclasses.replace(CONFIG, layers=depth), **DROPOUT)
            layers = jax.tree.map(lambda x, depth=depth: x[:depth], params["backbone"]["layers"])
            backbone = params["backbone"] | {"layers": layers}
            vectors.append(model.bind(params | {"backbone": backbone})(rows, slots, noise))
        return jnp.stack(vectors)

    return run(pack(TEXTS, LAYOUT, LENGTH), encode, whole)


@pytest.mark.parametrize("options", [{}, {"remat": "full", "unroll": 1}], ids=["unrolled", "scanned, recomputed"])
def test_a_depth_is_the_model_cut_there(cut, options):
    got = at_depths(pack(TEXTS, LAYOUT, LENGTH), **options)
    assert got[0].shape == (3, len(TEXTS), 24) and got[0].dtype == np.float32
    assert_near(got, cut)
    assert min(np.abs(got[0][i] - got[0][j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.1


def test_a_packed_text_gets_the_vectors_it_gets_alone(cut):
    assert_near(at_depths(pack(TEXTS, alone(TEXTS), 16), unroll=1), cut)


@pytest.mark.parametrize("name", ["data 2, fsdp 2, tensor 2", "tensor 2, expert 2, sequence 2"])
def test_depths_are_the_same_on_every_mesh(cut, name):
    packed = pack(TEXTS, LAYOUT, LENGTH, sharding.batch_shards(make_mesh(MESHES[name])))
    assert_near(at_depths(packed, MESHES[name], unroll=1), cut)


def test_width_and_depth_of_a_factory():
    with jax.set_mesh(make_mesh()):
        assert (make_factory(HEAD).width, make_factory(HEAD).depth) == (24, 3)
        assert make_factory().width == CONFIG.width
