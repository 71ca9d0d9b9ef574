"""Encoding a source of texts into folders of vectors: shard by shard, by any number of processes, in bounded memory.

Every process reads the whole source and encodes the shards that are its own, on its own devices: none waits for
another, and none is missed for long when it is lost. A shard that is there stays; so a start after a kill, with
whatever number of processes, encodes the shards that are missing. A text's vector does not depend on its neighbours,
so shards are the same whoever makes them.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from jaxembed import similarity
from jaxembed.data.texts import TextReader
from jaxembed.distributed import Peers
from jaxembed.embedder import Embedder
from jaxembed.encoding import DeviceBatch, TokenizedTexts
from jaxembed.evaluation.vectors import require_finite
from jaxembed.vectors.folder import ShardWriter
from jaxembed.vectors.quantize import CALIBRATED, quantize, ranges_of

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Shard:
    """Texts of one shard, ready for the devices.

    Attributes:
      number: from 0.
      ids: of the texts.
      tokenized: the texts' tokens by each of the model's tokenizers.
      read: how far the source was read for it, as `RowSource.done` says.
    """

    number: int
    ids: list[str]
    tokenized: tuple[TokenizedTexts, ...]
    read: int


@dataclasses.dataclass
class Work:
    """What one process has done.

    Attributes:
      count: texts of the whole source, once it is read.
      texts, tokens, places: that were encoded here, and the tokens that their rows had room for.
      seconds: since the first shard was asked for.
      read: how far that is in the source, as `RowSource.done` says.
      kept: shards that were there already.
    """

    count: int = 0
    texts: float = 0
    tokens: int = 0
    places: int = 0
    seconds: float = 0.0
    read: float = 0.0
    kept: int = 0

    @property
    def waste(self) -> float:
        """The part of the rows that was padding."""
        return 1 - self.tokens / self.places if self.places else 0.0


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What is encoded, and into which folders.

    Attributes:
      embedder: the model, on this process's devices.
      reader: the texts.
      prompt: put before each.
      writers: one for each width; all have shards of the same size.
      normalize: bring vectors to length 1, after truncating.
      batch_size: texts per device batch at the most, about; 0 = as many as fill a fixed number of tokens.
    """

    embedder: Embedder
    reader: TextReader
    prompt: str
    writers: Sequence[ShardWriter]
    normalize: bool = False
    batch_size: int = 0

    def run(self, peers: Peers, progress: Callable[[Work], None] = lambda work: None) -> Work:
        """Encodes this process's part of what is missing, and says in the folders when all is there.

        Args:
          peers: all processes.
          progress: called after each device batch.

        Returns:
          The work done here.

        Raises:
          UserError: bad texts, vectors that are not finite, folders that are another encoding's or cannot be written.
        """
        if peers.main:
            next(iter(self.reader))  # what cannot be read shows before anything is written
            for writer in self.writers:
                writer.claim()
            self._calibrate()
        there = peers.of_main([sorted(writer.done()) for writer in self.writers] if peers.main else None)
        work, begun = Work(), time.monotonic()
        for shard in _ahead(self._own_shards(set.intersection(*map(set, there)), peers, work)):
            counted = functools.partial(_count, work, shard, work.read, work.texts, begun, progress)
            vectors = self.embedder.encode_tokens(shard.tokenized, self.batch_size, counted)
            self._write(shard, vectors)
        work.seconds = time.monotonic() - begun
        peers.wait()
        if peers.main:
            for writer in self.writers:
                writer.finish(work.count)
        return work

    def _calibrate(self) -> None:
        """Takes the ranges of the dimensions from the first texts, where the folders want some and have none."""
        wanting = [w for w in self.writers if w.manifest.dtype in CALIBRATED and w.ranges() is None]
        if wanting:
            texts = [text for _, text in itertools.islice(self.reader, wanting[0].manifest.calibration)]
            vectors = self.embedder.encode_tokens(self.embedder.tokenize(texts, self.prompt), self.batch_size)
            for writer in wanting:
                writer.write_ranges(ranges_of(self._finished(vectors, writer)))

    def _own_shards(self, there: set[int], peers: Peers, work: Work) -> Iterator[Shard]:
        """Reads the source; yields the missing shards that are this process's: each has every so-manieth."""
        size, missing = self.writers[0].manifest.shard_size, 0
        texts = iter(self.reader)
        for number in itertools.count():
            own = number not in there and missing % peers.count == peers.index
            missing += number not in there
            chunk = list(itertools.islice(texts, size))
            work.count += len(chunk)
            if not chunk:
                return
            work.kept += number in there
            if own:
                ids, strings = zip(*chunk)
                tokenized = self.embedder.tokenize(strings, self.prompt)
                yield Shard(number, list(ids), tokenized, self.reader.source.done)

    def _write(self, shard: Shard, vectors_NxE: np.ndarray) -> None:
        require_finite(vectors_NxE)
        for writer in self.writers:
            vectors = self._finished(vectors_NxE, writer)
            writer.write(shard.number, shard.ids, quantize(vectors, writer.manifest.dtype, writer.ranges()))

    def _finished(self, vectors_NxE: np.ndarray, writer: ShardWriter) -> np.ndarray:
        """Returns vectors as they are before they are stored: truncated, and of length 1 where that is asked for."""
        cut = vectors_NxE[:, : writer.manifest.width]
        return similarity.unit(cut) if self.normalize else cut


def _count(
    work: Work,
    shard: Shard,
    read: float,
    texts: float,
    begun: float,
    progress: Callable[[Work], None],
    batch: DeviceBatch,
) -> None:
    """Adds a device batch to the work, which was at `read` and `texts` before this shard."""
    work.texts += batch.n_texts / len(shard.tokenized)  # each template has them all
    work.tokens += batch.n_tokens
    work.places += batch.places
    work.seconds = time.monotonic() - begun
    part = (work.texts - texts) / len(shard.ids)
    work.read = read + (shard.read - read) * part
    progress(work)


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yields the items, the next one being made in another thread meanwhile."""
    end = object()
    with ThreadPoolExecutor(1, "shards") as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item
