"""Rows of a TensorFlow Datasets data set, from its ArrayRecord files and without TensorFlow."""

import contextlib
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxembed.config import SourceConfig, nearest
from jaxembed.data.record_formats import BadRecord
from jaxembed.data.rows import Chooser, Row, reason
from jaxembed.errors import UserError

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

_ROWS = 1024  # read at a time
_OWN = "jaxembed.datasets"  # builders that come with this package, one a module, the module named like the data set
# tfds imports these parts of itself, which register its older text data sets, only when they are asked for.
_TEXT_PARTS = ("text", "question_answering", "ranking", "summarization", "text_simplification", "translate")
_ANEW = "prepare it anew with `tfds build --file_format=array_record`"


class TfdsRows:
    """The rows of one split, bytes turned to text. A `RowSource`."""

    kind = "tfds"

    def __init__(self, source: SourceConfig, where: str) -> None:
        """Opens the data set, preparing it first where it is not and tfds or this package knows how.

        Args:
          source: name (with configuration and version) and data_dir, or the path of a prepared one; the split.
          where: the config field of the source, for messages.

        Raises:
          UserError: no such data set, version or split; it cannot be prepared; its files are not for random access.
        """
        builder = _from_folder(source.path, where) if source.path else _by_name(source.name, source.data_dir, where)
        name = source.name or builder.name
        try:
            self._data = builder.as_data_source(split=source.split)
        except NotImplementedError as error:
            stands = f"tfds:{name} is prepared in {builder.data_dir} as {builder.info.file_format.value}"
            other = f"{_ANEW}, or set {where}.data_dir to another folder" if source.name else _ANEW
            raise UserError(f"{where}: {stands}, which only TensorFlow reads: {other}") from error
        except (ValueError, KeyError) as error:
            raise UserError(f"{where}.split: tfds:{name}: {_said(error)}") from error
        self._columns = sorted(builder.info.features)  # they come in any order
        self.title = f"tfds:{name}:{source.split}"
        self.label = f"tfds:{name}"
        self.licence = builder.info.redistribution_info.license.strip()
        shards = (pathlib.Path(shard) for shard in builder.info.splits[source.split].filepaths)
        self.files = (pathlib.Path(builder.data_dir) / "features.json", *shards)
        self.identity = (builder.info.full_name, source.split, self.licence)
        self.done, self.total = 0, len(self._data)

    def rows(self, choose: Chooser) -> Iterator[tuple[int, Row]]:
        """See `RowSource`."""
        columns = choose(self.title, self._columns)
        for start in range(0, self.total, _ROWS):
            chunk = range(start, min(start + _ROWS, self.total))
            try:
                examples = self._data.__getitems__(chunk)
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"{self.title}: cannot read on after row {start}: {_said(error)}") from error
            for self.done, example in enumerate(examples, start + 1):
                yield self.done, _row({column: example[column] for column in columns})

    def name(self, number: int) -> str:
        """See `RowSource`."""
        return f"{self.title} row {number}"

    def places(self) -> list[tuple[int, str]]:
        """See `RowSource`."""
        return [(0, f"{self.title} row ")]


def _from_folder(path: str, where: str) -> "DatasetBuilder":
    import tensorflow_datasets as tfds

    folder = pathlib.Path(path).expanduser()
    try:
        return tfds.builder_from_directory(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}.path: {path} is no prepared tfds data set: wants the folder with its dataset_info.json, such as "
            "DATA_DIR/NAME/1.0.0"
        ) from error


def _by_name(name: str, data_dir: str, where: str) -> "DatasetBuilder":
    if re.match(r"\w+:[A-Za-z]", name):
        raise UserError(
            f"{where}.name: {name!r} is no name of tfds: a version is three numbers, as in NAME:1.0.0; data sets of "
            "the Hugging Face hub are source 'hf'"
        )
    module = f"{_OWN}.{_bare(name)}"
    if _bare(name) and importlib.util.find_spec(module):
        importlib.import_module(module)  # which registers its builder
    builder = _builder(name, data_dir, where)
    if _is_prepared(builder):
        return builder
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(try_download_gcs=False)  # what lies there is for TensorFlow
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_config=config, file_format="array_record")
    except Exception as error:  # a builder is a program, which may raise anything
        builder = _builder(name, data_dir, where)
        if not _is_prepared(builder):  # unless another process was faster
            raise UserError(f"{where}.name: tfds:{name} cannot be prepared: {_said(error)}") from error
    return builder


def _builder(name: str, data_dir: str, where: str) -> "DatasetBuilder":
    import tensorflow_datasets as tfds

    place = {"data_dir": os.path.expanduser(data_dir)} if data_dir else {}
    not_found = tfds.core.registered.DatasetNotFoundError
    try:
        try:
            return tfds.builder(name, **place)
        except not_found:
            for part in _TEXT_PARTS:
                importlib.import_module(f"tensorflow_datasets.{part}")
            return tfds.builder(name, **place)
    except not_found as error:
        close = nearest(_bare(name), tfds.list_builders(with_community_datasets=False))
        raise UserError(f"{where}.name: tfds knows no data set {name!r}{close}") from error
    except (ValueError, TypeError, AssertionError) as error:
        said = _said(error).split(". Here are")[0]
        raise UserError(f"{where}.name: tfds:{name}: {said}; wants NAME[/CONFIGURATION][:VERSION]") from error


def _is_prepared(builder: "DatasetBuilder") -> bool:
    return (builder.data_path / "dataset_info.json").exists()  # tfds' own test warns where there is nothing yet


def _bare(name: str) -> str:
    """Returns the name without configuration and version."""
    return re.match(r"\w*", name)[0]


def _row(example: dict[str, Any]) -> Row:
    row = {}
    for column, value in example.items():
        try:
            row[column] = _plain(value)
        except UnicodeDecodeError:
            return BadRecord(f"{column!r} is not UTF-8")
    return row


def _plain(value: Any) -> Any:
    """Turns bytes into text and arrays into lists, however deep."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _said(error: BaseException) -> str:
    """Returns what went wrong first, which tfds wraps in further errors and introduces by the arguments."""
    while error.__cause__:
        error = error.__cause__
    return re.sub(r"^Failed to construct dataset .*?}\": ", "", reason(error)).rstrip(" .")
