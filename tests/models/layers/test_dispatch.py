"""Tokens to their experts and back, against loops over tokens and experts in float64, on several meshes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_cases import ACTIVATIONS

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.models.layers.dispatch import BIAS, INTO, OUT_OF, apply_experts
from jaxembed.models.layers.grouped import Kernels
from jaxembed.models.layers.routing import NOWHERE, Choice, ExpertOptions

ROWS, LENGTH, WIDTH, HIDDEN, EXPERTS, TOP_K = 8, 6, 8, 12, 8, 2
MESHES = {
    "1": MeshConfig(1),
    "data 2 x fsdp 2 x sequence 2": MeshConfig(2, 2, 1, 1, 2),
    "expert 4 x data 2": MeshConfig(2, 1, 1, 4),
    "expert 2 x tensor 2 x fsdp 2": MeshConfig(1, 2, 2, 2),
    "sequence 2 x expert 2 x data 2": MeshConfig(2, 1, 1, 2, 2),
    "expert 8": MeshConfig(1, 1, 1, 8),
}
OPTIONS = ExpertOptions()


def define(x, experts, weights, kernels, activation, dy):
    """Outputs and gradients, a token and an expert at a time, in float64."""
    x, weights, dy = (np.float64(a) for a in (x, weights, dy))
    k = {name: np.float64(v) for name, v in kernels.items()}
    y, d_x, d_weights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    d_k = {name: np.zeros_like(v) for name, v in k.items()}
    for *at, slot in np.ndindex(experts.shape):
        at, e = tuple(at), experts[*at, slot]
        if e == NOWHERE:
            continue
        t, g, w = x[at], dy[at], weights[*at, slot]
        up = t @ k["up"][e] + (k["up_bias"][e] if "up_bias" in k else 0)
        gate = t @ k["gate"][e] if "gate" in k else up
        a, slope = ACTIVATIONS[activation](gate)
        hidden = a * up if "gate" in k else a
        out = hidden @ k["down"][e]
        y[at] += w * out
        d_weights[*at, slot] = g @ out
        d_hidden = w * (k["down"][e] @ g)
        d_k["down"][e] += w * np.outer(hidden, g)
        d_up = d_hidden * (a if "gate" in k else slope)
        d_x[at] += k["up"][e] @ d_up
        d_k["up"][e] += np.outer(t, d_up)
        if "up_bias" in k:
            d_k["up_bias"][e] += d_up
        if "gate" in k:
            d_gate = d_hidden * up * slope
            d_x[at] += k["gate"][e] @ d_gate
            d_k["gate"][e] += np.outer(t, d_gate)
    return {"y": y, "x": d_x, "weights": d_weights, **d_k}


def make_kernels(gated, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: np.float32(rng.normal(size=shape) / math.sqrt(shape[1]))  # noqa: E731
    into, out_of = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    kernels = {"up": draw(*into), "down": draw(*out_of)}
    return kernels | ({"gate": draw(*into)} if gated else {"up_bias": draw(EXPERTS, HIDDEN)})


def make_experts(how, seed=0):
    """Returns where tokens go, int32 [R, L, K]: distinct experts; in some cases a token in five is void."""
    rng = np.random.default_rng(seed)
    chosen = rng.random((ROWS, LENGTH, EXPERTS)).argsort(-1)[..., :TOP_K]
    if how == "to one":  # all tokens to the same experts: of one device, the last
        chosen = np.broadcast_to([EXPERTS - 1, EXPERTS - 2], chosen.shape)
    elif how == "empty":
        chosen = rng.random((ROWS, LENGTH, 3)).argsort(-1)[..., :TOP_K] + 2
    elif how == "void":
        chosen = np.where(rng.random((ROWS, LENGTH, 1)) < 0.2, NOWHERE, chosen)
    elif how == "all void":
        chosen = np.full_like(chosen, NOWHERE)
    elif how == "by experts":  # any number of experts a token, in slots of their own; half of a row is one text
        taken = np.zeros((ROWS, LENGTH, EXPERTS), bool)
        seats = LENGTH * TOP_K // EXPERTS + 1
        for row in range(ROWS):
            for e in range(EXPERTS):
                taken[row, rng.permutation(LENGTH)[: seats - (e >= LENGTH * TOP_K % EXPERTS)], e] = True
        chosen = np.where(taken, np.arange(EXPERTS), NOWHERE)
    return np.int32(chosen)


@functools.cache
def program(mesh, gated, per_token, options=OPTIONS):
    activation = "silu" if gated else "gelu"

    def run(x, experts, weights, kernels, dy):
        def f(x, weights, kernels):
            return apply_experts(x, Choice(experts, weights, per_token), kernels, activation, options)

        y, pull = jax.vjp(f, x, weights, kernels)
        return y, pull(dy)

    return jax.jit(run)


def run(mesh, x, experts, weights, kernels, dy, options=OPTIONS, dtype=jnp.float32):
    config = MESHES[mesh]
    n = math.prod((config.data, config.fsdp, config.tensor, config.expert, config.sequence))
    on = sharding.make_mesh(config, jax.devices()[:n])
    names = {"up": INTO, "down": OUT_OF, "gate": INTO, "up_bias": BIAS}
    with jax.set_mesh(on):
        states = [sharding.put(np.asarray(a), on, sharding.STATES) for a in (x, experts, weights, dy)]
        k = Kernels(
            **{n: sharding.put(kernels[n], on, sharding.spec(*names[n])) if n in kernels else None for n in names}
        )
        x, experts, weights, dy = states
        f = program(mesh, "gate" in kernels, TOP_K, options)
        y, (d_x, d_weights, d_k) = f(x.astype(dtype), experts, weights, k, dy.astype(dtype))
        assert y.dtype == d_x.dtype == dtype
        assert jax.tree.map(jax.typeof, d_k) == jax.tree.map(jax.typeof, k)
    got = {"y": y, "x": d_x, "weights": d_weights} | {name: getattr(d_k, name) for name in kernels}
    return {name: np.asarray(v, np.float32) for name, v in got.items()}


def make_case(how, seed=0):
    rng = np.random.default_rng(seed + 1)
    experts = make_experts(how, seed)
    x, dy = (np.float32(rng.normal(size=(ROWS, LENGTH, WIDTH))) for _ in range(2))
    weights = np.where(experts == NOWHERE, 0, np.float32(rng.random(experts.shape)))
    return x, experts, weights, dy


def error(got, want):
    """Returns the largest difference, relative to each array's largest value."""
    assert got.keys() == want.keys()
    return max(np.abs(got[n] - want[n]).max() / max(np.abs(want[n]).max(), 1e-30) for n in want)


