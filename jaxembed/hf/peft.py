"""Adapters by their names in Hugging Face checkpoints, and as a folder that the peft library opens.

The names are those of peft 0.21: `base_model.model.MODULE.lora_A.weight` [r, in] and `…lora_B.weight` [out, r].
"""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxembed.errors import UserError
from jaxembed.hf.architectures import Architecture
from jaxembed.hf.files import listing
from jaxembed.hf.folder import read_folder
from jaxembed.hf.hub import REPOSITORY
from jaxembed.hf.table import Linear, Row
from jaxembed.hf.writer import SavedTokenizer, replacing
from jaxembed.models.lora import NAME, Lora
from jaxembed.storage import AnyPath, is_url

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KERNEL = "/kernel"
# Of sparse parts: no `Linear`s that adapters can stand beside, here or in peft.
NOT_LINEAR = tuple(f"experts/{name}{KERNEL}" for name in ("router", "up", "down", "gate"))


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


def base_of(spec: str) -> tuple[str, str | None]:
    """Returns what adapters to 'hf:SPEC' name as their base: a folder and None, or a repository and its revision.

    Raises:
      UserError: `spec` is neither.
    """
    if is_url(spec):
        raise UserError(
            f"hf:{spec}: no program that opens adapters finds their base there; train from a folder on disk"
        )
    folder = pathlib.Path(spec).expanduser()
    if folder.is_dir():  # by its whole path: elsewhere, programs would look for a relative one on the hub
        return str(read_folder(folder).transformer.resolve()), None
    match = REPOSITORY.fullmatch(spec)
    if not match:
        raise UserError(f"hf:{spec}: no such folder, and not of the form ORG/NAME or ORG/NAME@REVISION")
    return match["name"], match["revision"]


