"""Attention against a float64 loop over tokens; the kernels, emulated, against XLA, and lowered for their platforms."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tiny_models import MESHES, make_mesh

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.errors import UserError
from jaxembed.models.layers import attention as lib
from jaxembed.models.layers.attention import HEADS, KERNELS, AttentionSpec, attention, kernel_attention
from jaxembed.models.layers.dropout import Noise
from jaxembed.sharding import ROWS

TOLERANCE = 1e-5  # absolute, of values near 1
MODE = {True: "causal", False: "bidirectional"}
LARGE = 2_000_000_000  # segment ids are text numbers of the global batch


def make_case(rows: int, length: int, heads: int, width: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries, keys, values, an upstream gradient, and segments: short and long texts, padding behind."""
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(4, rows, length, heads, width)).astype(np.float32)
    segment_ids = np.zeros((rows, length), np.int32)
    for row in range(rows):
        cuts = [0, 1, 2 + row, length // 3, length - 1 - row * length // (2 * rows)]
        for number, (start, end) in enumerate(itertools.pairwise(cuts)):
            segment_ids[row, start:end] = LARGE + 10 * row + number
    segment_ids[-1, 1:] = LARGE + 999  # a text alone in nearly all of its row, no padding
    return *arrays, segment_ids


def seen_by(at: int, segment_ids: np.ndarray, spec: AttentionSpec, prefix: np.ndarray | None = None) -> np.ndarray:
    """Which tokens of a row the token at `at` sees, by the definition: bool [L]."""
    place = np.arange(len(segment_ids))
    seen = segment_ids == segment_ids[at]
    if spec.mode == "causal":
        seen &= place <= at
    elif spec.mode == "prefix":
        seen &= (place <= at) | prefix
    return seen & (np.abs(place - at) <= spec.reach) if spec.reach else seen


def reference(
    query, key, value, segment_ids, causal: bool = False, spec: AttentionSpec | None = None, prefix=None, bias=None
) -> np.ndarray:
    """The definition, in float64."""
    spec = spec or AttentionSpec(MODE[causal])
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    out = np.zeros_like(query)
    length = query.shape[1]
    for row, at in np.ndindex(query.shape[:2]):
        seen = seen_by(at, segment_ids[row], spec, None if prefix is None else prefix[row])
        scores = np.einsum("hk,mhk->hm", query[row, at], key[row, seen]) * (spec.scale or 1 / np.sqrt(query.shape[-1]))
        if spec.softcap:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        if bias is not None:
            scores += bias[:, length - 1 + np.flatnonzero(seen) - at]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[row, at] = np.einsum("hm,mhk->hk", weights / weights.sum(-1, keepdims=True), value[row, seen])
    return out


def on_mesh(case) -> tuple[jax.Array, ...]:
    mesh = jax.sharding.get_mesh()
    *arrays, segment_ids = case
    return *(sharding.put(x, mesh, HEADS) for x in arrays), sharding.put(segment_ids, mesh, ROWS)


def value_and_gradients(function, case):
    """Output and gradients of the sum of output x upstream gradient, by query, key and value."""

    def weighted(query, key, value, upstream, segment_ids):
        out = function(query, key, value, segment_ids)
        return (out * upstream).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(*on_mesh(case))
    return out, *gradients


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mesh", [MeshConfig(1), *MESHES.values()], ids=["1", *MESHES])
def test_xla_equals_the_definition_on_every_mesh(mesh, causal):
    case = make_case(8, 24, 4, 8)
    query, key, value, _, segment_ids = case
    spec = AttentionSpec(MODE[causal], kernel="xla")
    with jax.set_mesh(make_mesh(mesh)):
        out = jax.jit(lambda q, k, v, s: attention(q, k, v, s, spec))(*on_mesh(case)[:3], on_mesh(case)[4])
        assert jax.typeof(out).sharding.spec == HEADS
    np.testing.assert_allclose(out, reference(query, key, value, segment_ids, causal), atol=2e-6)


SPECS = {
    "bidirectional": AttentionSpec(),
    "causal": AttentionSpec("causal"),
    "bidirectional, a window": AttentionSpec(reach=3),
    "causal, a window": AttentionSpec("causal", reach=3),
    "prefix": AttentionSpec("prefix"),
    "prefix, a window": AttentionSpec("prefix", reach=3),
    "soft-capped and scaled": AttentionSpec("causal", softcap=0.7, scale=0.9),
}


def prefixes(segment_ids: np.ndarray) -> np.ndarray:
    """The first two tokens of every text."""
    before = np.pad(segment_ids, ((0, 0), (2, 0)))[:, :-2]
    return segment_ids != before


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("mesh", ["1", "fsdp 2, tensor 4", "tensor 2, expert 2, sequence 2"])
def test_grouped_queries_modes_and_scores_equal_the_definition(mesh, spec):
    """Two key heads for four query heads: on four devices of `tensor` each key head serves two of them."""
    query, key, value, _, segment_ids = make_case(2, 24, 4, 8)
    key, value, prefix = key[:, :, :2], value[:, :, :2], prefixes(segment_ids)
    bias = np.random.default_rng(1).normal(size=(4, 47)).astype(np.float32) if spec.softcap else None
    meshes = MESHES | {"1": MeshConfig(1), "fsdp 2, tensor 4": MeshConfig(1, 2, 4)}
    spec = dataclasses.replace(spec, kernel="xla")
    with jax.set_mesh(make_mesh(meshes[mesh])):
        here = jax.sharding.get_mesh()
        kv_spec = sharding.spec("batch", "sequence", sharding.heads_axis(2), None)
        q, k, v = (sharding.put(x, here, s) for x, s in ((query, HEADS), (key, kv_spec), (value, kv_spec)))
        ids, first = (sharding.put(x, here, ROWS) for x in (segment_ids, prefix))
        run = jax.jit(lambda q, k, v, s, p: attention(q, k, v, s, spec, prefix_RxL=p, bias_HxW=bias))
        out = run(q, k, v, ids, first)
        assert jax.typeof(out).sharding.spec == HEADS
    want = reference(query, key, value, segment_ids, spec=spec, prefix=prefix, bias=bias)
    np.testing.assert_allclose(out, want, atol=2e-6)


BACKENDS = {"xla": tuple(SPECS)[:6], "gpu": ("bidirectional", "causal"), "tpu": tuple(SPECS)[:4]}


REACHES = [(backend, name, 4) for backend, names in BACKENDS.items() for name in names]
REACHES += [(backend, name, 1) for backend in BACKENDS for name in ("bidirectional", "causal")]


@pytest.mark.parametrize(("backend", "name", "rows"), REACHES)
def test_the_gradient_reaches_exactly_what_the_spec_says(backend, name, rows):
    """Of the first, the last and another token of a text alone in its row, and of texts packed into one.

    Bidirectional: the first token reaches the last. Causal: it reaches itself alone. A window reaches its last token,
    and not the next. Kernels are emulated; those of the backend that do not know a spec are not asked.
    """
    length, spec = 128, SPECS[name]
    query, key, value, _, segment_ids = make_case(rows, length, 1, 16)
    segment_ids[0] = LARGE  # alone
    prefix = prefixes(segment_ids)

    def picked_sum(value, picked, query, key, segment_ids, prefix):
        if backend == "xla":
            xla = dataclasses.replace(spec, kernel="xla")
            out = attention(query, key, value, segment_ids, xla, prefix_RxL=prefix)
        else:
            out = kernel_attention(query, key, value, segment_ids, spec, KERNELS[backend], interpret=True)
        return (out * picked).sum()

    with jax.set_mesh(make_mesh()):
        here, whole = jax.sharding.get_mesh(), lib.WHOLE_HEADS
        specs = HEADS, whole, whole, ROWS, ROWS
        inputs = (sharding.put(*x) for x in zip((query, key, value, segment_ids, prefix), (here,) * 5, specs))
        query, key, value, ids, first = inputs
        gradient = jax.jit(jax.grad(picked_sum))
        for row, at in [(0, 0), (0, length - 1), (0, 60), (rows - 1, 1), (rows - 1, length - 3), (rows // 2, 7)]:
            picked = np.zeros((rows, length, 1, 1), np.float32)
            picked[row, at] = 1
            reached = np.asarray(gradient(value, picked, query, key, ids, first) != 0).any((2, 3))
            want = np.zeros((rows, length), bool)
            want[row] = seen_by(at, segment_ids[row], spec, prefix[row])
            np.testing.assert_array_equal(reached, want, err_msg=f"row {row}, token {at}")


def test_texts_and_padding_do_not_mix():
    """The gradient of one token's output reaches its own text and nothing else; in a causal model nothing after it."""
    case = make_case(2, 24, 2, 8)
    query, key, value, _, segment_ids = (jnp.asarray(x) for x in case)
    at = 4
    own = np.asarray(segment_ids[0] == segment_ids[0, at])
    picked = np.zeros((2, 24, 1, 1), np.float32)
    picked[0, at] = 1

    def picked_sum(key, value, causal):
        return (attention(query, key, value, segment_ids, AttentionSpec(MODE[causal], kernel="xla")) * picked).sum()

    with jax.set_mesh(make_mesh()):
        for causal in (False, True):
            for gradient in jax.jit(jax.grad(picked_sum, argnums=(0, 1)), static_argnums=2)(key, value, causal):
                reached = np.asarray(gradient != 0).any((2, 3))
                assert not reached[1].any()
                np.testing.assert_array_equal(reached[0], own & (np.arange(24) <= at) if causal else own)


def test_rows_without_any_text_stay_finite():
    case = make_case(2, 16, 2, 8)
    case[-1][:] = 0
    with jax.set_mesh(make_mesh()):
        for array in value_and_gradients(lambda *x: attention(*x, AttentionSpec("causal", kernel="xla")), case):
            assert np.isfinite(array).all()


def test_bfloat16_scores_and_softmax_are_float32():
    query, key, value, _, segment_ids = make_case(2, 24, 2, 8)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    with jax.set_mesh(make_mesh()):
        out = attention(*half, jnp.asarray(segment_ids), AttentionSpec(kernel="xla"))
    assert out.dtype == jnp.bfloat16
    want = reference(*(np.asarray(x, np.float32) for x in half), segment_ids, causal=False)
    # Weights and output are rounded to 8 bits of mantissa, once each; scores are not.
    assert np.abs(np.asarray(out, np.float64) - want).max() <= 2**-7 * np.abs(want).max()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("length", "width", "causal"),
    [(128, 32, False), (256, 64, True), (256, 128, False), (128, 128, True), (128, 24, False)],
)
def test_kernels_equal_xla_in_value_and_gradients(backend, length, width, causal):
    """Emulated, on 2 rows x 2 heads sharded over data and tensor; padding has an upstream gradient too."""
    case = make_case(2, length, 2, width)
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2))):
        kernel = KERNELS[backend]

        def emulated(query, key, value, segment_ids):
            key, value = (jax.sharding.reshard(x, lib.WHOLE_HEADS) for x in (key, value))
            return kernel_attention(query, key, value, segment_ids, AttentionSpec(MODE[causal]), kernel, interpret=True)

        got = value_and_gradients(emulated, case)
        want = value_and_gradients(lambda *x: attention(*x, AttentionSpec(MODE[causal], kernel="xla")), case)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


