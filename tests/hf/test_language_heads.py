"""Heads that predict words, of checkpoints that transformers wrote: its scores of words from its own token states."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import make_mesh

from jaxembed import config as config_lib
from jaxembed import sharding
from jaxembed.errors import UserError
from jaxembed.hf.architectures import ARCHITECTURES
from jaxembed.hf.folder import read_folder
from jaxembed.hf.language_heads import BIAS, GENERATING, TABLE, language_leaves, language_of, language_rows
from jaxembed.hf.safetensors_io import open_tensors, write_tensors
from jaxembed.hf.table import leaves_of
from jaxembed.models.language_head import LanguageConfig, LanguageHead
from jaxembed.models.text_encoder import ModelFactory, flatten, unflatten
from jaxembed.planning import shapes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, D = 50, 16
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
CASES = {
    "bert": ("BertForMaskedLM", {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "roberta": ("RobertaForMaskedLM", {"layer_norm_eps": 1e-3}),
    "mpnet": ("MPNetForMaskedLM", {}),
    "modernbert": ("ModernBertForMaskedLM", {"norm_eps": 1e-3, "cls_token_id": 0, "sep_token_id": 2}),
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 8, "num_key_value_heads": 1, "final_logit_softcapping": 0.5}),
}
FOUND = {  # what language_of finds
    "bert": {"transform": "relu", "norm_eps": 1e-3, "bias": True},
    "roberta": {"transform": "gelu", "norm_eps": 1e-3, "bias": True},
    "mpnet": {"transform": "gelu", "bias": True},
    "modernbert": {"transform": "gelu", "transform_bias": False, "norm_eps": 1e-3, "bias": True},
    "llama": {"own_table": True, "shift": True},
    "qwen2": {"shift": True},
    "gemma2": {"softcap": 0.5, "shift": True},
}


def make(name: str, folder) -> torch.nn.Module:
    """A random model of transformers that predicts words, saved to the folder."""
    torch.manual_seed(0)
    kind, fields = CASES[name]
    config = transformers.AutoConfig.for_model(name, **SIZES | TOKENS | {"initializer_range": 0.5} | fields)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def head_of(folder, words: int) -> tuple[LanguageConfig, dict]:
    """The config of the head and its leaves, all of which the folder has."""
    found = read_folder(folder)
    config = language_of(found.hf_config)
    factory = ModelFactory(lambda: LanguageHead(jax.random.key(0), config, words, D, 0.02, jnp.dtype("float32")))
    shapes = {f"language/{path}": leaf.shape for path, leaf in flatten(factory.abstract()).items()}
    assert shapes.keys() == leaves_of(language_rows(found.hf_config, found.config))
    leaves = language_leaves(found, shapes | {"projection/kernel": (D, D)})
    assert leaves.keys() == shapes.keys()
    return config, {path: leaf[()] for path, leaf in leaves.items()}


@pytest.mark.parametrize("name", CASES)
def test_scores_of_words_are_those_of_transformers(name, tmp_path):
    model = make(name, tmp_path)
    tokens = torch.tensor([[0, 7, 9, 11, 2]])
    with torch.no_grad():
        theirs = model(tokens).logits.numpy()
        states = model.base_model(tokens).last_hidden_state.numpy()
    words = 64  # the table's rows are padded
    with jax.set_mesh(make_mesh()):
        config, leaves = head_of(tmp_path, words)
        assert config == LanguageConfig(**FOUND[name])
        factory = ModelFactory(lambda: LanguageHead(jax.random.key(0), config, words, D, 0.02, jnp.dtype("float32")))
        mesh = jax.sharding.get_mesh()
        placed = {
            path: sharding.put(leaves[f"language/{path}"], mesh, leaf.sharding.spec)
            for path, leaf in flatten(factory.abstract()).items()
        }
        with jax.default_matmul_precision("float32"):
            out = np.asarray(factory.bind(unflatten(placed))(sharding.put(states, mesh, sharding.STATES)))
    table = model.get_input_embeddings().weight.detach().numpy()
    if config.own_table:
        table = leaves[TABLE][:V]
        np.testing.assert_array_equal(leaves[TABLE][V:], 0)
    scores = out @ table.T + (leaves[BIAS][:V] if config.bias else 0)
    scores = config.softcap * np.tanh(scores / config.softcap) if config.softcap else scores
    assert np.abs(theirs).max() > 0.4
    np.testing.assert_allclose(scores, theirs, atol=1e-4)


def test_what_a_folder_for_embeddings_lacks(tmp_path):
    """Of an encoder a head is made fresh; of a model that generates that would be no head."""
    for name in ("bert", "llama"):
        make(name, tmp_path / name)
        kept = {n: np.array(x) for n, x in open_tensors(tmp_path / name).items() if "lm_head" not in n}
        write_tensors(tmp_path / name, {n: x for n, x in kept.items() if "transform.dense" not in n})
    shapes = {"language/dense/kernel": (D, D), "language/dense/bias": (D,), "language/norm/scale": (D,), BIAS: (64,)}
    assert language_leaves(read_folder(tmp_path / "bert"), shapes).keys() == {"language/norm/scale", BIAS}
    with pytest.raises(UserError, match=r"this folder has no lm_head\.weight: it was made for embeddings"):
        language_leaves(read_folder(tmp_path / "llama"), {TABLE: (64, D)})
    assert language_leaves(read_folder(tmp_path / "llama"), {}) == {}  # nobody asks
    with pytest.raises(UserError, match=r"cls\.predictions\.bias has shape \[50\], wants \[50, 3\]"):
        language_leaves(read_folder(tmp_path / "bert"), {BIAS: (64, 3)})


def test_names_of_other_versions(tmp_path):
    make("bert", tmp_path)
    old = {"cls.predictions.bias": "cls.predictions.decoder.bias", "LayerNorm.weight": "LayerNorm.gamma"}
    tensors = {}
    for name, x in open_tensors(tmp_path).items():
        for new, before in old.items():
            name = name.replace(new, before)
        tensors[name] = np.array(x)
    write_tensors(tmp_path, tensors)
    with jax.set_mesh(make_mesh()):
        head_of(tmp_path, 64)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_table_of_its_own_is_what_transformers_takes_it_to_be(name):
    """Where config.json does not say."""
    hf = {"model_type": name}
    if name == "llada":
        assert not language_of(hf).own_table and language_of({**hf, "weight_tying": False}).own_table
        assert not language_of(hf).shift
        return
    if name == "Dream":
        assert language_of(hf) == LanguageConfig(own_table=True, shift=True)
        return
    theirs = name.removeprefix("bi") if name.startswith("bi") else name
    if name not in ("jina_bert", "nomic_moe"):
        own = not json.loads(transformers.AutoConfig.for_model(theirs).to_json_string(use_diff=False)).get(
            "tie_word_embeddings", True
        )
        assert language_of(hf).own_table == own
    assert language_of(hf).shift == (name in GENERATING)
    assert language_of({"model_type": "gemma2"}).softcap == 30.0


def test_odd_biases_of_modernbert_are_refused():
    with pytest.raises(UserError, match="classifier_bias and norm_bias"):
        language_of({"model_type": "modernbert", "classifier_bias": True})
    assert language_of({"model_type": "modernbert", "classifier_bias": True, "norm_bias": True}).transform_bias
    assert not language_of({"model_type": "modernbert", "decoder_bias": False}).bias


@pytest.mark.parametrize(("name", "own_table"), [("GSAI-ML/LLaDA-8B-Instruct", True), ("google/t5-v1_1-base", False)])
def test_a_plan_without_a_download_knows_the_head(name, own_table):
    c = config_lib.default_config()
    c.steps, c.data.train[0].path, c.model.init, c.loss.name = 1, "none.jsonl", f"hf:{name}", "masked_diffusion"
    config = config_lib.load(c)
    blueprint = shapes.adapted(shapes.open_shape(config.model.init, config), config)
    language = blueprint.language
    assert (language.own_table, language.words, language.mask_id) == (own_table, blueprint.backbone.vocab_size, 3)
    assert blueprint.tokenizer is None
