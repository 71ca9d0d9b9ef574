"""Tiny encoders with random weights, saved as their own programs save them, and the states that these compute."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tiny_models import random_texts

VOCAB = 90
LAYERS = 5
TEXTS = random_texts(8, longest=24)  # the ids 0 … 4 do not occur
CUT = 2  # the layer whose states are also wanted as if it were the last
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "intermediate_size": 40,
}
T5_SIZES = {"vocab_size": VOCAB, "d_model": 36, "num_layers": LAYERS, "num_heads": 6, "d_kv": 5, "d_ff": 40}
ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
MODERNBERT = SIZES | ENDS | {"local_attention": 9, "cls_token_id": 2, "sep_token_id": 3}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True}
# Name → model_type and fields of config.json.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mpnet": ("mpnet", SIZES | {"pad_token_id": 1, "max_position_embeddings": 34}),
    "t5": ("t5", T5_SIZES | {"relative_attention_num_buckets": 10, "relative_attention_max_distance": 20}),
    "mt5": ("mt5", T5_SIZES),
    "nomic_bert": ("nomic_bert", SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    "modernbert": ("modernbert", MODERNBERT),
    "modernbert with biases": ("modernbert", MODERNBERT | BIASES | {"global_attn_every_n_layers": 2}),
}
JINA = SIZES | {
    "model_type": "bert",
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
# Nomic's sparse BERT, in nomic-ai's words; the peer is our own torch class, which test_nomic_moe.py holds against the
# definition. Its first layer is dense in each variant.
SPARSE = {
    "vocab_size": VOCAB,
    "n_embd": 36,
    "n_layer": LAYERS,
    "n_head": 6,
    "n_inner": 20,
    "type_vocab_size": 1,
    "pad_token_id": 0,
    "num_experts": 4,
    "moe_top_k": 2,
}
NOMIC_MOE: dict[str, dict[str, Any]] = {
    "nomic_moe": {"activation_function": "gelu", "rotary_emb_fraction": 1.0, "moe_every_n_layers": 2},
    "nomic_moe of a bert": {
        "activation_function": "relu",
        "n_positions": 30,
        "moe_layers": [1, 4],
        "moe_up_bias": True,
        "moe_normalize_expert_weights": 1,
    },
    "nomic_moe of a nomic_bert": {
        "activation_function": "swiglu",
        "rotary_emb_fraction": 1.0,
        "rotary_emb_base": 1000.0,
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "moe_every_n_layers": 3,
        "moe_gated": True,
    },
}
NAMES = (*CONFIGS, "jina_bert", *NOMIC_MOE)
States = list[np.ndarray]  # [tokens, D] of each text


@dataclasses.dataclass(frozen=True)
class Peer:
    """What the peer computes.

    Attributes:
      states: of every layer, from the embeddings on.
      cut: those of layer CUT, as they would be if it were the last.
    """

    states: list[States]
    cut: States


def save_peer(name: str, folder: pathlib.Path) -> Peer:
    """Saves one of NAMES as a folder, config.json and model.safetensors."""
    if name in NOMIC_MOE:
        return save_nomic_moe(NOMIC_MOE[name], folder)
    return _save_jina(folder) if name == "jina_bert" else _save_torch(*CONFIGS[name], folder)


def save_nomic_moe(fields: dict[str, Any], folder: pathlib.Path) -> Peer:
    """Saves Nomic's sparse BERT; `fields` of config.json beside SPARSE."""
    pytest.importorskip("torch")
    from jaxembed.hf.modeling_nomic_moe import NomicBertConfig, NomicBertModel

    return _save(NomicBertConfig(**SPARSE, **fields), NomicBertModel, folder)


def _save_torch(model_type: str, fields: dict[str, Any], folder: pathlib.Path) -> Peer:
    pytest.importorskip("torch")
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **fields)
    made: Callable = transformers.AutoModel.from_config
    if model_type == "t5":  # a whole checkpoint, decoder and all
        made = transformers.T5ForConditionalGeneration
    elif model_type == "mt5":
        made = transformers.MT5EncoderModel
    return _save(config, made, folder)


