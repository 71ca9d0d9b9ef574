"""config.json of decoder-shaped models: what is read out of it, what is refused, and what we write ourselves."""

import json
import re
import types

import pytest

from jaxembed.errors import UserError
from jaxembed.hf.architectures import ARCHITECTURES, architecture
from jaxembed.hf.decoders import FAMILIES
from jaxembed.models.layers.rope import Dynamic, Linear, Llama3, LongRope, Unscaled, Yarn
from jaxembed.models.transformer import Window

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
COMMON = {"vocab_size": 90, "num_key_value_heads": 2, "max_position_embeddings": 64, **SIZES}
TOKENIZER = types.SimpleNamespace(vocab_size=90, pad_id=-1, cls_id=3, sep_id=4, eos_id=-1)
LONG = {"short_factor": (1.0,) * 4, "long_factor": (2.0,) * 4}  # 8 channels a head
SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 2.0}, Linear(2.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, Dynamic(2.0, 64)),
    "yarn": ({"rope_type": "yarn", "factor": 2.0}, Yarn(2.0, 64, 1.0693147180559945)),
    "llama3": ({"rope_type": "llama3", "factor": 2.0}, Llama3(2.0, 1.0, 4.0, 64)),
    "longrope": (
        {"rope_type": "longrope", "factor": 2.0, **LONG},
        LongRope((1.0,) * 4, (2.0,) * 4, 64, 1.0801234497346435),
    ),
}


def read(model_type: str, **fields):
    return architecture(model_type).config_from_hf({"model_type": model_type, **COMMON, **fields})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_field_that_is_not_there_is_what_transformers_takes_it_to_be(model_type):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 32, "intermediate_size": 48}
    theirs = transformers.AutoConfig.for_model(model_type, **sizes)
    ours = architecture(model_type).config_from_hf({"model_type": model_type, "vocab_size": 90, **sizes})
    said = json.loads(json.dumps(theirs.to_dict())) | {"vocab_size": 90}
    assert architecture(model_type).config_from_hf(said) == ours
    assert len(said) > 20 and (said["num_key_value_heads"], said["rms_norm_eps"]) == (ours.kv_heads, ours.norm_eps)


@pytest.mark.parametrize(
    ("model_type", "fields", "local", "window"),
    [
        ("llama", {"sliding_window": 6}, (False,), Window(0, 0)),
        ("mistral", {"sliding_window": 6}, (True,), Window(5, 6)),
        ("mistral", {"sliding_window": None}, (False,), Window(0, 0)),
        ("phi3", {"sliding_window": 6}, (True,), Window(5, 6)),
        ("qwen2", {"sliding_window": 6}, (False,) * 4, Window(0, 0)),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
            (False, False, False, True),
            Window(5, 6),
        ),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 6,
                "layer_types": ["sliding_attention"] + ["full_attention"] * 3,
            },
            (True, False, False, False),
            Window(5, 6),
        ),
        ("gemma2", {"sliding_window": 6}, (True, False, True, False), Window(5, 6)),
        ("gemma3_text", {"sliding_window": 6, "is_causal": False}, (True,) * 4, Window(5, 6)),
        ("gemma3_text", {"sliding_window": 6, "use_bidirectional_attention": True}, (True,) * 4, Window(5, 3)),
        (
            "gemma3_text",
            {"sliding_window": 6, "use_bidirectional_attention": True, "is_causal": False},
            (True,) * 4,
            Window(5, 4),
        ),
        (
            "gemma3_text",
            {"sliding_window": 7, "sliding_window_pattern": 2},
            (True, False, True, False),
            Window(6, 3),
        ),
    ],
)
def test_local_layers_and_their_windows(model_type, fields, local, window):
    config = read(model_type, **fields)
    assert (config.local, config.window) == (local, window)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_attention_is_said_in_the_architectures_words_and_read_again(model_type):
    arch, hf = architecture(model_type), {"model_type": model_type, **COMMON}
    assert arch.config_from_hf(hf).attention == ("causal",)
    both = arch.with_attention(hf, ("bidirectional",))
    assert arch.config_from_hf(both).attention == ("bidirectional",)
    assert both.items() >= FAMILIES[model_type].bidirectional.items()
    assert arch.config_from_hf(arch.with_attention(both, ("causal",))).attention == ("causal",)
    by_switch = arch.with_attention(hf | {"is_causal": False}, ("causal",))
    assert arch.config_from_hf(by_switch).attention == ("causal",)
    mixed = ("causal", "causal", "prefix", "bidirectional")
    assert arch.config_from_hf(arch.with_attention(both, mixed)).attention == mixed


