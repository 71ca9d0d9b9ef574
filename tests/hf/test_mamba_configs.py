"""config.json of state-space models and hybrids: what is read out of it, what is refused, what we write ourselves."""

import json
import math
import types

import pytest

from jaxembed.errors import UserError
from jaxembed.hf import mamba
from jaxembed.hf.architectures import ARCHITECTURES, architecture, architecture_of

SIZES = {"vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 4}
FIELDS = {
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "falcon_mamba": {},
    "bamba": {"mamba_n_heads": 8, "num_attention_heads": 8, "intermediate_size": 48},
}
TOKENIZER = types.SimpleNamespace(vocab_size=90, pad_id=-1, cls_id=3, sep_id=4, eos_id=-1)


def read(model_type: str, **fields):
    kind = {"model_type": model_type}
    return architecture(model_type).config_from_hf(
        kind | SIZES | FIELDS[mamba.KIN.get(model_type, model_type)] | fields
    )


@pytest.mark.parametrize("model_type", FIELDS)
def test_a_field_that_is_not_there_is_what_transformers_takes_it_to_be(model_type):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type, **SIZES, **FIELDS[model_type])
    said = json.loads(theirs.to_json_string(use_diff=False))
    assert len(said) > 30
    assert architecture(model_type).config_from_hf(said) == read(model_type)
    spelled = architecture(model_type).spelled(said)
    assert architecture(model_type).config_from_hf(spelled) == read(model_type)
    json.dumps(spelled, allow_nan=False)


def test_what_is_read():
    assert read("mamba").mixer.rank == 4 and read("mamba", time_step_rank=7).mixer.rank == 7
    falcon = read("falcon_mamba", expand=16, intermediate_size=128)  # as falcon-mamba-7b says it
    assert falcon.mixer.channels == 128 and falcon.mixer.inner_eps == 1e-6 and read("mamba").mixer.inner_eps == 0
    assert read("mamba2", n_groups=2).mixer.norm_groups == 2
    assert read("mamba2", time_step_limit=[0.1, {"__float__": "Infinity"}]).mixer.step_limit == (0.1, math.inf)
    assert (read("mamba").backward, read("mamba").attention) == ("none", ("causal",))
    assert (read("bimamba2").backward, read("bimamba2").attention) == ("separate", ("bidirectional",))
    assert read("bifalcon_mamba", shared_directions=True).backward == "shared"
    bamba = read("bamba", attn_layer_indices=[1, 3, 9])  # 9: of layers cut off
    assert bamba.mixers == (True, False, True, False)
    assert (bamba.rope.width, bamba.head_width, bamba.mixer.head_width) == (4, 8, 16)
    whole = read("bamba", rope_parameters={"rope_type": "default", "partial_rotary_factor": 1.0})
    assert whole.rope.width == 8 and read("bamba", partial_rotary_factor=1.0).rope.width == 4  # as transformers does
    assert read("bamba", attn_layer_indices=[1], is_causal=False).attention == ("bidirectional",)
    assert read("bamba", num_key_value_heads=None).kv_heads == 8


