"""Rotary positions against transformers' tables, and the rotation against complex numbers in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MESHES, make_mesh, pack, put_rows, random_texts

from jaxembed.hf.rope import RopeWords, read_rope
from jaxembed.models.layers.rope import RopeConfig, rope_tables, rotate, text_lengths

HEAD_WIDTH, LONGEST = 12, 32
WORDS = RopeWords(longrope_names=("su",))
KINDS = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, ramp of one channel": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
    "yarn, all fields": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 30,
        "beta_fast": 3,
        "beta_slow": 0.5,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn, its magnitude said": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 30,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 20,
        "short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 2.0],
        "long_factor": [1.0, 2.0, 3.0, 5.0, 7.0, 9.0],
    },
}


def their_tables(parameters: dict, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [length, n] of transformers, for a text of that length alone."""
    torch = pytest.importorskip("torch")
    from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3RotaryEmbedding

    config = Phi3Config(hidden_size=4 * HEAD_WIDTH, num_attention_heads=4, max_position_embeddings=LONGEST)
    config.original_max_position_embeddings = parameters.get("original_max_position_embeddings", LONGEST)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0} | parameters
    cos, sin = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    return cos[0, :, : cos.shape[-1] // 2].numpy(), sin[0, :, : sin.shape[-1] // 2].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_transformers_for_short_and_long_texts_in_a_row(kind):
    """A text longer than all limits, one within them, and one of a single token share a row."""
    texts = [np.full(n, 5, np.int32) for n in (45, 15, 1)]
    packed = pack(texts, [[1, 0, 2]], 64)
    parameters = WORDS.parameters({"rope_theta": 500.0, "rope_scaling": KINDS[kind]}, "config.json")
    config = read_rope(parameters, HEAD_WIDTH, LONGEST, "config.json")
    with jax.set_mesh(make_mesh()):
        rows = put_rows(packed.rows)
        ours = [np.asarray(x)[0, :, 0] for x in rope_tables(config, rows.positions, rows.segment_ids)]
    for text, start in zip(texts, packed.start, strict=True):
        for got, want in zip(ours, their_tables(KINDS[kind], len(text)), strict=True):
            np.testing.assert_allclose(got[start : start + len(text)], want, atol=1e-5)


def test_channels_are_turned_as_complex_numbers_and_the_others_stay():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 9, 2, 10)).astype(np.float32)
    config = RopeConfig(width=6, theta=30.0)
    angles = np.arange(9)[:, None, None] * 30.0 ** (-np.arange(3) / 3)
    turned = (x[..., :3] + 1j * x[..., 3:6]) * np.exp(1j * angles)
    with jax.set_mesh(make_mesh()):
        positions, segments = jnp.arange(9, dtype=jnp.int32)[None], jnp.ones((1, 9), jnp.int32)
        tables = rope_tables(config, positions, segments)
        got = rotate(jnp.asarray(x), tables)
        assert rotate(jnp.asarray(x, jnp.bfloat16), tables).dtype == jnp.bfloat16
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag, x[..., 6:]], -1), atol=1e-6)


@pytest.mark.parametrize("mesh", ["data 8", "tensor 2, expert 2, sequence 2"])
def test_lengths_of_texts_on_a_mesh(mesh):
    texts = random_texts(12, longest=10)
    packed = pack(texts, [[0, 1], [2], [3, 4, 5], [6], [7, 8], [9], [10, 11], []], 32)
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        rows = put_rows(packed.rows)
        got = np.asarray(jax.jit(text_lengths)(rows.positions, rows.segment_ids))
    for text, row, start in zip(texts, packed.row, packed.start, strict=True):
        assert (got[row, start : start + len(text)] == len(text)).all()