def test_both_spellings_of_rotary_positions_are_read():
    older = read("llama", rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0})
    newer = read("llama", rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0})
    assert older == newer
    assert older.rope.theta == 500.0 and older.rope.scaling == Linear(2.0) and older.max_length == 128
    gemma = {"rope_theta": 700.0, "rope_local_base_freq": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = read("gemma3_text", **gemma, head_dim=8)
    assert (config.rope.theta, config.rope.scaling) == (700.0, Linear(8.0))
    assert (config.local_rope.theta, config.local_rope.scaling) == (50.0, Unscaled())
    assert config.max_length == 64
    assert config == read(
        "gemma3_text",
        head_dim=8,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 700.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    )
    phi = read(
        "phi3", rope_scaling={"type": "su", **{k: list(v) for k, v in LONG.items()}}, max_position_embeddings=8192
    )
    assert phi.rope.scaling.length == 4096 and phi.max_length == 8192


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3"])
def test_a_scaling_asked_for_is_written_in_both_spellings(model_type, kind):
    """Each spelling alone gives the same model, whose texts may be twice as long; asked for again, nothing changes."""
    words, hf = ARCHITECTURES[model_type].rope, {"model_type": model_type, **COMMON, "head_dim": 8}
    scaling, want = SCALINGS[kind]
    if kind not in words.kinds:
        with pytest.raises(UserError, match="not supported; supported: l"):
            words.with_scaling(hf, scaling, "config.model.rope_scaling")
        return
    scaled = words.with_scaling(hf, scaling, "config.model.rope_scaling")
    scaled = json.loads(json.dumps(scaled))
    assert words.with_scaling(scaled, scaling, "config.model.rope_scaling") == scaled
    config = architecture(model_type).config_from_hf(scaled)
    assert config.rope.scaling == want and config.local_rope.scaling == (Unscaled() if words.local_type else want)
    assert config.max_length == 128
    for dropped in ("rope_parameters", "rope_scaling"):
        alone = {field: value for field, value in scaled.items() if field != dropped}
        assert architecture(model_type).config_from_hf(alone) == config


def test_transformers_reads_the_scaled_file_as_we_do():
    transformers = pytest.importorskip("transformers")
    for model_type in ("llama", "gemma3_text"):
        hf = {"model_type": model_type, **COMMON, "head_dim": 8, "pad_token_id": None}
        words = ARCHITECTURES[model_type].rope
        scaled = words.with_scaling(hf, {"rope_type": "yarn", "factor": 4.0}, "config.model.rope_scaling")
        theirs = transformers.AutoConfig.for_model(**scaled).rope_parameters
        theirs = theirs["full_attention"] if words.layer_type else theirs
        assert theirs == words.parameters(scaled, "config.json")


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        ({"rope_type": "yarn"}, "yarn wants factor"),
        ({"rope_type": "linear", "factor": 0.5}, "at least 1"),
        ({"rope_type": "linear", "factr": 2.0}, "no field 'factr'.*factor"),
        ({"rope_type": "mrope", "factor": 2.0}, "'mrope' is not supported"),
        ({"factor": 2.0}, "rope_type = None"),
        ({"rope_type": "longrope", "factor": 2.0}, "wants short_factor, long_factor"),
    ],
)
def test_wrong_scalings_are_refused(scaling, told):
    with pytest.raises(UserError, match=f"config.model.rope_scaling: .*{told}"):
        ARCHITECTURES["llama"].rope.with_scaling(COMMON, scaling, "config.model.rope_scaling")


def test_an_architecture_without_rotary_positions_refuses_to_scale_them():
    with pytest.raises(UserError, match="rope_scaling: bert has no rotary positions"):
        ARCHITECTURES["bert"].with_rope_scaling(COMMON, {"rope_type": "linear", "factor": 2.0})


def test_a_model_that_is_scaled_otherwise_is_not_scaled_again():
    hf = COMMON | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    with pytest.raises(UserError, match="scaled already"):
        ARCHITECTURES["llama"].with_rope_scaling(hf, {"rope_type": "yarn", "factor": 2.0})


@pytest.mark.parametrize(
    ("model_type", "fields", "told"),
    [
        ("llama", {"quantization_config": {"bits": 4}}, "quantised weights are not read"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide"),
        ("llama", {"hidden_size": 30}, "no multiple of num_attention_heads"),
        ("llama", {"rope_scaling": {"rope_type": "mrope"}}, "rope_type = 'mrope'"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling = 'linear': wants names and values"),
        ("llama", {"head_dim": 7}, "7 of 7 channels: wants an even number"),
        ("phi3", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1]}}, "short_factor.* wants 4 numbers"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "layer_types = .*wants 4 of full_attention"),
        ("gemma2", {"sliding_window": 1}, "sliding_window = 1 for local layers"),
        ("mistral", {"hidden_act": "xielu"}, "hidden_act = 'xielu' is not supported"),
        ("qwen2", {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ],
)
def test_what_the_model_cannot_do_is_refused_in_one_line(model_type, fields, told):
    with pytest.raises(UserError, match=f"config.json: .*{told}") as caught:
        read(model_type, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_fresh_config_opens_in_transformers_with_the_same_meaning(model_type):
    transformers = pytest.importorskip("transformers")
    arch = architecture(model_type)
    fresh = json.loads(json.dumps(arch.fresh_hf_config(SIZES, TOKENIZER)))
    config = arch.config_from_hf(fresh)
    assert (config.width, config.kv_heads, config.head_width, config.max_length) == (32, 4, 8, 512)
    theirs = transformers.AutoConfig.for_model(**fresh)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (None, 3, 4)
    model = transformers.AutoModel.from_config(theirs)
    names = set(arch.unpacked({name: tensor.numpy() for name, tensor in model.state_dict().items()}))
    for pattern, replacement in arch.renames:
        names = {re.sub(pattern, replacement, name) for name in names}
    assert {name for row in arch.rows(config) for name in row.names(config.layers)} == names
    with pytest.raises(UserError, match=f"{model_type} has no field 'hidden_sise'.*hidden_size"):
        arch.fresh_hf_config(SIZES | {"hidden_sise": 3}, TOKENIZER)
    with pytest.raises(UserError, match="intermediate_size is missing"):
        arch.fresh_hf_config({k: v for k, v in SIZES.items() if k != "intermediate_size"}, TOKENIZER)
