"""The mask token: a tokenizer's own, one that is named, one that is added to a model that grows by it or has room."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
from tiny_models import MESHES, make_mesh
from tiny_run import write_tokenizer
from tokenizers import models, pre_tokenizers, processors

from jaxembed.blueprint import Blueprint
from jaxembed.data.templates import Template
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.hf.architectures import ARCHITECTURES
from jaxembed.mask_token import with_mask_token
from jaxembed.model_source import open_folder
from jaxembed.models.language_head import LanguageConfig
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import HeadConfig, flatten

WORDS, D = 128, 16  # of the table, of which no row is padding
MASK = "<|mask|>"


def words(n: int, **special: str) -> Tokenizer:
    """A tokenizer of whole words w0, w1 …, the first of which stands for unknown ones, w1 ends a text."""
    backend = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A w1", special_tokens=[("w1", 1)])
    return Tokenizer(backend, {"unk_token": "w0", "eos_token": "w1", **special})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama with a head of its own and a tokenizer without a mask token."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.LlamaConfig(vocab_size=WORDS, max_position_embeddings=32, is_causal=False, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words(WORDS).save(folder, 32)
    return folder


def blueprint_of(name: str, tokenizer: Tokenizer, **changes: object) -> Blueprint:
    """A model without weights, its table of WORDS rows."""
    sizes = {"d_model": D, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 24}
    if name != "llada":
        sizes = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    hf_config = ARCHITECTURES[name].fresh_hf_config(sizes | {"vocab_size": WORDS}, tokenizer, "shape")
    made = Blueprint(hf_config, HeadConfig(), True, 32, {}, "", "cosine", 0, tokenizer, {})
    return dataclasses.replace(made, **changes)


def unloaded(factory):
    raise AssertionError("nothing is to be loaded")


def test_a_token_behind_the_table_gets_the_mean_row(folder, tmp_path):
    before, load = open_folder(folder)
    blueprint, load_grown = with_mask_token(before, load, MASK)
    assert (blueprint.hf_config["vocab_size"], blueprint.hf_config["mask_token_id"]) == (WORDS + 1, WORDS)
    blueprint = dataclasses.replace(blueprint, language=LanguageConfig(own_table=True))
    factory = blueprint.factory(ModelOptions())
    with jax.set_mesh(make_mesh(MESHES["data 2, fsdp 2, tensor 2"])):
        grown = flatten(load_grown(factory))
        for path, leaf in flatten(factory.abstract()).items():
            assert (grown[path].shape, grown[path].dtype) == (leaf.shape, leaf.dtype)
            assert grown[path].sharding.spec == leaf.sharding.spec
        was = flatten(load(dataclasses.replace(before, language=blueprint.language).factory(ModelOptions())))
    for path, x in was.items():
        new = np.asarray(grown[path])
        if path not in ("backbone/token/embedding", "language/table/embedding"):
            np.testing.assert_array_equal(new, x)
            continue
        assert new.shape == (2 * WORDS, D) and x.shape == (WORDS, D)
        np.testing.assert_array_equal(new[:WORDS], x)
        np.testing.assert_allclose(new[WORDS], np.asarray(x).mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(new[WORDS + 1 :], 0)


def test_the_exported_folder_keeps_the_mask_token(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    blueprint, load = with_mask_token(*open_folder(folder), MASK)
    factory, mesh = blueprint.factory(ModelOptions()), make_mesh()
    with jax.set_mesh(mesh):
        Embedder(blueprint, factory, load(factory), mesh).save(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.mask_token, theirs.mask_token_id) == (MASK, WORDS)
    assert theirs(f"w5 {MASK} w7")["input_ids"] == [5, WORDS, 7, 1]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mask_token_id"] == WORDS
    _, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    again, load = open_folder(tmp_path / "out")
    assert again.tokenizer.mask_id == WORDS and again.backbone.vocab_size == WORDS + 1
    same, same_load = with_mask_token(again, load, "")
    assert same == again and same_load is load


def test_a_table_with_room_does_not_grow():
    blueprint, load = with_mask_token(blueprint_of("llama", words(100)), unloaded, MASK)
    assert load is unloaded and blueprint.hf_config["vocab_size"] == WORDS
    assert blueprint.tokenizer.mask_id == blueprint.hf_config["mask_token_id"] == 100
    assert blueprint.tokenizer.tokenize([f"w3{MASK}w4"])[0].tolist() == [3, 100, 4, 1]


def test_a_word_that_stands_for_masked_ones_stays_a_word(tmp_path):
    """As LLM2Vec takes "_" of Mistral's: as a special token, transformers would cut it out of texts."""
    blueprint, _ = with_mask_token(blueprint_of("llama", words(100)), unloaded, "w7")
    assert blueprint.tokenizer.mask_id == blueprint.hf_config["mask_token_id"] == 7
    assert blueprint.tokenizer.tokenize(["w3 aw7b"])[0].tolist() == [3, 0, 1]  # no word that is known
    blueprint.tokenizer.save(tmp_path, 32)
    again = Tokenizer.load(f"hf:{tmp_path}")
    assert again.mask_id == 7 and again.framing_ids == (1, 7) and again.with_mask(MASK).mask_id == 100
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("w3 aw7b")["input_ids"] == [3, 0, 1] and theirs.mask_token is None


