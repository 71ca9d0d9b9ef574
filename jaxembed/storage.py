"""Object stores: the one room that knows URLs such as s3://BUCKET/FOLDER and gs://BUCKET/FOLDER.

`path_of` makes a path of what the user wrote: a `pathlib.Path`, or for a URL a `StorePath`, which has those of its
habits that this package uses. Both can be read through the same calls. What must be a local file or folder is copied
(`local`), what is written piece by piece is written locally and sent there (`staged`, `publish`, `filling`).

Stores have no folders, no renaming and no appending, but a file is there whole or not at all. So a folder is complete
once the file that is sent last is there. fsspec (https://filesystem-spec.readthedocs.io) and its packages speak with
the stores; they are imported when the first URL is met. A store that refuses is a `UserError`, one that cannot be
reached or fails is a `StoreLost`; a file that is not there is a FileNotFoundError, as on disk.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxembed.errors import StoreLost, UserError

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
# Words of refusals by a store, or by a package without an account for it, whose class does not tell that they are.
_REFUSALS = re.compile(r"Forbidden|Access ?Denied|[Uu]nable to locate credentials|credentials were not found|, 401$")
# What tells one content of a file from another, the surest first: digests, then times of change.
_MARKS = ("md5Hash", "ETag", "etag", "mtime", "LastModified", "created")


def is_url(text: str) -> bool:
    """Tells a URL from a path of this machine, by its form."""
    return _URL.fullmatch(text) is not None


def path_of(place: "str | AnyPath") -> "AnyPath":
    """Returns the path that a text names: `StorePath` of a URL, else a `pathlib.Path`, with '~' replaced.

    Raises:
      UserError: a URL without a bucket, of a kind that is not known, or whose package is not installed.
    """
    if isinstance(place, StorePath):
        return place
    text = str(place)
    if not is_url(text):
        return pathlib.Path(text).expanduser()
    path = StorePath(text.rstrip("/"))
    if not is_url(path.url) or not path.name:
        raise UserError(f"{text}: names no bucket, as in s3://BUCKET/FOLDER")
    _file_system(path.scheme)  # what is missing shows here
    return path


class NotThere(UserError):
    """A store has no such file, or no such bucket."""


class Stat(NamedTuple):
    """A file's size in bytes."""

    st_size: int


@dataclasses.dataclass(frozen=True, order=True)
class StorePath:
    """A place in an object store. Make one with `path_of`."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(f"{self.url}/{name}".rstrip("/"))

    @property
    def scheme(self) -> str:
        """What stands before '://'."""
        return self.url.partition("://")[0]

    @property
    def store(self) -> Any:
        """The fsspec file system."""
        return _file_system(self.scheme)

    @property
    def parts(self) -> tuple[str, ...]:
        """The bucket, the folders and the name."""
        return tuple(part for part in self.url.partition("://")[2].split("/") if part)

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "StorePath":
        """The folder that it is in."""
        return StorePath(self.url.rpartition("/")[0])

    def absolute(self) -> "StorePath":
        """Returns itself."""
        return self

    resolve = absolute

    def exists(self) -> bool:
        """Whether there is a file or a folder with files in it."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Whether it is a file."""
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        """Whether files are in it."""
        return (self._info() or {}).get("type") == "directory"

    def stat(self) -> Stat:
        """Returns the size of the file."""
        info = self._info()
        if info is None:
            raise FileNotFoundError(self.url)
        return Stat(info["size"])

    def files(self) -> dict[str, dict[str, Any]]:
        """Returns what the store says of each file in the folder and below it, by its name from here; {} of none."""
        found: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError), _asking(self.url, "read"):
            found = self.store.find(self.url, detail=True)
        here = len("/".join(self.parts)) + 1
        below = {name.lstrip("/")[here:]: info for name, info in found.items()}
        return {name: info for name, info in sorted(below.items()) if name}

    def iterdir(self) -> "Iterator[StorePath]":
        """Yields what is in the folder."""
        for name in dict.fromkeys(name.partition("/")[0] for name in self.files()):
            yield self / name

    def glob_files(self) -> "tuple[StorePath, ...]":
        """Returns the files that this path matches, its last parts being a glob, in the order of their names."""
        found: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError), _asking(self.url, "read"):
            found = self.store.glob(self.url, detail=True)
        names = sorted(name.lstrip("/") for name, info in found.items() if info["type"] == "file")
        return tuple(StorePath(f"{self.scheme}://{name}") for name in names)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Opens the file to be read; only what is read is fetched, and a few megabytes ahead."""
        with _asking(self.url, "read"):
            return io.BufferedReader(_Stream(self.store.open(self.url, mode), self.url), 1 << 20)

    def read_bytes(self) -> bytes:
        """Reads the file."""
        with _asking(self.url, "read"):
            return self.store.cat_file(self.url)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Reads the file."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Writes the file: whole, or not at all."""
        with _asking(self.url, "written"):
            self.store.pipe_file(self.url, content)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder is there as soon as there is a file in it."""

    def _info(self) -> dict[str, Any] | None:
        with contextlib.suppress(FileNotFoundError), _asking(self.url, "read"):
            return self.store.info(self.url)
        return None


AnyPath = pathlib.Path | StorePath


class _Stream(io.RawIOBase):
    """A file of a store, whose errors are said in one line."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _asking(self._url, "read"):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


