"""Sparse decoders against transformers, layer by layer, with random weights; meshes against one device."""

import dataclasses
from typing import Any

import decoder_peers
import jax
import numpy as np
import pytest
from decoder_peers import LAYERS, TEXTS, differences, load, padded_states, save_peer
from tiny_models import make_mesh, pack, put_rows, random_params

from jaxembed.config import MeshConfig
from jaxembed.hf.architectures import architecture
from jaxembed.hf.folder import read_folder
from jaxembed.hf.safetensors_io import open_tensors
from jaxembed.hf.table import export_tensors
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import ModelFactory, flatten
from jaxembed.models.transformer import Transformer

TOLERANCE = 5e-5  # absolute, of a token's states, whose values are near 2
BOTH = {"is_causal": False}
# Every field that shapes a model, between them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"sliding_window": 5}),
    "mixtral both ways": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3} | BOTH),
    "qwen2_moe": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}),
    "qwen2_moe both ways": (
        "qwen2_moe",
        {"norm_topk_prob": True, "mlp_only_layers": [0, 3], "qkv_bias": False} | BOTH,
    ),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2, "head_dim": 10}),
    "qwen3_moe both ways": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 5, "attention_bias": True} | BOTH,
    ),
    "olmoe": ("olmoe", {"norm_topk_prob": True, "attention_bias": True}),
    "olmoe both ways": ("olmoe", {"clip_qkv": 0.7, "num_key_value_heads": 4} | BOTH),
}


@pytest.mark.parametrize("case", CASES)
def test_states_of_every_layer_equal_transformers_and_tensors_come_back(case, tmp_path):
    """Every text alone in its row, and packed; read from the hub's layout and from that of transformers' memory."""
    model_type, fields = CASES[case]
    peer = save_peer(model_type, tmp_path, **fields)
    theirs = padded_states(peer)
    with jax.set_mesh(make_mesh()):
        factory, params = load(tmp_path, unroll=1)
        found = differences(factory, params, theirs)
        assert max(found.values()) <= TOLERANCE, found
        folder = read_folder(tmp_path)
        back = dict(export_tensors(folder.architecture.rows(folder.config), flatten(params), LAYERS))
        peer.save_pretrained(tmp_path / "fused", save_original_format=False)
        fused = flatten(load(tmp_path / "fused", unroll=1)[1])
    tensors = open_tensors(tmp_path)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    assert any(name.endswith(".mlp.experts.gate_up_proj") for name in open_tensors(tmp_path / "fused"))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, fused[path], err_msg=path)


def test_a_mesh_gives_what_one_device_gives():
    """States and gradients; experts on two devices, heads that are normed together on two others, a dense layer too."""
    hf = {"model_type": "olmoe", "vocab_size": decoder_peers.VOCAB, "hidden_size": 24, "intermediate_size": 16}
    hf |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "clip_qkv": 0.7}
    config = architecture("olmoe").config_from_hf(hf | decoder_peers.EXPERTS | BOTH)
    shape = dataclasses.replace(config.experts, shared_width=20, shared_gate=True)
    config = dataclasses.replace(config, experts=shape, sparse=(False, True))
    factory = ModelFactory(lambda: Transformer(jax.random.key(0), config, ModelOptions(unroll=1)))
    packed = pack(TEXTS, decoder_peers.LAYOUTS[1], decoder_peers.LENGTH)
    real = packed.rows.segment_ids > 0
    upstream = np.random.default_rng(0).normal(size=(*real.shape, 24)).astype(np.float32) * real[..., None]

    @jax.jit
    def run(params, rows):
        def loss(params):
            last = factory.bind(params)(rows).last
            return (last * upstream).sum(), last

        (_, last), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return last, gradients

    def outputs(mesh: MeshConfig) -> dict[str, np.ndarray]:
        with jax.set_mesh(make_mesh(mesh)):
            last, gradients = jax.device_get(run(random_params(factory), put_rows(packed.rows)))
        return {"states": last * real[..., None], **flatten(gradients)}

    alone, spread = outputs(MeshConfig(1)), outputs(MeshConfig(data=2, tensor=2, expert=2))
    assert {"experts/shared_gate/kernel", "mlps/up/kernel", "layers/attention/key_norm/scale"} <= alone.keys()
    for name, want in alone.items():
        assert np.abs(spread[name] - want).max() <= 2e-5 * np.abs(want).max(), name