HOWS = ["balanced", "to one", "empty", "void", "all void"]
CASES = [
    ("1", True, [*HOWS, "by experts"]),
    ("1", False, HOWS),
    ("data 2 x fsdp 2 x sequence 2", True, ["void"]),
    ("expert 4 x data 2", True, [*HOWS, "by experts"]),
    ("expert 2 x tensor 2 x fsdp 2", False, HOWS),
    ("sequence 2 x expert 2 x data 2", True, ["void", "to one"]),
    ("expert 8", False, ["to one", "void"]),
]


@pytest.mark.parametrize(("mesh", "gated", "hows"), CASES, ids=lambda word: str(word) if isinstance(word, str) else "")
def test_is_a_loop_over_tokens_and_experts(mesh, gated, hows):
    kernels = make_kernels(gated)
    for how in hows:
        x, experts, weights, dy = make_case(how)
        want = define(x, experts, weights, kernels, "silu" if gated else "gelu", dy)
        got = run(mesh, x, experts, weights, kernels, dy)
        assert error(got, want) < 1e-5, how
        assert (got["y"][(experts == NOWHERE).all(-1)] == 0).all()


def test_takes_rounds_until_all_have_gone():
    """Little room, everything for one device: 12 rounds, a slot each."""
    kernels, (x, experts, weights, dy) = make_kernels(False), make_case("to one")
    want = define(x, experts, weights, kernels, "gelu", dy)
    got = run("expert 8", x, experts, weights, kernels, dy, ExpertOptions(capacity=0.01))
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("mesh", ["1", "expert 2 x tensor 2 x fsdp 2"])
def test_bfloat16_is_near(mesh):
    kernels, (x, experts, weights, dy) = make_kernels(False), make_case("void")
    want = define(x, experts, weights, kernels, "gelu", dy)
    assert error(run(mesh, x, experts, weights, kernels, dy, dtype=jnp.bfloat16), want) < 0.03


@pytest.mark.parametrize("mesh", ["1", "expert 4 x data 2"])
def test_a_token_does_not_depend_on_the_others(mesh):
    kernels = make_kernels(True)
    x, experts, weights, dy = make_case("balanced")
    mine = np.arange(ROWS) % 2 == 0
    others = make_case("to one", seed=7)
    changed = [np.where(mine[:, None, None], a, b) for a, b in zip((x, experts, weights, dy), others)]
    alone, among = run(mesh, x, experts, weights, kernels, dy), run(mesh, *changed[:3], kernels, changed[3])
    for name in ("y", "x", "weights"):
        np.testing.assert_allclose(among[name][mine], alone[name][mine], atol=1e-6 * np.abs(alone[name]).max())
        assert np.abs(among[name][~mine] - alone[name][~mine]).max() > 1e-2


@pytest.mark.parametrize("config", [MeshConfig(1), MeshConfig(1, 1, 1, 2)], ids=["1", "expert 2"])
def test_memory_grows_with_tokens_times_k_and_not_with_experts(config):
    """Experts are narrow here, so that their kernels' gradients, which grow with them, are small beside the tokens."""
    tokens, width, hidden = 4096, 32, 16
    mesh = sharding.make_mesh(config, jax.devices()[: config.expert])

    def temporaries(n_experts, k):
        def array(dtype, names, *shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, sharding.spec(*names)))

        states = ("batch", "sequence", None)
        x = array(jnp.float32, states, 8, tokens // 8, width)
        experts, weights = (array(dtype, states, 8, tokens // 8, k) for dtype in (jnp.int32, jnp.float32))
        up, down = (n_experts, width, hidden), (n_experts, hidden, width)
        into = array(jnp.float32, INTO, *up)
        kernels = Kernels(up=into, down=array(jnp.float32, OUT_OF, *down), gate=into, up_bias=None)

        def loss(x, weights, kernels, experts):
            y = apply_experts(x, Choice(experts, weights, k), kernels, "silu", OPTIONS)
            return jnp.square(y).sum()

        with jax.set_mesh(mesh):
            program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
            compiled = program.lower(x, weights, kernels, experts).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many, twice = temporaries(8, 2), temporaries(64, 2), temporaries(8, 4)
    on_a_device = tokens // config.expert * width * 4  # bytes of the states
    assert many - few < 4 * 3 * 4 * 64 // config.expert * width * hidden  # four times the kernels at most
    assert many < 64 * on_a_device / 2
    assert few + 2 * on_a_device < twice < 2.2 * few
