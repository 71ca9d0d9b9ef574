"""Latent attention of NV-Embed (Lee et al. 2024, arXiv:2405.17428), as a module of sentence-transformers.

It stands between Transformer and a mean Pooling: every token's state attends to trained latents, then passes a gated
feed-forward layer. jaxembed writes this file into the folders of such models and never imports it. Open them with
SentenceTransformer(FOLDER, trust_remote_code=True).
"""

import pathlib
import shutil

import torch
from torch import Tensor, nn

try:
    from sentence_transformers.sentence_transformer.modules import Module
except ImportError:  # before sentence-transformers 5.4
    from sentence_transformers.models import Module


class LatentAttention(Module):
    """Token states [B, L, D] to token states, in float32; r latents, H heads of width D / H."""

    config_keys: list[str] = ["width", "latents", "heads"]  # noqa: RUF012

    def __init__(self, width: int, latents: int, heads: int) -> None:
        super().__init__()
        self.width, self.n_latents, self.heads = width, latents, heads
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.query_norm, self.latent_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, features: dict[str, Tensor], **kwargs: object) -> dict[str, Tensor]:
        x = features["token_embeddings"].to(self.latents.dtype)
        x = x + self.attend(self.query_norm(x), self.latent_norm(self.latents).expand(len(x), -1, -1))
        value, gate = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        return {**features, "token_embeddings": x + self.down(value * nn.functional.gelu(gate))}

    def attend(self, x: Tensor, latents: Tensor) -> Tensor:
        q, k, v = (
            project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, y in ((self.query, x), (self.key, latents), (self.value, latents))
        )
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def get_config_dict(self) -> dict[str, int]:
        return {"width": self.width, "latents": self.n_latents, "heads": self.heads}

    def save(self, output_path: str, *args: object, safe_serialization: bool = True, **kwargs: object) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)
        shutil.copy(__file__, pathlib.Path(output_path).parent)  # where it is looked for

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: object) -> "LatentAttention":
        place = {"model_name_or_path": model_name_or_path, "subfolder": subfolder}
        place |= {
            key: kwargs[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in kwargs
        }
        return cls.load_torch_weights(model=cls(**cls.load_config(**place)), **place)
