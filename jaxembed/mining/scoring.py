"""A model's view of a collection: which documents it finds for a query, and how near it finds a document."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxembed import similarity
from jaxembed.data.cache_writer import INSTRUCTION
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.evaluation.vectors import finite_vectors
from jaxembed.mining.collection import Collection
from jaxembed.vectors.exact import Compared, top_k
from jaxembed.vectors.folder import VectorFolder

AT_ONCE = 1 << 16  # pairs compared, or documents searched, at a time


class Scorer:
    """Similarities by one model, as it compares vectors: cosines, dot products, or distances with a minus.

    Each distinct query and document is encoded once; documents when they are first needed.
    """

    def __init__(
        self,
        embedder: Embedder,
        collection: Collection,
        prompts: tuple[str, str] | None = None,
        stored: VectorFolder | None = None,
        pool: np.ndarray | None = None,
        bar: bool = False,
    ) -> None:
        """Encodes the queries.

        Args:
          embedder: the model.
          collection: the texts.
          prompts: what stands before queries and before documents: see `prompts_of`; None = 'query' and 'document'.
          stored: vectors of the collection's corpus, `require_stored` has been asked about; None: they are encoded.
          pool: numbers of the documents that are searched, rising; None = all. Not with `stored`.
          bar: show progress on standard error.

        Raises:
          UserError: the model compares by Manhattan distance, or its vectors are not finite.
        """
        self.embedder, self.collection, self._stored, self._bar = embedder, collection, stored, bar
        self._pool = np.arange(len(collection.documents)) if pool is None else pool
        self._prompts = prompts or prompts_of(embedder, "the model")
        self._similarity = embedder.blueprint.similarity
        self._queries = self._encode_queries()
        self._documents = _Held(len(collection.documents), self._make)
        searched = _Searched(self._documents, self._pool, stored, self._queries.shape[1])
        self._compared = Compared(searched, self._similarity)

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
        vectors = self._queries[queries_Q]
        dots, numbers = top_k(self._compared.queries(vectors), self._compared, k, self.embedder.mesh)
        return self._compared.scores(dots, vectors), self._pool[numbers].astype(np.int32)

    def _encode_queries(self) -> np.ndarray:
        """Returns the queries' vectors, float32 [Q, E], each behind the prompt that its instruction fills."""
        behind: dict[str, list[int]] = {}
        for number, instruction in enumerate(self.collection.instructions):
            behind.setdefault(self._prompts[0].replace(INSTRUCTION, instruction), []).append(number)
        parts = [self._encode([self.collection.queries[i] for i in own], prompt) for prompt, own in behind.items()]
        vectors = np.zeros((len(self.collection.queries), parts[0].shape[1] if parts else 0), np.float32)
        for own, part in zip(behind.values(), parts):
            vectors[own] = part
        return vectors

    def _encode(self, texts: Sequence[str], prompt: str) -> np.ndarray:
        def encode(texts: list[str], prompt: str) -> np.ndarray:
            distinct = list(dict.fromkeys(texts))  # a corpus may hold a text twice, as may queries of one prompt
            vectors = self.embedder.encode(distinct, prompt=prompt, show_progress_bar=self._bar)
            if len(distinct) == len(texts):
                return vectors
            place = {text: i for i, text in enumerate(distinct)}
            return vectors[[place[text] for text in texts]]

        return finite_vectors(encode, list(texts), prompt)

    def _make(self, numbers_N: np.ndarray) -> np.ndarray:
        """Returns documents' vectors, float32 [N, E], numbers rising: the stored ones read, others encoded."""
        n_stored = self.collection.n_corpus if self._stored is not None else 0
        split = int(np.searchsorted(numbers_N, n_stored))
        texts = [self.collection.documents[i] for i in numbers_N[split:]]
        if not split:
            return self._encode(texts, self._prompts[1])
        read = np.zeros((split, self._stored.width), np.float32)
        for start, block in self._stored.blocks():
            first, last = np.searchsorted(numbers_N[:split], (start, start + len(block)))
            read[first:last] = block[numbers_N[first:last] - start]
        return np.concatenate([read, self._encode(texts, self._prompts[1])]) if texts else read


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


class _Searched:
    """The vectors that are searched: the stored ones, then what is held of those numbered in `pool`."""

    def __init__(self, held: _Held, pool: np.ndarray, stored: VectorFolder | None, width: int) -> None:
        self._held, self._pool, self._stored, self.width = held, pool, stored, width

    def __len__(self) -> int:
        return len(self._pool)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number of the first, float32 [n, width])."""
        if self._stored is not None:
            yield from self._stored.blocks()
        first = 0 if self._stored is None else len(self._stored)
        self._held.need(self._pool[first:])
        for start in range(first, len(self._pool), AT_ONCE):
            yield start, self._held.take(self._pool[start : start + AT_ONCE])


def prompts_of(embedder: Embedder, said: str, query_name: str = "query", name: str = "document") -> tuple[str, str]:
    """Returns a model's prompts for queries, `{instruction}` still in it, and for documents.

    Args:
      embedder: the model.
      said: the flag that names it, for messages.
      query_name, name: theirs, the values of --query_prompt_name and --prompt_name; '' for no prompt.

    Raises:
      UserError: the model has no such prompt, or documents are to have an instruction.
    """
    for flag, value in (("query_prompt_name", query_name), ("prompt_name", name)):
        if value and value not in embedder.prompts:
            raise UserError(f"--{flag}={value}: the prompts of {said} are {', '.join(embedder.prompts)}")
    prompts = embedder.prompt_of(query_name), embedder.prompt_of(name)
    if INSTRUCTION in prompts[1]:
        raise UserError(
            f"{said}: its prompt {name!r} has {INSTRUCTION}, but a document is searched for the queries of all "
            "records: take a model, or a prompt, without"
        )
    return prompts


def require_searchable(embedder: Embedder, said: str) -> None:
    """Makes sure that dot products can stand for the model's similarities.

    Raises:
      UserError: they cannot.
    """
    if embedder.blueprint.similarity == "manhattan":
        raise UserError(f"{said}: compares vectors by Manhattan distance, which the search cannot")
