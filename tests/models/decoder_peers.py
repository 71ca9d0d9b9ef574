"""Tiny models of transformers with random weights, of every decoder-shaped architecture, and their states."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from tiny_models import alone, pack, put_rows, random_texts

from jaxembed.hf.folder import read_folder
from jaxembed.hf.loading import load_onto
from jaxembed.hf.weights import backbone_leaves
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import ModelFactory, Params, flatten, unflatten
from jaxembed.models.transformer import Transformer

LAYERS = 5
VOCAB = 90
TEXTS = random_texts(8, seed=3, longest=12, vocab_size=VOCAB)
LENGTH = 24
LAYOUTS = (alone(TEXTS), [[0, 1, 2], [4, 3], [5, 6], [7], [], [], [], []])
WINDOW = 5  # smaller than most texts, and odd
# Grouped queries, heads that are wider than D / H where the architecture allows that, local layers where it has them.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 10, "attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 10, "sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"head_dim": 10, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
    "gemma": {"head_dim": 10},
    "gemma2": {"head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    "gemma3_text": {
        "head_dim": 10,
        "query_pre_attn_scalar": 7,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "phi3": {"sliding_window": WINDOW},
}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4}
SPARSE_SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4, "head_dim": 10},
    "qwen2_moe": EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 20},
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 16},
    "olmoe": EXPERTS,
}


def save_peer(model_type: str, folder: pathlib.Path, **fields: Any) -> Any:
    """Saves a random model; `fields` of config.json are added. Returns the model, as transformers reads the folder."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 44,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.AutoConfig.for_model(model_type, **shape | (SHAPES | SPARSE_SHAPES)[model_type] | fields)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms too: fresh ones are zeros and ones
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder, dtype="float32").eval()


def padded_states(model: Any, texts: Sequence[np.ndarray] = TEXTS) -> list[list[np.ndarray]]:
    """Returns the states of every text, layer by layer from the embeddings on, of one padded batch."""
    import torch

    tokens = np.zeros((len(texts), max(map(len, texts))), np.int64)
    attended = np.zeros_like(tokens)
    for i, text in enumerate(texts):
        tokens[i, : len(text)], attended[i, : len(text)] = text, 1
    with torch.no_grad():
        states = model(torch.tensor(tokens), torch.tensor(attended), output_hidden_states=True).hidden_states
    return [[layer[i, : len(text)].numpy() for i, text in enumerate(texts)] for layer in states]


def single_states(model: Any, texts: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Returns the same, each text alone, the shortest first: dynamic scaling remembers the longest text so far."""
    found = {i: padded_states(model, [texts[i]]) for i in sorted(range(len(texts)), key=lambda i: len(texts[i]))}
    return [[found[i][layer][0] for i in range(len(texts))] for layer in range(LAYERS + 1)]


def load(folder: pathlib.Path, **options: Any) -> tuple[ModelFactory, Params]:
    """Reads a folder onto the mesh in use."""
    read = read_folder(folder)
    factory = ModelFactory(lambda: Transformer(jax.random.key(0), read.config, ModelOptions(**options)))
    wanted = flatten(factory.abstract())
    shapes = {path: leaf.shape for path, leaf in wanted.items()}
    return factory, unflatten(load_onto(backbone_leaves(read, shapes), wanted))


def differences(
    factory: ModelFactory,
    params: Params,
    theirs: Sequence[Sequence[np.ndarray]],
    texts: Sequence[np.ndarray] = TEXTS,
    layouts: Sequence[Sequence[Sequence[int]]] = LAYOUTS,
    length: int = LENGTH,
) -> Mapping[str, float]:
    """Returns the largest difference of a token's states from theirs, by layout and layer."""

    @jax.jit
    def run(params, rows):
        states = factory.bind(params)(rows, chosen=tuple(range(LAYERS + 1)))
        return states.last, states.chosen

    found = {}
    for number, layout in enumerate(layouts):
        packed = pack(texts, layout, length)
        last, chosen = (np.asarray(x) for x in run(params, put_rows(packed.rows)))
        np.testing.assert_array_equal(last, chosen[-1])
        for layer, states in enumerate(theirs):
            errors = [0.0]
            for text, want in enumerate(states):
                start = packed.start[text]
                errors.append(np.abs(chosen[layer, packed.row[text], start : start + len(want)] - want).max())
            found[f"layout {number}, layer {layer}"] = float(max(errors))
    return found
