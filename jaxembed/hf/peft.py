"""Adapters by their names in Hugging Face checkpoints, and as a folder that the peft library opens.

The names are those of peft 0.21: `base_model.model.MODULE.lora_A.weight` [r, in] and `…lora_B.weight` [out, r].
"""

import json
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxembed.errors import UserError
from jaxembed.hf.files import listing
from jaxembed.hf.table import Linear, Row
from jaxembed.models.lora import NAME, Lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KERNEL = "/kernel"


def linear_layers(rows: Sequence[Row], pattern: str, where: str) -> tuple[str, ...]:
    """Returns our paths of the linear layers whose names in the checkpoint a regex finds.

    Args:
      rows: the architecture's table of names.
      pattern: a regex, searched for in names without the layer's number and '.weight': 'layers.self_attn.q_proj'.
      where: what the pattern is called, for messages.

    Raises:
      UserError: it finds none.
    """
    named = {_name(row): row for row in rows if _is_linear(row)}
    paths = tuple(path for name, row in named.items() if re.search(pattern, name) for path in _paths(row))
    if not paths:
        raise UserError(f"{where} = {pattern!r} finds none of the model's linear layers: {listing(list(named))}")
    return paths


def write_peft(
    out: pathlib.Path,
    rows: Sequence[Row],
    layers: int,
    adapters: Mapping[str, np.ndarray],
    lora: Lora,
    base: str,
    revision: str | None,
    extra_files: Mapping[str, bytes],
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained(base, out)` opens: all of it, or nothing.

    A tensor that holds several of our linear layers, such as a fused query, key and value, gets one adapter of their
    ranks' sum, which gives the same: its A holds theirs one below the other, its B theirs as a block-diagonal matrix.

    Args:
      out: the folder to make; must not be there, or be empty.
      rows: the architecture's table of names.
      layers: n, of the backbone.
      adapters: path in the backbone → A [n, inputs, r] or B [n, r, outputs], float32.
      lora: their kind.
      base: the checkpoint that they stand on: a folder, or a repository on the hub.
      revision: the repository's; None for none.
      extra_files: name → content of further files.

    Raises:
      UserError: something is at `out`, or it cannot be written.
    """
    from safetensors.numpy import save_file

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is there already; remove it, or export to another place")
    adapted = [row for row in rows if _is_linear(row) and set(_paths(row)) <= set(lora.targets)]
    ranks = {_pattern(row): lora.rank * len(row.parts) for row in adapted if len(row.parts) > 1}
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "rank_pattern": ranks,
        "alpha_pattern": {name: lora.scale * rank for name, rank in ranks.items()},
        "lora_dropout": lora.dropout,
        "use_rslora": False,  # lora_alpha / r is the scale, whatever rule it came from
        "target_modules": rf"(.*\.)?({'|'.join(map(_pattern, adapted))})",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        part.mkdir(parents=True)
        save_file(dict(_tensors(adapted, layers, adapters)), part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for name, content in extra_files.items():
            (part / name).write_bytes(content)
        part.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _tensors(rows: Sequence[Row], layers: int, adapters: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for row in rows:
        kernels = [(path, transform) for path, (_, transform) in zip(_paths(row), row.parts)]
        for i, name in enumerate(row.names(layers), row.first):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            a = [transform.to_hf(adapters[f"{path}/{NAME}/a"][i]) for path, transform in kernels]
            b = [Linear().to_hf(adapters[f"{path}/{NAME}/b"][i]) for path, _ in kernels]
            yield f"{module}.lora_A.weight", np.concatenate(a)
            yield f"{module}.lora_B.weight", _block_diagonal(b)


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    whole = np.zeros([sum(block.shape[axis] for block in blocks) for axis in (0, 1)], blocks[0].dtype)
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


def _is_linear(row: Row) -> bool:
    """Whether the tensor is the weight of linear layers, one in each layer of the backbone."""
    return row.stacked and all(isinstance(transform, Linear) and p.endswith(KERNEL) for p, transform in row.parts)


def _name(row: Row) -> str:
    return row.hf.replace("{i}.", "").removesuffix(".weight")


def _pattern(row: Row) -> str:
    """Returns a regex of the names that the row's modules have."""
    return re.escape(row.hf.removesuffix(".weight")).replace(re.escape("{i}"), r"\d+")


def _paths(row: Row) -> tuple[str, ...]:
    return tuple(path.removesuffix(KERNEL) for path, _ in row.parts)
