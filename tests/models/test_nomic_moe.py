"""Nomic's sparse BERT: our torch class against the definition, and the backbone over the axis `expert`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from encoder_peers import NOMIC_MOE, SPARSE, TEXTS, save_nomic_moe
from tiny_models import ONE, make_mesh, pack, put_rows, random_params

from jaxembed.config import MeshConfig
from jaxembed.hf import nomic_moe
from jaxembed.hf.safetensors_io import open_tensors
from jaxembed.models.layers.dropout import Noise, step_seed
from jaxembed.models.nomic_bert import NomicBert
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import ModelFactory, flatten

PACKED = [[0, 1], [4, 3], [5, 6], [7, 2]]
# Of nomic-ai/nomic-embed-text-v2-moe.
PUBLIC = {
    "vocab_size": 250_048,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": 3072,
    "n_positions": 2048,
    "type_vocab_size": 1,
    "activation_function": "gelu",
    "rotary_emb_fraction": 1.0,
    "rotary_emb_base": 10_000,
    "num_experts": 8,
    "moe_top_k": 2,
    "moe_every_n_layers": 2,
    "moe_normalize_expert_weights": False,
}


def defined(text, w, hf):
    """A text's states, layer by layer, in float64, straight from the hub's layout."""
    n, heads, width = len(text), hf["n_head"], hf["n_embd"]
    half = width // heads // 2

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    def rotated(x):
        out = np.empty_like(x)
        for position in range(n):
            for j in range(half):
                angle = position * 10_000.0 ** (-j / half)
                a, b = x[position, :, j], x[position, :, j + half]
                out[position, :, j] = a * math.cos(angle) - b * math.sin(angle)
                out[position, :, j + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def experts(x, layer):
        out = np.zeros_like(x)
        rows = hf["n_inner"]
        for token in range(n):
            scores = np.exp(w[f"{layer}mlp.router.layer.weight"] @ x[token])
            scores /= scores.sum()
            for expert in np.argsort(scores)[-hf["moe_top_k"] :]:  # the probabilities as they are
                own = slice(expert * rows, (expert + 1) * rows)
                hidden = gelu(w[f"{layer}mlp.experts.mlp.w1"][own] @ x[token])
                out[token] += scores[expert] * (hidden @ w[f"{layer}mlp.experts.mlp.w2"][own])
            out[token] += w[f"{layer}mlp.experts.bias"]  # once, not weighted
        return out

    x = w["embeddings.word_embeddings.weight"][text] + w["embeddings.token_type_embeddings.weight"][0]
    states = [norm(x, "emb_ln")]
    for i in range(hf["n_layer"]):
        x, layer = states[-1], f"encoder.layers.{i}."
        qkv = x @ w[f"{layer}attn.Wqkv.weight"].T + w[f"{layer}attn.Wqkv.bias"]
        q, k, v = (part.reshape(n, heads, 2 * half) for part in np.split(qkv, 3, axis=-1))
        scores = np.einsum("ahk,bhk->hab", rotated(q), rotated(k)) / math.sqrt(2 * half)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hab,bhk->ahk", scores / scores.sum(-1, keepdims=True), v).reshape(n, width)
        attended = attended @ w[f"{layer}attn.out_proj.weight"].T + w[f"{layer}attn.out_proj.bias"]
        x = norm(x + attended, f"{layer}norm1")
        if i % 2 == 1:
            fed = experts(x, layer)
        else:
            hidden = gelu(x @ w[f"{layer}mlp.fc1.weight"].T + w[f"{layer}mlp.fc1.bias"])
            fed = hidden @ w[f"{layer}mlp.fc2.weight"].T + w[f"{layer}mlp.fc2.bias"]
        states.append(norm(x + fed, f"{layer}norm2"))
    return states


def test_our_torch_class_computes_the_definition(tmp_path):
    peer = save_nomic_moe(NOMIC_MOE["nomic_moe"], tmp_path)
    weights = {name: np.asarray(tensor, np.float64) for name, tensor in open_tensors(tmp_path).items()}
    for i, text in enumerate(TEXTS):
        for layer, want in enumerate(defined(text, weights, SPARSE)):
            np.testing.assert_allclose(peer.states[layer][i], want, rtol=0, atol=1e-4, err_msg=f"{layer} {i}")


def test_eight_devices_compute_what_one_does():
    """Outputs, what routers count, and gradients with dropout, each within 1e-5 of its largest number."""
    fields = {"n_layer": 2, "moe_gated": True, "rotary_emb_fraction": 1.0}
    config = nomic_moe.config_from_hf(SPARSE | NOMIC_MOE["nomic_moe of a bert"] | fields)
    assert config.sparse == (False, True)
    options = ModelOptions(unroll=1, dropout=0.1, attention_dropout=0.1)
    factory = ModelFactory(lambda: NomicBert(jax.random.key(0), config, options))
    packed = pack(TEXTS, PACKED, 48)
    upstream = np.random.default_rng(0).normal(size=(len(PACKED), 48, config.width))
    upstream = (upstream * (packed.rows.segment_ids > 0)[..., None]).astype(np.float32)

    def loss(params, rows):
        noise = Noise(step_seed(0, jnp.int32(3)), rows.segment_ids, rows.positions)
        found = factory.bind(params)(rows, noise)
        aux = found.last, found.routed.sums
        return (found.last * jax.sharding.reshard(upstream, jax.typeof(found.last).sharding.spec)).sum(), aux

    found = []
    for mesh in (ONE, MeshConfig(data=2, tensor=2, expert=2)):
        with jax.set_mesh(make_mesh(mesh)):
            step = jax.jit(jax.value_and_grad(loss, has_aux=True))
            (_, (states, sums)), gradients = step(random_params(factory), put_rows(packed.rows))
            said = {"states": np.asarray(states) * (upstream != 0), **vars(jax.device_get(sums))}
            found.append(said | flatten(jax.device_get(gradients)))
    one, eight = found
    assert one["tokens"].tolist() == [sum(map(len, TEXTS))] and one["load"].sum() == 2 * one["tokens"].sum()
    for path, want in one.items():
        # A key's bias has no gradient but rounding: softmax takes off what all scores share.
        scale = np.abs(one[path.replace("bias", "kernel")] if path.endswith("key/bias") else want).max()
        assert np.abs(eight[path] - want).max() <= 1e-5 * scale, path


def test_the_public_model_has_as_many_parameters_as_its_card_says():
    """475 million, 305 million of them active: two of eight experts in every second layer."""
    config = nomic_moe.config_from_hf(PUBLIC)
    assert config.sparse == (False, True) * 6
    with jax.set_mesh(make_mesh()):
        shapes = ModelFactory(lambda: NomicBert(jax.random.key(0), config, ModelOptions())).abstract()
    sizes = {path: leaf.size for path, leaf in flatten(shapes).items()}
    assert round(sum(sizes.values()) / 1e6) == 475
    idle = sum(sizes[f"experts/{name}/kernel"] for name in ("up", "down")) * 6 // 8
    assert round((sum(sizes.values()) - idle) / 1e6) == 305
