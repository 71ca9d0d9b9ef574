"""Reading files of a folder that somebody else wrote: no way out of the folder, JSON objects of a sane size."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxembed.errors import UserError
from jaxembed.storage import AnyPath

MAX_JSON_BYTES = 100_000_000


def inside(folder: pathlib.Path, relative: str, where: pathlib.Path) -> pathlib.Path:
    """Returns `folder / relative`, which need not exist.

    Links are followed as far as the folder itself, or, for a snapshot in huggingface_hub's cache, the cached
    repository that its links lead into.

    Args:
      folder: an existing folder.
      relative: what a file in it says, '' for the folder itself.
      where: the file that says so, for the message.

    Raises:
      UserError: the path is absolute, has a '..' or a backslash in it, or is a link that leads out of the folder.
    """
    path = pathlib.PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or "\\" in relative or "\0" in relative:
        raise UserError(f"{where}: the path {relative!r} leads out of its folder; only plain relative paths are read")
    target = folder / relative
    if not target.resolve().is_relative_to(_root(folder.resolve())):
        raise UserError(f"{target}: this link leads out of its folder; put the file itself there")
    return target


def _root(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or for one in a hub cache (REPOSITORY/snapshots/REVISION, files linked to blobs/) the repository."""
    for parent in (folder, *folder.parents):
        repository = parent.parent.parent
        if parent.parent.name == "snapshots" and (repository / "blobs").is_dir():
            return repository
    return folder


def read_json(path: AnyPath, kind: type = dict) -> Any:
    """Returns the content of a JSON file, a `kind` (dict or list).

    Raises:
      UserError: the file is missing, larger than MAX_JSON_BYTES, not JSON, or something else than a `kind`.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes; no such file is that large")
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_json(text, path, kind)


def parse_json(
    text: bytes, path: AnyPath, kind: type = dict, hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Returns what the JSON `text` of the file `path` says. `hook` is json's `object_pairs_hook`; see `read_json`."""
    try:
        content = json.loads(text, object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}, wants a {kind.__name__}")
    return content


def read_optional_json(path: AnyPath) -> dict[str, Any]:
    """Returns the JSON object of a file, {} where there is none."""
    return read_json(path) if path.is_file() else {}


def listing(items: Sequence[str], limit: int = 20) -> str:
    """Joins items with '; ', those beyond the limit only counted."""
    more = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more