def caution(architecture: Architecture, hf_config: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Returns what goes wrong, in Markdown, where the base is opened with its own config.json; '' for nothing.

    Args:
      architecture: the backbone's.
      hf_config: config.json of the model that the adapters were trained in.
      base: that of their base.
    """
    wanted, own = architecture.config_from_hf(hf_config), architecture.config_from_hf(base)
    if wanted == own:
        return ""
    sees = " and ".join(dict.fromkeys(own.attention))
    wrong = "has other positions" if wanted.attention == own.attention else f"is {sees}"
    return (
        "**Opened without `config=AutoConfig.from_pretrained(here)`, as `AutoPeftModelForFeatureExtraction` and "
        f"`AutoModel` do it too, the model {wrong} and its vectors are wrong.**"
    )


def write_peft(
    out: AnyPath,
    *,
    architecture: Architecture,
    hf_config: Mapping[str, Any],
    adapters: Mapping[str, np.ndarray],
    lora: Lora,
    base: str,
    revision: str | None,
    tokenizer: SavedTokenizer,
    max_length: int,
    pooling: str,
    pool_prompt: bool,
    normalize: bool,
    prompts: Mapping[str, str],
    warning: str,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained(BASE, out)` opens: all of it, or nothing.

    A tensor that holds several of our linear layers, such as a fused query, key and value, gets one adapter of their
    ranks' sum, which gives the same: its A holds theirs one below the other, its B theirs as a block-diagonal matrix.

    Args:
      out: the folder to make; must not be there, or be empty.
      architecture: the backbone's.
      hf_config: config.json of the model, which may see more or less than its base does.
      adapters: path in the backbone → A [n, inputs, r] or B [n, r, outputs], float32.
      lora: their kind.
      base, revision: the checkpoint that they stand on, from `base_of`.
      tokenizer: writes its own files.
      max_length: longest text in tokens.
      pooling, pool_prompt, normalize, prompts: how a vector is made, which only the README can say.
      warning: from `caution`, for the README.

    Raises:
      UserError: something is at `out`, or it cannot be written; peft would not take the adapters for what they are.
    """
    from safetensors.numpy import save_file

    config = architecture.config_from_hf(hf_config)
    rows = [row for row in architecture.rows(config) if _is_linear(row) and set(_paths(row)) <= set(lora.targets)]
    if architecture.model_type == "qwen3_moe" and any(row.ours.startswith("mlps/") for row in rows):
        raise UserError(
            f"{out}: peft takes adapters to a qwen3_moe's dense MLPs for ones to its experts, and drops them without a "
            "word: leave --adapter out, or train with config.model.lora.targets = 'self_attn'"
        )
    if any(row.ours.endswith("mixer/step/kernel") and "dt_proj" in row.hf for row in rows):
        raise UserError(
            f"{out}: transformers reads the weights of dt_proj past the adapters that peft puts there: leave --adapter "
            "out, or train with config.model.lora.targets = 'into|gate|select|out'"
        )
    ranks = {_pattern(row): lora.rank * len(row.parts) for row in rows if len(row.parts) > 1}
    said = {
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
        "target_modules": rf"(.*\.)?({'|'.join(map(_pattern, rows))})",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    how = {
        "pooling": pooling + ("" if pool_prompt else ", without the prompt's tokens"),
        "vectors": "of length 1" if normalize else "of any length",
        "longest text": f"{max_length} tokens",
        **{f"prompt {name!r}": repr(text) for name, text in prompts.items()},
    }
    with replacing(out, lambda _: False, CONFIG) as part:
        save_file(dict(_tensors(rows, config.layers, adapters)), part / WEIGHTS, metadata={"format": "pt"})
        for name, content in ((CONFIG, said), ("config.json", dict(hf_config))):
            (part / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (part / "README.md").write_text(_readme(architecture.hf_class, base, revision, warning, how), encoding="utf-8")
        tokenizer.save(part, max_length)


def _readme(hf_class: str, base: str, revision: str | None, warning: str, how: Mapping[str, str]) -> str:
    on_hub = not pathlib.Path(base).is_absolute()
    named = f"base_model: {json.dumps(base)}\n" if on_hub else ""
    at = f", revision={revision!r}" if revision else ""
    said = f"\n{warning}\n" if warning else ""
    listed = "\n".join(f"- {name}: {value}" for name, value in how.items())
    return f"""---
{named}library_name: peft
pipeline_tag: feature-extraction
---
# Low-rank adapters of a text-embedding model

They stand on `{base}`, which is not in this folder. The folder's own config.json says what the model's attention sees.
{said}
```python
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, {hf_class}

here = "."  # this folder
base = {hf_class}.from_pretrained({base!r}{at}, config=AutoConfig.from_pretrained(here))
model = PeftModel.from_pretrained(base, here).eval()
tokenizer = AutoTokenizer.from_pretrained(here)
```

This gives the states of a text's tokens. How they become the vectors that the adapters were trained for, a folder of
adapters has no place to say:

{listed}

`python -m jaxembed.export` without `--adapter` writes the model merged, as one folder that sentence-transformers opens.
"""


def _tensors(rows: Sequence[Row], layers: int, adapters: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for row in rows:
        kernels = [(path, transform) for path, (_, transform) in zip(_paths(row), row.parts)]
        for name, place in row.places(layers):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            a = [transform.to_hf(adapters[f"{path}/{NAME}/a"][place]) for path, transform in kernels]
            b = [Linear().to_hf(adapters[f"{path}/{NAME}/b"][place]) for path, _ in kernels]
            yield (
                f"{module}.lora_A.weight",
                np.ascontiguousarray(np.concatenate(a)),
            )  # safetensors writes memory's order
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
    kernels = all(isinstance(transform, Linear) and path.endswith(KERNEL) for path, transform in row.parts)
    return row.stacked == 1 and kernels and row.ours not in NOT_LINEAR


def _name(row: Row) -> str:
    return row.hf.replace("{i}.", "").removesuffix(".weight")


def _pattern(row: Row) -> str:
    """Returns a regex of the names that the row's modules have."""
    return re.escape(row.hf.removesuffix(".weight")).replace(re.escape("{i}"), r"\d+")


def _paths(row: Row) -> tuple[str, ...]:
    return tuple(path.removesuffix(KERNEL) for path, _ in row.parts)
