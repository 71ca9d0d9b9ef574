"""Nomic's sparse BERT (Nussbaum & Duderstadt 2025, arXiv:2502.07972) for transformers.

jaxembed writes this file into the folders of such models and never imports it. Open them with
SentenceTransformer(FOLDER, trust_remote_code=True), or AutoModel.from_pretrained(FOLDER, trust_remote_code=True). The
names of fields and tensors are those of nomic-ai/nomic-embed-text-v2-moe; it and its variants are read.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput

GATES = {"swiglu": "silu", "geglu": "gelu"}  # activation_function → that of the gate


class NomicBertConfig(PretrainedConfig):
    """The fields of config.json that shape the model; `moe_layers`, `moe_gated` and `moe_up_bias` are jaxembed's."""

    model_type = "nomic_bert"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
    }

    def __init__(
        self,
        vocab_size: int = 30528,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        n_inner: int = 3072,
        n_positions: int = 2048,
        type_vocab_size: int = 2,
        layer_norm_epsilon: float = 1e-5,
        activation_function: str = "gelu_new",
        qkv_proj_bias: bool = True,
        mlp_fc1_bias: bool = True,
        mlp_fc2_bias: bool = True,
        rotary_emb_fraction: float = 0.0,
        rotary_emb_base: float = 10_000.0,
        initializer_range: float = 0.02,
        num_experts: int = 8,
        moe_top_k: int = 2,
        moe_every_n_layers: int = 0,
        moe_normalize_expert_weights: float = False,
        moe_layers: list[int] | None = None,
        moe_gated: bool = False,
        moe_up_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.type_vocab_size, self.n_positions = vocab_size, type_vocab_size, n_positions
        self.n_embd, self.n_layer, self.n_head, self.n_inner = n_embd, n_layer, n_head, n_inner
        self.layer_norm_epsilon, self.activation_function = layer_norm_epsilon, activation_function
        self.qkv_proj_bias, self.mlp_fc1_bias, self.mlp_fc2_bias = qkv_proj_bias, mlp_fc1_bias, mlp_fc2_bias
        self.rotary_emb_fraction, self.rotary_emb_base = rotary_emb_fraction, rotary_emb_base
        self.initializer_range = initializer_range
        self.num_experts, self.moe_top_k, self.moe_every_n_layers = num_experts, moe_top_k, moe_every_n_layers
        self.moe_normalize_expert_weights = moe_normalize_expert_weights
        self.moe_layers, self.moe_gated, self.moe_up_bias = moe_layers, moe_gated, moe_up_bias
        super().__init__(**kwargs)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return self.moe_every_n_layers > 0 and layer % self.moe_every_n_layers == 1


class Embeddings(nn.Module):
    """Token and type vectors, and position vectors where positions are not rotary."""

    def __init__(self, c: NomicBertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.n_embd)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.n_embd)
        self.position_embeddings = None if c.rotary_emb_fraction else nn.Embedding(c.n_positions, c.n_embd)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        return x if self.position_embeddings is None else x + self.position_embeddings(positions)


