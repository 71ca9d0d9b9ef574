"""Records out: JSON lines or parquet of the format 'jaxembed', which training takes as they are."""

import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxembed import storage
from jaxembed.data.record_formats import Record
from jaxembed.errors import UserError
from jaxembed.storage import AnyPath, path_of
from jaxembed.vectors.writing import text_stream

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
_GROUP = 8192  # rows written to a parquet file together
_NAMES = ("group", "id", "label", "instruction")


def require_out(spec: str) -> AnyPath:
    """Returns where --out goes to.

    Raises:
      UserError: it is missing, has another ending, is there already, or lies where nothing can be written.
    """
    if not spec:
        raise UserError("--out is missing: name the file of the records, as records.jsonl.gz")
    path = path_of(spec)
    if not path.name.endswith(ENDINGS):
        raise UserError(f"--out={spec}: wants a name that ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if path.exists():
        raise UserError(f"--out={spec}: is there already: take another name, or remove it")
    require_folder(path, f"--out={spec}")
    return path


def report_folder(out: AnyPath, named: str) -> AnyPath:
    """Returns where the report goes to: a folder beside the records, unless another is named.

    Raises:
      UserError: it cannot be written.
    """
    folder = path_of(named) if named else out.parent / f"{out.name}.report"
    said = f"--report={folder}"
    if isinstance(folder, pathlib.Path) and folder.exists() and not folder.is_dir():
        raise UserError(f"{said}: is a file, wants a folder (it need not exist yet)")
    require_folder(folder, said)
    return folder


def require_folder(path: AnyPath, said: str) -> None:
    """Makes sure that a file or folder of this machine can be made at a path, trying in the folder above.

    Raises:
      UserError: it cannot.
    """
    if isinstance(path, pathlib.Path):
        above = next(folder for folder in path.absolute().parents if folder.exists())
        try:
            with tempfile.TemporaryFile(dir=above):
                pass
        except OSError as error:
            raise UserError(f"{said}: cannot be written: {above}: {error.strerror or error}") from error


def row_of(
    record: Record, negatives: Sequence[str], scores: Sequence[float], negative_queries: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns a record as a row.

    Args:
      record: gives the rest.
      negatives: all that it is to have.
      scores: one for each positive and negative; or none.
      negative_queries: one for each negative; or none.
    """
    row: dict[str, Any] = {"query": record.query}
    row["positive"] = record.positives[0] if len(record.positives) == 1 else list(record.positives)
    if negatives:
        row["negative"] = list(negatives)
    if negative_queries:
        row["negative_query"] = list(negative_queries)
    if len(scores):
        row["scores"] = [round(float(score), 6) for score in scores]
    return row | {name: getattr(record, name) for name in _NAMES if getattr(record, name)}


def write_records(path: AnyPath, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows to a file that is whole or not there; its folder is made.

    The same rows give the same bytes.

    Raises:
      UserError: it cannot be written, or there is no row.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: no record is left, so nothing is written: loosen the rules")
    try:
        if isinstance(path, pathlib.Path):
            path.parent.mkdir(parents=True, exist_ok=True)
        place = storage.staged(path)
        part = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        try:
            write = _write_parquet if path.name.endswith(".parquet") else _write_lines
            write(part, itertools.chain([first], rows), path.name)
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)
        storage.publish(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write_lines(part: pathlib.Path, rows: Iterator[dict[str, Any]], name: str) -> None:
    with text_stream(part, name.endswith(".gz")) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(part: pathlib.Path, rows: Iterator[dict[str, Any]], _: str) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.list_(pyarrow.string())
    types = {"query": pyarrow.string(), "positive": texts, "negative": texts, "negative_query": texts}
    types |= {"scores": pyarrow.list_(pyarrow.float32())} | dict.fromkeys(_NAMES, pyarrow.string())
    schema = pyarrow.schema(list(types.items()))
    with pyarrow.parquet.ParquetWriter(part, schema) as writer:
        while waiting := list(itertools.islice(rows, _GROUP)):
            for row in waiting:
                row["positive"] = [row["positive"]] if isinstance(row["positive"], str) else row["positive"]
            writer.write_table(pyarrow.Table.from_pylist(waiting, schema))
