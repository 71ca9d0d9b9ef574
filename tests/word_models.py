"""What tests of predicted words share: tiny models with a language head, and all their scores."""

import dataclasses
import functools

import jax
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from jaxembed import sharding
from jaxembed.blueprint import Blueprint
from jaxembed.config import MeshConfig
from jaxembed.data.batch import Rows
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.embedder import Embedder
from jaxembed.models.language_head import LanguageConfig
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import HeadConfig, flatten, unflatten

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = [f"w{i}" for i in range(50)]
V = 60  # of the model: it has 5 words more than the tokenizer
FRAMING = (0, 2, 3, 4)
ENCODER = LanguageConfig(transform="gelu", bias=True, words=V, mask_id=4, framing=FRAMING)
DECODER = LanguageConfig(softcap=8.0, shift=True, words=V, mask_id=4, framing=FRAMING)
BERT = {
    "model_type": "bert",
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
KINDS = {"bert": (BERT, ENCODER), "llama both ways": (LLAMA | {"is_causal": False}, DECODER), "llama": (LLAMA, DECODER)}


def tokenizer() -> Tokenizer:
    """Whole words between [CLS] and [SEP]."""
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return Tokenizer(backend, dict(zip(roles, SPECIAL)))


@functools.cache
def make(kind: str, devices: int = 1) -> Embedder:
    """A tiny model of random weights, the same on every mesh; special tokens and unknown ids have the best scores."""
    hf_config, language = KINDS[kind]
    blueprint = Blueprint(hf_config, HeadConfig(), True, 32, {}, "", "cosine", 0, tokenizer(), {}, language=language)
    factory = blueprint.factory(ModelOptions())
    mesh = sharding.make_mesh(MeshConfig(-1, 1, *((2, 1, 2) if devices > 1 else ())), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        leaves = {}
        for i, (path, leaf) in enumerate(flatten(factory.abstract()).items()):
            values = np.random.default_rng(i).normal(scale=0.5, size=leaf.shape) + path.endswith("scale")
            if path == "language/bias":
                values[[0, 2, 3, 4, 55, 56]] += 5
            leaves[path] = sharding.put(values.astype(leaf.dtype), mesh, leaf.sharding.spec)
        return Embedder(blueprint, factory, unflatten(leaves), mesh)


def without(embedder: Embedder, **language: object) -> Embedder:
    """The same model with another way to predict words; without arguments none."""
    said = dataclasses.replace(embedder.blueprint.language, **language) if language else None
    blueprint = dataclasses.replace(embedder.blueprint, language=said)
    return Embedder(blueprint, embedder.factory, embedder.params, embedder.mesh)


def all_scores(embedder: Embedder, ids_TxN: np.ndarray) -> np.ndarray:
    """The scores of all words for every token's own place, float64 [T, N, V]: each text alone in a row.

    With shift place 0 has the scores of nothing.
    """
    shape = ids_TxN.shape
    place = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    rows = Rows(ids_TxN.astype(np.int32), ones, place, 0 * ones, ones == 0)
    with jax.set_mesh(embedder.mesh):
        put = functools.partial(sharding.put, mesh=embedder.mesh, partition=sharding.ROWS)
        states = np.asarray(_states(embedder.factory, embedder.params, jax.tree.map(put, rows)), np.float64)
        bound = embedder.factory.bind(embedder.params)
        table, bias = np.asarray(bound.word_table, np.float64), bound.word_bias
        bias = 0 if bias is None else np.asarray(bias, np.float64)
    scores = (states @ table.T + bias)[..., :V]
    language = embedder.blueprint.language
    if language.softcap:
        scores = language.softcap * np.tanh(scores / language.softcap)
    return np.concatenate([scores[:, :1] * 0, scores[:, :-1]], 1) if language.shift else scores


@functools.partial(jax.jit, static_argnums=0)
def _states(factory, params, rows):
    return factory.bind(params).word_states(rows)[0]


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def sentences(n: int, words: int, seed: int = 0) -> list[str]:
    """Texts of so many words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, words)) for _ in range(n)]
