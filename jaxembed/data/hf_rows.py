"""Rows of a data set of the `datasets` package: on disk, or by its name on the Hugging Face hub."""

import importlib.util
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxembed.config import SourceConfig
from jaxembed.data.rows import Chooser, Row, reason
from jaxembed.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS = 1024  # read at a time


class HfRows:
    """The rows of one split, read through memory-mapped Arrow files. A `RowSource`."""

    kind = "hf"

    def __init__(self, source: SourceConfig, where: str) -> None:
        """Opens the data set, fetching it first where it is only on the hub.

        Args:
          source: path of a folder that `save_to_disk` wrote, or name and subset on the hub; the split.
          where: the config field of the source, for messages.

        Raises:
          UserError: `datasets` is not installed; no such folder, data set or split; the hub cannot be read.
        """
        if importlib.util.find_spec("datasets") is None:
            raise UserError(f"{where}.source = 'hf' needs the package datasets: pip install datasets")
        self._data = _from_folder(source, where) if source.path else _from_hub(source, where)
        name = source.name or pathlib.Path(source.path).expanduser().resolve().name
        whole_name = "/".join(filter(None, (name, source.subset)))
        self.title = f"hf:{whole_name}:{source.split}"
        self.label = f"hf:{whole_name}"
        self.licence = (self._data.info.license or "").strip()
        # The bytes rather than the data set's own fingerprint, which depends on where and when it was fetched.
        self.files = tuple(pathlib.Path(file["filename"]) for file in self._data.cache_files)
        self.identity = (source.split, self.licence)
        self.done, self.total = 0, len(self._data)

    def rows(self, choose: Chooser) -> Iterator[tuple[int, Row]]:
        """See `RowSource`."""
        columns = choose(self.title, self._data.column_names)
        self.done = 0
        try:
            for batch in self._data.select_columns(columns).with_format(None).iter(_ROWS):
                for values in zip(*batch.values()):
                    self.done += 1
                    yield self.done, dict(zip(batch, values))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.title}: cannot read on after row {self.done}: {reason(error)}") from error

    def name(self, number: int) -> str:
        """See `RowSource`."""
        return f"{self.title} row {number}"

    def places(self) -> list[tuple[int, str]]:
        """See `RowSource`."""
        return [(0, f"{self.title} row ")]


def _from_folder(source: SourceConfig, where: str) -> "Dataset":
    import datasets

    try:
        saved = datasets.load_from_disk(pathlib.Path(source.path).expanduser(), keep_in_memory=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}.path: {source.path} is no folder that save_to_disk of datasets wrote: {reason(error)}"
        ) from error
    # A data set saved by itself need not say which split it is: then it is the default one.
    splits: Any = {str(saved.split or SourceConfig.split): saved} if isinstance(saved, datasets.Dataset) else saved
    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute({k: len(v) for k, v in splits.items()})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{where}.split: {source.path}: {reason(error)}") from error
    return datasets.concatenate_datasets([splits[p.splitname].select(range(p.from_, p.to)) for p in parts])


def _from_hub(source: SourceConfig, where: str) -> "Dataset":
    import datasets

    try:
        return datasets.load_dataset(source.name, source.subset or None, split=source.split, keep_in_memory=False)
    except Exception as error:  # files of any format, read by as many packages
        said = str(error.__cause__ or error).strip() or type(error).__name__
        raise UserError(f"{where}.name: hf:{source.name} cannot be loaded: {said.splitlines()[0]}") from error