def _save(config: Any, made: Callable, folder: pathlib.Path) -> Peer:
    import torch

    torch.manual_seed(0)
    model_type, model = config.model_type, made(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms too: fresh ones are zeros and ones
            weight.add_(torch.randn_like(weight) * (0.2 if weight.ndim == 1 else 0.1))
    model.save_pretrained(folder)
    encoder = model.get_encoder() if model_type in ("t5", "mt5") else model
    longest = max(map(len, TEXTS))
    tokens = np.full((len(TEXTS), longest), config.pad_token_id)
    attended = np.zeros_like(tokens)
    for i, text in enumerate(TEXTS):
        tokens[i, : len(text)], attended[i, : len(text)] = text, 1
    closing = {"t5": "final_layer_norm", "mt5": "final_layer_norm", "modernbert": "final_norm"}.get(model_type)
    with torch.no_grad():
        states = encoder(torch.tensor(tokens), torch.tensor(attended), output_hidden_states=True).hidden_states
        cut = getattr(encoder, closing)(states[CUT]) if closing else states[CUT]
    return Peer([_by_text(layer) for layer in states], _by_text(cut))


def _by_text(states: Any) -> States:
    return [states[i, : len(text)].numpy() for i, text in enumerate(TEXTS)]


def _save_jina(folder: pathlib.Path) -> Peer:
    """The Jina-2 kind: no program of these tests' has it, so the definition itself, in float64, text by text."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    width, hidden = JINA["hidden_size"], JINA["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (VOCAB, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        **_norm_shapes("embeddings.LayerNorm", width),
    }
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        for linear in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{layer}{linear}.weight": (width, width), f"{layer}{linear}.bias": (width,)}
        shapes |= _norm_shapes(f"{layer}attention.output.LayerNorm", width)
        shapes |= {f"{layer}mlp.gated_layers.weight": (2 * hidden, width)}
        shapes |= {f"{layer}mlp.wo.weight": (width, hidden), f"{layer}mlp.wo.bias": (width,)}
        shapes |= _norm_shapes(f"{layer}mlp.layernorm", width)
    shapes |= {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
    tensors = {name: rng.normal(scale=0.2, size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in tensors:
        if "norm" in name.lower() and name.endswith("weight"):
            tensors[name] += 1
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(JINA))
    each = [_jina_states(text, {name: tensor.astype(np.float64) for name, tensor in tensors.items()}) for text in TEXTS]
    states = [list(layer) for layer in zip(*each)]
    return Peer(states, states[CUT])


def _norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _jina_states(text: Sequence[int], w: dict[str, np.ndarray]) -> States:
    """A text's states, layer by layer; Press et al.'s slopes for 6 heads, on both sides."""
    slopes = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]  # those of 4 heads, then every second one of 8
    n, heads, head_width = len(text), 6, JINA["hidden_size"] // 6

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + JINA["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = w["embeddings.word_embeddings.weight"][text] + w["embeddings.token_type_embeddings.weight"][0]
    states = [norm(x, "embeddings.LayerNorm")]
    for i in range(LAYERS):
        x, layer = states[-1], f"encoder.layer.{i}."
        q, k, v = (
            linear(x, f"{layer}attention.self.{name}").reshape(n, heads, head_width)
            for name in ("query", "key", "value")
        )
        attended = np.zeros_like(q)
        for h, slope in enumerate(slopes):
            for a in range(n):
                scores = [q[a, h] @ k[b, h] / math.sqrt(head_width) - slope * abs(a - b) for b in range(n)]
                weights = np.exp(scores - np.max(scores))
                attended[a, h] = weights / weights.sum() @ v[:, h]
        out = linear(attended.reshape(n, -1), f"{layer}attention.output.dense")
        x = norm(x + out, f"{layer}attention.output.LayerNorm")
        gate, up = np.split(linear(x, f"{layer}mlp.gated_layers"), 2, axis=-1)
        gelu = gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) / 2
        states.append(norm(x + linear(gelu * up, f"{layer}mlp.wo"), f"{layer}mlp.layernorm"))
    return states
