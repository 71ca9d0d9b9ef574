"""A folder of vectors, as `jaxembed.encode` writes it: shards of a fixed number of texts, and a manifest.

    manifest.json          what the vectors are, and how many; says 'complete' when all of them are there
    ids-00000.json         the ids of a shard's texts
    vectors-00000.npy      their vectors, in the same order; written after the ids, so that a shard is there or not
    vectors-00000.parquet  or both in one file: the columns id and vector
    ranges.npy             of 'int8' and 'uint8': each dimension's least and largest value, float32 [2, E]

A shard is a fixed number of texts in the order of the input, whoever wrote it, so shards that are there stay as they
are when the rest is written by another number of processes.
"""

import dataclasses
import functools
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxembed.errors import UserError
from jaxembed.run_folder import differences, write_json, write_whole
from jaxembed.storage import AnyPath, path_of, sizes
from jaxembed.vectors.quantize import CALIBRATED, PACKED, dequantize

MANIFEST, RANGES = "manifest.json", "ranges.npy"
FORMAT = "jaxembed vectors 1"
LAYOUTS = ("npy", "parquet")
_SHARD = re.compile(r"vectors-(\d{5,})\.(npy|parquet)")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder's vectors are: all that two starts of one encoding must have in common.

    Attributes:
      model: as the user named it.
      weights: a digest of its weights; see `model_source.digest_of`.
      input: as the user named it.
      files: the input's files, each with what changes when its content does.
      rows: what else decides the input's rows, such as a split; see `RowSource.identity`.
      field, id_field: columns of texts and ids; '' for the usual ones.
      prompt: what stood before each text.
      template: what each text was put into; '' for nothing.
      max_length: longest text in tokens; what was longer was cut.
      width: E, after truncation.
      dtype: one of `quantize.DTYPES`.
      compute_dtype: of the model's computation.
      normalized: whether vectors have length 1, but for the rounding of `dtype`.
      raw: whether the model's own scaling to length 1 was left out.
      similarity: how the model's vectors are meant to be compared.
      layout: 'npy' or 'parquet'.
      shard_size: texts in each shard but the last.
      calibration: texts that ranges were taken from, the first ones of the input; 0 for none.
    """

    model: str
    weights: str
    input: str
    files: tuple[tuple[str, int | str], ...]
    rows: tuple[str, ...]
    field: str
    id_field: str
    prompt: str
    template: str
    max_length: int
    width: int
    dtype: str
    compute_dtype: str
    normalized: bool
    raw: bool
    similarity: str
    layout: str
    shard_size: int
    calibration: int


class ShardWriter:
    """Writes a folder's shards, in any order and by several processes, each its own."""

    def __init__(self, path: AnyPath, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    def claim(self) -> None:
        """Makes the folder this encoding's, or makes sure that it already is.

        Raises:
          UserError: something else is there, or vectors of another encoding: it says what differs.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out={self.path}: is a file, wants a folder (it need not exist yet)")
        if (self.path / MANIFEST).is_file():
            said = _read_manifest(self.path, "--out")
            different = differences(_decisive(said["encoding"]), _decisive(_plain(self.manifest)))
            if different:
                raise UserError(
                    f"--out={self.path} holds vectors of another encoding ({'; '.join(different[:6])}): take another "
                    "--out, or the same flags"
                )
            return
        if self.path.is_dir() and not all(name.startswith(f".{MANIFEST}.") for name in sizes(self.path)):
            raise UserError(f"--out={self.path}: has files but no {MANIFEST}: take another --out, or empty the folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_manifest({"complete": False})
        except OSError as error:
            raise UserError(f"--out={self.path}: cannot be written: {error.strerror}") from error

    def ranges(self) -> np.ndarray | None:
        """Returns the ranges of the dimensions, float32 [2, E]; None where there are none, or not yet."""
        wanted = self.manifest.dtype in CALIBRATED and (self.path / RANGES).is_file()
        return _load_npy(self.path / RANGES) if wanted else None

    def write_ranges(self, ranges_2xE: np.ndarray) -> None:
        """Writes the ranges of the dimensions, float32 [2, E]."""
        write_whole(self.path / RANGES, _npy(ranges_2xE))

    def done(self) -> set[int]:
        """Returns the numbers of the shards that are there."""
        return {int(match[1]) for name in sizes(self.path) if (match := _SHARD.fullmatch(name))}

    def write(self, shard: int, ids: Sequence[str], stored: np.ndarray) -> None:
        """Writes a shard, whole or not at all.

        Args:
          shard: its number, from 0.
          ids: of its texts.
          stored: their vectors, from `quantize`.

        Raises:
          UserError: the disk is full or broken, or the store refuses.
        """
        files = {_name(shard, "parquet"): _parquet(ids, stored)} if self.manifest.layout == "parquet" else {}
        if not files:
            said = json.dumps(list(ids), ensure_ascii=False).encode()
            files = {f"ids-{shard:05}.json": said, _name(shard, "npy"): _npy(stored)}
        try:
            for name, content in files.items():
                write_whole(self.path / name, content)
        except OSError as error:
            raise UserError(
                f"--out={self.path}: cannot be written: {error.strerror}. The shards that are there stay: make room, "
                "and start again with the same flags"
            ) from error

    def finish(self, count: int) -> None:
        """Says that all vectors are there, `count` of them."""
        self._write_manifest({"complete": True, "count": count, "shards": -(-count // self.manifest.shard_size)})

    def _write_manifest(self, progress: dict[str, Any]) -> None:
        write_json(self.path / MANIFEST, {"format": FORMAT, **progress, "encoding": _plain(self.manifest)})


@dataclasses.dataclass(frozen=True)
class VectorFolder:
    """Vectors that `jaxembed.encode` wrote. Make one with `VectorFolder.open`.

    Attributes:
      path: the folder.
      count: how many vectors.
      manifest: what they are.
    """

    path: AnyPath
    count: int
    manifest: Manifest

    @classmethod
    def open(cls, path: str | AnyPath, where: str) -> "VectorFolder":
        """Opens a folder.

        Args:
          path: on disk or in a store.
          where: the flag that names it, for messages.

        Raises:
          UserError: it holds no vectors, or not all of them yet.
        """
        folder = path_of(path)
        said = _read_manifest(folder, where)
        if not said["complete"]:
            raise UserError(f"{where}={folder}: not all vectors are there: start the same jaxembed.encode again")
        encoding = said["encoding"]
        rest = {"files": tuple(map(tuple, encoding["files"])), "rows": tuple(encoding["rows"])}
        return cls(folder, said["count"], Manifest(**encoding | rest))

    def __len__(self) -> int:
        return self.count

    @property
    def width(self) -> int:
        """E."""
        return self.manifest.width

    @property
    def dtype(self) -> str:
        """One of `quantize.DTYPES`."""
        return self.manifest.dtype

    @property
    def similarity(self) -> str:
        """How the model's vectors are meant to be compared."""
        return self.manifest.similarity

    @property
    def normalized(self) -> bool:
        """Whether the vectors have length 1."""
        return self.manifest.normalized

    @property
    def model(self) -> str:
        """The model, as it was named."""
        return self.manifest.model

    @property
    def prompt(self) -> str:
        """What stood before each text."""
        return self.manifest.prompt

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number of the first, vectors float32 [n, E]) of each shard in order; see `quantize.dequantize`.

        Raises:
          UserError: a shard is missing or broken.
        """
        start = 0
        for shard in range(self._shards):
            _, stored = self._read(shard, ids=False)
            yield start, dequantize(stored, self.dtype, self.width, self._ranges)
            start += len(stored)

    def ids(self) -> Iterator[str]:
        """Yields the texts' ids, in order.

        Raises:
          UserError: a shard is missing or broken.
        """
        for shard in range(self._shards):
            yield from self._read(shard, ids=True)[0]

    def vectors(self) -> np.ndarray:
        """Returns all vectors: float32 [count, E]."""
        vectors = np.zeros((self.count, self.width), np.float32)
        for start, block in self.blocks():
            vectors[start : start + len(block)] = block
        return vectors

    @property
    def _shards(self) -> int:
        return -(-self.count // self.manifest.shard_size)

    @functools.cached_property
    def _ranges(self) -> np.ndarray | None:
        return _load_npy(self.path / RANGES) if self.dtype in CALIBRATED else None

    def _read(self, shard: int, ids: bool) -> tuple[list[str], np.ndarray]:
        """Returns a shard's ids, or its vectors as they are stored: of what is not asked for, nothing."""
        n = min(self.manifest.shard_size, self.count - shard * self.manifest.shard_size)
        file = self.path / _name(shard, self.manifest.layout)
        try:
            if self.manifest.layout == "parquet":
                names, stored = _read_parquet(file.read_bytes(), ids)
            elif ids:
                names, stored = json.loads((self.path / f"ids-{shard:05}.json").read_text()), np.zeros(0)
            else:
                names, stored = [], _load_npy(file)
        except FileNotFoundError as error:
            raise UserError(f"{self.path}: shard {shard} is missing: was a file removed? Encode anew") from error
        except ValueError as error:
            raise UserError(f"{file}: not a shard of vectors: {error}") from error
        width = -(-self.width // 8) if self.dtype in PACKED else self.width
        if len(names if ids else stored) != n or (not ids and stored.shape[1:] != (width,)):
            raise UserError(f"{file}: does not hold {n} vectors of {self.width} dimensions, as {MANIFEST} says")
        return names, stored


def _read_manifest(folder: AnyPath, where: str) -> dict[str, Any]:
    try:
        said = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{where}={folder}: no {MANIFEST} here: wants a folder that jaxembed.encode wrote") from error
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST}: broken JSON: {error}") from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise UserError(f"{folder / MANIFEST}: not of the format {FORMAT!r}: encode anew")
    return said


