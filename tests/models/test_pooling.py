"""Pooling against sentence-transformers' module, and by hand where a text has several spans."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MESHES, ONE, Packed, make_mesh, pack, put_rows, random_texts

from jaxembed import sharding
from jaxembed.models.pooling import MODES, l2_normalize, pool
from jaxembed.sharding import STATES

THEIR_MODES = {"mean": "mean", "cls": "cls", "last": "lasttoken", "weighted_mean": "weightedmean"}
WIDTH, LENGTH = 8, 16
LAYOUT = [[0], [2, 1], [3, 4], [5], [6], [7, 8], [9], [10, 11]]
TEXTS = random_texts(12, seed=1, longest=8)
PROMPT = 2
TEXTS = [np.concatenate([np.full(PROMPT, 4, np.int32), text]) for text in TEXTS]  # some text follows every prompt


def token_states(packed: Packed) -> tuple[np.ndarray, list[np.ndarray]]:
    """Random states of rows, and the same text by text; padding's are large, so that none goes unseen."""
    rng = np.random.default_rng(2)
    rows = np.full((*packed.rows.tokens.shape, WIDTH), 1e3, np.float32)
    states = [rng.normal(size=(len(text), WIDTH)).astype(np.float32) for text in TEXTS]
    for text, x in enumerate(states):
        rows[packed.row[text], packed.start[text] : packed.start[text] + len(x)] = x
    return rows, states


def pooled(packed: Packed, hidden: np.ndarray, mode: str, pool_prompt: bool, mesh_config=ONE) -> np.ndarray:
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        function = jax.jit(lambda hidden, rows: pool(hidden, rows, packed.slots, mode, pool_prompt))
        vectors = function(sharding.put(hidden, mesh, STATES), put_rows(packed.rows))
    assert vectors.dtype == jnp.float32
    return np.asarray(vectors)


@pytest.mark.parametrize("pool_prompt", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_modes_mean_what_they_mean_in_sentence_transformers(mode, pool_prompt):
    torch = pytest.importorskip("torch")
    from sentence_transformers.sentence_transformer.modules import Pooling

    packed = pack(TEXTS, LAYOUT, LENGTH, prompt=PROMPT)
    hidden, states = token_states(packed)
    longest = max(len(x) for x in states)
    padded = np.stack([np.pad(x, ((0, longest - len(x)), (0, 0)), constant_values=1e3) for x in states])
    attended = np.stack([np.arange(longest) < len(x) for x in states])
    theirs = Pooling(WIDTH, THEIR_MODES[mode], include_prompt=pool_prompt)(
        {
            "token_embeddings": torch.from_numpy(padded),
            "attention_mask": torch.from_numpy(attended.astype(np.int64)),
            "prompt_length": PROMPT,
        }
    )["sentence_embedding"].numpy()
    vectors = pooled(packed, hidden, mode, pool_prompt)
    np.testing.assert_allclose(vectors[packed.shard, packed.slot], theirs, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_vectors_are_the_same_on_every_mesh(mesh):
    one = pack(TEXTS, LAYOUT, LENGTH, prompt=PROMPT)
    hidden, _ = token_states(one)
    many = pack(TEXTS, LAYOUT, LENGTH, sharding.batch_shards(make_mesh(mesh)), prompt=PROMPT)
    for mode in MODES:
        got, want = pooled(many, hidden, mode, False, mesh), pooled(one, hidden, mode, False)
        np.testing.assert_allclose(got[many.shard, many.slot], want[one.shard, one.slot], atol=1e-6)


def test_several_spans_in_a_text():
    """Text 0 has the spans [0, 2) and [3, 6), and tokens of none; positions go on through the text."""
    text = [np.arange(5, 12, dtype=np.int32)]
    packed = pack(text, [[0]], 8)
    spans = np.array([[1, 1, -1, 0, 0, 0, -1, -1]], np.int32)
    rows = dataclasses.replace(packed.rows, span_ids=spans)
    x = np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)
    first, second = x[:2], x[3:6]
    want = {
        "mean": (second.mean(0), first.mean(0)),
        "cls": (second[0], first[0]),
        "last": (second[-1], first[-1]),
        "weighted_mean": (np.average(second, 0, [4, 5, 6]), np.average(first, 0, [1, 2])),
    }
    for mode, vectors in want.items():
        got = pooled(dataclasses.replace(packed, rows=rows, slots=2), x[None], mode, True)
        np.testing.assert_allclose(got[0], np.stack(vectors), atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_slot_gives_zero_and_a_finite_gradient(mode):
    """One slot has no token, another only a prompt, which is left out."""
    texts = [TEXTS[0], TEXTS[1][:PROMPT]]
    packed = pack(texts, [[0, 1]], LENGTH, prompt=PROMPT)
    hidden = np.random.default_rng(0).normal(size=(1, LENGTH, WIDTH)).astype(np.float32)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        rows = put_rows(packed.rows)

        def loss(hidden):
            vectors = l2_normalize(pool(hidden, rows, 3, mode, False))
            return (vectors * jnp.arange(1.0, WIDTH + 1)).sum(), vectors

        (_, vectors), gradient = jax.value_and_grad(loss, has_aux=True)(sharding.put(hidden, mesh, STATES))
    np.testing.assert_allclose(np.linalg.norm(vectors[0], axis=1), [1, 0, 0], atol=1e-6)
    assert np.isfinite(gradient).all()
    assert not gradient[0, len(texts[0]) :].any()  # neither the lone prompt nor padding is reached


def test_bfloat16_states_are_summed_in_float32():
    text = [np.full(512, 5, np.int32)]
    packed = pack(text, [[0]], 512)
    hidden = np.full((1, 512, WIDTH), 1.0, jnp.bfloat16)
    hidden[0, 0] = 2
    np.testing.assert_allclose(pooled(packed, hidden, "mean", True)[0, 0], 513 / 512, rtol=1e-6)
