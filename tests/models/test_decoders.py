"""Decoder-shaped backbones against transformers, layer by layer, with random weights; meshes against one device."""

import dataclasses
import json

import decoder_peers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_peers import LAYERS, SHAPES, TEXTS, VOCAB, differences, load, padded_states, save_peer, single_states
from tiny_models import alone, make_mesh, pack, put_rows, random_params

from jaxembed.config import MeshConfig
from jaxembed.errors import UserError
from jaxembed.hf.folder import read_folder
from jaxembed.hf.safetensors_io import open_tensors
from jaxembed.hf.table import export_tensors
from jaxembed.models.layers.rope import Linear, RopeConfig
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import ModelFactory, flatten
from jaxembed.models.transformer import Transformer, TransformerConfig, Window

TOLERANCE = 5e-5  # absolute, of a token's states, whose values are near 2
BIDIRECTIONAL = {name: ({"is_causal": False},) for name in SHAPES}
BIDIRECTIONAL["gemma3_text"] += ({"use_bidirectional_attention": True},)  # a window of another size
CASES = [(name, words) for name in SHAPES for words in ({}, *BIDIRECTIONAL[name])]


@pytest.mark.parametrize(("model_type", "words"), CASES, ids=lambda value: str(value))
def test_states_of_every_layer_equal_transformers_and_tensors_come_back(model_type, words, tmp_path):
    """Windows are smaller than the texts; every text alone in its row, and packed."""
    theirs = padded_states(save_peer(model_type, tmp_path, **words))
    with jax.set_mesh(make_mesh()):
        factory, params = load(tmp_path, unroll=1)
        found = differences(factory, params, theirs)
        assert max(found.values()) <= TOLERANCE, found
        folder = read_folder(tmp_path)
        back = dict(export_tensors(folder.architecture.rows(folder.config), flatten(params), LAYERS))
    tensors = open_tensors(tmp_path)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


SCALED = {
    "llama": {"rope_type": "dynamic", "factor": 3.0},
    "phi3": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [1.1, 3.0, 7.0],
        "original_max_position_embeddings": 6,
    },
}


@pytest.mark.parametrize("model_type", SCALED)
def test_positions_that_depend_on_the_texts_length_are_those_of_the_text_alone(model_type, tmp_path):
    """Texts shorter and longer than what the model was trained on share rows."""
    fields = {"max_position_embeddings": 6 if model_type == "llama" else 64}
    if model_type == "phi3":
        fields["original_max_position_embeddings"] = 6
    theirs = single_states(save_peer(model_type, tmp_path, rope_scaling=SCALED[model_type], **fields), TEXTS)
    assert {len(text) > 6 for text in TEXTS} == {True, False}
    with jax.set_mesh(make_mesh()):
        found = differences(*load(tmp_path, unroll=1), theirs)
    assert max(found.values()) <= TOLERANCE, found


def test_tensors_that_do_not_fit_come_in_one_report(tmp_path):
    save_peer("qwen3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wrong = {"num_hidden_layers": LAYERS + 1, "head_dim": 12, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config | wrong))
    with jax.set_mesh(make_mesh()), pytest.raises(UserError) as caught:
        load(tmp_path)
    told = str(caught.value)
    assert "tensor layers.0.self_attn.q_proj.weight has shape [40, 24], wants [48, 24]" in told
    assert "missing tensor layers.5.mlp.up_proj.weight [44, 24]" in told


CONFIG = TransformerConfig(
    vocab_size=VOCAB,
    width=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=10,
    mlp_width=40,
    max_length=64,
    rope=RopeConfig(8, 500.0, Linear(2.0)),
    local_rope=RopeConfig(10, 50.0),
    local=(True, False),
    window=Window(2, 3),
    attention=("prefix", "bidirectional"),
    activation="gelu_tanh",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    qk_norm=True,
    sandwich=True,
    embedding_scale=24**0.5,
    score_scale=0.4,
    softcap=2.0,
)
MESHES = {
    "fsdp 4, tensor 2": MeshConfig(1, 4, 2),
    "fsdp 8": MeshConfig(1, 8),
    "tensor 4, sequence 2": MeshConfig(1, 1, 4, 1, 2),  # 4 devices for 2 key heads
}


def make(config: TransformerConfig = CONFIG, **options) -> ModelFactory:
    return ModelFactory(lambda: Transformer(jax.random.key(0), config, ModelOptions(**options)))


def outputs_and_gradients(mesh: MeshConfig) -> dict[str, np.ndarray]:
    """States of every token, and the gradients of a sum of them with random weights."""
    packed = pack(TEXTS, decoder_peers.LAYOUTS[1], decoder_peers.LENGTH, prompt=3)
    upstream = np.random.default_rng(0).normal(size=(8, decoder_peers.LENGTH, CONFIG.width)).astype(np.float32)
    upstream[packed.rows.segment_ids == 0] = 0
    factory = make(unroll=1)

    @jax.jit
    def run(params, rows):
        def loss(params):
            last = factory.bind(params)(rows).last
            return (last * upstream).sum(), last

        (_, last), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return last, gradients

    with jax.set_mesh(make_mesh(mesh)):
        last, gradients = jax.device_get(run(random_params(factory), put_rows(packed.rows)))
    return {"states": last * (packed.rows.segment_ids > 0)[..., None], **flatten(gradients)}


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, np.ndarray]:
    return outputs_and_gradients(MeshConfig(1))


