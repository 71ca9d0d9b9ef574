"""Encoders' config.json in all its spellings, what is refused, and folders that transformers' own classes open."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from jaxembed.errors import UserError
from jaxembed.hf import mpnet, nomic_bert, nomic_moe
from jaxembed.hf.architectures import ARCHITECTURES, architecture_of
from jaxembed.hf.safetensors_io import open_tensors, write_tensors
from jaxembed.hf.table import export_tensors, import_leaves, leaves_of
from jaxembed.models.layers.rope import Dynamic, RopeConfig
from jaxembed.models.layers.routing import ExpertsShape
from jaxembed.models.nomic_bert import NomicBertConfig
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import ModelFactory, flatten

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
T5_SIZES = {"d_model": 24, "num_layers": 3, "num_heads": 2, "d_kv": 10, "d_ff": 40}
TOKENIZER = types.SimpleNamespace(vocab_size=90, pad_id=1, cls_id=0, sep_id=2, eos_id=-1)
SHAPES = {
    "mpnet": SIZES,
    "jina_bert": SIZES | {"max_position_embeddings": 64},
    "t5": T5_SIZES | {"feed_forward_proj": "relu"},
    "mt5": T5_SIZES,
    "nomic_bert": SIZES,
    "nomic_moe": SIZES,
    "modernbert": SIZES,
}
NATIVE = [name for name in SHAPES if name not in ("jina_bert", "nomic_moe")]
# nomic-ai/nomic-embed-text-v1.5's words, with other numbers.
HUB_NOMIC = {
    "model_type": "nomic_bert",
    "activation_function": "swiglu",
    "attn_pdrop": 0.0,
    "causal": False,
    "layer_norm_epsilon": 1e-11,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "moe_every_n_layers": 0,
    "n_embd": 24,
    "n_head": 2,
    "n_inner": 40,
    "n_layer": 3,
    "n_positions": 8192,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "resid_pdrop": 0.0,
    "rotary_emb_base": 500,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "type_vocab_size": 2,
    "use_rms_norm": False,
    "vocab_size": 90,
}
# nomic-ai/nomic-embed-text-v2-moe's words, with other numbers.
HUB_NOMIC_MOE = HUB_NOMIC | {
    "activation_function": "gelu",
    "auto_map": {"AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"},
    "expert_choice_router": False,
    "ffn_div": 1,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "moe_every_n_layers": 2,
    "moe_normalize_expert_weights": False,
    "moe_top_k": 2,
    "n_positions": 2048,
    "num_experts": 8,
    "num_shared_experts": 0,
    "pad_token_id": 1,
    "qkv_proj_bias": True,
    "type_vocab_size": 1,
}


def fresh(name, **shape):
    return ARCHITECTURES[name].fresh_hf_config(SHAPES[name] | shape, TOKENIZER)


def model_shapes(name, config):
    factory = ModelFactory(lambda: ARCHITECTURES[name].backbone(jax.random.key(0), config, ModelOptions()))
    return {path: leaf.shape for path, leaf in flatten(factory.abstract()).items()}


def our_leaves(name, config, folder):
    a = ARCHITECTURES[name]
    return import_leaves(
        a.rows(config),
        open_tensors(folder),
        model_shapes(name, config),
        config.layers,
        where="",
        ignored=a.ignored,
        prefixes=a.prefixes,
        renames=a.renames,
    )


@pytest.fixture(autouse=True)
def mesh():
    from tiny_models import make_mesh

    with jax.set_mesh(make_mesh()):
        yield


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_from_scratch_has_the_leaves_of_its_table(name):
    config = architecture_of(fresh(name)).config_from_hf(fresh(name))
    assert architecture_of(fresh(name)) is ARCHITECTURES[name]
    assert leaves_of(ARCHITECTURES[name].rows(config)) == model_shapes(name, config).keys()
    assert (config.layers, config.width, config.vocab_size) == (3, 24, 90)
    with pytest.raises(UserError, match="no field 'hidden_sizes'"):
        fresh(name, hidden_sizes=3)


@pytest.mark.parametrize("name", NATIVE)
def test_transformers_opens_what_we_write(name, tmp_path):
    """Of what we would write, its class finds every tensor, and none too many; it computes what the original does."""
    torch = pytest.importorskip("torch")
    import transformers

    a, fields = ARCHITECTURES[name], fresh(name)
    torch.manual_seed(0)
    cls = getattr(transformers, a.hf_class)
    original = cls(transformers.AutoConfig.for_model(**fields)).eval()
    original.save_pretrained(tmp_path / "theirs")
    config = a.config_from_hf(json.loads((tmp_path / "theirs" / "config.json").read_text()))
    assert config == a.config_from_hf(fields)
    leaves = {path: leaf[()] for path, leaf in our_leaves(name, config, tmp_path / "theirs").items()}
    unused = [(tensor, np.zeros(shape, np.float32)) for tensor, shape in a.unused(config).items()]
    (tmp_path / "ours").mkdir()
    write_tensors(tmp_path / "ours", iter([*export_tensors(a.rows(config), leaves, config.layers), *unused]))
    (tmp_path / "ours" / "config.json").write_text(json.dumps(a.spelled(fields) | {"architectures": [a.hf_class]}))
    again, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.arange(5, 45)[None]
    with torch.no_grad():
        theirs, ours = (m(tokens).last_hidden_state for m in (original, again.eval()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "task_class"),
    [
        ("mpnet", "MPNetForMaskedLM"),
        ("nomic_bert", "NomicBertForMaskedLM"),
        ("modernbert", "ModernBertForMaskedLM"),
        ("mt5", "MT5ForConditionalGeneration"),
    ],
)
def test_checkpoints_of_pre_training_are_read(name, task_class, tmp_path):
    pytest.importorskip("torch")
    import transformers

    fields = fresh(name)
    getattr(transformers, task_class)(transformers.AutoConfig.for_model(**fields)).save_pretrained(tmp_path)
    our_leaves(name, ARCHITECTURES[name].config_from_hf(fields), tmp_path)


def test_a_jina_folder_says_where_its_class_is():
    fields = fresh("jina_bert")
    assert fields["model_type"] == "bert"
    assert fields["auto_map"]["AutoModel"] == "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"
    without = {field: value for field, value in fields.items() if field != "auto_map"}
    assert ARCHITECTURES["jina_bert"].spelled(without) == fields


def test_nomic_is_read_in_the_hubs_words_and_written_in_both():
    config = nomic_bert.config_from_hf(HUB_NOMIC)
    assert dataclasses.asdict(config) | {"rope": config.rope} == {
        "vocab_size": 90,
        "width": 24,
        "layers": 3,
        "heads": 2,
        "mlp_width": 40,
        "rope": RopeConfig(12, 500.0),
        "max_length": 8192,
        "type_vocab": 2,
        "norm_eps": 1e-11,
        "activation": "silu",
        "gated": True,
        "attention_bias": False,
        "mlp_biases": (False, False),
        "initializer_range": 0.02,
        "attention": ("bidirectional",),
        "experts": None,
        "sparse": (True,),
    }
    both = nomic_bert.spelled(HUB_NOMIC)
    assert HUB_NOMIC.items() <= both.items()
    assert nomic_bert.spelled(both) == both and nomic_bert.config_from_hf(both) == config
    in_theirs = {field: both[field] for field in [*nomic_bert.NAMES, "rope_parameters", "vocab_size"]}
    assert nomic_bert.config_from_hf({"model_type": "nomic_bert", **in_theirs}) == config
    assert in_theirs["rope_parameters"] == {"rope_type": "default", "rope_theta": 500}
    assert {field: fresh("nomic_bert")[field] for field in ("n_embd", "n_layer", "rotary_emb_base")} == {
        "n_embd": 24,
        "n_layer": 3,
        "rotary_emb_base": 1000.0,
    }


def test_nomic_for_longer_texts():
    config = nomic_bert.config_from_hf(HUB_NOMIC | {"rotary_scaling_factor": 2.0})
    assert config.rope == RopeConfig(12, 500.0, Dynamic(2.0, 2048)) and config.max_length == 4096
    plain = nomic_bert.spelled(HUB_NOMIC | {"n_positions": 2048})
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    scaled = nomic_bert.spelled(nomic_bert.ROPE.with_scaling(plain, scaling, "config.model.rope_scaling"))
    assert nomic_bert.config_from_hf(scaled) == config
    assert (scaled["rotary_scaling_factor"], scaled["max_trained_positions"]) == (2.0, 2048)
    # What nomic-ai's words cannot say is not said in them.
    yarn = nomic_bert.ROPE.with_scaling(plain, {"rope_type": "yarn", "factor": 2.0}, "config.model.rope_scaling")
    assert not {"n_embd", "n_layer"} & nomic_bert.spelled(yarn).keys()


def test_sparse_nomic_is_read_and_written_in_the_hubs_words():
    assert architecture_of(HUB_NOMIC_MOE).model_type == "nomic_moe"
    assert architecture_of(HUB_NOMIC).model_type == "nomic_bert"
    config = nomic_moe.config_from_hf(HUB_NOMIC_MOE)
    assert config == NomicBertConfig(
        vocab_size=90,
        width=24,
        layers=3,
        heads=2,
        mlp_width=40,
        rope=RopeConfig(12, 500.0),
        max_length=2048,
        type_vocab=1,
        norm_eps=1e-11,
        activation="gelu",
        gated=False,
        attention_bias=True,
        mlp_biases=(True, True),
        experts=ExpertsShape(8, 2, 40, normalize=False, activation="gelu", gated=False, out_bias=True),
        sparse=(False, True, False),
    )
    said = nomic_moe.spelled(HUB_NOMIC_MOE)
    assert (HUB_NOMIC_MOE | {"auto_map": nomic_moe.AUTO_MAP}).items() <= said.items()
    assert nomic_moe.spelled(said) == said and nomic_moe.config_from_hf(said) == config
    assert not said.keys() & {"hidden_size", "rope_parameters", *nomic_moe.OURS}
    both = nomic_bert.spelled(HUB_NOMIC) | {"num_experts": 8, "moe_top_k": 2, "moe_every_n_layers": 2}
    assert nomic_moe.config_from_hf(both) == nomic_moe.config_from_hf(nomic_moe.spelled(both))
    assert nomic_moe.config_from_hf(both).mlp_biases == (False, False)


@pytest.mark.parametrize(
    ("moe_layers", "sparse", "said"),
    [
        ((1,), (0, 1, 0), {"moe_every_n_layers": 2}),
        ([1, 2], (0, 1, 1), {"moe_every_n_layers": 0, "moe_layers": [1, 2]}),
        ([0, 9], (1, 0, 0), {"moe_every_n_layers": 0, "moe_layers": [0]}),  # 9: of layers that were cut off
    ],
)
def test_which_layers_of_a_sparse_nomic_have_experts(moe_layers, sparse, said):
    fields = fresh("nomic_moe", moe_layers=moe_layers)
    assert nomic_moe.config_from_hf(fields).sparse == sparse
    assert {field: fields[field] for field in fields if field in ("moe_layers", "moe_every_n_layers")} == said


def test_modernbert_is_read_in_the_words_of_both_transformers():
    four = SIZES | {
        "model_type": "modernbert",
        "vocab_size": 90,
        "local_attention": 10,
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 700.0,
        "local_rope_theta": 50.0,
    }
    five = SIZES | {
        "model_type": "modernbert",
        "vocab_size": 90,
        "local_attention": 10,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 700.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    }
    read = ARCHITECTURES["modernbert"].config_from_hf
    config = read(four)
    assert config == read(five)
    assert (config.local, config.reach) == ((False, True, False), 5)
    assert (config.rope.theta, config.local_rope.theta) == (700.0, 50.0)


@pytest.mark.parametrize("name", SHAPES)
def test_the_first_layers_alone(name):
    a, fields = ARCHITECTURES[name], fresh(name)
    fields |= {"layer_types": ["full_attention", "sliding_attention", "full_attention"]} if name == "modernbert" else {}
    assert a.config_from_hf(a.spelled(a.with_layers(fields, 2))).layers == 2


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("nomic_bert", "num_experts", 8),
        ("nomic_bert", "moe_every_n_layers", 2),
        ("nomic_bert", "prenorm", True),
        ("nomic_bert", "qkv_proj_bias", True),
        ("nomic_bert", "activation_function", "gelu"),
        ("nomic_bert", "partial_rotary_factor", 0.5),
        ("nomic_bert", "num_attention_heads", 5),
        ("nomic_moe", "moe_top_k", 9),
        ("nomic_moe", "num_experts", "8"),
        ("nomic_moe", "moe_every_n_layers", 1),
        ("nomic_moe", "moe_every_n_layers", "2"),
        ("nomic_moe", "moe_layers", [7]),
        ("nomic_moe", "moe_layers", 1),
        ("nomic_moe", "moe_normalize_expert_weights", 2),
        ("nomic_moe", "expert_choice_router", True),
        ("nomic_moe", "num_shared_experts", 1),
        ("nomic_moe", "prenorm", True),
        ("nomic_moe", "causal", True),
        ("nomic_moe", "rotary_emb_fraction", 0.5),
        ("nomic_moe", "rotary_scaling_factor", 2.0),
        ("nomic_moe", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("nomic_moe", "activation_function", "glu"),
        ("nomic_moe", "n_head", 5),
        ("nomic_moe", "n_head", 8),
        ("mpnet", "pad_token_id", 0),
        ("mpnet", "relative_attention_num_buckets", 16),
        ("jina_bert", "feed_forward_type", "original"),
        ("t5", "feed_forward_proj", "gated-tanh"),
        ("t5", "relative_attention_num_buckets", 3),
        ("t5", "relative_attention_max_distance", 8),
        ("modernbert", "local_attention", 1),
        ("modernbert", "layer_types", ["full_attention"]),
        ("modernbert", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("modernbert", "num_attention_heads", 5),
    ],
)
def test_what_cannot_be_computed_is_refused(name, field, value):
    with pytest.raises(UserError) as error:
        ARCHITECTURES[name].config_from_hf(fresh(name) | {field: value}, "folder/config.json")
    assert str(error.value).startswith("folder/config.json: ") and "\n" not in str(error.value)


def test_a_hub_config_without_rotary_positions_is_refused():
    without = {field: value for field, value in HUB_NOMIC.items() if field != "rotary_emb_fraction"}
    with pytest.raises(UserError, match="rotary_emb_fraction = None is not supported"):
        nomic_bert.config_from_hf(without)


def test_mpnet_from_scratch_wants_padding_of_its_id():
    other = types.SimpleNamespace(**vars(TOKENIZER) | {"pad_id": 0})
    with pytest.raises(UserError, match="whose padding has the id 1, here it is 0"):
        mpnet.fresh_hf_config(SIZES, other)
