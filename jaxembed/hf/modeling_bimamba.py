"""Mamba, Mamba-2 and Falcon Mamba that read every text both ways, for transformers.

jaxembed writes this file into the folders of such models and never imports it. Open them with
SentenceTransformer(FOLDER, trust_remote_code=True), or AutoModel.from_pretrained(FOLDER, trust_remote_code=True). A
layer is x + (forward(norm x) + backward(norm x)) / 2, where `backward` reads each text from its end. The mixers are
transformers' own; those that read backwards are called `backward_mixer`, and with `shared_directions` in config.json
the same mixer reads both ways.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import FalconMambaConfig, FalconMambaModel, Mamba2Config, Mamba2Model, MambaConfig, MambaModel
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaBlock
from transformers.models.mamba.modeling_mamba import MambaBlock
from transformers.models.mamba2.modeling_mamba2 import Mamba2Block


class BothWays:
    """What makes a block of transformers read each text from both ends."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if not getattr(config, "shared_directions", False):
            self.backward_mixer = copy.deepcopy(self.mixer)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Returns the block's output; `attention_mask` [B, L] says which tokens are the text's, None = all.

        Both mixers get the text's first token of their direction in the first place, so padding, on whichever side it
        was, lies behind what they read.
        """
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        x = self.norm(hidden_states.to(self.norm.weight.dtype))
        first, last, places = 0, x.shape[1] - 1, torch.arange(x.shape[1], device=x.device)[None]
        if attention_mask is not None:
            real = attention_mask.bool().int()
            first = real.argmax(1, keepdim=True)
            last = first + real.sum(1, keepdim=True) - 1
        forward = moved(self.mixer(moved(x, places + first)), places - first)
        backward = getattr(self, "backward_mixer", self.mixer)(moved(x, last - places))
        return residual + (forward + moved(backward, last - places)) / 2


def moved(x: Tensor, places: Tensor) -> Tensor:
    """Returns the states of x [B, L, D] at these places [B, L] or [1, L], counted around the row's end."""
    return torch.take_along_dim(x, (places % x.shape[1])[..., None], 1)


class BiMambaBlock(BothWays, MambaBlock):
    """A block of Mamba."""


class BiMamba2Block(BothWays, Mamba2Block):
    """A block of Mamba-2."""


class BiFalconMambaBlock(BothWays, FalconMambaBlock):
    """A block of Falcon Mamba."""


class WithBlocks:
    """What puts such blocks into a model of transformers, in the place of its own."""

    block: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(self.block(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class BiMambaConfig(MambaConfig):
    """The fields of a Mamba, and `shared_directions`."""

    model_type = "bimamba"


class BiMamba2Config(Mamba2Config):
    """The fields of a Mamba-2, and `shared_directions`."""

    model_type = "bimamba2"


class BiFalconMambaConfig(FalconMambaConfig):
    """The fields of a Falcon Mamba, and `shared_directions`."""

    model_type = "bifalcon_mamba"


class BiMambaModel(WithBlocks, MambaModel):
    """A Mamba that reads both ways."""

    config_class, block = BiMambaConfig, BiMambaBlock
    _no_split_modules = ["BiMambaBlock"]  # noqa: RUF012


class BiMamba2Model(WithBlocks, Mamba2Model):
    """A Mamba-2 that reads both ways."""

    config_class, block = BiMamba2Config, BiMamba2Block
    _no_split_modules = ["BiMamba2Block"]  # noqa: RUF012


class BiFalconMambaModel(WithBlocks, FalconMambaModel):
    """A Falcon Mamba that reads both ways."""

    config_class, block = BiFalconMambaConfig, BiFalconMambaBlock
    _no_split_modules = ["BiFalconMambaBlock"]  # noqa: RUF012
