"""Heads of language models against NumPy in float64: latent attention, means of layers, echo and one-word templates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from llm_tokenizers import save_tiny_bert
from tiny_models import CONFIG, MESHES, alone, make_mesh, pack, put_rows, random_params, random_texts

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.data.templates import META_TASKS
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.models.options import ModelOptions, TokenStates
from jaxembed.models.pooling import LayerMean
from jaxembed.models.text_encoder import HeadConfig, ModelFactory, TextEncoder, flatten

LATENT = HeadConfig("latent", latents=5, latent_heads=4, normalize=False)
MIXED = HeadConfig("weighted_mean", pool_layers=1, normalize=False)
BOTH = HeadConfig("latent", latents=5, latent_heads=1, pool_layers=0, projection=24)  # tensor 2 does not divide 1 head
TEXTS = random_texts(12, seed=1)
PACKED = [[0, 1], [2], [3, 4], [5], [6], [7, 8], [9], [10, 11]]
LENGTH = 24
STATES_NxVxD = np.random.default_rng(2).normal(size=(CONFIG.layers + 1, CONFIG.vocab_size, CONFIG.width))


class Lookup(nnx.Module):
    """A backbone whose states are a token's entries in STATES_NxVxD, quick to compile."""

    def __init__(self, key, config, options):
        self.config = config

    def __call__(self, rows, noise=None, chosen=()):
        table = jnp.asarray(STATES_NxVxD, jnp.float32)
        states = table.at[:, rows.tokens].get(out_sharding=P(None, *sharding.STATES))
        return TokenStates(states[-1], states[jnp.array(chosen)] if chosen else None)


def norm(x, params):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * params["scale"] + params["bias"]


def latent_attention(hidden_LxD, params, heads):
    """The definition: token by token, head by head."""
    width = hidden_LxD.shape[1] // heads
    latents = norm(params["latents"], params["latent_norm"])
    out = []
    for x in hidden_LxD:
        query, asked = norm(x, params["query_norm"]), np.zeros_like(x)
        for h in range(heads):
            q, k, v = (
                y @ params[name]["kernel"][:, h] for name, y in (("query", query), ("key", latents), ("value", latents))
            )
            weights = np.exp(k @ q / math.sqrt(width))
            asked += (weights @ v / weights.sum()) @ params["out"]["kernel"][h]
        x = x + asked
        value, gate = np.einsum("d,dgf->gf", norm(x, params["mlp_norm"]), params["up"]["kernel"]) + params["up"]["bias"]
        gelu = gate * 0.5 * np.array([1 + math.erf(g / math.sqrt(2)) for g in gate])
        out.append(x + (value * gelu) @ params["down"]["kernel"] + params["down"]["bias"])
    return np.stack(out)


def definition(head, params, states):
    """A text's vector from the states of all layers [n + 1, L, D]."""
    hidden = states[-1]
    if head.pool_layers >= 0:
        weights = params["layer_mean"]["scale"]
        hidden = np.einsum("n,nld->ld", weights, states[head.pool_layers :]) / weights.sum()
    if head.pooling == "latent":
        hidden = latent_attention(hidden, params["latent_attention"], head.latent_heads)
    weights = np.arange(1, len(hidden) + 1) if head.pooling == "weighted_mean" else np.ones(len(hidden))
    vector = weights @ hidden / weights.sum()
    if head.projection:
        vector = vector @ params["projection"]["kernel"]
    return vector / np.linalg.norm(vector) if head.normalize else vector


def encode(head, layout, mesh_config):
    """Vectors of TEXTS, gradients of a loss on them, parameters."""
    mesh = make_mesh(mesh_config)
    packed = pack(TEXTS, layout, LENGTH, sharding.batch_shards(mesh))
    places = np.zeros((packed.shard.max() + 1, packed.slots, len(TEXTS)), np.float32)
    places[packed.shard, packed.slot, np.arange(len(TEXTS))] = 1
    upstream = np.random.default_rng(3).normal(size=(len(TEXTS), head.projection or CONFIG.width)).astype(np.float32)
    factory = ModelFactory(lambda: TextEncoder(jax.random.key(0), Lookup, CONFIG, head, ModelOptions()))

    def loss(params, rows):
        vectors = jax.sharding.reshard(factory.bind(params)(rows, packed.slots), P(None, None, None))
        by_text = jnp.einsum("ste,stn->ne", vectors, places)
        return (by_text * upstream).sum(), by_text

    with jax.set_mesh(mesh):
        params = random_params(factory)
        (_, vectors), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, put_rows(packed.rows))
    return np.asarray(vectors), flatten(jax.device_get(gradients)), jax.device_get(params)