def test_splash_caps_scales_and_cuts_scores_as_xla_does():
    spec = AttentionSpec("causal", reach=7, softcap=1.5, scale=0.4)
    with jax.set_mesh(make_mesh()):

        def emulated(query, key, value, segment_ids):
            key, value = (jax.sharding.reshard(x, lib.WHOLE_HEADS) for x in (key, value))
            return kernel_attention(query, key, value, segment_ids, spec, KERNELS["tpu"], interpret=True)

        case, xla = make_case(1, 128, 2, 32), dataclasses.replace(spec, kernel="xla")
        got, want = (value_and_gradients(f, case) for f in (emulated, lambda *x: attention(*x, xla)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("backend", "platform", "call"), [("tpu", "tpu", "tpu_custom_call"), ("gpu", "cuda", "triton")]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_lower_for_their_platform(backend, platform, call, dtype):
    mesh = make_mesh(MeshConfig(2, 1, 2))

    def loss(query, key, value, segment_ids):
        return (
            kernel_attention(query, key, value, segment_ids, AttentionSpec(), KERNELS[backend])
            .astype(jnp.float32)
            .sum()
        )

    with jax.set_mesh(mesh):
        queries, keys = (
            jax.ShapeDtypeStruct((4, 256, 4, 64), dtype, sharding=NamedSharding(mesh, spec))
            for spec in (HEADS, lib.WHOLE_HEADS)
        )
        ids = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=NamedSharding(mesh, ROWS))
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(queries, keys, keys, ids)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) >= 2  # forward and backward


