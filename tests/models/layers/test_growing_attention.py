"""Attention on its way from causal to bidirectional."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import MESHES, ONE, alone, make_mesh, pack, put_rows, random_texts

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.models.layers.attention import HEADS, AttentionSpec, attention
from jaxembed.models.layers.dropout import Noise, seen_ahead

TEXTS = random_texts(8, longest=12)


def states(texts: list[np.ndarray], layout: list[list[int]], length: int, width: int = 8) -> np.ndarray:
    """Queries, keys and values of each token by its text and place, so that a text has the same ones everywhere."""
    out = np.zeros((3, len(layout), length, 4, width), np.float32)
    for row, members in enumerate(layout):
        start = 0
        for text in members:
            n = len(texts[text])
            out[:, row, start : start + n] = np.random.default_rng(text).normal(size=(3, n, 4, width))
            start += n
    return out


def attend(layout: list[list[int]], length: int, ahead: float | None, mode: str, mesh: MeshConfig = ONE) -> list:
    """Each text's output."""
    packed = pack(TEXTS, layout, length)
    with jax.set_mesh(make_mesh(mesh)):
        rows = put_rows(packed.rows)
        q, k, v = (sharding.put(x, jax.sharding.get_mesh(), HEADS) for x in states(TEXTS, layout, length))
        part = None if ahead is None else jnp.float32(ahead)
        noise = Noise(jnp.uint32(3), rows.segment_ids, rows.positions, part)
        run = jax.jit(lambda q, k, v, noise: attention(q, k, v, rows.segment_ids, AttentionSpec(mode), noise))
        out = np.asarray(run(q, k, v, noise))
    return [out[r, s : s + len(text)] for text, r, s in zip(TEXTS, packed.row, packed.start)]


def test_grows_from_causal_to_all() -> None:
    layout = [[0, 1], [2, 3], [4, 5], [6, 7]]
    for ahead, mode in ((0.0, "causal"), (1.0, "bidirectional")):
        for got, want in zip(attend(layout, 24, ahead, "bidirectional"), attend(layout, 24, None, mode)):
            np.testing.assert_allclose(got, want, atol=1e-6)
    for got, want in zip(attend(layout, 24, 0.5, "causal"), attend(layout, 24, None, "causal")):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_neither_rows_nor_devices_matter_on_the_way() -> None:
    packed = attend([[0, 1], [2, 3], [4, 5], [6, 7]], 24, 0.4, "bidirectional")
    others = [attend(alone(TEXTS), 12, 0.4, "bidirectional")]
    others += [attend(alone(TEXTS), 12, 0.4, "bidirectional", mesh) for mesh in (MESHES["data 2, fsdp 2, tensor 2"],)]
    others += [attend(alone(TEXTS), 12, 0.4, "bidirectional", MeshConfig(2, 1, 2, 1, 2))]
    for other in others:
        for got, want in zip(other, packed):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_part_of_pairs_that_see_each_other() -> None:
    rows = pack([np.arange(5, 25)] * 64, alone(range(64)), 20).rows
    with jax.set_mesh(make_mesh()):
        placed = put_rows(rows)
        noise = Noise(jnp.uint32(1), placed.segment_ids, placed.positions, jnp.float32(0.3))
        half = np.asarray(seen_ahead(noise))
        more = np.asarray(seen_ahead(dataclasses.replace(noise, ahead=jnp.float32(0.6))))
        later = np.asarray(seen_ahead(dataclasses.replace(noise, seed=jnp.uint32(2))))
    assert abs(half.mean() - 0.3) < 0.01
    assert abs(more.mean() - 0.6) < 0.01
    assert more[half].all()
    assert abs((half & later).mean() - 0.09) < 0.01
