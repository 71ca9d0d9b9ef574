"""The whole encoder: MiniLM against sentence-transformers, packing, dropout, recomputation, dtypes, kernels, meshes."""

import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_models import CONFIG, MESHES, ONE, alone, make_factory, make_mesh, pack, put_rows, random_params, random_texts

from jaxembed import Embedder, sharding
from jaxembed.config import MeshConfig
from jaxembed.models.layers import attention
from jaxembed.models.layers.dropout import Noise, step_seed
from jaxembed.models.pooling import MODES
from jaxembed.models.text_encoder import HeadConfig, flatten, unflatten

LENGTH = 24
TEXTS = random_texts(16, longest=12)
LAYOUT = [[0, 1, 2], [4, 3], [6, 5], [7], [8, 10], [9, 11], [12, 13], [15, 14]]
HEAD = HeadConfig(projection=24, projection_bias=True)
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}


def run(factory, packed, mesh=ONE, step=None, gradient=False):
    """The texts' vectors [n, E], and if asked the parameters' gradient of their product with fixed numbers."""
    upstream = np.random.default_rng(9).normal(size=(len(packed.slot), 64)).astype(np.float32)
    places = np.zeros((packed.shard.max() + 1, packed.slots, len(packed.slot)), np.float32)
    places[packed.shard, packed.slot, np.arange(len(packed.slot))] = 1  # [S, slots, n]

    def loss(params, rows):
        noise = None if step is None else Noise(step_seed(0, jnp.int32(step)), rows.segment_ids, rows.positions)
        vectors = factory.bind(params)(rows, packed.slots, noise)
        wanted = jax.sharding.reshard(vectors, jax.P(None, None, None))
        by_text = jnp.einsum("ste,stn->ne", wanted, places)
        return (by_text * upstream[:, : by_text.shape[1]]).sum(), by_text

    with jax.set_mesh(make_mesh(mesh)):
        function = jax.value_and_grad(loss, has_aux=True) if gradient else lambda *args: (loss(*args), {})
        (_, vectors), gradients = jax.jit(function)(random_params(factory), put_rows(packed.rows))
        vectors = np.asarray(vectors)
        return (vectors, flatten(jax.device_get(gradients))) if gradient else vectors


def assert_near(got, want, tolerance):
    """max|a - b| / max|b| of every array; a key's bias, whose true gradient is 0, against its kernel's."""
    assert got.keys() == want.keys()
    for path, b in want.items():
        scale = np.abs(want[path.replace("bias", "kernel")] if path.endswith("key/bias") else b).max()
        assert np.abs(got[path] - b).max() <= tolerance * scale, path


@pytest.fixture(scope="module")
def sentences(data_dir):
    """1,000 sentences of STS-B dev."""
    with gzip.open(data_dir / "sts" / "stsb-dev.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    found = list(dict.fromkeys(row[side] for row in rows for side in ("sentence1", "sentence2")))
    assert len(found) >= 1000
    return found[:1000]


@pytest.fixture(scope="module")
def on_one_device(minilm_dir, sentences):
    return Embedder.load(minilm_dir, mesh=make_mesh()).encode(sentences)


def test_minilm_equals_sentence_transformers(minilm_dir, sentences, on_one_device):
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(minilm_dir), device="cpu").encode(sentences)
    assert on_one_device.shape == (1000, 384) and on_one_device.dtype == np.float32
    assert np.abs(on_one_device - theirs).max() <= 1e-5


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_minilm_is_the_same_on_eight_devices(minilm_dir, sentences, on_one_device, mesh):
    vectors = Embedder.load(minilm_dir, mesh=make_mesh(mesh)).encode(sentences[:100])
    assert np.abs(vectors - on_one_device[:100]).max() <= 1e-6


@pytest.mark.parametrize(("mode", "pool_prompt"), [*((mode, True) for mode in MODES), ("weighted_mean", False)])
def test_a_packed_text_gets_the_vector_it_gets_alone(mode, pool_prompt):
    factory = make_factory(HeadConfig(mode, pool_prompt, projection=24))
    texts = [np.concatenate([[7, 8], text[:10]]).astype(np.int32) for text in TEXTS]
    packed = run(factory, pack(texts, LAYOUT, LENGTH * 2, prompt=2))
    np.testing.assert_allclose(np.linalg.norm(packed, axis=1), 1, atol=1e-6)
    assert np.abs(packed - run(factory, pack(texts, alone(texts), 16, prompt=2))).max() <= 1e-5


