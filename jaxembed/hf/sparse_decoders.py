"""How config.json and checkpoints of decoders speak of experts: mixtral, qwen2_moe, qwen3_moe, olmoe.

Routing as transformers' modeling files have it: the softmax over all experts in float32, of these the k likeliest,
whose weights are then divided by their sum (mixtral always, the others where `norm_topk_prob` says so). The hub's files
hold a tensor per expert; what transformers holds in memory, and may write too, is a tensor for all experts of a layer,
the gate in front of the other map.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxembed.errors import UserError
from jaxembed.hf.fields import read_count
from jaxembed.hf.source_experts import read_source_experts
from jaxembed.hf.table import Linear, Row
from jaxembed.models.layers.routing import ExpertsShape

COUNTS = ("num_experts", "num_local_experts")  # both spellings of X
_QWEN = {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None}


@dataclasses.dataclass(frozen=True)
class ExpertWords:
    """How one `model_type` speaks of its experts.

    Attributes:
      defaults: the fields that shape them, with what transformers takes them to be where config.json does not say.
      count: the spelling of X in the hub's files, one of COUNTS.
      width: the field with F.
      part: the sparse part in tensors' names.
      gate, up, down: an expert's maps there.
    """

    defaults: Mapping[str, Any]
    count: str = "num_experts"
    width: str = "intermediate_size"
    part: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def renames(self) -> tuple[tuple[str, str], ...]:
        """From transformers' names in memory to the hub's."""
        return () if self.part == "mlp" else ((r"^(layers\.\d+)\.mlp\.", rf"\1.{self.part}."),)


MIXTRAL = ExpertWords(
    {"num_local_experts": 8, "num_experts_per_tok": 2},
    count="num_local_experts",
    part="block_sparse_moe",
    gate="w1",
    up="w3",
    down="w2",
)
QWEN2 = ExpertWords(
    {
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        **_QWEN,
    },
    width="moe_intermediate_size",
)
QWEN3 = ExpertWords(
    {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        **_QWEN,
    },
    width="moe_intermediate_size",
)
OLMOE = ExpertWords({"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False})


def spelled(words: ExpertWords, hf: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """Returns config.json with the number of experts in the hub's spelling alone.

    Raises:
      UserError: it says two numbers.
    """
    said = {field: hf[field] for field in COUNTS if hf.get(field) is not None}
    if any(count != value for count in said.values() for value in said.values()):
        both = " and ".join(f"{field} = {value!r}" for field, value in said.items())
        raise UserError(f"{where}: {both} are two names of one number: leave one out")
    rest = {field: value for field, value in hf.items() if field not in COUNTS}
    return rest | {words.count: said.popitem()[1]} if said else rest


def read_experts(
    words: ExpertWords, hf: Mapping[str, Any], layers: int, activation: str, where: str
) -> tuple[ExpertsShape, tuple[bool, ...]]:
    """Reads the experts out of config.json, and whether layers are sparse, one value for all or one for each.

    Args:
      words: those of its model_type.
      hf: the content of config.json, defaults filled in.
      layers: n.
      activation: of the experts, our name.
      where: the file, for messages.

    Raises:
      UserError: a wrong value, or no sparse layer.
    """
    count, top_k = read_count(hf, words.count, where), read_count(hf, "num_experts_per_tok", where)
    if top_k > count:
        raise UserError(f"{where}: num_experts_per_tok = {top_k}: of {words.count} = {count} a token takes no more")
    normalize = hf["norm_topk_prob"] if "norm_topk_prob" in words.defaults else True
    if not isinstance(normalize, bool):
        raise UserError(f"{where}: norm_topk_prob = {normalize!r}: wants true or false")
    shared = "shared_expert_intermediate_size"
    shape = ExpertsShape(
        count=count,
        top_k=top_k,
        width=read_count(hf, words.width, where),
        normalize=normalize,
        activation=activation,
        shared_width=read_count(hf, shared, where) if shared in words.defaults else 0,
        shared_gate=shared in words.defaults,
    )
    return read_source_experts(hf, shape), _sparse(words, hf, layers, where)


def _sparse(words: ExpertWords, hf: Mapping[str, Any], layers: int, where: str) -> tuple[bool, ...]:
    if "mlp_only_layers" not in words.defaults:
        return (True,)
    step, dense = read_count(hf, "decoder_sparse_step", where), hf["mlp_only_layers"] or ()
    if not isinstance(dense, list | tuple) or not all(type(i) is int for i in dense):
        raise UserError(f"{where}: mlp_only_layers = {dense!r}: wants a list of layers' numbers, the first being 0")
    sparse = tuple((i + 1) % step == 0 and i not in dense for i in range(layers))
    if not any(sparse):
        raise UserError(
            f"{where}: by decoder_sparse_step = {step} and mlp_only_layers = {list(dense)} none of {layers} layers is "
            "sparse: such a model is a dense one, of another model_type"
        )
    return (True,) if all(sparse) else sparse


def rows(words: ExpertWords, shape: ExpertsShape, sparse: Sequence[bool]) -> list[Row]:
    """Returns the table of names of the feed-forward parts; see `jaxembed.hf.table`.

    Args:
      words: those of its model_type.
      shape: the experts'.
      sparse: whether layers are, one value for all or one for each.
    """
    at = tuple(i for i, here in enumerate(sparse) if here) if len(sparse) > 1 else ()
    dense = tuple(i for i, here in enumerate(sparse) if not here)
    part = f"layers.{{i}}.{words.part}."
    names = {words.up: "up", words.down: "down", words.gate: "gate"}
    router = Row(f"{part}gate.weight", "experts/router/kernel", Linear(), at=at)
    found = [] if shape.by_source else [router]
    found += [
        Row(f"{part}experts.{{x}}.{hf}.weight", f"experts/{ours}/kernel", Linear(), at=at, experts=shape.count)
        for hf, ours in names.items()
    ]
    if shape.shared_width:
        found += [
            Row(f"{part}shared_expert.{hf}.weight", f"experts/shared/{ours}/kernel", Linear(), at=at)
            for hf, ours in names.items()
        ]
        found += [Row(f"{part}shared_expert_gate.weight", "experts/shared_gate/kernel", Linear(), at=at)]
    if dense:
        found += [Row(f"{part}{hf}.weight", f"mlps/{ours}/kernel", Linear(), at=dense) for hf, ours in names.items()]
    return found


def per_expert(words: ExpertWords, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a checkpoint's tensors with one for each expert: views of those that hold all experts of a layer."""
    found = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.experts\.)(gate_up_proj|down_proj)", name)
        if not match or tensor.ndim != 3:
            found[name] = tensor
            continue
        maps = (words.gate, words.up) if match[2] == "gate_up_proj" else (words.down,)
        for x, matrix in enumerate(tensor):
            for hf, view in zip(maps, np.array_split(matrix, len(maps))):
                found[f"{match[1]}{x}.{hf}.weight"] = view
    return found
