"""The shapes of the checkpoints that configs/ starts from, from their public config.json.

With them bytes and FLOPs are counted, and steps compiled, without a download.
"""

import importlib.util
import pathlib
from typing import Any

from ml_collections import ConfigDict

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"

# configs/NAME.py → model_type, fields of config.json.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_0p6b": (
        "qwen3",
        {
            "vocab_size": 151_936,
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "max_position_embeddings": 32_768,
            "rope_theta": 1_000_000.0,
        },
    ),
    "mistral_7b_lora": (
        "mistral",
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14_336,
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "rope_theta": 10_000.0,
        },
    ),
    "embeddinggemma": (
        "gemma3_text",
        {
            "vocab_size": 262_144,
            "hidden_size": 768,
            "num_hidden_layers": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 1152,
            "max_position_embeddings": 2048,
            "sliding_window": 512,
            "query_pre_attn_scalar": 256,
        },
    ),
    "modernbert": (
        "modernbert",
        {
            "vocab_size": 50_368,
            "hidden_size": 768,
            "num_hidden_layers": 22,
            "num_attention_heads": 12,
            "intermediate_size": 1152,
            "max_position_embeddings": 8192,
            "local_attention": 128,
        },
    ),
    "t5_encoder": (
        "t5",
        {
            "vocab_size": 32_128,
            "d_model": 768,
            "num_layers": 12,
            "num_heads": 12,
            "d_kv": 64,
            "d_ff": 2048,
            "feed_forward_proj": "gated-gelu",
        },
    ),
}


class NoTokenizer:
    """Ids of a tokenizer that is not at hand."""

    vocab_size, pad_id, cls_id, sep_id, eos_id = 1, 0, 1, 2, 2


def get_config(name: str, machine: str) -> ConfigDict:
    """Returns what configs/NAME.py gives for a machine."""
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(machine)
