"""config.json of sparse decoders: what is read out of it, what is refused, and what we write ourselves."""

import numpy as np
import pytest

from jaxembed.errors import UserError
from jaxembed.hf.architectures import architecture
from jaxembed.models.layers.routing import ExpertsShape

COMMON = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def read(model_type: str, **fields):
    return architecture(model_type).config_from_hf({"model_type": model_type, **COMMON, **fields})


@pytest.mark.parametrize(
    ("model_type", "fields", "shape"),
    [
        ("mixtral", {}, ExpertsShape(8, 2, 48, True)),
        ("mixtral", {"num_experts": 6, "norm_topk_prob": False}, ExpertsShape(6, 2, 48, True)),
        ("qwen2_moe", {}, ExpertsShape(60, 4, 1408, False, shared_width=5632, shared_gate=True)),
        ("qwen3_moe", {"norm_topk_prob": True, "num_local_experts": 16}, ExpertsShape(16, 8, 768, True)),
        ("olmoe", {"hidden_act": "gelu"}, ExpertsShape(64, 8, 48, False, "gelu")),
    ],
)
def test_experts(model_type, fields, shape):
    config = read(model_type, **fields)
    assert (config.experts, config.sparse) == (shape, (True,))
    assert config.qkv_bias == (model_type == "qwen2_moe")


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("fields", "sparse"),
    [
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"mlp_only_layers": [1, 3]}, (True, False, True, False)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": (1,)}, (False, False, False, True)),
        ({"mlp_only_layers": [7]}, (True,)),
    ],
)
def test_which_layers_are_sparse(model_type, fields, sparse):
    config = read(model_type, **fields)
    assert config.sparse == sparse
    names = {name for row in architecture(model_type).rows(config) for name in row.names(4)}
    whole = sparse * 4 if len(sparse) == 1 else sparse
    for i, here in enumerate(whole):
        assert (f"layers.{i}.mlp.gate.weight" in names, f"layers.{i}.mlp.up_proj.weight" in names) == (here, not here)
        assert (f"layers.{i}.mlp.experts.7.down_proj.weight" in names) == here


def test_the_cut_model_keeps_what_its_layers_are():
    arch = architecture("qwen3_moe")
    hf = {"model_type": "qwen3_moe", **COMMON, "decoder_sparse_step": 2}
    assert arch.config_from_hf(arch.with_layers(hf, 3)).sparse == (False, True, False)
    with pytest.raises(UserError, match=r"by decoder_sparse_step = 2 and mlp_only_layers = \[\] none of 1 layers"):
        arch.config_from_hf(arch.with_layers(hf, 1))


def test_windows():
    """qwen2_moe's own rule: the even layers before max_window_layers."""
    on = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}
    assert read("qwen2_moe", **on).local == (True, False, True, False)
    assert read("qwen2_moe", **on | {"max_window_layers": 0}).local == (False,) * 4
    assert read("qwen2_moe", **on | {"use_sliding_window": False}).local == (False,) * 4
    assert read("qwen3_moe", **on).local == (True,)
    assert read("qwen3_moe", sliding_window=6).local == (False,)
    assert read("mixtral", sliding_window=6).local == (True,)
    assert read("mixtral").local == read("olmoe", sliding_window=6).local == (False,)


def test_the_number_of_experts_is_written_in_the_hubs_spelling():
    for model_type in FAMILIES:
        arch, hubs = architecture(model_type), "num_local_experts" if model_type == "mixtral" else "num_experts"
        for field in ("num_experts", "num_local_experts"):
            said = arch.spelled({"model_type": model_type, **COMMON, field: 12})
            assert said[hubs] == 12 and ({"num_experts", "num_local_experts"} - {hubs}).isdisjoint(said)
            assert arch.config_from_hf(said).experts.count == 12


@pytest.mark.parametrize(
    ("model_type", "fields", "told"),
    [
        (
            "mixtral",
            {"num_experts_per_tok": 9},
            "num_experts_per_tok = 9: of num_local_experts = 8 a token takes no more",
        ),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0"),
        ("olmoe", {"num_experts": None, "num_local_experts": 0}, "num_experts is 0"),
        (
            "mixtral",
            {"num_local_experts": 4, "num_experts": 8},
            "num_experts = 8 and num_local_experts = 4 are two names",
        ),
        ("qwen3_moe", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob = 1: wants true or false"),
        ("olmoe", {"norm_topk_prob": "true"}, "norm_topk_prob = 'true': wants true or false"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
        ("qwen2_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        ("qwen2_moe", {"mlp_only_layers": 3}, "mlp_only_layers = 3: wants a list of layers"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers = .* wants a list of layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "none of 4 layers is sparse: such a model is a dense one"),
        ("olmoe", {"clip_qkv": 0}, "clip_qkv is 0, wants a number above 0"),
        ("olmoe", {"head_dim": 12}, "head_dim = 12: olmoe's is hidden_size / num_attention_heads"),
    ],
)
def test_what_the_model_cannot_do_is_refused_in_one_line(model_type, fields, told):
    with pytest.raises(UserError, match=f"config.json: .*{told}") as caught:
        read(model_type, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_experts_of_a_layer_in_one_tensor(model_type):
    """The gate lies in front; nothing is copied, and what does not fit keeps its odd shape for the report."""
    arch, count, width, hidden = architecture(model_type), 3, 6, 4
    fused = {
        "model.layers.2.mlp.experts.gate_up_proj": np.arange(count * 2 * width * hidden).reshape(count, -1, hidden),
        "model.layers.2.mlp.experts.down_proj": np.arange(count * hidden * width).reshape(count, hidden, width),
        "model.norm.weight": np.zeros(hidden),
    }
    names = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    found = arch.unpacked(fused)
    assert len(found) == 3 * count + 1
    both, down = fused["model.layers.2.mlp.experts.gate_up_proj"], fused["model.layers.2.mlp.experts.down_proj"]
    for x in range(count):
        wanted = dict(zip(names, (both[x, :width], both[x, width:], down[x])))
        for name, want in wanted.items():
            view = found[f"model.layers.2.mlp.experts.{x}.{name}.weight"]
            np.testing.assert_array_equal(view, want)
            assert np.shares_memory(view, want)
    odd = arch.unpacked({"layers.0.mlp.experts.gate_up_proj": np.zeros((count, 2 * width + 1, hidden))})
    assert {view.shape for view in odd.values()} == {(width + 1, hidden), (width, hidden)}
    assert arch.unpacked({"layers.0.mlp.experts.down_proj": both[0]})["layers.0.mlp.experts.down_proj"] is not None
