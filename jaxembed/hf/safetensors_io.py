"""Safetensors files: memory-mapped reading that trusts nothing, and writing in shards.

The format (https://huggingface.co/docs/safetensors): 8 bytes of little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}`, then the tensors' bytes, without gaps or overlaps.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxembed.errors import UserError
from jaxembed.hf.files import inside, parse_json, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in (
        ("BOOL", np.bool_),
        ("U8", np.uint8),
        ("I8", np.int8),
        ("U16", np.uint16),
        ("I16", np.int16),
        ("U32", np.uint32),
        ("I32", np.int32),
        ("U64", np.uint64),
        ("I64", np.int64),
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("F32", np.float32),
        ("F64", np.float64),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
    )
}


def open_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Opens the weights of a folder: model.safetensors, or the shards that model.safetensors.index.json names.

    Returns:
      Name → read-only view of the memory-mapped file; nothing is read yet.

    Raises:
      UserError: there are no safetensors, a shard is missing or lies elsewhere, a file is damaged, or a tensor is
        there twice.
    """
    single = inside(folder, SINGLE, folder)
    if single.is_file():
        return open_file(single)
    index = inside(folder, INDEX, folder)
    if not index.is_file():
        raise _no_weights(folder)
    return _open_shards(folder, index)


def _no_weights(folder: pathlib.Path) -> UserError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return UserError(
            f"{folder}: the weights are in {pickles[0]}, a format that can run code when read; "
            "convert them to safetensors (in transformers: AutoModel.from_pretrained(…).save_pretrained(…))"
        )
    return UserError(f"{folder}: has neither {SINGLE} nor {INDEX}")


def _open_shards(folder: pathlib.Path, index: pathlib.Path) -> dict[str, np.ndarray]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: 'weight_map' does not map tensor names to file names")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not shard or pathlib.PurePath(shard).name != shard:
            raise UserError(f"{index}: {shard!r} is not the name of a file beside it")
    paths = [inside(folder, shard, index) for shard in shards]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{index}: names files that are missing: {', '.join(missing)}")
    tensors: dict[str, np.ndarray] = {}
    for path in paths:
        for name, tensor in open_file(path).items():
            if name in tensors:
                raise UserError(f"{path}: tensor {name!r} is also in another file of {index.name}")
            tensors[name] = tensor
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise UserError(f"{index}: names tensors that its files do not hold: {', '.join(absent)}")
    return tensors


def open_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Opens one safetensors file; see `open_tensors`."""
    size = path.stat().st_size
    if size < 8:
        raise UserError(f"{path}: is truncated: {size} bytes hold no safetensors header")
    content = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    header_bytes = int(content[:8].view("<u8")[0])
    if header_bytes > MAX_HEADER_BYTES:
        raise UserError(f"{path}: is no safetensors file: its header would have {header_bytes:,} bytes")
    if header_bytes > size - 8:
        raise UserError(f"{path}: is truncated: {size:,} bytes, its header alone has {header_bytes:,}")
    data = content[8 + header_bytes :]
    entries = _entries(path, content[8 : 8 + header_bytes].tobytes())
    _check_spans(path, entries, data.size)
    return {
        name: data[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries.items()
        for begin, end in [entry["data_offsets"]]
    }


def _entries(path: pathlib.Path, header: bytes) -> dict[str, dict[str, Any]]:
    """Parses the header and checks each tensor's entry by itself."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise UserError(f"{path}: is there twice in the header: {', '.join(twice)}")
        return dict(pairs)

    entries = parse_json(header, path, dict, no_duplicates)
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        fault = _fault(entry)
        if fault:
            raise UserError(f"{path}: tensor {name!r}: {fault}")
    return entries


def _fault(entry: Any) -> str:
    """Says what is wrong with a tensor's header entry, '' for nothing."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "its header entry lacks dtype, shape or data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}"
    if not _counts(shape):
        return f"shape {shape!r} is not a list of sizes"
    if not _counts(offsets) or len(offsets) != 2:
        return f"data_offsets {offsets!r} are not two offsets"
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        return f"{dtype} of shape {shape} has {wanted:,} bytes, its data_offsets {offsets} span another number"
    return ""


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_spans(path: pathlib.Path, entries: Mapping[str, dict[str, Any]], data_bytes: int) -> None:
    """The tensors lie one behind the other and fill the file."""
    spans = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    end_before = 0
    for begin, end, name in spans:
        if begin != end_before:
            raise UserError(f"{path}: tensor {name!r} begins at byte {begin:,}, the one before ends at {end_before:,}")
        end_before = end
    cut = [name for _, end, name in spans if end > data_bytes]
    if cut:
        raise UserError(
            f"{path}: is truncated: {data_bytes:,} of {end_before:,} bytes of tensors; cut or absent: {', '.join(cut)}"
        )
    if end_before < data_bytes:
        raise UserError(f"{path}: {data_bytes - end_before:,} bytes behind the last tensor belong to none")


def write_tensors(
    folder: pathlib.Path,
    tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes model.safetensors, or shards with an index where it would be larger than `max_shard_bytes`.

    At the most one shard is held in memory. Files appear under their names when all are complete. An iterable may
    yield views in any memory layout; they are made contiguous here.

    Raises:
      UserError: the folder cannot be written to.
    """
    try:
        _write_tensors(folder, tensors.items() if isinstance(tensors, Mapping) else tensors, max_shard_bytes)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error


def _write_tensors(folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int) -> None:
    parts: list[pathlib.Path] = []
    names: list[list[str]] = []
    total_bytes = 0
    try:
        for shard in _shards(tensors, max_shard_bytes):
            parts.append(folder / f".{SINGLE}.{len(parts)}.partial")
            names.append(list(shard))
            total_bytes += sum(tensor.nbytes for tensor in shard.values())
            _save(shard, parts[-1])
        finals = [SINGLE]
        if len(parts) > 1:
            finals = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        for part, final in zip(parts, finals):
            os.replace(part, folder / final)
        if len(parts) > 1:
            weight_map = {name: final for final, group in zip(finals, names) for name in group}
            index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _shards(tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """Groups tensors, in their order, into contiguous arrays of up to `max_shard_bytes` together."""
    shard: dict[str, np.ndarray] = {}
    seen: set[str] = set()
    shard_bytes = 0
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"tensor {name!r} is to be written twice")
        seen.add(name)
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, shard_bytes = {}, 0
        shard[name] = np.asarray(tensor, order="C")
        shard_bytes += tensor.nbytes
    yield shard


def _save(shard: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(dict(shard), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
