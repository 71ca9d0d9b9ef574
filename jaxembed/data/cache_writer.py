"""Fills a folder of the token cache: tokenises a source chunk by chunk and appends the arrays to files."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from jaxembed.config import MaxLength, PromptConfig
from jaxembed.data.records import Record, RecordReader
from jaxembed.data.tokenizer import Tokenizer

FORMAT = 3  # raised when what stands in the files changes: older folders are then built anew
META = "meta.json"
INSTRUCTION = "{instruction}"  # in a prompt: the record's own instruction

# A chunk is tokenised at once: many texts for speed, few characters because the tokenizer needs about 100 bytes each.
_CHUNK_TEXTS = 8192
_CHUNK_CHARACTERS = 4_000_000


@dataclasses.dataclass
class _Counts:
    """What meta.json says beside the inputs."""

    n_records: int = 0
    n_texts: int = 0
    max_positives: int = 0
    max_negatives: int = 0
    negative_queries: bool = False
    scored: bool = True
    max_length: int = 0
    total_tokens: int = 0
    truncated: int = 0
    skipped: int = 0
    skipped_reasons: tuple[str, ...] = ()


def fill(
    folder: pathlib.Path,
    reader: RecordReader,
    tokenizer: Tokenizer,
    prompts: PromptConfig,
    max_lengths: MaxLength,
    inputs: dict[str, Any],
    show_progress: bool,
) -> None:
    """Writes the cache of one source into an empty folder; meta.json comes last.

    Args:
      folder: exists and is empty.
      reader: the source.
      tokenizer: gives the ids.
      prompts: strings put before the texts; `{instruction}` in them is replaced by the record's.
      max_lengths: most tokens of a text of each side, one copy of it counted where a template repeats it.
      inputs: what the cache is made from, for meta.json and the hashes of labels.
      show_progress: a progress bar on standard error.

    Raises:
      UserError: what the reader raises.
      OSError: the folder cannot be written.
    """
    counts = _Counts()
    chunks = _Chunks(reader, tokenizer, prompts, max_lengths, "\0".join(inputs["source_sha256"]), counts)
    with contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        dtypes: dict[str, np.dtype] = {}
        lengths: dict[str, int] = {}
        advance = stack.enter_context(_progress(reader, show_progress))
        for records in _chunks_of(reader):
            for name, array in chunks.arrays(records).items():
                if name not in files:
                    files[name] = stack.enter_context(open(folder / f"{name}.bin", "wb"))
                    dtypes[name], lengths[name] = array.dtype, 0
                array.tofile(files[name])
                lengths[name] += len(array)
            advance(counts.n_records)
        reader.require(counts.n_records)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    counts.skipped, counts.skipped_reasons = reader.skipped, tuple(reader.reasons)
    meta = {
        "format": FORMAT,
        "label": reader.source.label,
        "licence": reader.source.licence,
        "places": reader.source.places(),
        **dataclasses.asdict(counts),
        "arrays": {name: [dtypes[name].str, lengths[name]] for name in dtypes},
        "inputs": inputs,
    }
    with open(folder / META, "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


class _Chunks:
    """Turns chunks of records into the arrays that are appended to the files. Keeps the running counts."""

    def __init__(
        self,
        reader: RecordReader,
        tokenizer: Tokenizer,
        prompts: PromptConfig,
        max_lengths: MaxLength,
        source_digest: str,
        counts: _Counts,
    ) -> None:
        self._reader = reader
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._max_lengths = max_lengths
        self._source_digest = source_digest
        self._counts = counts
        self._token_dtype = np.uint16 if tokenizer.vocab_size <= 65_536 else np.uint32
        self._prompt_length = functools.lru_cache(maxsize=65_536)(tokenizer.prompt_length)

    def arrays(self, records: list[tuple[int, Record]]) -> dict[str, np.ndarray]:
        """Returns the rows that these (line, record) add to every array of the cache."""
        texts_of = [_texts(record) for _, record in records]
        prompts_of = [_per_text(record, *self._prompts_of(record)) for _, record in records]
        whole = self._tokenizer.tokenize(
            [prompt + text for texts, prompts in zip(texts_of, prompts_of) for prompt, text in zip(prompts, texts)]
        )
        counts, first = self._counts, not self._counts.n_records
        ids: list[np.ndarray] = []
        hashes: list[int] = []
        of_prompts: list[int] = []
        scores: list[float] = []
        record_ends, n_positives, groups, lines = [], [], [], []
        whole_ids = iter(whole)
        for (line, record), texts, prompts in zip(records, texts_of, prompts_of):
            own = list(itertools.islice(whole_ids, len(texts)))
            if any(len(tokens) == 0 for tokens in own):  # only a tokenizer without special tokens gives none
                self._reader.reject(line, "a text has no token")
                continue
            if record.negatives and counts.max_negatives and bool(record.negative_queries) != counts.negative_queries:
                has = "no negative_query" if counts.negative_queries else "a negative_query"
                self._reader.reject(line, f"has {has}, unlike the records before: give one to all negatives or to none")
                continue
            limits = _per_text(record, self._max_lengths.query, self._max_lengths.document)
            for text, tokens, limit, prompt in zip(texts, own, limits, prompts):
                ids.append(self._tokenizer.truncate(tokens, limit))
                counts.truncated += len(ids[-1]) < len(tokens)
                of_prompts.append(self._prompt_length(prompt))
                hashes.append(_hash(text))
            missing = (np.nan,) * len(record.positives + record.negatives)
            scores += (np.nan, *(record.scores or missing), *(np.nan for _ in record.negative_queries))
            counts.n_records += 1
            counts.n_texts += len(texts)
            counts.max_positives = max(counts.max_positives, len(record.positives))
            counts.max_negatives = max(counts.max_negatives, len(record.negatives))
            counts.negative_queries |= len(record.negative_queries) > 0
            counts.scored &= len(record.scores) > 0
            record_ends.append(counts.n_texts)
            n_positives.append(len(record.positives))
            groups.append(self._group(record))
            lines.append(line)
        lengths = np.array([len(tokens) for tokens in ids], np.int64)
        ends = counts.total_tokens + np.cumsum(lengths)
        counts.total_tokens += int(lengths.sum())
        counts.max_length = max(counts.max_length, int(lengths.max(initial=0)))
        start = [0] if first and record_ends else []  # both lists of ends begin with the start of the first
        return {
            "tokens": np.concatenate([np.empty(0, self._token_dtype), *ids], dtype=self._token_dtype, casting="unsafe"),
            "offsets": np.concatenate([np.array(start, np.int64), ends]),
            "lengths": lengths.astype(np.uint16),
            "prompt_lengths": self._tokenizer.prompt_lengths(np.array(of_prompts, np.int64), lengths).astype(np.uint16),
            "hashes": np.array(hashes, np.uint64),
            "scores": np.array(scores, np.float32),
            "first_text": np.array([*start, *record_ends], np.int64),
            "n_positives": np.array(n_positives, np.uint16),
            "groups": np.array(groups, np.uint64),
            "lines": np.array(lines, np.int64),
        }

    def _prompts_of(self, record: Record) -> tuple[str, str]:
        return (
            self._prompts.query.replace(INSTRUCTION, record.instruction),
            self._prompts.document.replace(INSTRUCTION, record.instruction),
        )

    def _group(self, record: Record) -> int:
        if record.group:
            return _hash(f"group\0{record.group}") or 1
        return (_hash(f"label\0{self._source_digest}\0{record.label}") or 1) if record.label else 0


def _texts(record: Record) -> tuple[str, ...]:
    """Returns a record's texts in the order of the cache."""
    return (record.query, *record.positives, *record.negatives, *record.negative_queries)


def _per_text(record: Record, of_query: Any, of_document: Any) -> list[Any]:
    """Spreads what queries and documents have over a record's texts."""
    n_documents = len(record.positives) + len(record.negatives)
    return [of_query, *[of_document] * n_documents, *[of_query] * len(record.negative_queries)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _chunks_of(reader: RecordReader) -> Iterator[list[tuple[int, Record]]]:
    chunk: list[tuple[int, Record]] = []
    n_texts = n_characters = 0
    for record in reader:
        chunk.append((reader.line, record))
        texts = _texts(record)
        n_texts += len(texts)
        n_characters += sum(map(len, texts))
        if n_texts >= _CHUNK_TEXTS or n_characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, n_texts, n_characters = [], 0, 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _progress(reader: RecordReader, show: bool) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda n_records: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[records]:,} records"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        source = reader.source
        task = bar.add_task(f"Tokenising {source.label}", total=source.total, records=0)
        yield lambda n_records: bar.update(task, completed=source.done, records=n_records)