@pytest.mark.parametrize(("mode", "noise"), [("mean", True), ("last", False)])
def test_texts_of_a_row_know_nothing_of_each_other(mode, noise):
    """Text A's vector: its gradient by what B alone uses is exactly 0, and B's tokens do not move a bit of it."""
    factory = make_factory(HeadConfig(mode), **(DROPOUT if noise else {}))
    a, b = np.arange(10, 16, dtype=np.int32), np.arange(40, 52, dtype=np.int32)

    def vector_of_a(params, rows):
        dropped = Noise(step_seed(0, jnp.int32(0)), rows.segment_ids, rows.positions) if noise else None
        vector = factory.bind(params)(rows, 2, dropped)
        first = vector * jnp.array([1.0, 0])[:, None]
        return (first * jnp.arange(CONFIG.width)).sum(), first

    with jax.set_mesh(make_mesh()):
        params = random_params(factory)
        function = jax.jit(jax.value_and_grad(vector_of_a, has_aux=True))
        rows, others = (put_rows(pack([a, text], [[0, 1]], LENGTH).rows) for text in (b, b[::-1] + 20))
        (_, before), gradient = function(params, rows)
        (_, after), _ = function(params, others)
    tables = {name: np.asarray(gradient["backbone"]["embeddings"][name]["embedding"]) for name in ("token", "position")}
    assert tables["token"][a].any(1).all()
    untouched = np.delete(tables["token"], a, axis=0)  # B's tokens, and padding's
    assert not untouched.any() and not tables["position"][len(a) :].any()
    np.testing.assert_array_equal(before, after)


@pytest.fixture(scope="module")
def plain():
    """Vectors and gradients on one device, nothing recomputed, no kernel."""
    return run(make_factory(HEAD), pack(TEXTS, LAYOUT, LENGTH), gradient=True)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_changes_no_gradient(plain, remat):
    vectors, gradient = run(make_factory(HEAD, remat=remat), pack(TEXTS, LAYOUT, LENGTH), gradient=True)
    np.testing.assert_allclose(vectors, plain[0], atol=1e-6)
    assert_near(gradient, plain[1], 1e-6)


def test_bfloat16_compute_stays_close_with_float32_parameters_and_vectors(plain):
    factory = make_factory(HEAD, dtype="bfloat16")
    vectors, gradient = run(factory, pack(TEXTS, LAYOUT, LENGTH), gradient=True)
    assert vectors.dtype == np.float32
    assert (vectors * plain[0]).sum(1).min() > 0.99  # cosines
    for path, want in plain[1].items():
        got = gradient[path]
        assert got.dtype == np.float32
        if not path.endswith("key/bias"):
            assert (got * want).sum() > 0.98 * np.linalg.norm(got) * np.linalg.norm(want), path


def test_bfloat16_parameters():
    factory = make_factory(param_dtype="bfloat16")
    with jax.set_mesh(make_mesh()):
        assert {x.dtype for x in flatten(jax.jit(factory.fresh)()).values()} == {jnp.dtype("bfloat16")}


@pytest.fixture(scope="module")
def dropped():
    """Vectors and gradients of step 5 on one device, with dropout."""
    return run(make_factory(HEAD, **DROPOUT), pack(TEXTS, LAYOUT, LENGTH), step=5, gradient=True)


def test_dropout_does_not_depend_on_packing(plain, dropped):
    factory, row_by_row = make_factory(HEAD, **DROPOUT), pack(TEXTS, alone(TEXTS), 16)
    vectors, gradient = run(factory, row_by_row, step=5, gradient=True)
    np.testing.assert_allclose(vectors, dropped[0], atol=1e-5)
    assert_near(gradient, dropped[1], 1e-5)
    assert np.abs(vectors - run(factory, row_by_row, step=6)).max() > 0.01
    assert np.abs(vectors - plain[0]).max() > 0.01


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_dropout_and_gradients_are_the_same_on_every_mesh(dropped, mesh):
    packed = pack(TEXTS, LAYOUT, LENGTH, sharding.batch_shards(make_mesh(mesh)))
    vectors, gradient = run(make_factory(HEAD, **DROPOUT), packed, mesh, step=5, gradient=True)
    np.testing.assert_allclose(vectors, dropped[0], atol=1e-6)
    assert_near(gradient, dropped[1], 1e-5)


