"""Indexes of other packages, for corpora too large to be compared whole: faiss and usearch.

An index finds the nearest of those documents that it looks at. It is told of Euclidean distances as such: put as dot
products, as exact search has them, they would lead through a graph of documents that are not near each other. A file
says nothing of the vectors in it, so FILE.json is written beside it, which does.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from jaxembed.errors import UserError
from jaxembed.run_folder import differences, write_json
from jaxembed.similarity import unit
from jaxembed.storage import AnyPath, local_file
from jaxembed.vectors.exact import Compared, Vectors
from jaxembed.vectors.writing import replacing

PACKAGES = {"faiss": "faiss-cpu", "usearch": "usearch"}  # kind of index → what pip calls it
USEARCH_DTYPES = ("f32", "f16", "i8")
TRAIN_BYTES = 1 << 30  # of the sample that an index of faiss learns from

Found = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which index to build.

    Attributes:
      kind: one of PACKAGES.
      factory: of faiss, what `faiss.index_factory` takes: 'Flat', 'HNSW32', 'IVF4096,Flat', 'IVF4096,PQ48x8' …
      dtype: of usearch, one of USEARCH_DTYPES.
      similarity: how the vectors are compared.
    """

    kind: str
    factory: str = "Flat"
    dtype: str = "f32"
    similarity: str = "cosine"

    def require(self, width: int) -> None:
        """Refuses what cannot be built of vectors of so many dimensions; needs none of them.

        Raises:
          UserError: the package is not installed, faiss knows no such index, or 8 bits would lose the vectors' lengths.
        """
        if importlib.util.find_spec(self.kind) is None:
            package = PACKAGES[self.kind]
            raise UserError(f"--index={self.kind} needs a package that is not installed: pip install {package}")
        if self.kind == "faiss":
            with _errors_of(self):
                _package("faiss").index_factory(width, self.factory)
        elif self.dtype == "i8" and self.similarity != "cosine":
            raise UserError(
                f"--usearch_dtype=i8 keeps no vector's length, and the model compares by {self.similarity}: take f16"
            )

    @property
    def how(self) -> str:
        """The kind and what it is made of, as 'faiss HNSW32' and 'usearch HNSW f16'."""
        return f"faiss {self.factory}" if self.kind == "faiss" else f"usearch HNSW {self.dtype}"


class Index(Protocol):
    """Vectors that are in an index; make one with `build` or `load`.

    Attributes:
      count: how many.
      width: E.
    """

    count: int
    width: int

    def search(self, queries_QxE: np.ndarray, k: int, effort: int = 0) -> Found:
        """Finds documents that are near.

        Args:
          queries_QxE: float32.
          k: how many of them; the number of documents where there are fewer.
          effort: how much is looked at; 0 = as much as the package does by itself. Of IVF, the clusters; of HNSW, the
            documents that are kept in view.

        Returns:
          Similarities float32 [Q, k], highest first, and the documents' numbers, int64 [Q, k], of equal ones the lower
          first; -inf and -1 where no more were found.

        Raises:
          UserError: the index has nothing to set the effort of.
        """
        ...

    def write(self, file: pathlib.Path) -> None:
        """Writes it to a file."""
        ...


def build(plan: Plan, documents: Vectors) -> Index:
    """Builds an index of vectors, which are read in blocks, twice where faiss has something to learn.

    Args:
      plan: what index.
      documents: as the model gave them.

    Raises:
      UserError: faiss cannot learn from so few, and what `Plan.require` raises.
    """
    plan.require(documents.width)
    with _errors_of(plan):
        given = Compared(documents, "cosine") if plan.similarity == "cosine" else documents
        return _KINDS[plan.kind].build(plan, given)


def save(index: Index, path: AnyPath, plan: Plan, vectors: dict[str, Any]) -> None:
    """Writes an index, whole or not at all, and before it PATH.json.

    Args:
      index: built by `plan`.
      path: on disk or in a store.
      plan: how it was built.
      vectors: what they are, as JSON.

    Raises:
      UserError: it cannot be written.
    """
    with replacing(path, "--index_file") as part:
        try:
            index.write(part)
        except RuntimeError as error:
            raise UserError(f"--index_file={path}: cannot be written: {_words(error)}") from error
        write_json(_beside(path), _said(plan, index.count, vectors))


def load(path: AnyPath, plan: Plan, count: int, vectors: dict[str, Any]) -> Index:
    """Opens an index that `save` wrote.

    Args:
      path: on disk or in a store.
      plan: how it should have been built.
      count: how many vectors it should have.
      vectors: what they should be, as JSON.

    Raises:
      UserError: it was built otherwise, or of other vectors, or is not whole.
    """
    try:
        said = json.loads(_beside(path).read_text())
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--index_file={path}: no {_beside(path).name} that says what is in it: remove it") from error
    different = differences(said, _said(plan, count, vectors))
    if different:
        raise UserError(
            f"--index_file={path} is of something else ({'; '.join(different[:4])}): remove it, or name another"
        )
    file = local_file(path, ())
    try:
        index = _KINDS[plan.kind].read(plan, file)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--index_file={path}: not an index of {plan.kind}: {_words(error)}") from error
    if index.count != count:
        raise UserError(f"--index_file={path}: holds {index.count} vectors of {count}: remove it")
    return index