@pytest.mark.parametrize(
    ("model_type", "fields", "told"),
    [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; supported: 'silu', 'swish'"),
        ("mamba2", {"hidden_act": "mish"}, "hidden_act = 'mish' is not supported"),
        ("mamba2", {"head_dim": 8}, r"num_heads · head_dim = 8 · 8 is not expand · hidden_size = 128"),
        ("mamba2", {"n_groups": 3}, "n_groups = 3 does not divide num_heads = 8"),
        ("mamba2", {"time_step_limit": [1.0, 0.5]}, r"time_step_limit = \[1.0, 0.5\]: wants two numbers"),
        ("mamba", {"time_step_min": 0.5}, "time_step_min = 0.5 is above time_step_max = 0.1"),
        ("mamba", {"state_size": "16"}, "state_size is '16', wants a whole number"),
        ("mamba", {"use_bias": "no"}, "use_bias = 'no' is not supported"),
        ("mamba", {"rms_norm": False}, "rms_norm = False is not supported"),
        ("falcon_mamba", {"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ("bimamba", {"shared_directions": "yes"}, "shared_directions = 'yes' is not supported"),
        ("bamba", {"mamba_d_head": 8}, r"mamba_n_heads · mamba_d_head = 8 · 8 is not mamba_expand"),
        ("bamba", {"mamba_n_groups": 3}, "mamba_n_groups = 3 does not divide mamba_n_heads = 8"),
        ("bamba", {"attn_layer_indices": 3}, "attn_layer_indices = 3: wants numbers of layers"),
        ("bamba", {"is_causal": False}, "attn_layer_indices names no layer, so none could see both ways"),
    ],
)
def test_what_is_refused(model_type, fields, told):
    with pytest.raises(UserError, match=told):
        read(model_type, **fields)


def test_state_spaces_own_folders_are_refused():
    with pytest.raises(UserError, match=r"^X: state-spaces' own format is not read; take .*NAME-hf$"):
        architecture_of({"d_model": 768, "n_layer": 24, "ssm_cfg": {}, "rms_norm": True}, "X")


@pytest.mark.parametrize("model_type", mamba.CLASSES)
def test_a_causal_config_becomes_that_of_its_kin(model_type):
    causal = {"model_type": model_type, **SIZES, **FIELDS[model_type], "architectures": ["MambaForCausalLM"]}
    kin = mamba.both_ways(causal, shared=True)
    arch = architecture_of(kin)
    assert arch.model_type == f"bi{model_type}" and kin["architectures"] == [arch.hf_class]
    assert kin["auto_map"] == mamba.AUTO_MAPS[arch.model_type] == arch.spelled(kin)["auto_map"]
    assert mamba.both_ways(kin, shared=True) == kin
    assert arch.config_from_hf(kin).backward == "shared"
    assert arch.modes == ("native", "bidirectional") and ARCHITECTURES[model_type].modes == ("native", "causal")


@pytest.mark.parametrize("model_type", [*mamba.CLASSES, *mamba.KIN, "bamba"])
def test_a_model_from_scratch(model_type):
    arch = ARCHITECTURES[model_type]
    shape = {"hidden_size": 64, "num_hidden_layers": 12}
    shape |= {"num_attention_heads": 4, "intermediate_size": 40} if model_type == "bamba" else {}
    made = arch.fresh_hf_config(shape, TOKENIZER, "config.model.shape")
    config = arch.config_from_hf(made)
    assert (config.width, config.layers, config.vocab_size, config.initializer_range) == (64, 12, 90, 0.02)
    assert arch.spelled(made) == made and not arch.requires(made)
    if model_type == "bamba":
        assert [i for i, is_mixer in enumerate(config.mixers) if not is_mixer] == [4]
    with pytest.raises(UserError, match="has no field 'hiden_act', did you mean 'hidden_act'"):
        arch.fresh_hf_config(shape | {"hiden_act": "silu"}, TOKENIZER, "config.model.shape")


def test_groups_of_gated_norms_need_a_transformers_that_knows_them():
    assert mamba.requires({"n_groups": 8}) == mamba.requires({"mamba_n_groups": 2}) == "5.23.0"
    assert not mamba.requires({"n_groups": 1}) and not mamba.requires({})


def test_the_first_layers_of_a_hybrid():
    arch = ARCHITECTURES["bamba"]
    hf = {"model_type": "bamba", **SIZES, **FIELDS["bamba"], "attn_layer_indices": [1, 3]}
    config = arch.config_from_hf(arch.with_layers(hf, 2))
    assert config.mixers == (True, False)
    names = {row.hf.format(i=i) for row in arch.rows(config) for i in row.at}
    assert "layers.1.self_attn.q_proj.weight" in names and "layers.0.mamba.A_log" in names
    assert not any("layers.3" in name or "layers.1.mamba" in name for name in names)
