"""State-space recurrences in chunks, over shards, both ways: against one token after another in float64."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import ONE, make_mesh

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.errors import UserError
from jaxembed.models.layers.recurrence import Borders
from jaxembed.models.layers.selective_scan import selective_scan
from jaxembed.models.layers.short_conv import ShortConv
from jaxembed.models.layers.ssd import state_space_dual
from jaxembed.sharding import spec

ROWS, HEADS, WIDTH, GROUPS, STATE = 2, 4, 2, 2, 3
CHANNELS = HEADS * WIDTH
SHARDED = {
    "data 2, tensor 2, sequence 2": MeshConfig(2, 1, 2, 1, 2),
    "fsdp 2, sequence 4": MeshConfig(1, 2, 1, 1, 4),
    "tensor 4, data 2": MeshConfig(2, 1, 4, 1, 1),
}
NAMES = ("x", "step", "a", "write", "read", "skip")
FORMS = ("associative", "steps", "products")


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of a form, where they lie on the mesh, and how each is spread over [R, L, I] or [R, L, I, N]."""

    arrays: dict[str, np.ndarray]
    layouts: dict[str, jax.sharding.PartitionSpec]
    spread: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    texts: np.ndarray
    weights: np.ndarray


def make_case(form: str, length: int) -> Case:
    rng = np.random.default_rng(0)
    texts = np.cumsum(rng.random((ROWS, length)) < 5 / length, axis=1).astype(np.int32)
    texts[0, -length // 7 :] = 0  # padding
    weights = rng.normal(size=(ROWS, length, CHANNELS))
    normal, steps = rng.normal, rng.uniform
    if form == "products":
        arrays = {
            "x": normal(size=(ROWS, length, HEADS, WIDTH)),
            "step": steps(0.001, 0.2, (ROWS, length, HEADS)),
            "a": -np.array([0.5, 4, 30, 100]),
            "write": normal(size=(ROWS, length, GROUPS, STATE)),
            "read": normal(size=(ROWS, length, GROUPS, STATE)),
            "skip": normal(size=HEADS),
        }
        groups = spec("batch", "sequence", None, None)
        tokens = spec("batch", "sequence", "heads", None), spec("batch", "sequence", "heads"), spec("heads")
        layouts = dict(zip(arrays, (*tokens, groups, groups, spec("heads"))))
        return Case(arrays, layouts, spread_heads, texts, weights)
    arrays = {
        "x": normal(size=(ROWS, length, CHANNELS)),
        "step": steps(0.001, 0.2, (ROWS, length, CHANNELS)),
        "a": -steps(0.1, 16, (CHANNELS, STATE)),
        "write": normal(size=(ROWS, length, STATE)),
        "read": normal(size=(ROWS, length, STATE)),
        "skip": normal(size=CHANNELS),
    }
    states, inner = spec("batch", "sequence", None), spec("batch", "sequence", "mlp")
    layouts = dict(zip(arrays, (inner, inner, spec("mlp", None), states, states, spec("mlp"))))
    return Case(arrays, layouts, spread_states, texts, weights)


def spread_heads(c: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rows, length = c["x"].shape[:2]
    states = {n: np.repeat(np.repeat(c[n], HEADS // GROUPS, 2), WIDTH, 2) for n in ("write", "read")}
    a = np.broadcast_to(np.repeat(c["a"], WIDTH)[:, None], (CHANNELS, STATE))
    steps = np.repeat(c["step"], WIDTH, 2)
    return {"x": c["x"].reshape(rows, length, -1), "step": steps, "a": a, "skip": np.repeat(c["skip"], WIDTH), **states}


def spread_states(c: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    shape = (*c["x"].shape, STATE)
    return c | {n: np.broadcast_to(c[n][:, :, None], shape) for n in ("write", "read")}


def gathered(form: str, spread: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gradients of spread arguments, summed to those of the arguments."""
    if form != "products":
        return spread | {n: spread[n].sum(2) for n in ("write", "read")}
    rows, length = spread["x"].shape[:2]
    groups = {n: spread[n].reshape(rows, length, GROUPS, -1, STATE).sum(3) for n in ("write", "read")}
    return groups | {
        "x": spread["x"].reshape(rows, length, HEADS, WIDTH),
        "step": spread["step"].reshape(rows, length, HEADS, WIDTH).sum(-1),
        "a": spread["a"].reshape(HEADS, -1).sum(-1),
        "skip": spread["skip"].reshape(HEADS, WIDTH).sum(-1),
    }


def recurrence(c: dict[str, np.ndarray], texts: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, dict]:
    """One token after another: the outputs [R, L, I], and the gradient of their sum with weights."""
    x, step, a, write, read, skip = (c[n] for n in NAMES)
    length = x.shape[1]
    starts = np.ones(texts.shape, bool)
    starts[:, 1:] = texts[:, 1:] != texts[:, :-1]
    states = np.zeros((length + 1, x.shape[0], *a.shape))
    decays = np.exp(step[..., None] * a) * ~starts[..., None, None]
    for t in range(length):
        states[t + 1] = decays[:, t] * states[t] + (step * x)[:, t, :, None] * write[:, t]
    after = np.moveaxis(states[1:], 0, 1)
    out = (after * read).sum(-1) + skip * x
    grads = np.zeros_like(after)  # of the states
    later = np.zeros_like(states[0])
    for t in reversed(range(length)):
        grads[:, t] = later + weights[:, t, :, None] * read[:, t]
        later = decays[:, t] * grads[:, t]
    of_decay = grads * np.moveaxis(states[:-1], 0, 1) * decays
    written = (grads * write).sum(-1)
    return out, {
        "x": step * written + skip * weights,
        "step": x * written + (of_decay * a).sum(-1),
        "a": (of_decay * step[..., None]).sum((0, 1)),
        "write": grads * (step * x)[..., None],
        "read": weights[..., None] * after,
        "skip": (weights * x).sum((0, 1)),
    }


@functools.cache
def expected(form: str, length: int, reverse: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    case = make_case(form, length)
    turn = (lambda x: np.flip(x, 1) if x.ndim > 2 else x) if reverse else lambda x: x
    arrays = {name: turn(x) for name, x in case.spread(case.arrays).items()}
    texts = np.flip(case.texts, 1) if reverse else case.texts
    out, grads = recurrence(arrays, texts, turn(case.weights))
    return turn(out), gathered(form, {name: turn(x) for name, x in grads.items()})


def ours(form: str, case: Case, reverse: bool, chunk: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    mesh = jax.sharding.get_mesh()
    borders = Borders.of(sharding.put(case.texts, mesh, sharding.ROWS))
    arrays = {n: sharding.put(jnp.asarray(x), mesh, case.layouts[n]) for n, x in case.arrays.items()}
    shape = case.arrays["x"].shape
    weights = sharding.put(jnp.asarray(case.weights.reshape(shape)), mesh, case.layouts["x"])

    def run(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        how = {"borders": borders, "chunk": chunk, "reverse": reverse}
        if form == "products":
            out = state_space_dual(*(arrays[name] for name in NAMES), **how, groups_axis=None)
        else:
            out = selective_scan(*(arrays[name] for name in NAMES), **how, associative=form == "associative")
        return (out * weights).sum(), out

    grads, out = jax.jit(jax.grad(run, has_aux=True))(arrays)
    return np.asarray(out).reshape(case.weights.shape), jax.tree.map(np.asarray, grads)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return np.abs(a - b).max() / np.abs(b).max()


def check(form: str, length: int, reverse: bool, chunk: int, bound: float) -> None:
    out, grads = ours(form, make_case(form, length), reverse, chunk)
    want, want_grads = expected(form, length, reverse)
    assert difference(out, want) < bound
    assert {n: d for n in want_grads if not (d := difference(grads[n], want_grads[n])) < bound} == {}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("wide", "bound"), [(True, 1e-6), (False, 1e-5)])
def test_one_token_after_another(form, wide, bound):
    with jax.enable_x64(wide), jax.set_mesh(make_mesh(ONE)):
        check(form, 4001, False, 64, bound)


@pytest.mark.parametrize(
    ("form", "mesh", "reverse"),
    [
        ("associative", "data 2, tensor 2, sequence 2", True),
        ("steps", "fsdp 2, sequence 4", True),
        ("products", "data 2, tensor 2, sequence 2", True),
        ("products", "fsdp 2, sequence 4", False),
        ("products", "tensor 4, data 2", False),  # a group on two devices
    ],
)
def test_shards_of_rows_and_channels(form, mesh, reverse):
    with jax.set_mesh(make_mesh(SHARDED[mesh])):
        check(form, 76, reverse, 8, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_passes_from_text_to_text(form):
    case = make_case(form, 76)
    only = np.zeros_like(case.weights)
    only[:, 40:] = case.weights[:, 40:]
    texts = np.repeat((np.arange(76) >= 40)[None] + 1, ROWS, 0).astype(np.int32)
    with jax.set_mesh(make_mesh(ONE)):
        _, grads = ours(form, dataclasses.replace(case, texts=texts, weights=only), form == "products", 16)
    for name in ("x", "step", "write", "read"):
        assert not grads[name][:, :40].any() and grads[name][:, 40:].any(), name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mesh", [ONE, MeshConfig(2, 1, 2, 1, 2), MeshConfig(1, sequence=8)], ids=["1", "2·2·2", "8"])
def test_short_convolution(mesh, reverse):
    rng = np.random.default_rng(1)
    x, texts = rng.normal(size=(2, 32, 6)).astype(np.float32), np.sort(rng.integers(0, 6, (2, 32)), 1).astype(np.int32)
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        conv = ShortConv(jax.random.key(0), 4, (("mlp", 6),), jnp.float32, True)
        conv.bias[...] = sharding.put(rng.normal(size=6).astype(np.float32), mesh, spec("mlp"))
        put = sharding.put(x, mesh, spec("batch", "sequence", "mlp"))
        borders = Borders.of(sharding.put(texts, mesh, sharding.ROWS))
        out = np.asarray(jax.jit(lambda x: conv(x, borders, reverse))(put))
        kernel, bias = np.asarray(conv.kernel[...], np.float64), np.asarray(conv.bias[...])
    want = np.zeros(x.shape) + bias
    for r, t, back in np.ndindex(2, 32, 4):
        seen = t + back if reverse else t - back
        if 0 <= seen < 32 and texts[r, seen] == texts[r, t]:
            want[r, t] += kernel[3 - back] * x[r, seen]
    assert difference(out, want) < 1e-6


def test_shards_shorter_than_the_convolution():
    mesh = make_mesh(MeshConfig(1, sequence=8))
    with jax.set_mesh(mesh):
        conv = ShortConv(jax.random.key(0), 4, (("mlp", 2),), jnp.float32, False)
        x = sharding.put(np.zeros((1, 16, 2), np.float32), mesh, spec("batch", "sequence", "mlp"))
        borders = Borders.of(sharding.put(np.zeros((1, 16), np.int32), mesh, sharding.ROWS))
        with pytest.raises(UserError, match=r"config\.mesh\.sequence leaves shards of 2 tokens"):
            jax.jit(lambda x: conv(x, borders))(x)


@pytest.mark.parametrize("form", ["associative", "steps"])
def test_memory_is_that_of_a_chunk_not_of_all_states(form):
    """Of 4,096 tokens a chunk of 64 is held, and a state for each of the 64 chunks."""
    length, channels, state = 4096, 32, 16
    shapes = {"x": (1, length, channels), "step": (1, length, channels), "a": (channels, state)}
    shapes |= {"write": (1, length, state), "read": (1, length, state), "skip": (channels,)}
    mesh, layouts = make_mesh(ONE), make_case(form, 76).layouts
    with jax.set_mesh(mesh):
        put = {n: sharding.put(np.ones(shape, np.float32), mesh, layouts[n]) for n, shape in shapes.items()}
        borders = Borders.of(sharding.put(np.ones((1, length), np.int32), mesh, sharding.ROWS))

        def run(arrays: dict[str, jax.Array]) -> jax.Array:
            how = {"chunk": 64, "associative": form == "associative"}
            return selective_scan(*(arrays[name] for name in NAMES), borders, **how).sum()

        held = jax.jit(jax.grad(run)).lower(put).compile().memory_analysis().temp_size_in_bytes
    states, arrays = 4 * length * channels * state, 4 * length * channels
    assert held < states / 2 and held > arrays