@pytest.mark.parametrize("mesh", MESHES)
def test_meshes_give_what_one_device_gives(mesh, on_one_device):
    """All that the families differ in at once: windows, modes, norms, biases, soft-capped scores, grouped queries."""
    found = outputs_and_gradients(MESHES[mesh])
    assert found.keys() == on_one_device.keys()
    for name, want in on_one_device.items():
        assert np.abs(found[name] - want).max() <= 1e-5 * np.abs(want).max(), name


def test_key_heads_that_tensor_does_not_divide_lie_on_every_device():
    with jax.set_mesh(make_mesh(MESHES["tensor 4, sequence 2"])):
        specs = {path: tuple(leaf.sharding.spec) for path, leaf in flatten(make().abstract()).items()}
    assert specs["layers/attention/query/kernel"] == (None, "fsdp", "tensor", None)
    assert specs["layers/attention/key/kernel"] == (None, "fsdp", None, None)
    with jax.set_mesh(make_mesh(MESHES["fsdp 4, tensor 2"])):
        spec = flatten(make().abstract())["layers/attention/key/kernel"].sharding.spec
    assert tuple(spec) == (None, "fsdp", "tensor", None)


@pytest.mark.parametrize(
    ("field", "told"), [("heads", "8 devices.*12 attention heads"), ("mlp_width", "12 channels of the MLP")]
)
def test_sizes_that_tensor_does_not_divide_are_refused(field, told):
    config = dataclasses.replace(CONFIG, heads=16, mlp_width=48)
    config = dataclasses.replace(config, **{field: 12})
    with (
        jax.set_mesh(make_mesh(MeshConfig(1, 1, 8))),
        pytest.raises(UserError, match=told.replace("8 devices", "tensor = 8")),
    ):
        make(config).abstract()


def reached(config: TransformerConfig, text: np.ndarray, prompt: int) -> np.ndarray:
    """Which tokens' states move when a token changes: bool [changed token, token]."""
    factory, n = make(config, unroll=1), len(text)
    variants = [text] + [np.where(np.arange(n) == i, text + 1, text).astype(np.int32) for i in range(n)]
    with jax.set_mesh(make_mesh()):
        packed = pack(variants, alone(variants), n, prompt=prompt)
        last = jax.jit(lambda p, r: factory.bind(p)(r).last)(random_params(factory), put_rows(packed.rows))
    return np.abs(np.asarray(last[1:] - last[0])).max(-1) > 1e-6


def seen(mode: str, reach: int, n: int, prompt: int) -> np.ndarray:
    """The definition: bool [key, query]."""
    key, query = np.indices((n, n))
    allowed = {
        "causal": key <= query,
        "bidirectional": np.full((n, n), True),
        "prefix": (key <= query) | (key < prompt),
    }[mode]
    return allowed & (np.abs(key - query) <= reach) if reach else allowed


LISTS = [
    ("causal", "causal", "causal", "bidirectional"),  # BeLLM
    ("prefix", "prefix", "prefix", "prefix"),
]


@pytest.mark.parametrize("modes", LISTS)
def test_each_layer_sees_what_its_mode_says(modes):
    """Through local and global layers what a token can depend on is the product of what each layer lets it see."""
    local = (True, True, False, True)
    config = dataclasses.replace(CONFIG, layers=4, attention=modes, local=local, window=Window(1, 2))
    text, prompt = np.arange(5, 17, dtype=np.int32), 3
    want = np.eye(len(text), dtype=bool)
    for mode, local in zip(modes, config.local):
        reach = (2 if mode == "bidirectional" else 1) if local else 0
        want = want @ seen(mode, reach, len(text), prompt)
    np.testing.assert_array_equal(reached(config, text, prompt), want)
    assert not want.all()


def test_the_closing_norm_makes_of_an_earlier_layer_what_it_is_as_the_last():
    """`finish`, of the states that `chosen` gives, equals the model that is cut there."""
    rows = pack(TEXTS, decoder_peers.LAYOUTS[1], decoder_peers.LENGTH).rows
    short = dataclasses.replace(CONFIG, layers=1, local=CONFIG.local[:1], attention=CONFIG.attention[:1])
    with jax.set_mesh(make_mesh()):
        factory = make(unroll=1)
        params, rows = random_params(factory), put_rows(rows)

        @jax.jit
        def run(params, rows):
            model = factory.bind(params)
            return model.finish(model(rows, chosen=(1, 2)).chosen[0]), make(short).bind(cut(params))(rows).last

        finished, last = run(params, rows)
    np.testing.assert_allclose(finished, last, atol=1e-5)


def cut(params):
    return params | {"layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])}


def test_bfloat16_stays_near_float32_and_its_norms_are_float32():
    rows = pack(TEXTS, decoder_peers.LAYOUTS[1], decoder_peers.LENGTH).rows
    with jax.set_mesh(make_mesh()):
        states = []
        for dtype in ("float32", "bfloat16"):
            factory = make(dtype=dtype, unroll=1)
            last = jax.jit(lambda p, r, f=factory: f.bind(p)(r).last)(random_params(factory), put_rows(rows))
            assert last.dtype == jnp.dtype(dtype)
            states.append(np.asarray(last, np.float64))
    assert np.abs(states[1] - states[0]).mean() <= 0.03 * np.abs(states[0]).mean()
