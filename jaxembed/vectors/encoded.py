"""A model's vectors of texts, kept in a folder so that the same texts are not encoded twice."""

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxembed.embedder import WINDOW, Embedder
from jaxembed.errors import UserError
from jaxembed.evaluation.vectors import require_finite
from jaxembed.run_folder import write_whole
from jaxembed.storage import AnyPath


class CachedEncoder:
    """Encodes texts, or takes the vectors that it made of them before.

    A file of the cache belongs to a model, its longest text, a prompt, and some texts: the vectors of these texts in
    their order, in NumPy's format. What is not used any more may be removed.
    """

    def __init__(self, embedder: Embedder, fingerprint: str, cache: AnyPath | None) -> None:
        """Joins what decides the vectors.

        Args:
          embedder: the model.
          fingerprint: of the model; see `model_source.fingerprint`. Not looked at without a cache.
          cache: the folder, made where there is none; None for none.
        """
        self.embedder, self._fingerprint, self._cache = embedder, fingerprint, cache

    def __call__(self, texts: Sequence[str], prompt_name: str) -> np.ndarray:
        """Returns the vectors of texts behind a prompt: float32 [n, E], finite.

        Raises:
          UserError: the model has no such prompt; a vector is not finite; the cache cannot be written.
        """
        place = self._cache / self._name(texts, prompt_name) if self._cache else None
        vectors = self._kept(place, len(texts)) if place else None
        if vectors is not None:
            return vectors
        vectors = require_finite(self.embedder.encode(texts, prompt_name=prompt_name, show_progress_bar=True))
        if place:
            self._keep(place, vectors)
        return vectors

    def windows(self, texts: Iterable[str], prompt_name: str) -> Iterator[np.ndarray]:
        """Yields the vectors of any number of texts, some at a time.

        Raises:
          UserError: as by a call, or by the texts.
        """
        texts = iter(texts)
        while window := list(itertools.islice(texts, WINDOW)):
            yield self(window, prompt_name)

    def _name(self, texts: Sequence[str], prompt_name: str) -> str:
        model = self.embedder
        said = [self._fingerprint, model.blueprint.max_length, model.prompts.get(prompt_name), list(texts)]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32] + ".npy"

    def _kept(self, place: AnyPath, n: int) -> np.ndarray | None:
        """Returns what is in a file of the cache; None where it is not there, or something else."""
        try:
            vectors = np.load(io.BytesIO(place.read_bytes()), allow_pickle=False)
        except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
            return None
        return vectors if vectors.shape == (n, self.embedder.width) and vectors.dtype == np.float32 else None

    def _keep(self, place: AnyPath, vectors: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, vectors, allow_pickle=False)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, buffer.getvalue())
        except OSError as error:
            raise UserError(f"--cache={place.parent}: cannot be written: {error.strerror}") from error