@functools.cache
def _file_system(scheme: str) -> Any:
    import fsspec

    try:  # without its memory of listings: other processes write too
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        needed = f"the package {package}: pip install {package}" if package else f"a package: {error}"
        raise UserError(f"{scheme}:// needs {needed}") from error
    except ValueError as error:
        raise UserError(f"{scheme}:// is no kind of place that is known: wants a path, gs://… or s3://…") from error


@contextlib.contextmanager
def _asking(url: str, done: str) -> Iterator[None]:
    """Turns what a store's package raises into one line; when reading, a missing file stays FileNotFoundError.

    Raises:
      NotThere: a file or a bucket is missing.
      UserError: the store refuses.
      StoreLost: it does not answer, or not as it should.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each package has classes of its own
        if isinstance(error, FileNotFoundError) and done == "read":
            raise
        said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        said = said.splitlines()[0]
        if isinstance(error, FileNotFoundError):
            kind = NotThere
        elif isinstance(error, PermissionError | ValueError) or _REFUSALS.search(said):
            kind = UserError
        else:
            kind = StoreLost
        raise kind(f"{url}: cannot be {done}: {said}") from error


def cache_folder() -> pathlib.Path:
    """Where copies are kept and what is to be sent is written: XDG_CACHE_HOME/jaxembed, by default in ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxembed"


def stamp(file: AnyPath) -> list[int | str]:
    """Returns what changes with a file's content: its size, and its time of change or the store's mark of it.

    Raises:
      OSError: there is no such file, or it must not be looked at.
    """
    if isinstance(file, pathlib.Path):
        stat = file.stat()
        return [stat.st_size, stat.st_mtime_ns]
    info = file._info()
    if info is None:
        raise FileNotFoundError(f"{file}: no such file")
    return _mark(info)


def _mark(info: Mapping[str, Any]) -> list[int | str]:
    return [info["size"], next((str(info[key]) for key in _MARKS if info.get(key)), "")]


def sizes(folder: AnyPath) -> dict[str, int]:
    """Returns the size in bytes of each file in a folder and below it, by its name from there; {} of no folder."""
    if isinstance(folder, StorePath):
        return {name: info["size"] for name, info in folder.files().items()}
    return {f.relative_to(folder).as_posix(): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}


