"""A jaxembed model as MTEB sees one (Muennighoff et al. 2023, arXiv:2210.07316), by the package mteb 2.

Scores are those of `mteb.evaluate(SentenceTransformer(folder), …)` on the exported folder: the same prompts for the
same texts, the same similarity, and mteb's own evaluators. This module needs mteb, which is optional: import it late.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from jaxembed.embedder import Embedder

Vectors = np.ndarray | torch.Tensor


class MtebEncoder(AbsEncoder):
    """An `Embedder` behind mteb's EncoderProtocol."""

    def __init__(self, embedder: Embedder, name: str) -> None:
        """Wraps a model.

        Args:
          embedder: the model.
          name: what results call it, 'ORGANISATION/NAME'.
        """
        self.model = embedder
        with warnings.catch_warnings():  # prompts that mteb does not look for, such as 'passage', are no mistake
            warnings.simplefilter("ignore")
            known, _ = self.validate_task_to_prompt_name(embedder.prompts, raise_for_invalid_keys=False)
        self.model_prompts = known
        about = {
            "name": name,
            "revision": f"step-{embedder.run.step}" if embedder.run else None,  # None: mteb's word for none
            "max_tokens": embedder.blueprint.max_length,
            "embed_dim": embedder.blueprint.truncate_dim or embedder.width,
            "similarity_fn_name": ScoringFunction(embedder.blueprint.similarity),
            "framework": ["JAX"],
        }
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=about)

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        show_progress_bar: bool = True,
        **kwargs: Any,
    ) -> np.ndarray:
        """Encodes the texts of all batches, packed anew: the batches' size, and all in `kwargs`, does not matter.

        The prompt is the first that the model has of: task name and side, task name, task type and side, task type,
        side ('query' or 'document'); else that of `encode_query`, `encode_document` or `encode`.

        Args:
          inputs: batches with the field 'text', a document's title and text already joined.
          task_metadata: of the task, whose name and type may have a prompt of their own.
          hf_split, hf_subset: not used.
          prompt_type: whether these are queries or documents; None for neither.
          show_progress_bar: on standard error.

        Returns:
          float32 [n, E].
        """
        texts = [text for batch in inputs for text in batch["text"]]
        by_side = {PromptType.query: self.model.encode_query, PromptType.document: self.model.encode_document}
        encode = by_side[prompt_type] if prompt_type else self.model.encode
        prompt = get_prompt(self.model_prompts, task_metadata, prompt_type)
        return encode(texts, prompt=prompt, show_progress_bar=show_progress_bar)

    def similarity(self, embeddings1: Vectors, embeddings2: Vectors) -> torch.Tensor:
        """Compares all with all, as the model says: [n, m]."""
        return torch.from_numpy(self.model.similarity(np.asarray(embeddings1), np.asarray(embeddings2)))

    def similarity_pairwise(self, embeddings1: Vectors, embeddings2: Vectors) -> torch.Tensor:
        """Compares each with its partner, as the model says: [n]."""
        return torch.from_numpy(self.model.similarity_pairwise(np.asarray(embeddings1), np.asarray(embeddings2)))
