"""Code for a model card: how to load the exported folder, each piece ready to run in that folder.

All of them make `queries` and `documents`, two arrays of one vector per text, and their `scores`.
"""

import json

from jaxembed.blueprint import Blueprint
from jaxembed.embedder import Embedder

QUERIES = '["What do bees make honey from?"]'
DOCUMENTS = '["Bees turn the nectar of flowers into honey.", "A violin has four strings."]'


def sentence_transformers_code(model: Embedder) -> str:
    """Returns how sentence-transformers loads it; latent attention, and some models, are code in the folder."""
    of_ours = model.blueprint.head.pooling == "latent" or model.blueprint.architecture.code
    trust = ", trust_remote_code=True" if of_ours else ""
    return f"""from sentence_transformers import SentenceTransformer

model = SentenceTransformer("."{trust})  # this folder, or its name on the hub
queries = model.encode_query({QUERIES})
documents = model.encode_document({DOCUMENTS})
scores = model.similarity(queries, documents)
"""


def jax_code() -> str:
    """Returns how jaxembed loads it."""
    return f"""from jaxembed import Embedder

model = Embedder.load(".")  # this folder, or its name on the hub
queries = model.encode_query({QUERIES})
documents = model.encode_document({DOCUMENTS})
scores = model.similarity(queries, documents)
"""


def transformers_code(model: Embedder) -> str:
    """Returns how transformers loads it, with this model's pooling, projection and normalisation written out."""
    blueprint, head = model.blueprint, model.blueprint.head
    query, document = (json.dumps(model.prompts[name], ensure_ascii=False) for name in ("query", "document"))
    imports = ["import torch"]
    if head.projection:
        imports.append("from safetensors.torch import load_file")
    imports.append("from transformers import AutoModel, AutoTokenizer")
    trust = ", trust_remote_code=True" if blueprint.architecture.code else ""
    load = ['tokenizer = AutoTokenizer.from_pretrained(".")', f'model = AutoModel.from_pretrained("."{trust}).eval()']
    if head.projection:
        load.append('dense = load_file("2_Dense/model.safetensors")')
    body = [
        "batch = tokenizer(",
        "    [prompt + text for text in texts],",
        f"    max_length={blueprint.max_length},",
        "    truncation=True,",
        "    padding=True,",
        '    return_tensors="pt",',
        ")",
        "with torch.no_grad():",
        "    states = model(**batch).last_hidden_state",
        'mask = batch["attention_mask"]',
        *_prompt_lines(blueprint),
        *_pooling_lines(head.pooling, masked=not head.pool_prompt),
    ]
    if head.projection:
        bias = ', dense["linear.bias"]' if head.projection_bias else ""
        body.append(f'vectors = torch.nn.functional.linear(vectors, dense["linear.weight"]{bias})')
    last = "torch.nn.functional.normalize(vectors, dim=-1)" if head.normalize else "vectors"
    cut = f"[:, :{blueprint.truncate_dim}]" if blueprint.truncate_dim else ""
    body.append(f"return {last}{cut}")
    lines = [
        *imports,
        "",
        *load,
        "",
        "",
        "def encode(texts, prompt):",
        *(f"    {line}" for line in body),
        "",
        "",
        f"queries = encode({QUERIES}, prompt={query})",
        f"documents = encode({DOCUMENTS}, prompt={document})",
        f"scores = {_similarity(blueprint.similarity)}",
    ]
    return "\n".join(lines) + "\n"


def _prompt_lines(blueprint: Blueprint) -> list[str]:
    """Leaves the prompt's tokens out of the mask, where the model pools without them."""
    if blueprint.head.pool_prompt:
        return []
    probe = "a"
    closing = len(blueprint.tokenizer.tokenize([probe])[0]) - blueprint.tokenizer.prompt_length(probe)
    alone = 'len(tokenizer(prompt)["input_ids"])' + (f" - {closing}" if closing else "")
    return [f"mask[:, : {alone} if prompt else 0] = 0  # the prompt is not pooled"]


def _pooling_lines(pooling: str, masked: bool) -> list[str]:
    """Pools `states` [B, L, D] by `mask` [B, L]; `masked` where the mask leaves out a prompt."""
    weighted = "vectors = (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)"
    places = "torch.arange(1, mask.shape[1] + 1)"
    return {
        "mean": ["weights = mask.float()", weighted],
        "weighted_mean": [f"weights = mask * {places}.float()", weighted],
        "cls": ["vectors = states[torch.arange(len(texts)), mask.argmax(1)]" if masked else "vectors = states[:, 0]"],
        "last": [f"vectors = states[torch.arange(len(texts)), (mask * {places}).argmax(1)]"],
    }[pooling]


def _similarity(kind: str) -> str:
    return {
        "cosine": "torch.nn.functional.cosine_similarity(queries[:, None], documents[None], dim=-1)",
        "dot": "queries @ documents.T",
        "euclidean": "-torch.cdist(queries, documents)",
        "manhattan": "-torch.cdist(queries, documents, p=1)",
    }[kind]
