"""The cross-entropy in tiles against the whole one, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.losses import cross_entropy as module
from jaxembed.losses.cross_entropy import Words, cross_entropy

V, D, R, L = 301, 24, 4, 16


@dataclasses.dataclass
class Case:
    states: np.ndarray
    table: np.ndarray
    bias: np.ndarray
    targets: np.ndarray
    asked: np.ndarray
    weights: np.ndarray

    @classmethod
    def draw(cls, rows: int = 384, rate: float = 0.4) -> "Case":
        rng = np.random.default_rng(0)
        return cls(
            rng.normal(size=(R, L, D)),
            rng.normal(size=(rows, D)),
            rng.normal(size=rows),
            rng.integers(0, V, (R, L)).astype(np.int32),
            rng.random((R, L)) < rate,
            rng.normal(size=(R, L)),
        )


def whole(case: Case, softcap: float, with_bias: bool) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Losses, which are right, and the gradients of sum(weights · losses): of all tokens x words, in NumPy."""
    scores = case.states @ case.table[:V].T + (case.bias[:V] if with_bias else 0)
    capped = softcap * np.tanh(scores / softcap) if softcap else scores
    highest = capped.max(-1, keepdims=True)
    lse = highest + np.log(np.exp(capped - highest).sum(-1, keepdims=True))
    own = np.take_along_axis(capped, case.targets[..., None], -1)
    losses = np.where(case.asked, (lse - own)[..., 0], 0)
    slope = (np.exp(capped - lse) - np.eye(V)[case.targets]) * (case.asked * case.weights)[..., None]
    slope *= 1 - (capped / softcap) ** 2 if softcap else 1
    of_table, of_bias = np.zeros_like(case.table), np.zeros_like(case.bias)
    of_table[:V], of_bias[:V] = np.einsum("rlv,rld->vd", slope, case.states), slope.sum((0, 1))
    return losses, (capped.argmax(-1) == case.targets) & case.asked, [slope @ case.table[:V], of_table, of_bias]


def ours(case: Case, words: Words, with_bias: bool, mesh: MeshConfig) -> tuple:
    count = int(np.prod([max(getattr(mesh, axis), 1) for axis in sharding.AXES]))
    with jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[:count])) as _:
        mesh_ = jax.sharding.get_mesh()

        def put(x: np.ndarray, spec: jax.sharding.PartitionSpec) -> jax.Array:
            return sharding.put(x.astype(np.float32) if x.dtype == np.float64 else x, mesh_, spec)

        states, table = put(case.states, sharding.STATES), put(case.table, sharding.spec("vocab", None))
        bias = put(case.bias, sharding.spec("vocab"))
        targets, asked, weights = (put(x, sharding.ROWS) for x in (case.targets, case.asked, case.weights))

        @jax.jit
        def run(states: jax.Array, table: jax.Array, bias: jax.Array) -> tuple:
            def value(states: jax.Array, table: jax.Array, bias: jax.Array) -> tuple:
                given = bias if with_bias else None
                losses, right = cross_entropy(states, table, given, targets, asked, words)
                return (losses * weights).sum(), (losses, right)

            return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(states, table, bias)

        (_, (losses, right)), gradients = run(states, table, bias)
        return np.asarray(losses), np.asarray(right), [np.asarray(x) for x in gradients]


@pytest.mark.parametrize(
    ("mesh", "tile", "tokens", "softcap", "with_bias"),
    [
        (MeshConfig(data=1), 64, 1024, 0.0, False),
        (MeshConfig(data=1), 100, 16, 5.0, True),
        (MeshConfig(data=1), 4096, 16, 0.0, True),
        (MeshConfig(data=2, fsdp=1, tensor=2, sequence=2), 50, 16, 5.0, True),
        (MeshConfig(data=1, fsdp=2, tensor=4), 64, 16, 0.0, False),
    ],
)
def test_tiles_are_the_whole(
    mesh: MeshConfig, tile: int, tokens: int, softcap: float, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS_ON_CPU", tokens)
    case = Case.draw()
    losses, right, gradients = ours(case, Words(V, tile, softcap), with_bias, mesh)
    expected = whole(case, softcap, with_bias)
    np.testing.assert_allclose(losses, expected[0], atol=1e-5 * np.abs(expected[0]).max())
    np.testing.assert_array_equal(right, expected[1])
    for ours_, theirs in zip(gradients[: 2 + with_bias], expected[2]):
        np.testing.assert_allclose(ours_, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_nothing_and_everything_asked(rate: float) -> None:
    case = Case.draw(rate=rate)
    losses, right, gradients = ours(case, Words(V, 64), False, MeshConfig(data=1))
    expected = whole(case, 0.0, False)
    np.testing.assert_allclose(losses, expected[0], atol=1e-4)
    np.testing.assert_array_equal(right, expected[1])
    for ours_, theirs in zip(gradients[:2], expected[2]):
        np.testing.assert_allclose(ours_, theirs, atol=1e-4)


def test_memory_does_not_grow_with_tokens_times_words() -> None:
    """Beside the table's own gradient, the program's memory is that of tiles."""

    def beside_the_table(words: int) -> int:
        with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])):
            mesh = jax.sharding.get_mesh()
            n, width = 2048, 16
            states = sharding.put(np.zeros((4, n // 4, width), np.float32), mesh, sharding.STATES)
            table = sharding.put(np.zeros((words, width), np.float32), mesh, sharding.spec("vocab", None))
            asked = sharding.put(np.ones((4, n // 4), bool), mesh, sharding.ROWS)

            def value(states: jax.Array, table: jax.Array) -> jax.Array:
                targets = asked.astype(jnp.int32)
                return cross_entropy(states, table, None, targets, asked, Words(words, 1024))[0].sum()

            compiled = jax.jit(jax.grad(value, argnums=(0, 1))).lower(states, table).compile()
            return compiled.memory_analysis().temp_size_in_bytes - 3 * 4 * words * (width + 2)

    small, large = beside_the_table(4096), beside_the_table(65_536)
    assert large < 1.2 * max(small, 4 * 1024 * 1024 * 2)  # all scores would be 512 MiB
