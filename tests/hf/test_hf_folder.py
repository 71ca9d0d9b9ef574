"""Reading folders: what the JSON files of sentence-transformers 2 to 6 mean, and what is refused."""

import json
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxembed.errors import UserError
from jaxembed.hf.architectures import architecture
from jaxembed.hf.bert import config_from_hf
from jaxembed.hf.folder import read_folder
from jaxembed.hf.weights import projection_leaves
from jaxembed.models.bert import BertConfig

BERT = {
    "model_type": "bert",
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
OLD = "sentence_transformers.models."
NEW = "sentence_transformers.sentence_transformer.modules."
BASE = "sentence_transformers.base.modules."
MODULES = (("", OLD + "Transformer"), ("1_Pooling", OLD + "Pooling"))
IDENTITY = "torch.nn.modules.linear.Identity"


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make(folder, modules=MODULES, hf=BERT, pooling=None, **files):
    """Writes a folder; `files` are further JSON files, '__' for '/'."""
    put(folder / "config.json", hf)
    if modules is not None:
        entries = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
        put(folder / "modules.json", entries)
        put(folder / "1_Pooling" / "config.json", pooling or {"word_embedding_dimension": 16})
    for name, content in files.items():
        put(folder / f"{name.replace('__', '/')}.json", content)
    return folder


def test_minilm(minilm_dir):
    folder = read_folder(minilm_dir)
    assert folder.model_type == "bert"
    assert folder.config == BertConfig(30522, 384, 6, 12, 1536)
    assert (folder.pooling, folder.pool_prompt, folder.normalize, folder.dense) == ("mean", True, True, None)
    assert folder.max_length == 256
    assert (folder.prompts, folder.default_prompt_name, folder.similarity) == ({}, "", "cosine")
    assert folder.truncate_dim is None
    assert folder.transformer == minilm_dir


def test_plain_transformers_folder(tmp_path):
    folder = read_folder(make(tmp_path, modules=None))
    assert (folder.pooling, folder.normalize, folder.dense, folder.max_length) == ("mean", False, None, 40)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": "mean", "pooling_mode_cls_token": True}, "mean"),
        ({}, "mean"),
    ],
)
def test_pooling_modes(tmp_path, config, wanted):
    assert read_folder(make(tmp_path, pooling={"embedding_dimension": 16, **config})).pooling == wanted


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
        {"pooling_mode": ["cls", "mean"]},
        {"pooling_mode": "mean_sqrt_len_tokens"},
        {"pooling_mode": 3},
    ],
)
def test_pooling_that_is_not_supported(tmp_path, config):
    with pytest.raises(UserError, match=r"1_Pooling/config.json: pooling .* is not supported"):
        read_folder(make(tmp_path, pooling={"x": 1, **config}))