class Attention(nn.Module):
    """Self-attention of every token with all of its text."""

    def __init__(self, c: NomicBertConfig) -> None:
        super().__init__()
        self.heads = c.n_head
        self.Wqkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.qkv_proj_bias)
        self.out_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.qkv_proj_bias)

    def forward(self, x: Tensor, mask: Tensor, angles: Tensor | None) -> Tensor:
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, L, K] each
        if angles is not None:
            q, k = turned(q, angles), turned(k, angles)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores.float().masked_fill(~mask, torch.finfo(torch.float32).min)
        out = scores.softmax(-1).to(v.dtype) @ v
        return self.out_proj(out.transpose(1, 2).flatten(2))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Turns channel i of x [B, H, L, K] together with channel i + K / 2, by angles [B, 1, L, K / 2], in float32."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), or gated: fc2(activation(fc12(x)) · fc11(x))."""

    def __init__(self, c: NomicBertConfig) -> None:
        super().__init__()
        self.gated = c.activation_function in GATES
        self.activation = ACT2FN[GATES.get(c.activation_function, c.activation_function)]
        for name in ("fc11", "fc12") if self.gated else ("fc1",):
            setattr(self, name, nn.Linear(c.n_embd, c.n_inner, bias=c.mlp_fc1_bias))
        self.fc2 = nn.Linear(c.n_inner, c.n_embd, bias=c.mlp_fc2_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.fc2(self.activation(self.fc12(x)) * self.fc11(x))
        return self.fc2(self.activation(self.fc1(x)))


class Router(nn.Module):
    """Which experts a token takes, in float32."""

    def __init__(self, c: NomicBertConfig) -> None:
        super().__init__()
        self.top_k, self.normalize = c.moe_top_k, bool(c.moe_normalize_expert_weights)
        self.layer = nn.Linear(c.n_embd, c.num_experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights and numbers [N, k] of the experts of tokens [N, D]."""
        logits = nn.functional.linear(x.float(), self.layer.weight.float())
        weights, experts = logits.softmax(-1).topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True) if self.normalize else weights, experts


class ExpertWeights(nn.Module):
    """The kernels of all experts, one behind another: F rows each."""

    def __init__(self, c: NomicBertConfig) -> None:
        super().__init__()
        rows = c.num_experts * c.n_inner
        self.w1, self.w2 = (nn.Parameter(torch.empty(rows, c.n_embd)) for _ in range(2))
        self.v1 = nn.Parameter(torch.empty(rows, c.n_embd)) if c.moe_gated else None
        self.b1 = nn.Parameter(torch.empty(rows)) if c.moe_up_bias else None


class Experts(nn.Module):
    """w2ᵀ activation(w1 x), or gated: w2ᵀ (activation(w1 x) · v1 x). One bias behind all of them.

    The bias into the hidden layer belongs to what is not the gate; where there is no gate, to w1.
    """

    def __init__(self, c: NomicBertConfig) -> None:
        super().__init__()
        self.rows = c.n_inner
        self.activation = ACT2FN[GATES.get(c.activation_function, c.activation_function)]
        self.mlp = ExpertWeights(c)
        self.bias = nn.Parameter(torch.empty(c.n_embd))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number in experts.unique().tolist():
            token, nth = torch.where(experts == number)
            y = self.expert(x.index_select(0, token), number) * weights[token, nth, None].to(x.dtype)
            out.index_add_(0, token, y)
        return out + self.bias

    def expert(self, x: Tensor, number: int) -> Tensor:
        """Returns what one expert makes of tokens [N, D]."""
        own, mlp = slice(number * self.rows, (number + 1) * self.rows), self.mlp
        bias = None if mlp.b1 is None else mlp.b1[own]
        if mlp.v1 is None:
            hidden = self.activation(nn.functional.linear(x, mlp.w1[own], bias))
        else:
            hidden = self.activation(nn.functional.linear(x, mlp.w1[own])) * nn.functional.linear(x, mlp.v1[own], bias)
        return hidden @ mlp.w2[own]


class SparseMlp(nn.Module):
    """A router and its experts."""

    def __init__(self, c: NomicBertConfig) -> None:
        super().__init__()
        self.router, self.experts = Router(c), Experts(c)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        return self.experts(tokens, *self.router(tokens)).view_as(x)


class Layer(nn.Module):
    """One block: each sub-layer is added to its input, then normalised."""

    def __init__(self, c: NomicBertConfig, number: int) -> None:
        super().__init__()
        self.attn = Attention(c)
        self.mlp = SparseMlp(c) if c.is_sparse(number) else Mlp(c)
        self.norm1, self.norm2 = (nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor, angles: Tensor | None) -> Tensor:
        x = self.norm1(x + self.attn(x, mask, angles))
        return self.norm2(x + self.mlp(x))


class Encoder(nn.Module):
    """The layers."""

    def __init__(self, c: NomicBertConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.n_layer))


class NomicBertModel(PreTrainedModel):
    """Token ids and attention mask [B, L] to token states [B, L, D]."""

    config_class = NomicBertConfig
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def __init__(self, config: NomicBertConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.emb_ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.encoder = Encoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts | ExpertWeights):
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=self.config.initializer_range if weight.ndim > 1 else 0.0)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = attention_mask.bool()[:, None, None, :]
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # a text's first token is number 0, wherever it lies
        angles = self.angles(positions) if self.config.rotary_emb_fraction else None
        states = [self.emb_ln(self.embeddings(input_ids, positions))]
        for layer in self.encoder.layers:
            states.append(layer(states[-1], mask, angles))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states) if wanted else None)

    def angles(self, positions: Tensor) -> Tensor:
        """Returns radians [B, 1, L, K / 2] by which queries and keys are turned, in float32."""
        width = self.config.n_embd // self.config.n_head
        steps = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
        return positions[:, None, :, None].float() * self.config.rotary_emb_base**-steps
