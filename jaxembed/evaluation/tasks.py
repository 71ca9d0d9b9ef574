"""The evaluation sets of a run, read once and scored as often as asked."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from jaxembed.config import EvalConfig
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.evaluation.bm25 import rank_by_words
from jaxembed.evaluation.classification import ClassificationData, evaluate_classification, read_classification
from jaxembed.evaluation.hybrid import evaluate_hybrid
from jaxembed.evaluation.likelihood import TextsData, evaluate_likelihood, read_texts
from jaxembed.evaluation.pairs import read_pairs
from jaxembed.evaluation.report import BM25, HYBRID, Results
from jaxembed.evaluation.retrieval import RetrievalData, rank_by_vectors, read_retrieval, score_rankings
from jaxembed.evaluation.sts import StsData, evaluate_sts, read_sts
from jaxembed.evaluation.vectors import NO_PROMPT
from jaxembed.vectors.exact import top_k

Data = TypeVar("Data", StsData, RetrievalData, ClassificationData, TextsData)


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Evaluation sets, by name in the results.

    Attributes:
      sts: similarity sets, 'sts/NAME'.
      retrieval: retrieval sets, 'retrieval/NAME' and 'pairs/NAME'.
      classification: classification sets, 'classification/NAME'.
      texts: texts to predict, 'texts/NAME'.
      draws: masks of each of these.
      bm25: whether BM25 is scored too.
      hybrid: whether the model's and BM25's rankings are fused and scored too.
    """

    sts: dict[str, StsData]
    retrieval: dict[str, RetrievalData]
    classification: dict[str, ClassificationData]
    texts: dict[str, TextsData]
    draws: int
    bm25: bool
    hybrid: bool

    @classmethod
    def read(cls, config: EvalConfig, prefix: str) -> "Tasks":
        """Reads the sets.

        Args:
          config: names them.
          prefix: what messages put before a set's field: 'config.eval.' or '--'.

        Raises:
          UserError: one is missing or broken, or two have the same name.
        """
        beir = _by_name("retrieval", map(read_retrieval, config.retrieval))
        pairs = _by_name("pairs", (read_pairs(spec, f"{prefix}pairs") for spec in config.pairs))
        classification = _by_name("classification", map(read_classification, config.classification))
        texts = _by_name("texts", (read_texts(spec, f"{prefix}texts") for spec in config.texts))
        sts = _by_name("sts", map(read_sts, config.sts))
        return cls(sts, beir | pairs, classification, texts, config.draws, config.bm25, config.hybrid)

    def evaluate(self, embedder: Embedder, show_progress_bar: bool = False) -> Results:
        """Scores a model on all sets, on its mesh.

        Queries and documents are encoded with their own prompts, other texts with the model's default prompt, and
        vectors compared as the model says, as in sentence-transformers. Texts to predict have no prompt. What the
        model's and BM25's rankings give together, if it is asked for, is called 'hybrid/KIND/NAME'.

        Raises:
          UserError: a set wants what the model does not have: vectors that are finite, words that it predicts.
        """

        def encode(texts: Sequence[str], prompt_name: str) -> np.ndarray:
            by_name = {"query": embedder.encode_query, "document": embedder.encode_document, NO_PROMPT: embedder.encode}
            return by_name[prompt_name](texts, show_progress_bar=show_progress_bar)

        search, similarity = functools.partial(top_k, mesh=embedder.mesh), embedder.blueprint.similarity
        results = {task: evaluate_sts(data, encode, similarity) for task, data in self.sts.items()}
        for task, data in self.retrieval.items():
            rankings = rank_by_vectors(data, encode, search, similarity)
            results[task] = score_rankings(data, rankings)
            if self.hybrid:
                results[HYBRID + task] = evaluate_hybrid(data, rankings, self._by_words[task])
        for task, data in self.classification.items():
            results[task] = evaluate_classification(data, encode)
        for task, data in self.texts.items():
            results[task] = evaluate_likelihood(data, embedder, self.draws, show_progress_bar)
        return results

    def baselines(self) -> Results:
        """Scores BM25 on the retrieval and pairs sets, as 'bm25/KIND/NAME', if it is asked for."""
        if not self.bm25:
            return {}
        return {BM25 + task: score_rankings(data, self._by_words[task]) for task, data in self.retrieval.items()}

    @functools.cached_property
    def _by_words(self) -> dict[str, list[np.ndarray]]:
        """BM25's rankings, made once: a run asks for them at every evaluation."""
        return {task: rank_by_words(data) for task, data in self.retrieval.items()}


def _by_name(kind: str, sets: Iterable[Data]) -> dict[str, Data]:
    named: dict[str, Data] = {}
    for data in sets:
        task = f"{kind}/{data.name}"
        if task in named:
            raise UserError(f"two evaluation sets are called {task}: their scores would have one name; rename one")
        named[task] = data
    return named
