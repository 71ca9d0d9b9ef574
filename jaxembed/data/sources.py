"""Where training records come from, in words: the shorthand of a source, and the files that a path stands for.

Everything here answers at once: no file is read, and no package is imported that takes a moment.
"""

import glob
import pathlib
import re

from jaxembed.config import AUTO, SourceConfig
from jaxembed.errors import UserError
from jaxembed.storage import AnyPath, StorePath, is_url, path_of, sizes

DATA_SETS = ("tfds", "hf")  # sources whose rows a package of their own reads

_SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".json", ".json.gz"),
    "parquet": (".parquet",),
    "txt": (".txt", ".txt.gz"),
}
_ALL_SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
_ROW_SUFFIXES = _SUFFIXES["jsonl"] + _SUFFIXES["parquet"]
_INFO_FILES = ("dataset_info.json", "dataset_dict.json")  # what a folder written by tfds or datasets has
_SPLIT = r"[A-Za-z][\w.-]*(\[[^\]]*\])?"
_SHORTHAND = re.compile(rf"(?P<source>tfds|hf):(?P<name>.+?)(:(?P<split>{_SPLIT}(\+{_SPLIT})*))?")


def parse_spec(spec: str) -> dict[str, str]:
    """Returns the fields of `SourceConfig` that a source's shorthand stands for.

    Args:
      spec: a file, folder or glob, on disk or in a store; or 'tfds:NAME[:SPLIT]' or 'hf:NAME[:SPLIT]', NAME being a
        data set's name or the folder of a prepared one. A split begins with a letter and may be a slice or a sum
        (`test`, `train[:10%]`); a version, as in 'tfds:glue/mrpc:2.0.0', is a part of the name.

    Raises:
      UserError: no name after 'tfds:' or 'hf:'.
    """
    if not spec.startswith(tuple(f"{source}:" for source in DATA_SETS)):
        return {"source": AUTO, "path": spec}
    match = _SHORTHAND.fullmatch(spec)
    if not match:
        raise UserError(f"{spec!r} names no data set: wants tfds:NAME, tfds:NAME:SPLIT, hf:NAME or hf:NAME:SPLIT")
    name = match["name"]
    fields = {"source": match["source"], ("path" if _means_folder(name) else "name"): name}
    return fields | ({"split": match["split"]} if match["split"] else {})


def _means_folder(name: str) -> bool:
    """Tells a prepared data set's folder from a name, though a folder of the name may happen to be there."""
    return name.startswith((".", "/", "~")) or (not is_url(name) and _is_data_set(pathlib.Path(name)))


def _is_data_set(folder: AnyPath) -> bool:
    return any((folder / name).is_file() for name in _INFO_FILES)


def check_place(source: SourceConfig, field: str) -> None:
    """Refuses a path that leads nowhere. What has only a name is not looked for.

    Args:
      source: the source.
      field: the flag or config field of its path, for messages.

    Raises:
      UserError: there is nothing at the path, or files of several kinds.
    """
    if source.source not in DATA_SETS:
        find_files(source, field)
    elif source.path and not pathlib.Path(source.path).expanduser().is_dir():
        raise UserError(f"{field}: there is no folder {source.path}")


def find_files(source: SourceConfig, field: str) -> tuple[str, tuple[AnyPath, ...]]:
    """Returns the kind of a source's files, 'jsonl', 'parquet' or 'txt', and the files in the order of their names.

    A folder stands for all files of a known kind in it and its subfolders, a glob (`**` goes through subfolders) for
    all files that it matches. Hidden files are left out of both.

    Args:
      source: path and kind.
      field: the flag or config field of the path, for messages.

    Raises:
      UserError: no such file, none in the folder or of the glob, or several kinds.
    """
    path, said = path_of(source.path), f"{field}: {source.path}"
    if path.is_dir():
        files = _files_in(path, source.source, said)
    elif path.is_file():
        files = (path,)
    elif glob.has_magic(source.path):
        files = _matching(path)
        if not files:
            raise UserError(f"{said}: no file matches")
    else:
        raise UserError(f"{field}: no such file or folder: {source.path}")
    return (_common_kind(files, said) if source.source == AUTO else source.source), files


def _matching(path: AnyPath) -> tuple[AnyPath, ...]:
    if isinstance(path, StorePath):
        return tuple(file for file in path.glob_files() if not file.name.startswith("."))
    return tuple(sorted(f for f in map(pathlib.Path, glob.glob(str(path), recursive=True)) if f.is_file()))


def _files_in(folder: AnyPath, kind: str, said: str) -> tuple[AnyPath, ...]:
    if kind == AUTO and _is_data_set(folder):
        raise UserError(f"{said} is the folder of a prepared data set: give it as tfds:FOLDER or hf:FOLDER")
    names = map(pathlib.PurePosixPath, sizes(folder))
    visible = sorted(name for name in names if not any(part.startswith(".") for part in name.parts))
    # Beside other files, plain text is what was written about them: README.txt, LICENSE.txt.
    choices = (_ROW_SUFFIXES, _SUFFIXES["txt"]) if kind == AUTO else (_SUFFIXES[kind],)
    for wanted in choices:
        files = tuple(folder / str(name) for name in visible if name.name.endswith(wanted))
        if files:
            return files
    raise UserError(f"{said}: no {', '.join(sum(choices, ()))} file in this folder or its subfolders")


def _common_kind(files: tuple[AnyPath, ...], said: str) -> str:
    first_of: dict[str, AnyPath] = {}
    for file in files:
        kind = next((kind for kind, suffixes in _SUFFIXES.items() if file.name.endswith(suffixes)), "")
        if not kind:
            raise UserError(f"{said}: {file.name} ends in none of {', '.join(_ALL_SUFFIXES)}: rename it, or set source")
        first_of.setdefault(kind, file)
    if len(first_of) > 1:
        raise UserError(
            f"{said}: files of two kinds, {' and '.join(file.name for file in first_of.values())}: "
            f"set source to {' or '.join(first_of)}, or name the files of one kind by a glob"
        )
    return next(iter(first_of))


def label_of(path: str, n_files: int) -> str:
    """Returns a short name without machine paths: 'a.jsonl', 'folder/ (12 files)', 'folder/*.parquet (12 files)'."""
    place = path_of(path)
    if place.is_file():
        return place.name
    if place.is_dir():
        name = f"{place.resolve().name}/"
    else:  # the folder before the first wild card says what the files are; all before it is this machine's affair
        parts = place.parts
        wild = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        name = "/".join(part for part in parts[max(0, wild - 1) :] if part != "/")
    return f"{name} ({n_files} file{'s' * (n_files != 1)})"