@pytest.mark.parametrize(
    ("head", "meshes"),
    [(LATENT, list(MESHES)[1:]), (MIXED, list(MESHES)[2:]), (BOTH, list(MESHES)[1:2])],
    ids=["latent", "layers", "both"],
)
def test_heads_are_their_definition_packed_and_sharded(head, meshes):
    vectors, gradients, params = encode(head, alone(TEXTS), MeshConfig(1))
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    wanted = np.stack([definition(head, params, STATES_NxVxD[:, text]) for text in TEXTS])
    np.testing.assert_allclose(vectors, wanted, atol=1e-5 * np.abs(wanted).max())
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())
    for mesh in meshes:
        packed, packed_gradients, _ = encode(head, PACKED, MESHES[mesh])
        np.testing.assert_allclose(packed, vectors, atol=1e-5 * np.abs(vectors).max(), err_msg=mesh)
        for path, gradient in gradients.items():
            scale = max(np.abs(gradient).max(), 1e-3)
            assert np.abs(packed_gradients[path] - gradient).max() <= 1e-5 * scale, (mesh, path)


def test_fresh_weights_are_the_plain_mean_of_layers():
    with jax.set_mesh(make_mesh()):
        assert LayerMean(3).scale[...].tolist() == [1, 1, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tiny")
    save_tiny_bert(made)
    return made


def test_templates_pool_what_they_say(folder):
    """Against the token states of transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    texts = ["the lowest", "naïve 日本"]
    mesh = make_mesh()
    for template, pooling, prompt in (
        ("prompt_eol", "auto", "query: "),
        ("echo", "auto", "query: "),
        ("echo", "weighted_mean", ""),
        ("echo", "last", ""),
    ):
        model = Embedder.load(folder, template=template, pooling=pooling, mesh=mesh)
        tokenizer, vectors = model.blueprint.tokenizer, model.encode(texts, prompt=prompt)
        for text, vector in zip(texts, vectors):
            ids = tokenizer.encode([text], 90, prompt)[0]
            with torch.no_grad():
                states = theirs(torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0].numpy()
            own = len(Embedder.load(folder, mesh=mesh).blueprint.tokenizer.encode([prompt + text], 90)[0]) - 1
            own -= len(tokenizer._backend.encode(prompt, add_special_tokens=False).ids) // tokenizer.copies
            weights = np.zeros(len(ids))
            if template == "prompt_eol" or pooling == "last":
                weights[-1] = 1
            else:
                weights[-own:] = 1
            if pooling == "weighted_mean":
                weights *= np.arange(1, len(ids) + 1)
            np.testing.assert_allclose(vector, weights @ states / weights.sum(), atol=1e-5)


def test_several_templates_are_averaged(folder):
    mesh, texts = make_mesh(), ["the lowest", "a", "many words " * 40]
    short = [f"{task[:8]} {{text}} in" for task in META_TASKS[:3]]
    each = [Embedder.load(folder, template=template, mesh=mesh).encode(texts) for template in short]
    model = Embedder.load(folder, template=short, mesh=mesh)
    np.testing.assert_allclose(model.encode(texts), np.mean(each, axis=0), atol=1e-6)
    with pytest.raises(UserError, match="several templates cannot be saved"):
        model.save(folder / "out")
    with pytest.raises(UserError, match="name the pooling too"):
        Embedder.load(folder, template=("echo", "prompt_eol"), mesh=mesh)
    with pytest.raises(UserError, match=r"template = 'x': wants prompt_eol, echo, or a text"):
        Embedder.load(folder, template="x", mesh=mesh)