class _Faiss:
    def __init__(self, plan: Plan, index: Any) -> None:
        self._plan, self._index, self.count, self.width = plan, index, index.ntotal, index.d

    @classmethod
    def build(cls, plan: Plan, documents: Vectors) -> "_Faiss":
        faiss = _package("faiss")
        metric = faiss.METRIC_L2 if plan.similarity == "euclidean" else faiss.METRIC_INNER_PRODUCT
        index = faiss.index_factory(documents.width, plan.factory, metric)
        if not index.is_trained:
            index.train(_sample(documents))
        for _, block in documents.blocks():
            index.add(np.ascontiguousarray(block, np.float32))
        return cls(plan, index)

    @classmethod
    def read(cls, plan: Plan, file: pathlib.Path) -> "_Faiss":
        return cls(plan, _package("faiss").read_index(str(file)))

    def search(self, queries_QxE: np.ndarray, k: int, effort: int = 0) -> Found:
        if effort:
            self._set(effort)
        found, numbers = self._index.search(_asked(queries_QxE, self._plan), min(k, self.count))
        scores = -np.sqrt(np.maximum(found, 0)) if self._plan.similarity == "euclidean" else found
        return _in_order(np.where(numbers < 0, -np.inf, scores).astype(np.float32), numbers)

    def write(self, file: pathlib.Path) -> None:
        _package("faiss").write_index(self._index, str(file))

    def _set(self, effort: int) -> None:
        for name in ("nprobe", "efSearch"):
            with contextlib.suppress(RuntimeError):
                _package("faiss").ParameterSpace().set_index_parameter(self._index, name, effort)
                return
        raise UserError("--effort: this index of faiss looks at everything: leave it out, or take IVF… or HNSW…")


class _Usearch:
    def __init__(self, plan: Plan, index: Any) -> None:
        self._plan, self._index, self.count, self.width = plan, index, len(index), index.ndim

    @classmethod
    def build(cls, plan: Plan, documents: Vectors) -> "_Usearch":
        metric = {"cosine": "cos", "dot": "ip", "euclidean": "l2sq"}[plan.similarity]
        index = _package("usearch.index").Index(ndim=documents.width, metric=metric, dtype=plan.dtype)
        for start, block in documents.blocks():
            index.add(np.arange(start, start + len(block)), np.ascontiguousarray(block, np.float32))
        return cls(plan, index)

    @classmethod
    def read(cls, plan: Plan, file: pathlib.Path) -> "_Usearch":
        return cls(plan, _package("usearch.index").Index.restore(str(file)))

    def search(self, queries_QxE: np.ndarray, k: int, effort: int = 0) -> Found:
        if effort:
            self._index.expansion_search = effort
        k = min(k, self.count)
        scores = np.full((len(queries_QxE), k), -np.inf, np.float32)
        numbers = np.full(scores.shape, -1, np.int64)
        if scores.size:
            # A query too many, since the package answers a single one in another form.
            matches = self._index.search(_asked(np.concatenate([queries_QxE, queries_QxE[:1]]), self._plan), k)
            found = np.arange(k) < matches.counts[:-1, None]
            far = matches.distances[:-1][found]
            numbers[found] = matches.keys[:-1][found]
            scores[found] = -np.sqrt(np.maximum(far, 0)) if self._plan.similarity == "euclidean" else 1 - far
        return _in_order(scores, numbers)

    def write(self, file: pathlib.Path) -> None:
        self._index.save(str(file))


_KINDS: dict[str, Callable[..., Any]] = {"faiss": _Faiss, "usearch": _Usearch}


def _asked(queries_QxE: np.ndarray, plan: Plan) -> np.ndarray:
    queries_QxE = np.ascontiguousarray(queries_QxE, np.float32)
    return unit(queries_QxE) if plan.similarity == "cosine" else queries_QxE


def _sample(documents: Vectors) -> np.ndarray:
    """Returns every n-th vector, as many as `TRAIN_BYTES` hold."""
    step = -(-len(documents) * documents.width * 4 // TRAIN_BYTES)
    return np.concatenate([block[-start % step :: step] for start, block in documents.blocks()]).astype(np.float32)


def _in_order(scores: np.ndarray, numbers: np.ndarray) -> Found:
    order = np.lexsort((numbers, -scores), axis=-1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)


def _said(plan: Plan, count: int, vectors: dict[str, Any]) -> dict[str, Any]:
    return {"index": plan.how, "similarity": plan.similarity, "count": count, "vectors": vectors}


def _beside(path: AnyPath) -> AnyPath:
    return path.parent / f"{path.name}.json"


def _package(name: str) -> Any:
    """Imports a package; faiss always first, because it crashes where usearch's libraries were loaded before it."""
    if name != "faiss" and importlib.util.find_spec("faiss"):
        importlib.import_module("faiss")
    return importlib.import_module(name)


@contextlib.contextmanager
def _errors_of(plan: Plan) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"--index={plan.kind} ({plan.how}): {_words(error)}") from error


def _words(error: Exception) -> str:
    """Returns what went wrong, without what faiss puts before it: function, file, line, condition."""
    return (
        re.sub(r"^.*\.(?:cpp|h):\d+: (?:Error: '.*?' failed: )?", "", str(error), flags=re.DOTALL)
        or type(error).__name__
    )
