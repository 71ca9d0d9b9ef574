"""Floating-point operations of a step, by the model's own formula: those of real tokens, without any recomputation.

A product of [m, k] and [k, n] counts 2 m k n. Counted: linear layers of the backbone and of the head, adapters, the
experts that a token goes to (k of X) and their router, attention's two products (scores, and weights with values), and
of state-space layers the short convolutions and what a token does to its I N states, whatever form computes it: it
writes and it reads, 2 I N each. Not counted, as in PaLM's count (Chowdhery et al. 2022, arXiv:2204.02311, appendix B):
look-ups, norms, activations, rotary positions, biases, the softmax, states' decay; and neither the optimizer nor the
loss.

Attention counts the pairs of tokens that see each other, so that a masked score is no work done: n² in a text of n
tokens that sees all of itself, n (n + 1) / 2 where a token sees those up to itself, and with a reach of w tokens on
either side no more than w of them there. (PaLM counts n² for causal models too, which flatters their utilisation.) What
a prefix adds to a causal layer is left out.
"""

import dataclasses
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxembed.models.hybrid import ATTENTION, MIXERS, HybridConfig
from jaxembed.models.layers.parts import DENSE, LAYERS, SPARSE
from jaxembed.models.lora import Lora, is_adapter
from jaxembed.models.mamba import MambaConfig
from jaxembed.models.modernbert import ModernBertConfig
from jaxembed.models.options import per_layer
from jaxembed.models.text_encoder import BACKBONE, LANGUAGE, ModelFactory, flatten
from jaxembed.models.transformer import TransformerConfig

if TYPE_CHECKING:  # models/ knows nothing of where models come from
    from jaxembed.blueprint import Blueprint