def local(folder: AnyPath, patterns: Sequence[str] = ("*",)) -> pathlib.Path:
    """Returns a folder of this machine with a folder's files: itself, or a copy made of a store's.

    A copy is kept in `cache_folder()` for the next time, under a name that depends on what the store says of its files,
    so that a change of them makes another one.

    Args:
      folder: where the files are.
      patterns: of a store's, only those whose names match one of these are copied.

    Raises:
      FileNotFoundError: a store has no such file there.
      UserError: the store cannot be read, or the disk not be written.
    """
    if isinstance(folder, pathlib.Path):
        return folder
    infos = {name: info for name, info in folder.files().items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
    if not infos:
        raise FileNotFoundError(f"{folder}: no such folder")
    return _copy(folder, infos)


def local_file(file: AnyPath, beside: Sequence[str]) -> pathlib.Path:
    """Returns a file of this machine: itself, or a copy made of a store's, as `local` does.

    Args:
      file: the file.
      beside: names of files that are copied too, those that there are in the same folder, into the same one.

    Raises:
      FileNotFoundError: a store has no such file.
      UserError: the store cannot be read, or the disk not be written.
    """
    if isinstance(file, pathlib.Path):
        return file
    infos = {name: (file.parent / name)._info() for name in (file.name, *beside)}
    infos = {name: info for name, info in infos.items() if info and info["type"] == "file"}
    if file.name not in infos:
        raise FileNotFoundError(f"{file}: no such file")
    return _copy(file.parent, infos) / file.name


def _copy(folder: StorePath, infos: Mapping[str, Mapping[str, Any]]) -> pathlib.Path:
    """Returns the copy of a folder's files, of which the store says `infos`; made where there is none yet."""
    said = json.dumps([folder.url, {name: _mark(info) for name, info in infos.items()}])
    copy = cache_folder() / "copies" / hashlib.sha256(said.encode()).hexdigest()[:32] / folder.name
    if not copy.is_dir():
        fetch(folder, copy, tuple(infos))
    return copy


def fetch(folder: StorePath, into: pathlib.Path, names: Sequence[str]) -> None:
    """Copies files of a store's folder into a folder of this machine, which is there with all of them or not at all.

    Args:
      folder: where they are.
      into: must not be there, unless another process has just made the same copy.
      names: of the files, from `folder`.

    Raises:
      NotThere: a file is gone.
      UserError: the store cannot be read, or the disk not be written.
    """
    with _local_disk(into):
        into.parent.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(prefix=f".{into.name}.", dir=into.parent))
        try:
            for name in names:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
            with _asking(folder.url, "copied"):
                folder.store.get([f"{folder}/{name}" for name in names], [str(part / name) for name in names])
            try:
                part.rename(into)
            except OSError:
                if not into.is_dir():
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)


def send(folder: pathlib.Path, to: StorePath, last: str, anew: bool = False) -> None:
    """Makes a store's folder the same as one of this machine; in between, it lacks the file `last`.

    Args:
      folder: where the files are.
      to: where they go.
      last: the file that is taken away first and comes back last.
      anew: the files there, if any, are the same: others may read or send them meanwhile, so `last` is not taken away.

    Raises:
      UserError: the store cannot be written.
    """
    names = set(sizes(folder))
    there = set(to.files())
    with _asking(to.url, "written"):
        if last in there and not anew:
            _remove_file(to / last)
        for batch in (sorted(names - {last}), [last]):
            to.store.put([str(folder / name) for name in batch], [f"{to}/{name}" for name in batch])
        for name in sorted(there - names):
            _remove_file(to / name)


def remove(folder: StorePath, first: str) -> None:
    """Removes a store's folder, the file `first` before all others."""
    names = sorted(folder.files(), key=lambda name: (name != first, name))
    with _asking(folder.url, "removed"):
        for name in names:
            _remove_file(folder / name)


def _remove_file(file: StorePath) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process may have removed it
        file.store.rm_file(file.url)


def staged(path: AnyPath) -> pathlib.Path:
    """Returns where a file or folder is written: at `path`, or, of a store, at a place of this machine of its own.

    The same path has the same place in every process. The folder that it is in is made.
    """
    if isinstance(path, pathlib.Path):
        return path
    place = cache_folder().joinpath("staged", path.scheme, *path.parts)
    with _local_disk(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    return place


def publish(path: AnyPath) -> None:
    """Sends what was `staged` for a path, a file or all files of a folder, to its store; on disk it is there already.

    A folder that was sent is removed here, so that the next one that is staged for the same path begins empty.

    Raises:
      UserError: the store cannot be written.
    """
    if isinstance(path, pathlib.Path):
        return
    place = staged(path)
    files = {place / name: f"{path}/{name}" for name in sizes(place)} if place.is_dir() else {place: str(path)}
    with _asking(path.url, "written"):
        path.store.put([str(file) for file in files], list(files.values()))
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def filling(folder: AnyPath, last: str, anew: bool = False) -> Iterator[pathlib.Path]:
    """Gives a folder to write into: `folder` itself, or one whose files become those of a store's when the block ends.

    Args:
      folder: made where there is none.
      last: the file that tells that the folder is complete: in a store it is written last.
      anew: see `send`.

    Raises:
      UserError: the store cannot be written.
    """
    if isinstance(folder, pathlib.Path):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="filling.", dir=cache) as scratch:
        yield pathlib.Path(scratch)
        send(pathlib.Path(scratch), folder, last, anew)


@contextlib.contextmanager
def _local_disk(place: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        said = error.strerror or error
        raise UserError(f"{place}: cannot be written: {said}; XDG_CACHE_HOME names another place") from error
