"""Models without their weights: shapes of well-known checkpoints, from their public config.json.

With them steps are compiled, and bytes and operations counted, without a download.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxembed import checkpoint, model_source
from jaxembed.blueprint import Blueprint
from jaxembed.both_ways import becomes_both_ways, both_ways_blueprint
from jaxembed.config import AUTO, Config
from jaxembed.config_check import TRAINED
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import UserError
from jaxembed.hf.architectures import architecture, architecture_of
from jaxembed.hf.hub import REPOSITORY
from jaxembed.language import language_for
from jaxembed.models.moee import with_moee
from jaxembed.models.text_encoder import HeadConfig
from jaxembed.storage import AnyPath, path_of
from jaxembed.upcycling import sparse_blueprint


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a plan has to know of a checkpoint.

    Attributes:
      model_type: of config.json.
      fields: others of it.
      head: how its folder makes a vector of token states.
      max_length: the longest text that its folder takes.
      attention: its own mode.
    """

    model_type: str
    fields: Mapping[str, Any]
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    max_length: int = 512
    attention: str = "native"


# By the name on the hub.
SHAPES: dict[str, Shape] = {
    "sentence-transformers/all-MiniLM-L6-v2": Shape(
        "bert",
        {
            "vocab_size": 30_522,
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
            "max_position_embeddings": 512,
        },
        max_length=256,
    ),
    "Qwen/Qwen3-0.6B-Base": Shape(
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
    "mistralai/Mistral-7B-v0.1": Shape(
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
    "Qwen/Qwen3-30B-A3B-Base": Shape(
        "qwen3_moe",
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40_960,
            "rope_theta": 1_000_000.0,
        },
    ),
    "mistralai/Mixtral-8x7B-v0.1": Shape(
        "mixtral",
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14_336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32_768,
            "rope_theta": 1_000_000.0,
        },
    ),
    "allenai/OLMoE-1B-7B-0924": Shape(
        "olmoe",
        {
            "vocab_size": 50_304,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 4096,
            "rope_theta": 10_000.0,
        },
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": Shape(
        "qwen2_moe",
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 8192,
            "rope_theta": 1_000_000.0,
        },
    ),
    "GSAI-ML/LLaDA-8B-Instruct": Shape(
        "llada",
        {
            "vocab_size": 126_464,
            "d_model": 4096,
            "n_layers": 32,
            "n_heads": 32,
            "mlp_hidden_size": 12_288,
            "max_sequence_length": 4096,
        },
    ),
    "Dream-org/Dream-v0-Instruct-7B": Shape(
        "Dream",
        {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18_944,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
        },
    ),
    "google/embeddinggemma-300m": Shape(
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
        HeadConfig(expansion=3072, projection=768),
        attention="bidirectional",
    ),
    "nomic-ai/nomic-embed-text-v1-unsupervised": Shape(
        "nomic_bert",
        {
            "vocab_size": 30_528,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": 8192,
        },
    ),
    "answerdotai/ModernBERT-base": Shape(
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
    "google/t5-v1_1-base": Shape(
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
    "state-spaces/mamba-130m-hf": Shape(
        "mamba",
        {
            "vocab_size": 50_280,
            "hidden_size": 768,
            "num_hidden_layers": 24,
            "state_size": 16,
            "time_step_rank": 48,
        },
    ),
    "AntonV/mamba2-130m-hf": Shape(
        "mamba2",
        {
            "vocab_size": 50_288,
            "hidden_size": 768,
            "num_hidden_layers": 24,
            "state_size": 128,
            "num_heads": 24,
            "head_dim": 64,
            "n_groups": 1,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Ids of a tokenizer that is not at hand."""

    vocab_size: int
    pad_id: int = 0
    cls_id: int = 1
    sep_id: int = 2
    eos_id: int = 2
    mask_id: int = 3
    framing_ids: tuple[int, ...] = (0, 1, 2, 3)


def open_shape(init: str, config: Config) -> Blueprint:
    """Returns a model of 'hf:…', 'run:…' or 'scratch' without weights, and mostly without its tokenizer.

    Args:
      init: config.model.init or config.teacher.init.
      config: says what a model from scratch is like.

    Raises:
      UserError: it cannot be found.
    """
    kind, _, place = init.partition(":")
    name = place.partition("@")[0]
    if init == "scratch":
        arch = architecture(config.model.arch)
        hf_config = arch.fresh_hf_config(dict(config.model.shape), _tokens(config.tokenizer), "config.model.shape")
        return _blueprint(hf_config, arch.config_from_hf(hf_config).max_length)
    if kind == "run":
        return Blueprint.load(checkpoint.split(place)[0] / model_source.FOLDER)
    folder = path_of(place)
    if folder.is_dir():
        if isinstance(folder, pathlib.Path) and any(folder.rglob("*.safetensors")):
            return model_source.open_folder(folder)[0]
        return _blueprint(_read(folder / "config.json"), 512)
    if shape := SHAPES.get(name):
        arch = architecture(shape.model_type)
        hf_config = arch.fresh_hf_config(shape.fields, Tokens(1), "shape")
        hf_config = arch.with_attention(hf_config, (shape.attention,))
        return dataclasses.replace(_blueprint(hf_config, shape.max_length), head=shape.head)
    return _blueprint(_read(_fetched(place)), 512)


def adapted(blueprint: Blueprint, config: Config) -> Blueprint:
    """Returns the blueprint with what the config asks for, as `jaxembed.model_source` would make it of a folder."""
    m = config.model
    if becomes_both_ways(blueprint, config):
        blueprint = both_ways_blueprint(blueprint, m.ssm)
    arch, head = blueprint.architecture, blueprint.head
    hf_config = arch.with_rope_scaling(blueprint.hf_config, m.rope_scaling) if m.rope_scaling else blueprint.hf_config
    hf_config = arch.with_attention(hf_config, m.attention_layers or (m.attention,))
    latent = {"latents": m.latents, "latent_heads": m.latent_heads} if m.pooling == "latent" else {}
    head = dataclasses.replace(
        head,
        pooling=head.pooling if m.pooling == AUTO else m.pooling,
        pool_prompt=m.pool_prompt,
        pool_layers=max(m.pool_layers, head.pool_layers),
        projection=m.projection or head.projection,
        normalize=m.normalize,
        **latent,
    )
    said = config.data.max_length
    usual = min(blueprint.max_length, dataclasses.replace(blueprint, hf_config=hf_config).longest)
    longest = max(said.query or usual, said.document or usual)
    blueprint = dataclasses.replace(blueprint, hf_config=hf_config, head=head, max_length=longest)
    blueprint = sparse_blueprint(blueprint, m.experts) if m.experts.upcycle else blueprint
    head = with_moee(blueprint.head, blueprint.backbone, m.moee, m.moee_weight, "config.model.")
    tokens = Tokens(blueprint.backbone.vocab_size)
    language = language_for(dataclasses.replace(blueprint, tokenizer=blueprint.tokenizer or tokens), config)
    return dataclasses.replace(blueprint, head=head, language=language)


def _blueprint(hf_config: dict[str, Any], max_length: int) -> Blueprint:
    longest = architecture_of(hf_config).config_from_hf(hf_config).max_length
    return Blueprint(hf_config, HeadConfig(), True, min(max_length, longest), {}, "", "cosine", 0, None, {})


def _tokens(tokenizer: str) -> Any:
    """Returns the ids of a tokenizer: as many as one that is yet to be trained will have, or those of a file."""
    if tokenizer.startswith(TRAINED):
        return Tokens(int(tokenizer.rpartition(":")[2]))
    return Tokenizer.load(tokenizer)


def _read(path: AnyPath) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; a plan wants a model's config.json") from error


def _fetched(place: str) -> pathlib.Path:
    """Fetches config.json of a repository, and nothing else."""
    from huggingface_hub import hf_hub_download

    match = REPOSITORY.fullmatch(place)
    if not match:
        raise UserError(f"hf:{place}: no such folder, and not of the form ORG/NAME or ORG/NAME@REVISION")
    try:
        return pathlib.Path(hf_hub_download(match["name"], "config.json", revision=match["revision"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"hf:{place}: its config.json is not here, and the hub does not give it ({reason}); planned without one "
            f"are {', '.join(SHAPES)}"
        ) from error