def test_dropout_does_not_depend_on_chunks(dropped):
    """Gradient caching runs a scan over checkpointed micro-batches; masks follow the texts into them."""
    factory = make_factory(HEAD, **DROPOUT)
    chunks = [pack(TEXTS, LAYOUT[i : i + 2], LENGTH) for i in range(0, len(LAYOUT), 2)]
    slots = max(chunk.slots for chunk in chunks)

    def encode(params, rows):
        noise = Noise(step_seed(0, jnp.int32(5)), rows.segment_ids, rows.positions)
        return factory.bind(params)(rows, slots, noise)

    def cached(params, micro_rows):
        body = jax.checkpoint(functools.partial(encode, params), prevent_cse=False)
        return jax.lax.scan(lambda _, rows: (None, body(rows)), None, micro_rows)[1]

    mesh = make_mesh()
    with jax.set_mesh(mesh):
        stacked = jax.tree.map(lambda *x: np.stack(x), *(chunk.rows for chunk in chunks))
        micro_rows = jax.tree.map(lambda x: sharding.put(x, mesh, sharding.MICRO_ROWS), stacked)
        vectors = np.asarray(jax.jit(cached)(random_params(factory), micro_rows))[:, 0]
    for i, chunk in enumerate(chunks):
        members = [*LAYOUT[2 * i], *LAYOUT[2 * i + 1]]
        np.testing.assert_allclose(vectors[i, chunk.slot[members]], dropped[0][members], atol=1e-6)


@pytest.mark.parametrize("backend", attention.KERNELS)
def test_the_encoder_with_emulated_kernels(monkeypatch, backend):
    """The kernels in their place: under scan, checkpoint and the mesh, with texts and padding in rows of 128."""
    packed = pack(TEXTS, [range(8), range(8, 16)], 128, shards=2)
    want = run(make_factory(HEAD), packed, MeshConfig(2, 1, 2), gradient=True)
    kernel = attention.KERNELS[backend]

    def emulated(*args, spec, interpret):
        return kernel(*args, spec=spec, interpret=True)

    monkeypatch.setattr(attention, "KERNELS", {"cpu": emulated})
    factory = make_factory(HEAD, attention_kernel="pallas", remat="dots")
    vectors, gradient = run(factory, packed, MeshConfig(2, 1, 2), gradient=True)
    np.testing.assert_allclose(vectors, want[0], atol=1e-5)
    assert_near(gradient, want[1], 1e-5)


@pytest.fixture
def no_compile_cache():
    """What the compiler says is said only when it compiles."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def test_the_compiler_finds_no_sharding_it_cannot_keep(no_compile_cache, capfd):
    """XLA warns on stderr where it must gather a whole array to change its sharding."""
    mesh = MESHES["data 2, fsdp 2, tensor 2"]
    run(make_factory(HEAD, remat="dots", **DROPOUT), pack(TEXTS, LAYOUT, LENGTH, 4), mesh, step=0, gradient=True)
    assert "rematerialization" not in capfd.readouterr().err
    with jax.set_mesh(make_mesh(mesh)):  # the warning is still called that, and comes here
        x = jax.sharding.reshard(jnp.ones((8, 8, 8)), jax.P(("data", "fsdp"), None, "tensor"))
        jax.jit(lambda x: jax.sharding.reshard(jnp.sin(x), jax.P(None, ("data", "fsdp", "tensor"), None)))(x)
    assert "rematerialization" in capfd.readouterr().err


def test_factory_binds_what_it_gives():
    factory = make_factory(HEAD)
    with jax.set_mesh(make_mesh()):
        params = jax.jit(factory.fresh)()
        abstract = factory.abstract()
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
            lambda x: (x.shape, x.dtype), abstract
        )
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, unflatten(flatten(params)), params))
        packed = pack(TEXTS, LAYOUT, LENGTH)
        vectors = factory.encoder(params, put_rows(packed.rows), packed.slots)
    assert vectors.shape == (1, packed.slots, HEAD.projection) and vectors.dtype == jnp.float32


def test_without_normalisation_vectors_keep_their_length():
    packed = pack(TEXTS, LAYOUT, LENGTH)
    raw = run(make_factory(HeadConfig(normalize=False)), packed)
    unit = run(make_factory(), packed)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert lengths.std() > 0.01
    np.testing.assert_allclose(raw / lengths, unit, atol=1e-6)