def test_the_one_that_there_is(tmp_path):
    own = Tokenizer.load(f"file:{write_tokenizer(tmp_path / 'tokenizer.json')}")
    bert = dataclasses.replace(blueprint_of("bert", words(100)), tokenizer=own)
    bert = dataclasses.replace(bert, hf_config=bert.hf_config | {"vocab_size": own.vocab_size})
    blueprint, load = with_mask_token(bert, unloaded, "")
    assert load is unloaded and blueprint.tokenizer is own and blueprint.hf_config["mask_token_id"] == own.mask_id == 4
    assert with_mask_token(bert, unloaded, "[MASK]")[0] == blueprint
    llama = blueprint_of("llama", words(100))
    said = dataclasses.replace(llama, hf_config=llama.hf_config | {"mask_token_id": 9})  # as LLaDA's folders say it
    assert with_mask_token(said, unloaded, "")[0].tokenizer.mask_id == 9
    for hf_config in (llama.hf_config, llama.hf_config | {"mask_token_id": 100}):
        with pytest.raises(UserError, match=r"^config\.model\.mask_token = '': .* has no mask token: name one"):
            with_mask_token(dataclasses.replace(llama, hf_config=hf_config), unloaded, "")


def test_llada_grows_with_the_head_that_it_hands_through():
    head = "model.transformer.ff_out.weight"
    table = np.random.default_rng(0).normal(size=(WORDS, D)).astype(np.float32)
    llada = blueprint_of("llada", words(WORDS), unused={head: table})
    blueprint, _ = with_mask_token(llada, unloaded, MASK)
    assert {blueprint.hf_config[field] for field in ("vocab_size", "embedding_size")} == {WORDS + 1}
    assert blueprint.backbone.vocab_size == WORDS + 1 and len(llada.unused[head]) == WORDS
    np.testing.assert_array_equal(blueprint.unused[head][:WORDS], table)
    np.testing.assert_allclose(blueprint.unused[head][WORDS], table.mean(0), rtol=1e-5)


@pytest.mark.parametrize(("token", "said"), [("w2", "is the tokenizer's pad_token"), (" ", "is blank")])
def test_tokens_that_cannot_mask(token, said):
    with pytest.raises(UserError, match=said):
        words(20, pad_token="w2").with_mask(token)


def test_ids_that_no_loss_masks():
    tokenizer = words(20, pad_token="w2", mask_token="w3")
    assert tokenizer.framing_ids == (1, 2, 3)  # w0 stands for words
    assert words(20).with_mask("w9").framing_ids == (1, 9)
    echo = words(20).with_template(Template(("w5 ", " w6 "), " w7"), "here")
    assert echo.framing_ids == (1,)  # what stands in a template are words
    assert tokenizer.token(4) == "w4" and tokenizer.token(20) == tokenizer.token(-1) == ""
