"""The token cache: every text of a source tokenised once, read through memory maps.

A cache is a folder CACHE_DIR/tokens/KEY, KEY a hash of all that its content depends on. It is filled under another
name and renamed when complete, so that a killed build leaves nothing that could be taken for a cache. Of the processes
of a machine one builds and the others wait; processes that share nothing but the folder may build the same one at once.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import mmap
import os
import pathlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxembed.config import MaxLength, PromptConfig, SourceConfig
from jaxembed.config_check import MAX_LENGTH
from jaxembed.data import cache_writer
from jaxembed.data.records import RecordReader
from jaxembed.data.rows import row_name
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import UserError
from jaxembed.storage import AnyPath, NotThere, StorePath, cache_folder, fetch, path_of, send, stamp

_CLOCK_GRAIN_NS = 2_000_000_000  # a file just written may change again without a new time of change
_ABANDONED = 24 * 3600  # seconds without a write after which an unfinished build is taken for dead


class DamagedCacheError(ValueError):
    """A folder that is no complete token cache of this version."""


class TokenCache:
    """The tokens of one source. Read-only, memory-mapped, picklable (by its path); threads may share it.

    The texts of record r are numbers first_text[r] … first_text[r + 1] - 1: its query, its positives, its negatives,
    and where `negative_queries` holds, for each of these negatives a query that it does answer.

    Attributes:
      path: the folder.
      label: a short name of the source without any path of the machine: a file's name, 'FOLDER/ (12 files)', a glob's
        last parts, 'tfds:NAME', 'hf:NAME'.
      licence: what the data set says of its own licence; '' where it says nothing, as files do.
      n_records, n_texts: how many there are.
      max_positives, max_negatives: most of one record.
      negative_queries: whether the records with negatives have their queries too: all of them do, or none.
      scored: whether every document has a score.
      max_length: longest text in tokens, all copies of it.
      total_tokens: of all texts.
      truncated: texts that were cut to the maximum length.
      skipped: bad records of the source that were left out; skipped_reasons: what was wrong with the first ones.
      first_text: int64 [n_records + 1].
      n_positives: uint16 [n_records].
      groups: uint64 [n_records], hash of the record's group, or, where it has none, of its label and source. Records
        of one group are never each other's in-batch negatives, so neither are those of one label. 0 = none.
      lines: int64 [n_records], line or row of the record in the source, from 1 and through all its files.
      lengths: uint16 [n_texts], tokens, prompt and special tokens included.
      prompt_lengths: uint16 [n_texts], leading tokens that belong to the prompt; less than `lengths`.
      hashes: uint64 [n_texts], of the text without its prompt: equal texts are found across roles and sources.
      scores: float32 [n_texts], score of a document with its query, NaN for queries and where there is none.
      offsets: int64 [n_texts + 1], where each text begins in `tokens`.
      tokens: uint16 or uint32 [total_tokens].
    """

    first_text: np.ndarray
    n_positives: np.ndarray
    groups: np.ndarray
    lines: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    hashes: np.ndarray
    scores: np.ndarray
    offsets: np.ndarray
    tokens: np.ndarray

    def __init__(self, path: str | pathlib.Path, label: str = "") -> None:
        """Opens a folder that `build_or_open` made.

        Args:
          path: the folder.
          label: the source's, where its name is another than when the cache was built.

        Raises:
          DamagedCacheError: the folder is missing, incomplete or of another version.
        """
        self.path = pathlib.Path(path)
        meta = _read_meta(self.path)
        self.label: str = label or meta["label"]
        self.licence: str = meta["licence"]
        self.n_records: int = meta["n_records"]
        self.n_texts: int = meta["n_texts"]
        self.max_positives: int = meta["max_positives"]
        self.max_negatives: int = meta["max_negatives"]
        self.negative_queries: bool = meta["negative_queries"]
        self.scored: bool = meta["scored"]
        self.max_length: int = meta["max_length"]
        self.total_tokens: int = meta["total_tokens"]
        self.truncated: int = meta["truncated"]
        self.skipped: int = meta["skipped"]
        self.skipped_reasons: tuple[str, ...] = tuple(meta["skipped_reasons"])
        self._places: list[tuple[int, str]] = meta["places"]
        for name, (dtype, length) in meta["arrays"].items():
            setattr(self, name, _map(self.path / f"{name}.bin", np.dtype(dtype), length))

    def __reduce__(self) -> tuple[type["TokenCache"], tuple[pathlib.Path, str]]:
        return TokenCache, (self.path, self.label)

    def tokens_of(self, text: int) -> np.ndarray:
        """Returns the token ids of a text, [lengths[text]], a view of the file."""
        return self.tokens[self.offsets[text] : self.offsets[text + 1]]

    def record_name(self, record: int) -> str:
        """Returns 'FILE:LINE' (or 'FILE row N', 'tfds:NAME:SPLIT row N'), FILE being where the cache was built from."""
        return row_name(self._places, int(self.lines[record]))


def _map(path: pathlib.Path, dtype: np.dtype, length: int) -> np.ndarray:
    """Maps a file of `length` values. Steps read here and there, so the disk is told not to read ahead."""
    if length == 0:
        return np.empty(0, dtype)
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), length * dtype.itemsize, access=mmap.ACCESS_READ)
    if hasattr(pages, "madvise"):
        pages.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(pages, dtype, length)


def build_or_open(
    source: SourceConfig,
    tokenizer: Tokenizer,
    prompts: PromptConfig,
    max_lengths: MaxLength,
    cache_dir: str | pathlib.Path,
    on_bad_record: str,
    show_progress: bool,
    where: str = "config.data.train",
) -> TokenCache:
    """Opens the cache of a source, tokenising the source first where there is none.

    Args:
      source: the files or data set, and how to read them.
      tokenizer: gives the ids.
      prompts: the very strings put before queries and documents ('' for none). `{instruction}` in them is replaced by
        the record's instruction.
      max_lengths: longest query and document in tokens, prompt and special tokens included, one copy counted where a
        template repeats the text; both above 0.
      cache_dir: the cache's root folder, made if need be. Of one in a store, what is used is copied to a folder of
        this machine, and what is built here is sent there.
      on_bad_record: 'error' | 'skip'.
      show_progress: a progress bar on standard error while tokenising.
      where: the config field of the source, for messages.

    Raises:
      UserError: the source is unreadable or has a bad record, a length leaves no room for text, the cache cannot be
        written.
    """
    for side in ("query", "document"):
        length = getattr(max_lengths, side)
        most = tokenizer.fitting(MAX_LENGTH)
        if not tokenizer.n_special < length <= most:
            framing = "a template's or special ones" if tokenizer.in_template else "special ones"
            raise UserError(
                f"config.data.max_length.{side} = {length}: must be in {tokenizer.n_special + 1} … {most} "
                f"({tokenizer.n_special} tokens of each text are {framing})"
            )
    reader = RecordReader(source, on_bad_record, where)
    place = path_of(cache_dir)
    root = cache_folder().joinpath("caches", place.scheme, *place.parts) if isinstance(place, StorePath) else place
    with _writing(root):
        (root / "tokens").mkdir(parents=True, exist_ok=True)
        files = reader.source.files
        before = _stamps(files)
        inputs = {
            "format": cache_writer.FORMAT,
            "source_sha256": _digests(files, root),
            "identity": reader.source.identity,
            "kind": reader.source.kind,
            "record_format": source.format,
            "columns": dict(sorted(source.columns.items())),
            "tokenizer": tokenizer.fingerprint(),
            "max_length": dataclasses.asdict(max_lengths),
            "prompts": dataclasses.asdict(prompts),
            "on_bad_record": on_bad_record,
        }
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        final = root / "tokens" / key
        stored = place / "tokens" / key if isinstance(place, StorePath) else None
        if _is_whole(final) and (stored is None or _is_sent(stored)):
            return TokenCache(final, reader.source.label)
        with _alone(final):
            if _is_whole(final):  # built while this process waited, or by one that could not send it
                if stored is not None and not _is_sent(stored):
                    send(final, stored, cache_writer.META, anew=True)
                return TokenCache(final, reader.source.label)
            _remove_abandoned(final)
            if stored is not None and _copied(stored, final):
                return TokenCache(final, reader.source.label)
            scratch = _unused(final)
            scratch.mkdir()
            try:
                cache_writer.fill(scratch, reader, tokenizer, prompts, max_lengths, inputs, show_progress)
                if _stamps(files) != before:
                    raise UserError(f"{reader.source.title} changed while it was being tokenised: start again")
                _publish(scratch, final)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            if stored is not None:  # other machines may send the same: a key has one content
                send(final, stored, cache_writer.META, anew=True)
        return TokenCache(final)


@contextlib.contextmanager
def _alone(final: pathlib.Path) -> Iterator[None]:
    """Keeps other processes of this machine from building the same cache at the same time.

    The lock is none of the cache's folder, which may lie on a file system that knows no locks.
    """
    name = hashlib.sha256(str(final.absolute()).encode()).hexdigest()[:32]
    path = pathlib.Path(tempfile.gettempdir()) / f"jaxembed-{os.getuid()}-{name}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(root: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"config.data.cache_dir: cannot write the token cache in {root}: {error.strerror or error}"
        ) from error


def _is_whole(folder: pathlib.Path) -> bool:
    with contextlib.suppress(DamagedCacheError):
        return bool(_read_meta(folder))
    return False


def _is_sent(stored: StorePath) -> bool:
    return (stored / cache_writer.META).exists()  # which is sent last


def _copied(stored: StorePath, final: pathlib.Path) -> bool:
    """Copies a cache out of a store, if it is whole there; tells whether it is."""
    if not _is_sent(stored):
        return False
    scratch = _unused(final)
    try:
        fetch(stored, scratch, tuple(stored.files()))
        TokenCache(scratch)
        _publish(scratch, final)
    except (DamagedCacheError, NotThere):
        return False
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _publish(scratch: pathlib.Path, final: pathlib.Path) -> None:
    """Gives a complete cache its name, unless another process was faster; a damaged one is moved out of the way."""
    while True:
        try:
            scratch.rename(final)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            TokenCache(final)
            return
        except DamagedCacheError:
            aside = _unused(final)
            with contextlib.suppress(FileNotFoundError):  # another process may have moved it just now
                final.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def _unused(path: pathlib.Path) -> pathlib.Path:
    """Returns a name beside `path` that no other process uses."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def _remove_abandoned(final: pathlib.Path) -> None:
    """Removes what killed builds of this cache left behind."""
    for folder in final.parent.glob(f"{final.name}.*"):
        with contextlib.suppress(OSError):  # another process may be removing it too
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > _ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def _read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """Returns meta.json of a folder whose files have the sizes that it states."""
    try:
        meta = json.loads((folder / cache_writer.META).read_text(encoding="utf-8"))
        if meta["format"] != cache_writer.FORMAT:
            raise DamagedCacheError(f"{folder}: version {meta['format']} of the token cache")
        per_record, per_text = meta["n_records"], meta["n_texts"]
        expected = {name: per_text for name in ("lengths", "prompt_lengths", "hashes", "scores")}
        expected |= {name: per_record for name in ("n_positives", "groups", "lines")}
        expected |= {"offsets": per_text + 1, "first_text": per_record + 1, "tokens": meta["total_tokens"]}
        if {name: length for name, (_, length) in meta["arrays"].items()} != expected:
            raise DamagedCacheError(f"{folder}: meta.json contradicts itself")
        for name, (dtype, length) in meta["arrays"].items():
            if (folder / f"{name}.bin").stat().st_size != np.dtype(dtype).itemsize * length:
                raise DamagedCacheError(f"{folder}: {name}.bin has the wrong size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCacheError(f"{folder}: not a complete token cache: {error}") from error
    return meta


def _stamps(files: Iterable[AnyPath]) -> list[list[int | str]]:
    """Returns [size, time of change or a store's mark] of each file.

    Raises:
      UserError: a file is gone or must not be looked at.
    """
    stamps = []
    for file in files:
        try:
            stamps.append(stamp(file))
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
    return stamps


def _digests(files: Sequence[AnyPath], root: pathlib.Path) -> list[str]:
    """Returns the sha256 of each file's bytes, remembered by path, size and time of change.

    Of a file in a store, that of its name and of what the store says of it, so that it need not be fetched.
    """
    memo_file = root / "sources.json"
    memo = _read_memo(memo_file)
    digests, to_remember = [], {}
    for file, said in zip(files, _stamps(files)):
        name = str(file.absolute())
        if isinstance(file, StorePath):
            digests.append(hashlib.sha256(json.dumps([name, *said]).encode()).hexdigest())
            continue
        if memo.get(name, [])[:2] == said:
            digests.append(memo[name][2])
            continue
        try:
            with open(file, "rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
        if time.time_ns() - said[1] > _CLOCK_GRAIN_NS:
            to_remember[name] = [*said, digests[-1]]
    if to_remember:
        scratch = _unused(memo_file)
        scratch.write_text(json.dumps(_read_memo(memo_file) | to_remember, indent=1), encoding="utf-8")
        scratch.replace(memo_file)
    return digests


def _read_memo(file: pathlib.Path) -> dict[str, list[Any]]:
    """Returns path → [size, time of change, sha256]; nothing where the file is missing or broken."""
    try:
        memo = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(memo, dict) and all(isinstance(entry, list) and len(entry) == 3 for entry in memo.values())
    return memo if whole else {}
