"""Tiny models of transformers with random weights, of every state-space architecture, and their states."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from decoder_peers import LAYERS, VOCAB, differences
from tiny_models import alone, make_mesh, random_texts

from jaxembed.hf.folder import read_folder
from jaxembed.hf.loading import load_onto
from jaxembed.hf.safetensors_io import open_tensors
from jaxembed.hf.table import export_tensors
from jaxembed.hf.weights import backbone_leaves
from jaxembed.models.layers.ssm import SsmOptions
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import ModelFactory, Params, flatten, unflatten

CHUNK = 8  # tokens; the longest text has several chunks, and packed texts begin inside of them
TEXTS = [*random_texts(5, seed=3, longest=12, vocab_size=VOCAB), *random_texts(1, seed=5, longest=40, vocab_size=VOCAB)]
LENGTH = 40
TOLERANCE = 5e-5  # absolute, of a token's states
LAYOUTS = (alone(TEXTS), [[0, 5], [1, 2, 3], [4], [], [], []])
SIZES = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": LAYERS, "pad_token_id": 0}
MAMBA2 = {"num_heads": 6, "head_dim": 8, "state_size": 5, "n_groups": 2, "chunk_size": 16}
BAMBA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 20,
    "mamba_n_heads": 6,
    "mamba_d_state": 5,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "attn_layer_indices": [1, 4],
}
# Name → model_type and fields of config.json beside SIZES.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"state_size": 5, "time_step_rank": 3, "conv_kernel": 3}),
    "mamba2": ("mamba2", MAMBA2 | {"time_step_limit": [0.3, 1.5]}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 5, "expand": 16, "intermediate_size": 40, "use_bias": True}),
    "bamba": ("bamba", BAMBA),
    "bamba both ways": (
        "bamba",
        BAMBA | {"is_causal": False, "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True},
    ),
    "bimamba": ("bimamba", {"state_size": 5, "shared_directions": False}),
    "bimamba2": ("bimamba2", MAMBA2 | {"use_bias": True, "use_conv_bias": False, "shared_directions": True}),
    "bifalcon_mamba": ("bifalcon_mamba", {"state_size": 5, "use_bias": True, "shared_directions": False}),
}


def save_peer(name: str, folder: pathlib.Path) -> Any:
    """Saves a random model of SHAPES. Returns it, as transformers, or our own class, reads the folder."""
    torch = pytest.importorskip("torch")
    import transformers

    model_type, fields = SHAPES[name]
    torch.manual_seed(0)
    if model_type.startswith("bi"):
        kind = bidirectional(model_type)
        model = kind(kind.config_class(**SIZES, **fields))
    else:
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **SIZES, **fields))
        kind = type(model)
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms too: fresh ones are zeros and ones
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    return kind.from_pretrained(folder, dtype="float32").eval()


def bidirectional(model_type: str) -> Any:
    """Our torch class of a model_type of `jaxembed.hf.mamba.KIN`."""
    from jaxembed.hf import modeling_bimamba
    from jaxembed.hf.mamba import AUTO_MAPS

    return getattr(modeling_bimamba, AUTO_MAPS[model_type]["AutoModel"].split(".")[1])


def padded_states(model: Any, left: bool = False) -> list[list[np.ndarray]]:
    """Returns the states of every text, layer by layer from the embeddings on, of one padded batch."""
    import torch

    longest = max(map(len, TEXTS))
    places = [slice(longest - len(text), longest) if left else slice(len(text)) for text in TEXTS]
    tokens = np.zeros((len(TEXTS), longest), np.int64)
    attended = np.zeros_like(tokens)
    for i, (text, place) in enumerate(zip(TEXTS, places)):
        tokens[i, place], attended[i, place] = text, 1
    tokens = torch.tensor(tokens)
    with torch.no_grad():
        states = model(tokens, attention_mask=torch.tensor(attended), output_hidden_states=True).hidden_states
        if model.config.model_type != "bamba":  # the embeddings are not there, and the last layer's come twice
            states = (model.get_input_embeddings()(tokens), *states[:-2], states[-1])
    return [[layer[i, place].numpy() for i, place in enumerate(places)] for layer in states]


def load(folder: pathlib.Path, **options: Any) -> tuple[ModelFactory, Params]:
    """Reads a folder onto the mesh in use."""
    read = read_folder(folder)
    how = ModelOptions(ssm=SsmOptions(chunk=CHUNK), unroll=1, **options)
    factory = ModelFactory(lambda: read.architecture.backbone(jax.random.key(0), read.config, how))
    wanted = flatten(factory.abstract())
    shapes = {path: leaf.shape for path, leaf in wanted.items()}
    return factory, unflatten(load_onto(backbone_leaves(read, shapes), wanted))


def assert_as_torch(name: str, folder: pathlib.Path) -> None:
    """States of every layer and the last ones, every text alone in its row and packed; tensors come back as they were.

    Where the maps into a mixer have biases, transformers lets its convolution see padding on the left; our class not.
    """
    model = save_peer(name, folder)
    theirs = padded_states(model)
    if name.startswith("bi") or not any(SHAPES[name][1].get(field) for field in ("use_bias", "mamba_proj_bias")):
        for layer, on_the_left in zip(theirs, padded_states(model, left=True)):
            for text, moved in zip(layer, on_the_left):
                np.testing.assert_allclose(moved, text, rtol=0, atol=TOLERANCE)
    with jax.set_mesh(make_mesh()):
        factory, params = load(folder)
        found = differences(factory, params, theirs, TEXTS, LAYOUTS, LENGTH)
        read = read_folder(folder)
        back = dict(export_tensors(read.architecture.rows(read.config), flatten(params), LAYERS))
    assert max(found.values()) <= TOLERANCE, found
    tensors = open_tensors(folder)
    assert set(back) == set(tensors)
    for tensor in tensors:
        np.testing.assert_array_equal(back[tensor], tensors[tensor], err_msg=tensor)
