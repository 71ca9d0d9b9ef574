"""Writing a folder that sentence-transformers and transformers open, without remote code wherever they have a class.

The legacy spelling of sentence-transformers' files is written: all its versions, and the other programs that serve such
folders, read it.
"""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxembed.errors import UserError
from jaxembed.hf.architectures import ANY_TRANSFORMERS, Architecture, architecture_of
from jaxembed.hf.attention_modes import IS_CAUSAL_SINCE, portable
from jaxembed.hf.files import read_optional_json
from jaxembed.hf.folder import LATENT_ATTENTION, LEGACY_POOLING, POOLING_MODES
from jaxembed.hf.language_heads import language_of, language_rows
from jaxembed.hf.safetensors_io import write_tensors
from jaxembed.hf.table import Row, export_tensors, leaves_of
from jaxembed.hf.weights import DENSE_BIAS, DENSE_WEIGHT, LATENT_ROWS, LAYER_WEIGHTS, dense_rows
from jaxembed.hf.word_rules import require_cut
from jaxembed.models.text_encoder import LANGUAGE
from jaxembed.storage import AnyPath, StorePath, filling

Array = np.ndarray | jax.Array

SETTINGS = "config_sentence_transformers.json"
MODULE_TYPES = {
    **{
        name: f"sentence_transformers.models.{name}"
        for name in ("Transformer", "WeightedLayerPooling", "Pooling", "Dense", "Normalize")
    },
    "LatentAttention": LATENT_ATTENTION,
}
LATENT_CODE = pathlib.Path(__file__).with_name(f"{LATENT_ATTENTION.split('.')[0]}.py")  # copied, never imported
# Of the format, not of a program: the first sentence-transformers that reads all fields. `jaxembed` marks the folder as
# one that may be replaced.
VERSIONS = {"jaxembed": "1", "sentence_transformers": "3.0.0"}
# Keys of a checkpoint's config.json that do not hold for what we write.
DROPPED = ("_name_or_path", "auto_map", "quantization_config", "transformers_version")


class SavedTokenizer(Protocol):
    """What is asked of a tokenizer; see `jaxembed.data.tokenizer.Tokenizer`."""

    in_template: bool

    def words(self, text: str) -> list[str]: ...

    def save(self, folder: pathlib.Path, max_length: int) -> None: ...