def obstacle(length: int, width: int, backend: str, dtype=jnp.float32, spec=AttentionSpec()) -> str:  # noqa: B008
    return lib._obstacle(jax.ShapeDtypeStruct((2, length, 4, width), dtype), spec, backend)


def test_kernels_are_used_where_they_serve():
    with jax.set_mesh(make_mesh()):
        assert not obstacle(128, 64, "gpu") and not obstacle(128, 64, "tpu") and not obstacle(128, 128, "gpu")
        assert not obstacle(128, 256, "gpu", jnp.bfloat16) and not obstacle(128, 256, "tpu")
        assert "shared memory" in obstacle(128, 256, "gpu")
        assert "shared memory" in obstacle(128, 130, "gpu")  # computed as 256
        assert "row_length" in obstacle(64, 64, "gpu")
        assert "cpu" in obstacle(128, 64, "cpu")
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1, 1, 2))):
        assert "sequence" in obstacle(128, 64, "tpu")


def test_a_kernel_asked_for_where_there_is_none_is_refused():
    query, key, value, _, segment_ids = make_case(2, 128, 2, 8)
    with jax.set_mesh(make_mesh()), pytest.raises(UserError, match=r"attention_kernel = 'pallas'.*not for cpu"):
        attention(query, key, value, segment_ids, AttentionSpec(kernel="pallas"))


def test_dropout_of_weights_takes_the_xla_path_and_keeps_the_mean():
    """Values are ones, so that each output is the sum of the surviving weights over 1 - rate: 1 on average."""
    query, key, _, _, segment_ids = make_case(4, 128, 4, 8)
    positions = np.tile(np.arange(128, dtype=np.int32), (4, 1))
    noise = Noise(jnp.uint32(7), jnp.asarray(segment_ids), jnp.asarray(positions))
    with jax.set_mesh(make_mesh()):
        spec = AttentionSpec(dropout=0.25)
        args = (jnp.asarray(query * 0), jnp.asarray(key), jnp.ones_like(query), jnp.asarray(segment_ids))
        assert np.allclose(attention(*args, spec), 1, atol=1e-6)  # without noise nothing is dropped
        out = np.asarray(attention(*args, spec, noise))
    long = out[-1, 1:]  # 127 tokens attend to 127 equal weights: variance rate / (1 - rate) / 127
    assert abs(long.mean() - 1) <= 4 * np.sqrt(1 / 3 / 127 / long[..., 0].size)
    assert abs(long[..., 0].var() * 127 * 3 - 1) <= 0.25