def _plain(manifest: Manifest) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(manifest)))


def _decisive(encoding: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what only says how the user named things, and where files lie."""
    return {**encoding, "model": "", "input": "", "files": files_said(encoding["files"])}


def files_said(files: Sequence[Sequence[int | str]]) -> list[list[int | str]]:
    """Returns a manifest's files by their names alone, wherever they lay."""
    return [[file[0].replace("\\", "/").rpartition("/")[2], *file[1:]] for file in files]


def _name(shard: int, layout: str) -> str:
    return f"vectors-{shard:05}.{layout}"


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _load_npy(file: AnyPath) -> np.ndarray:
    return np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)


def _parquet(ids: Sequence[str], stored: np.ndarray) -> bytes:
    import pyarrow
    import pyarrow.parquet

    values = pyarrow.array(np.ascontiguousarray(stored).reshape(-1))
    vectors = pyarrow.FixedSizeListArray.from_arrays(values, stored.shape[1])
    table = pyarrow.table({"id": pyarrow.array(ids, pyarrow.string()), "vector": vectors})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="none")
    return buffer.getvalue()


def _read_parquet(content: bytes, ids: bool) -> tuple[list[str], np.ndarray]:
    import pyarrow.parquet

    column = pyarrow.parquet.read_table(io.BytesIO(content), columns=["id" if ids else "vector"]).column(0)
    if ids:
        return column.to_pylist(), np.zeros(0)
    vectors = column.combine_chunks()
    return [], vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), -1)