def write_folder(
    out: AnyPath,
    *,
    hf_config: Mapping[str, Any],
    architecture: Architecture,
    config: Any,
    leaves: Mapping[str, Array],
    tokenizer: SavedTokenizer,
    pooling: str,
    pool_prompt: bool,
    normalize: bool,
    projection: tuple[Array, Array | None] | None,
    max_length: int,
    prompts: Mapping[str, str],
    default_prompt_name: str = "",
    similarity: str = "cosine",
    truncate_dim: int = 0,
    dtype: str = "float32",
    head: Mapping[str, Array] | None = None,
    unused: Mapping[str, np.ndarray] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes the folder, all of it or nothing.

    A model whose class is not in transformers is written as its kin that is: see `Architecture.portable_as`.

    Args:
      out: the folder to make. One that this function wrote, or an empty one, is replaced.
      hf_config: config.json of the checkpoint that training began with, or from `architecture.fresh_hf_config`.
      architecture: of the backbone.
      config: the backbone's config; `hf_config` must say the same.
      leaves: path → array of every leaf of the backbone.
      tokenizer: writes its own files.
      pooling: 'mean' | 'cls' | 'last' | 'weighted_mean' | 'latent', which only opens with trust_remote_code elsewhere.
      pool_prompt: whether the prompt's tokens are pooled.
      normalize: whether vectors are brought to length 1.
      projection: kernel [D, E] and bias [E] or None of the layer after pooling; None for no such layer.
      max_length: longest text in tokens.
      prompts: name → text.
      default_prompt_name: one of prompts, '' for none.
      similarity: 'cosine' | 'dot' | 'euclidean' | 'manhattan'.
      truncate_dim: vectors are cut to this many dimensions after all else; 0 for not.
      dtype: of the tensors written: 'float32' | 'bfloat16' | 'float16'; those of a few rows are float32 in any case.
      head: path → array of every leaf of a mean of layers (config.json then says output_hidden_states), of latent
        attention, and of a linear layer before `projection`, 'expansion'; others are not looked at.
      unused: from `jaxembed.hf.weights.unused_tensors`; those not given are written as zeros.
      extra_files: name → content of further files, such as README.md.

    Raises:
      UserError: something else is at `out`, or it cannot be written.
      ValueError: the arguments do not fit one another.
    """
    if architecture.config_from_hf(hf_config, "hf_config") != config:
        raise ValueError(f"hf_config does not describe the backbone {config}")
    if architecture.portable_as:
        hf_config = architecture.portable_as(hf_config)
        architecture = architecture_of(hf_config)
    if not portable(hf_config):
        raise UserError(
            f"{out}: no folder can say to other programs what this model's attention sees (config.model.attention, "
            ".attention_layers): open the run itself, with Embedder.load or jaxembed.evaluate"
        )
    if LAYER_WEIGHTS.ours in (head or {}) and not architecture.all_states:
        raise UserError(
            f"{out}: a mean of layers (config.model.pool_layers): transformers gives other states of a "
            f"{architecture.model_type}: open the run itself, or train without"
        )
    if not pool_prompt and tokenizer.in_template:
        raise UserError(
            f"{out}: no folder can say to other programs that only a part of what stands in a template is pooled "
            "(config.model.template): open the run itself, or train with config.model.pooling = 'last'"
        )
    require_cut(architecture.cuts, tokenizer, architecture.model_type)
    if default_prompt_name and default_prompt_name not in prompts:
        raise ValueError(f"default_prompt_name {default_prompt_name!r} is not one of the prompts")
    kind = jnp.dtype(dtype)
    width = config.width
    with replacing(out, _is_exported, "config.json") as folder:
        _write_json(folder / "config.json", _model_config(hf_config, architecture, dtype))
        write_tensors(folder, _backbone_tensors(architecture, config, leaves, unused or {}, kind))
        if architecture.code:
            shutil.copy(architecture.code, folder)
        tokenizer.save(folder, max_length)
        _write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
        kinds = _write_modules(folder, width, pooling, pool_prompt, projection, head or {}, config.layers, kind)
        modules = [*kinds, "Normalize"] if normalize else kinds
        if normalize:
            (folder / f"{len(kinds)}_Normalize").mkdir()
        _write_json(
            folder / "modules.json",
            [
                {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": MODULE_TYPES[name]}
                for i, name in enumerate(modules)
            ],
        )
        settings = {
            "__version__": VERSIONS,
            "model_type": "SentenceTransformer",
            "prompts": dict(prompts),
            "default_prompt_name": default_prompt_name or None,
            "similarity_fn_name": similarity,
            **({"truncate_dim": truncate_dim} if truncate_dim else {}),
            **_requirements(architecture, hf_config),
        }
        _write_json(folder / SETTINGS, settings)
        for name, content in (extra_files or {}).items():
            (folder / name).write_bytes(content)


def hub_rows(architecture: Architecture, hf_config: Mapping[str, Any], config: Any, trained: bool) -> tuple[Row, ...]:
    """Returns the table of a model in the layout of the hub; `trained`: with the head that predicts words."""
    return (*architecture.rows(config), *(language_rows(hf_config, config) if trained else ()))


def write_hub_folder(
    out: AnyPath,
    *,
    hf_config: Mapping[str, Any],
    architecture: Architecture,
    leaves: Mapping[str, Array],
    tokenizer: SavedTokenizer,
    max_length: int,
    dtype: str = "float32",
    unused: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a folder for a model's own code on the hub, all of it or nothing: no part of it speaks of embeddings.

    That code is not in the folder: config.json says of it what it said when it was read.

    Args:
      out: the folder to make; must not be there, or be empty.
      hf_config: config.json as it was read; a dtype that it names becomes that of the tensors.
      architecture: of the backbone; has `portable_as`.
      leaves: path → array of every leaf of the backbone, and of the head that predicts words where that was trained,
        'language/…'.
      tokenizer: writes its own files.
      max_length: longest text in tokens, of the tokenizer's files.
      dtype: of the tensors written: 'float32' | 'bfloat16' | 'float16'.
      unused: from `jaxembed.hf.weights.unused_tensors`: the head, where it was not trained.

    Raises:
      UserError: something is at `out`, or it cannot be written; the model has no head that predicts words.
    """
    config, kind, unused = architecture.config_from_hf(hf_config), jnp.dtype(dtype), unused or {}
    trained = any(path.startswith(LANGUAGE) for path in leaves)
    rows = hub_rows(architecture, hf_config, config, trained)
    others = [] if trained or not language_of(hf_config).own_table else list(architecture.unused(config).items())
    for name, shape in others:
        if name not in unused or unused[name].shape != shape:
            raise UserError(
                f"{out}: in the layout of the hub there is a head that predicts words, {name}; this model has none: "
                "start from a checkpoint, or train with a loss over words; or leave --layout=hub out"
            )
    said = {key: dtype for key in ("dtype", "torch_dtype") if key in hf_config}
    with replacing(out, lambda _: False, "config.json") as folder:
        _write_json(folder / "config.json", {**hf_config, **said})
        made = export_tensors(rows, {path: leaves[path] for path in leaves_of(rows)}, config.layers)
        tensors = ((name, tensor.astype(kind, copy=False)) for name, tensor in made)
        kept = ((name, unused[name].astype(kind, copy=False)) for name, _ in others)
        write_tensors(folder, itertools.chain(tensors, kept))
        tokenizer.save(folder, max_length)


def _model_config(hf_config: Mapping[str, Any], architecture: Architecture, dtype: str) -> dict[str, Any]:
    """config.json; the dtype under its names in transformers 5 and 4."""
    kept = {key: value for key, value in hf_config.items() if key not in DROPPED}
    kept = architecture.spelled(kept)
    if not architecture.fixed_attention:
        kept["use_cache"] = False  # of keys and values, which only generating has a use for
    return {**kept, "architectures": [architecture.hf_class], "dtype": dtype, "torch_dtype": dtype}


def _requirements(architecture: Architecture, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """What sentence-transformers 6 checks before it opens the folder: an older transformers would misread it."""
    needed = [architecture.transformers, *filter(None, [architecture.requires(hf_config)])]
    if "is_causal" in hf_config:
        needed.append(IS_CAUSAL_SINCE)
    newest = max(needed, key=lambda version: [int(part) for part in version.split(".")])
    return {"requirements": {"transformers": f">={newest}"}} if newest != ANY_TRANSFORMERS else {}


def _backbone_tensors(
    architecture: Architecture,
    config: Any,
    leaves: Mapping[str, Array],
    unused: Mapping[str, np.ndarray],
    dtype: np.dtype,
) -> Iterator[tuple[str, np.ndarray]]:
    rows = architecture.rows(config)
    whole = {name for row in rows if row.full_precision for name in row.names(config.layers)}
    for name, tensor in export_tensors(rows, leaves, config.layers):
        yield name, tensor.astype(np.float32 if name in whole else dtype, copy=False)
    for name, shape in architecture.unused(config).items():
        yield name, unused[name].astype(dtype, copy=False) if name in unused else np.zeros(shape, dtype)


def _write_modules(
    folder: pathlib.Path,
    width: int,
    pooling: str,
    pool_prompt: bool,
    projection: tuple[Array, Array | None] | None,
    head: Mapping[str, Array],
    layers: int,
    dtype: np.dtype,
) -> list[str]:
    """Writes what follows the backbone, each module into NUMBER_KIND; returns the kinds, the backbone's first."""
    kinds = ["Transformer"]

    def add(kind: str) -> pathlib.Path:
        kinds.append(kind)
        return folder / f"{len(kinds) - 1}_{kind}"

    if LAYER_WEIGHTS.ours in head:
        first = layers + 1 - len(head[LAYER_WEIGHTS.ours])
        config = {"word_embedding_dimension": width, "layer_start": first, "num_hidden_layers": layers}
        _write_module(add("WeightedLayerPooling"), config, (LAYER_WEIGHTS,), head, dtype)
    if pooling == "latent":
        config = {
            "width": width,
            "latents": len(head["latent_attention/latents"]),
            "heads": head["latent_attention/query/kernel"].shape[1],
        }
        _write_module(add("LatentAttention"), config, LATENT_ROWS, head, dtype)
        shutil.copy(LATENT_CODE, folder)
    _write_pooling(add("Pooling"), width, "mean" if pooling == "latent" else pooling, pool_prompt)
    if "expansion/kernel" in head:
        _write_dense(add("Dense"), head["expansion/kernel"], head.get("expansion/bias"), dtype)
    if projection is not None:
        _write_dense(add("Dense"), *projection, dtype)
    return kinds


def _write_pooling(folder: pathlib.Path, width: int, pooling: str, pool_prompt: bool) -> None:
    theirs = {ours: name for name, ours in POOLING_MODES.items()}[pooling]
    folder.mkdir()
    booleans = {key: mode == theirs for key, mode in LEGACY_POOLING.items()}
    _write_json(folder / "config.json", {"word_embedding_dimension": width, **booleans, "include_prompt": pool_prompt})


def _write_dense(folder: pathlib.Path, kernel: Array, bias: Array | None, dtype: np.dtype) -> None:
    config = {
        "in_features": kernel.shape[0],
        "out_features": kernel.shape[1],
        "bias": bias is not None,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    leaves = {DENSE_WEIGHT.ours: kernel} | ({} if bias is None else {DENSE_BIAS.ours: bias})
    _write_module(folder, config, dense_rows(bias is not None), leaves, dtype)


def _write_module(
    folder: pathlib.Path, config: dict[str, Any], rows: Sequence[Row], leaves: Mapping[str, Array], dtype: np.dtype
) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", config)
    tensors = export_tensors(rows, {row.ours: leaves[row.ours] for row in rows}, 0)
    write_tensors(folder, ((name, tensor.astype(dtype, copy=False)) for name, tensor in tensors))


def _write_json(path: pathlib.Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(out: AnyPath, replaceable: Callable[[AnyPath], bool], last: str) -> Iterator[pathlib.Path]:
    """Gives a new folder to write into, and puts it in `out`'s place when the block ends well.

    Args:
      out: the place; what is there may be an empty folder.
      replaceable: whether another folder there may go.
      last: the file that a store gets last, without which the folder cannot be opened.

    Raises:
      UserError: what is there must not go, or the folder cannot be written.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or replaceable(out))):
        raise UserError(f"{out}: is there already and is no exported folder; remove it, or export to another place")
    if isinstance(out, StorePath):
        with filling(out, last) as folder:
            yield folder
        return
    tag = uuid.uuid4().hex[:8]
    new, old = out.with_name(f".{out.name}.{tag}.new"), out.with_name(f".{out.name}.{tag}.old")
    try:
        new.mkdir(parents=True)
        yield new
        if out.exists():
            os.rename(out, old)
        try:
            os.rename(new, out)
        except OSError:
            if old.exists():
                os.rename(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _is_exported(out: AnyPath) -> bool:
    versions = read_optional_json(out / SETTINGS).get("__version__")
    return isinstance(versions, dict) and "jaxembed" in versions