def test_all_that_a_new_folder_can_say(tmp_path):
    modules = (
        ("0_Transformer", BASE + "transformer.Transformer"),
        ("1_Pooling", NEW + "pooling.Pooling"),
        ("2_Dense", BASE + "dense.Dense"),
        ("3_Normalize", BASE + "normalize.Normalize"),
    )
    make(
        tmp_path,
        modules,
        pooling={"embedding_dimension": 16, "pooling_mode": "cls", "include_prompt": False},
        **{
            "0_Transformer__config": BERT,
            "0_Transformer__sentence_bert_config": {
                "transformer_task": "feature-extraction",
                "module_output_name": "token_embeddings",
            },
            "0_Transformer__tokenizer_config": {"model_max_length": 32},
            "2_Dense__config": {
                "in_features": 16,
                "out_features": 8,
                "activation_function": IDENTITY,
                "module_input_name": "sentence_embedding",
            },
            "3_Normalize__config": {"module_input_name": "sentence_embedding", "module_output_name": None},
            "config_sentence_transformers": {
                "prompts": {"query": "q: ", "document": None},
                "default_prompt_name": "query",
                "similarity_fn_name": "dot",
                "truncate_dim": 4,
            },
        },
    )
    folder = read_folder(tmp_path)
    assert folder.transformer == tmp_path / "0_Transformer"
    assert (folder.pooling, folder.pool_prompt, folder.normalize, folder.max_length) == ("cls", False, True, 32)
    assert (folder.dense.in_features, folder.dense.out_features, folder.dense.bias) == (16, 8, True)
    assert folder.prompts == {"query": "q: ", "document": ""}
    assert (folder.default_prompt_name, folder.similarity, folder.truncate_dim) == ("query", "dot", 4)
    save_file(
        {"linear.weight": np.arange(128, dtype=np.float32).reshape(8, 16), "linear.bias": np.ones(8, np.float32)},
        tmp_path / "2_Dense" / "model.safetensors",
    )
    leaves = projection_leaves(folder.dense)
    np.testing.assert_array_equal(leaves["projection/kernel"][()], np.arange(128).reshape(8, 16).T)
    np.testing.assert_array_equal(leaves["projection/bias"][()], np.ones(8))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ((("../secret", OLD + "Transformer"), MODULES[1]), "leads out of its folder"),
        ((("/etc", OLD + "Transformer"), MODULES[1]), "leads out of its folder"),
        ((*MODULES, ("2_X", "sentence_transformers.models.WordEmbeddings")), r"WordEmbeddings' is not supported"),
        (((("", "sentence_transformers.models.CLIPModel")),), r"CLIPModel' is not supported"),
        ((("", BASE + "router.Router"),), r"Router' is not supported"),
        ((MODULES[0], ("1_Pooling", "modeling_x.Pooling")), r"'modeling_x.Pooling' is a class of its own"),
        ((MODULES[0],), "modules Transformer; supported"),
        ((), "modules none; supported"),
        ((*MODULES, ("2_Normalize", OLD + "Normalize"), ("3_Dense", OLD + "Dense")), "modules .*Normalize, Dense; "),
        ((*MODULES, ("1_Pooling", OLD + "Pooling")), "too many Pooling"),
    ],
)
def test_modules_that_are_not_supported(tmp_path, modules, message):
    with pytest.raises(UserError, match=message) as caught:
        read_folder(make(tmp_path / "model", modules))
    assert "modules.json" in str(caught.value)


