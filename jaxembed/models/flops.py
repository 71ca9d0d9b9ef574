"""Floating-point operations of a model, for utilisation (MFU): those of real tokens, without any recomputation.

A product of [m, k] and [k, n] counts 2 m k n. Norms, activations, rotary positions and the softmax are left out, as in
PaLM's count (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxembed.models.text_encoder import BACKBONE, flatten


def linear_flops_per_token(params: Mapping[str, Any]) -> int:
    """Returns operations of one token's way forward through the linear layers of all of the backbone's layers.

    Args:
      params: the model's, arrays or ShapeDtypeStructs; layers are stacked.
    """
    kernels = (
        x for path, x in flatten(params).items() if path.startswith(f"{BACKBONE}layers/") and path.endswith("/kernel")
    )
    return sum(2 * math.prod(x.shape) for x in kernels)


def attention_flops(layers: int, heads: int, head_width: int, lengths: Sequence[int]) -> int:
    """Returns operations of the way forward of scores and values, of texts that see all of themselves.

    Args:
      layers: n.
      heads: H.
      head_width: K.
      lengths: tokens of each text.
    """
    return 4 * layers * heads * head_width * sum(int(length) ** 2 for length in lengths)


def training_flops(linear: int, attention: int, frozen: bool) -> int:
    """Returns operations of forward and backward pass, from those of the forward pass.

    Each product has two in the backward pass, one for either factor's gradient; where kernels are frozen, one. What low
    rank adapters add is left out.
    """
    return linear * (2 if frozen else 3) + attention * 3