_LAYERS = f"{BACKBONE}{LAYERS}/"
_STACKS = tuple(f"{BACKBONE}{stack}/" for stack in (LAYERS, DENSE, SPARSE, ATTENTION, MIXERS))
_QUERIES = tuple(f"{path}/query/kernel" for path in (f"{_LAYERS}attention", f"{BACKBONE}{ATTENTION}"))
_EXPERTS = tuple(f"{BACKBONE}{SPARSE}/{name}/kernel" for name in ("up", "down", "gate"))
_HEAD = ("expansion/kernel", "projection/kernel")


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """What a model computes, as operations of its way forward.

    Attributes:
      per_token: of the kernels that every token meets, and of its states.
      frozen_per_token: of these, what belongs to kernels that are not trained.
      per_text: of the head's kernels behind pooling.
      heads: H and K; 0 and 0 where no layer attends. A pair of tokens in one layer, where the first sees the second,
        counts 4 H K.
      layers: (whether causal, reach; 0 = any distance) → how many layers attend so.
      vectors: whether the step makes vectors of its texts.
      predicted: of each loss over tokens, which reads the texts once more, the part of the tokens that it asks for.
      per_word: of the language head, for a token that is asked for. frozen_per_word: what of it is not trained.
    """

    per_token: int
    frozen_per_token: int
    per_text: int
    heads: tuple[int, int]
    layers: tuple[tuple[tuple[bool, int], int], ...]
    vectors: bool = True
    predicted: tuple[float, ...] = ()
    per_word: int = 0
    frozen_per_word: int = 0

    @classmethod
    def of(
        cls,
        blueprint: "Blueprint",
        factory: ModelFactory,
        lora: Lora | None = None,
        vectors: bool = True,
        predicted: tuple[float, ...] = (),
    ) -> "StepFlops":
        """Counts a model's operations from its parameters' shapes; needs a mesh set.

        Args:
          blueprint: the model's; its backbone says what attention sees.
          factory: the model's maker, with its adapters where it has any.
          lora: the adapters, with which the backbone's own kernels are not trained; None without.
          vectors: whether the step has losses over vectors.
          predicted: of each of its losses over tokens, the part of the tokens that it asks for.
        """
        leaves = flatten(factory.abstract())
        kernels = {path: 2 * math.prod(x.shape) for path, x in leaves.items() if _is_kernel(path)}
        transform = sum(kernels.pop(path) for path in [*kernels] if path.startswith(LANGUAGE))
        per_word = transform + 2 * blueprint.backbone.width * blueprint.backbone.vocab_size if predicted else 0
        if shape := blueprint.experts:
            taken = 1 if shape.by_source else shape.top_k
            kernels |= {path: kernels[path] // shape.count * taken for path in _EXPERTS if path in kernels}
        if getattr(blueprint.backbone, "backward", "") == "shared":  # one mixer reads every text twice
            kernels |= {path: 2 * n for path, n in kernels.items() if path.startswith(f"{_LAYERS}mixer/")}
        layers = sum(n for path, n in kernels.items() if path.startswith(_STACKS) and not is_adapter(path))
        per_text = sum(kernels.get(path, 0) for path in _HEAD)
        # The latents' keys and values are made once, not for each token; its scores and values are for each.
        once = sum(kernels.get(f"latent_attention/{name}/kernel", 0) for name in ("key", "value"))
        latent = 4 * blueprint.head.latents * blueprint.backbone.width if blueprint.head.pooling == "latent" else 0
        return cls(
            per_token=sum(kernels.values()) - per_text - once + latent + _states(blueprint.backbone),
            frozen_per_token=layers if lora else 0,
            per_text=per_text,
            heads=next((leaves[path].shape[-2:] for path in _QUERIES if path in leaves), (0, 0)),
            layers=tuple(Counter(_seen(blueprint.backbone)).items()),
            vectors=vectors,
            predicted=predicted,
            per_word=per_word,
            frozen_per_word=per_word if lora else 0,
        )

    def forward(self, lengths: np.ndarray) -> float:
        """Returns operations of the way forward; arguments as for `training`. A teacher does no more than this."""
        return float(self._linear(self.per_token, lengths) + self._attention(lengths))

    def training(self, lengths: np.ndarray) -> float:
        """Returns operations of forward and backward pass.

        Each product has two in the backward pass, one for either factor's gradient; where kernels are not trained, one.
        (Kernels that `config.optimizer.by_regex` freezes count as trained.)

        Args:
          lengths: integers of any shape, tokens of each text of a step; 0 where there is no text.
        """
        tokens = int(lengths.sum())
        reading = tokens * (3 * self.per_token - self.frozen_per_token) + 3 * self._attention(lengths)
        of_texts = 3 * int(np.count_nonzero(lengths)) * self.per_text if self.vectors else 0
        of_words = tokens * sum(self.predicted) * (3 * self.per_word - self.frozen_per_word)
        return float((self.vectors + len(self.predicted)) * reading + of_texts + of_words)

    def _linear(self, per_token: int, lengths: np.ndarray) -> int:
        return int(lengths.sum()) * per_token + int(np.count_nonzero(lengths)) * self.per_text

    def _attention(self, lengths: np.ndarray) -> float:
        texts_of_length = np.bincount(lengths.reshape(-1))
        length = np.arange(texts_of_length.size, dtype=np.float64)
        seen = sum((n * pairs_seen(length, causal, reach) for (causal, reach), n in self.layers), 0 * length)
        return 4 * math.prod(self.heads) * float(texts_of_length @ seen)


def pairs_seen(length: np.ndarray, causal: bool, reach: int) -> np.ndarray:
    """Returns how many pairs (token, token that it sees) texts have.

    Args:
      length: float64, n of each text.
      causal: whether nothing behind a token is seen.
      reach: the farthest distance seen, on either side; 0 = any.
    """
    # Before the i-th token (from 0) lie min(i, reach) that it sees; behind it, if any are seen, as many in all.
    far = np.minimum(length, reach + 1) if reach else length
    before = far * (far - 1) / 2 + (length - far) * reach
    return length + before * (1 if causal else 2)


def _is_kernel(path: str) -> bool:
    return path.endswith("/kernel") or is_adapter(path)


def _states(backbone: Any) -> int:
    """Returns what a token writes into the states of all state-space layers, and reads from them."""
    match backbone:
        case MambaConfig(layers=layers, backward=backward):
            mixers = layers if backward == "none" else 2 * layers
        case HybridConfig(mixers=of_layers):
            mixers = sum(of_layers)
        case _:
            return 0
    return 4 * mixers * backbone.mixer.channels * backbone.mixer.state


def _seen(backbone: Any) -> list[tuple[bool, int]]:
    """Returns of each layer that attends whether it is causal, and its reach."""
    if isinstance(backbone, MambaConfig):
        return []
    causal = [mode != "bidirectional" for mode in per_layer(backbone.attention, backbone.layers)]
    match backbone:
        case HybridConfig(mixers=mixers):
            return [(c, 0) for c, is_mixer in zip(causal, mixers) if not is_mixer]
        case TransformerConfig(window=window, local=local):
            reach = [window.causal if c else window.bidirectional for c in causal]
            return [(c, w if near else 0) for c, w, near in zip(causal, reach, per_layer(local, backbone.layers))]
        case ModernBertConfig(local=local, reach=reach):
            return [(c, reach if near else 0) for c, near in zip(causal, local)]
        case _:
            return [(c, 0) for c in causal]