def test_a_module_folder_that_is_a_link_out(tmp_path):
    make(tmp_path / "model")
    put(tmp_path / "other" / "config.json", {"pooling_mode": "cls"})
    (tmp_path / "model" / "1_Pooling" / "config.json").unlink()
    (tmp_path / "model" / "1_Pooling").rmdir()
    (tmp_path / "model" / "1_Pooling").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="link leads out"):
        read_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.Tanh"}, "Tanh' is not supported"),
        ({}, "Tanh' is not supported"),
        ({"activation_function": "evil.Identity"}, "evil.Identity' is not supported"),
        ({"activation_function": IDENTITY, "use_residual": True}, "use_residual"),
        ({"activation_function": IDENTITY, "module_input_name": "token_embeddings"}, "module_input_name"),
        ({"activation_function": IDENTITY, "in_features": 17}, "do not fit a model of width 16"),
        ({"activation_function": IDENTITY, "out_features": None}, "do not fit"),
    ],
)
def test_dense_layers_that_are_not_supported(tmp_path, dense, message):
    config = {"in_features": 16, "out_features": 8, **dense}
    make(tmp_path, (*MODULES, ("2_Dense", OLD + "Dense")), **{"2_Dense__config": config})
    with pytest.raises(UserError, match=message):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 40),
        ({"sentence_bert_config": {"max_seq_length": 20}, "tokenizer_config": {"model_max_length": 30}}, 20),
        ({"sentence_bert_config": {"max_seq_length": None}, "tokenizer_config": {"model_max_length": 30}}, 30),
        ({"sentence_roberta_config": {"max_seq_length": 25}}, 25),
        ({"sentence_bert_config": {"max_seq_length": 4000}}, 40),
        ({"tokenizer_config": {"model_max_length": 10**30}}, 40),
        ({"tokenizer_config": {"model_max_length": 1e30}}, 40),
    ],
)
def test_longest_text(tmp_path, files, wanted):
    assert read_folder(make(tmp_path, **files)).max_length == wanted
    roberta = BERT | {"model_type": "roberta", "pad_token_id": 1}
    assert read_folder(make(tmp_path, hf=roberta, **files)).max_length == min(wanted, 38)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"sentence_bert_config": {"max_seq_length": "long"}}, "the longest text 'long'"),
        ({"sentence_bert_config": {"transformer_task": "text-generation"}}, "transformer_task"),
        ({"config_sentence_transformers": {"prompts": ["a"]}}, "prompts"),
        ({"config_sentence_transformers": {"prompts": {"a": 1}}}, "wants texts"),
        ({"config_sentence_transformers": {"default_prompt_name": "query"}}, "default_prompt_name = 'query'"),
        ({"config_sentence_transformers": {"similarity_fn_name": "hamming"}}, "similarity_fn_name = 'hamming'"),
        ({"config_sentence_transformers": {"truncate_dim": -1}}, "truncate_dim = -1"),
        ({"config": BERT | {"model_type": "bart"}}, "model_type 'bart' is not known, did you mean 'bert'"),
        ({"config": {}}, "model_type None is not known; known: bert, roberta, xlm-roberta"),
        ({"config": [1]}, "config.json: holds a JSON list, wants a dict"),
    ],
)
def test_settings_that_are_refused(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as caught:
        read_folder(make(tmp_path, **files))
    assert str(caught.value).startswith(str(tmp_path))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_folder(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        read_folder(tmp_path)
    make(tmp_path)
    (tmp_path / "modules.json").write_text("[{")
    with pytest.raises(UserError, match=r"modules\.json: is not JSON"):
        read_folder(tmp_path)


def test_code_in_the_folder_is_never_run(tmp_path):
    hf = BERT | {"auto_map": {"AutoModel": "modeling_evil.Evil"}}
    (make(tmp_path, hf=hf) / "modeling_evil.py").write_text("raise SystemExit('run')")
    assert read_folder(tmp_path).model_type == "bert"


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("swish", "silu"),
    ],
)
def test_activations(name, ours):
    import jax
    import torch
    from transformers.activations import ACT2FN

    from jaxembed.models.layers.mlp import ACTIVATIONS

    assert config_from_hf(BERT | {"hidden_act": name}).activation == ours
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(ACTIVATIONS[ours](x), ACT2FN[name](torch.from_numpy(x)), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"embedding_size": 8}, "embedding_size = 8"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_attention_heads": 3}, "no multiple of num_attention_heads = 3"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id = None"),
        ({"model_type": "roberta", "pad_token_id": 39}, "leaves no position"),
    ],
)
def test_configs_that_the_model_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(BERT | change, "config.json")


TOKENIZER = types.SimpleNamespace(vocab_size=500, pad_id=3, cls_id=4, sep_id=5, eos_id=-1)
SHAPE = {name: BERT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta"])
def test_fresh_config_is_complete_for_transformers(model_type):
    from transformers import AutoConfig

    entry = architecture(model_type)
    hf_config = entry.fresh_hf_config(SHAPE | {"hidden_act": "gelu_new"}, TOKENIZER)
    config = entry.config_from_hf(hf_config)
    assert (config.vocab_size, config.width, config.layers, config.activation) == (500, 16, 2, "gelu_tanh")
    assert config.max_length == 512
    assert config.position_offset == (0 if model_type == "bert" else 4)
    theirs = AutoConfig.for_model(**hf_config).to_dict()
    assert entry.config_from_hf(theirs) == config
    assert (theirs["pad_token_id"], theirs["bos_token_id"], theirs["eos_token_id"]) == (3, 4, 5)


def test_fresh_config_mistakes():
    entry = architecture("bert")
    with pytest.raises(
        UserError, match=r"config\.model\.shape: bert has no field 'hidden_sise', did you mean 'hidden_s"
    ):
        entry.fresh_hf_config(SHAPE | {"hidden_sise": 3}, TOKENIZER)
    with pytest.raises(UserError, match=r"config\.model\.shape: hidden_size is missing"):
        entry.fresh_hf_config({}, TOKENIZER)
    with pytest.raises(UserError, match=r"config\.model\.arch: model_type 'brt' is not known, did you mean 'bert'"):
        architecture("brt")
