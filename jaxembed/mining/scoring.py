"""A model's view of a collection: which documents it finds for a query, and how near it finds a document."""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxembed import similarity
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.evaluation.vectors import finite_vectors
from jaxembed.mining.collection import Collection
from jaxembed.vectors.exact import top_k
from jaxembed.vectors.folder import VectorFolder
from jaxembed.vectors.quantize import PACKED

AT_ONCE = 1 << 16  # pairs compared at a time


class Scorer:
    """Similarities by one model, as it compares vectors: cosines, dot products, or distances with a minus.

    Each distinct query and document is encoded once, with the prompts 'query' and 'document'; documents when they are
    first needed.
    """

    def __init__(
        self,
        embedder: Embedder,
        collection: Collection,
        stored: VectorFolder | None = None,
        pool: np.ndarray | None = None,
        bar: bool = False,
    ) -> None:
        """Encodes the queries.

        Args:
          embedder: the model.
          collection: the texts.
          stored: vectors of the collection's corpus, `require_stored` has been asked about; None: they are encoded.
          pool: numbers of the documents that are searched, rising; None = all. Not with `stored`.
          bar: show progress on standard error.

        Raises:
          UserError: the model compares by Manhattan distance, or its vectors are not finite.
        """
        self.embedder, self.collection, self._stored, self._bar = embedder, collection, stored, bar
        self._pool = np.arange(len(collection.documents)) if pool is None else pool
        self._similarity = embedder.blueprint.similarity
        self._queries = self._encode(collection.queries, "query")
        self._turned, _ = similarity.for_search(self._queries, self._queries[:1], self._similarity)
        self._documents = _Held(len(collection.documents), self._make)

    @property
    def searched(self) -> int:
        """Among how many documents `search` searches."""
        return len(self._pool)

    def score(self, queries_N: np.ndarray, documents_N: np.ndarray) -> np.ndarray:
        """Returns the similarity of each query with its document, float32 [N], both given by number."""
        scores = np.zeros(len(queries_N), np.float32)
        self._documents.need(documents_N)
        for start in range(0, len(scores), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            pair = self._queries[queries_N[part]], self._documents.take(documents_N[part])
            scores[part] = similarity.pairwise(*pair, self._similarity)
        return scores

    def search(self, queries_Q: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best documents of queries given by number: similarities float32 and numbers int32, [Q, k].

        k is that of `top_k`, whose order it is.
        """
        scores, numbers = top_k(self._turned[queries_Q], self._searched, k, self.embedder.mesh)
        if self._similarity == "euclidean":  # from q·d - |d|²/2 to the distance
            squares_Q = np.einsum("qe,qe->q", self._queries[queries_Q], self._queries[queries_Q], dtype=np.float64)
            scores = -np.sqrt(np.maximum(squares_Q[:, None] - 2.0 * scores, 0)).astype(np.float32)
        return scores, self._pool[numbers].astype(np.int32)

    @functools.cached_property
    def _searched(self) -> "np.ndarray | _Turned":
        """The documents that are searched, so that dot products with `_turned` rank them."""
        if self._stored is None:
            return similarity.for_search(self._queries[:1], self._documents.take(self._pool), self._similarity)[1]
        added = self._documents.take(self._pool[self.collection.n_corpus :])
        return _Turned(self._stored, added, self._queries[:1], self._similarity)

    def _encode(self, texts: Sequence[str], prompt_name: str) -> np.ndarray:
        def encode(texts: list[str], name: str) -> np.ndarray:
            distinct = list(dict.fromkeys(texts))  # a corpus may hold a text twice
            vectors = self.embedder.encode(distinct, prompt_name=name, show_progress_bar=self._bar)
            if len(distinct) == len(texts):
                return vectors
            place = {text: i for i, text in enumerate(distinct)}
            return vectors[[place[text] for text in texts]]

        return finite_vectors(encode, list(texts), prompt_name)

    def _make(self, numbers_N: np.ndarray) -> np.ndarray:
        """Returns documents' vectors, float32 [N, E], numbers rising: the stored ones read, others encoded."""
        n_stored = self.collection.n_corpus if self._stored is not None else 0
        split = int(np.searchsorted(numbers_N, n_stored))
        texts = [self.collection.documents[i] for i in numbers_N[split:]]
        if not split:
            return self._encode(texts, "document")
        read = np.zeros((split, self._stored.width), np.float32)
        for start, block in self._stored.blocks():
            first, last = np.searchsorted(numbers_N[:split], (start, start + len(block)))
            read[first:last] = block[numbers_N[first:last] - start]
        return np.concatenate([read, self._encode(texts, "document")]) if texts else read


class _Held:
    """Vectors of some of N numbered documents; those not held yet are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[np.ndarray], np.ndarray]) -> None:
        self._place, self._make = np.full(count, -1, np.int64), make
        self._vectors = np.zeros((0, 0), np.float32)

    def need(self, numbers: np.ndarray) -> None:
        """Makes what is missing, all at once."""
        missing = np.unique(numbers[self._place[numbers] < 0])
        if len(missing):
            self._place[missing] = len(self._vectors) + np.arange(len(missing))
            made = self._make(missing)
            self._vectors = np.concatenate([self._vectors, made]) if len(self._vectors) else made

    def take(self, numbers_N: np.ndarray) -> np.ndarray:
        """Returns vectors, float32 [N, E]."""
        self.need(numbers_N)
        places = self._place[numbers_N]
        everything = len(places) == len(self._vectors) and (places == np.arange(len(places))).all()
        return self._vectors if everything else self._vectors[places]


class _Turned:
    """Stored vectors and more behind them, made ready for `top_k` block by block."""

    def __init__(self, stored: VectorFolder, added: np.ndarray, query_1xE: np.ndarray, similarity: str) -> None:
        self._stored, self._added, self._query, self._similarity = stored, added, query_1xE, similarity
        self.width = self._turn(np.zeros((1, stored.width), np.float32)).shape[1]

    def __len__(self) -> int:
        return len(self._stored) + len(self._added)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number of the first, float32 [n, width])."""
        for start, block in self._stored.blocks():
            yield start, self._turn(block)
        if len(self._added):
            yield len(self._stored), self._turn(self._added)

    def _turn(self, vectors: np.ndarray) -> np.ndarray:
        return similarity.for_search(self._query, vectors, self._similarity)[1]


def require_stored(stored: VectorFolder, ids: Sequence[str], embedder: Embedder, weights: str, where: str) -> None:
    """Makes sure that stored vectors are those that the model would give for a corpus.

    Args:
      stored: the folder.
      ids: of the corpus's texts, in order.
      embedder: the model.
      weights: `model_source.fingerprint` of the model.
      where: the flag that names the folder.

    Raises:
      UserError: what differs.
    """
    said = f"{where}={stored.path}"
    if stored.manifest.weights != weights:
        raise UserError(f"{said}: vectors of another model ({stored.model}): encode the corpus with --model")
    if stored.dtype in PACKED:
        raise UserError(f"{said}: {stored.dtype} vectors say too little for margins: wants float32, float16 or int8")
    prompt = embedder.prompts["document"]
    if stored.prompt != prompt:
        raise UserError(f"{said}: encoded with the prompt {stored.prompt!r}, wants that of documents, {prompt!r}")
    width = embedder.blueprint.truncate_dim or embedder.width
    scaled = stored.similarity != "cosine" and stored.normalized != embedder.blueprint.head.unit
    if stored.manifest.raw or stored.manifest.template or stored.width != width or scaled:
        raise UserError(
            f"{said}: encoded with --raw, --normalize, --dims or a template: wants the model's vectors as they are"
        )
    if len(stored) != len(ids):
        raise UserError(f"{said}: {len(stored):,} vectors for {len(ids):,} texts of --corpus")
    for number, (a, b) in enumerate(zip(ids, stored.ids()), 1):
        if a != b:
            raise UserError(f"{said}: text {number} is {b!r} there, and {a!r} in --corpus: the order must be the same")


def require_searchable(embedder: Embedder, said: str) -> None:
    """Makes sure that dot products can stand for the model's similarities.

    Raises:
      UserError: they cannot.
    """
    if embedder.blueprint.similarity == "manhattan":
        raise UserError(f"{said}: compares vectors by Manhattan distance, which the search cannot")
