"""The evaluation sets of a run, read once and scored as often as asked."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.evaluation.retrieval import RetrievalData, evaluate_retrieval, read_retrieval
from jaxembed.evaluation.search import top_k
from jaxembed.evaluation.sts import StsData, evaluate_sts, read_sts
from jaxembed.evaluation.vectors import NO_PROMPT

Results = dict[str, dict[str, float]]  # 'sts/NAME' or 'retrieval/NAME' → metric → score


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Evaluation sets.

    Attributes:
      sts: similarity sets.
      retrieval: retrieval sets.
    """

    sts: tuple[StsData, ...]
    retrieval: tuple[RetrievalData, ...]

    @classmethod
    def read(cls, sts: Iterable[str], retrieval: Iterable[str]) -> "Tasks":
        """Reads the files.

        Raises:
          UserError: one is missing or broken, or two have the same name.
        """
        tasks = cls(tuple(map(read_sts, sts)), tuple(map(read_retrieval, retrieval)))
        for kind in (tasks.sts, tasks.retrieval):
            names = [data.name for data in kind]
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"two evaluation sets are called {name!r}: their scores would have one name")
        return tasks

    def evaluate(self, embedder: Embedder, show_progress_bar: bool = False) -> Results:
        """Scores a model on all sets, on its mesh.

        Similarity sets are encoded with the model's default prompt, queries and documents with their own, as in
        sentence-transformers.
        """

        def encode(texts: Sequence[str], prompt_name: str) -> np.ndarray:
            by_name = {"query": embedder.encode_query, "document": embedder.encode_document, NO_PROMPT: embedder.encode}
            return by_name[prompt_name](texts, show_progress_bar=show_progress_bar)

        search = functools.partial(top_k, mesh=embedder.mesh)
        return {f"sts/{data.name}": evaluate_sts(data, encode) for data in self.sts} | {
            f"retrieval/{data.name}": evaluate_retrieval(data, encode, search) for data in self.retrieval
        }
