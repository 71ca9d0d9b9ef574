"""Every architecture, end to end: made, written as a folder, opened by torch with equal vectors, read back the same."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
import tokenizers as tokenizers_library
from tiny_models import random_params
from tiny_run import write_tokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from jaxembed import config as config_lib
from jaxembed import model_source, sharding
from jaxembed.config import MeshConfig
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.export import export_model
from jaxembed.hf.architectures import ARCHITECTURES
from jaxembed.hf.safetensors_io import open_tensors, write_tensors
from jaxembed.hf.word_rules import QWEN_WORDS
from jaxembed.models.options import ModelOptions
from jaxembed.verification import _only_ours, verify

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 6, "d_ff": 48, "n_positions": 64}
SSM = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
SSM2 = SSM | {"head_dim": 8, "n_groups": 2}
SHAPES = {
    "t5": T5,
    "mt5": T5 | {"feed_forward_proj": "gated-gelu"},
    "modernbert": COMMON | {"local_attention": 8},
    **{name: COMMON | {"num_key_value_heads": 2} for name in ("llama", "qwen2", "qwen3", "phi3", "gemma")},
    **{name: COMMON | {"num_key_value_heads": 2, "sliding_window": 5} for name in ("mistral", "gemma2")},
    "gemma3_text": COMMON | {"num_key_value_heads": 1, "sliding_window": 6, "sliding_window_pattern": 2},
    "mixtral": COMMON | {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2_moe": COMMON
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    | {"mlp_only_layers": [1]},
    "qwen3_moe": COMMON
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2},
    "olmoe": COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    **dict.fromkeys(("mamba", "falcon_mamba", "bimamba", "bifalcon_mamba"), SSM),
    "mamba2": SSM2,
    "bimamba2": SSM2 | {"shared_directions": True},
    "llada": {"d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 48, "max_sequence_length": 64},
    "Dream": COMMON | {"num_key_value_heads": 2},
    "bamba": COMMON
    | {"num_hidden_layers": 2, "num_key_value_heads": 2, "mamba_d_state": 4, "mamba_d_head": 8, "mamba_n_groups": 2},
}
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "bamba")  # whose causal states tests/models compares
CASES = [
    (name, mode)
    for name, arch in ARCHITECTURES.items()
    for mode in (("native",) if arch.fixed_attention else ("bidirectional", "causal"))
    if name not in SPARSE or mode == "bidirectional"
]
WITH_CODE = ("jina_bert",)  # whose class is on the hub, not in transformers


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Which tokenizer.json a model_type takes: mpnet's padding is number 1, qwen2's words are Qwen's."""
    folder = tmp_path_factory.mktemp("tokenizer")
    plain = write_tokenizer(folder / "tokenizer.json")
    shifted = json.loads(plain.read_text())
    vocab = shifted["model"]["vocab"]
    vocab["[PAD]"], vocab["[UNK]"] = vocab["[UNK]"], vocab["[PAD]"]
    for token in shifted["added_tokens"]:
        token["id"] = vocab[token["content"]]
    (folder / "mpnet.json").write_text(json.dumps(shifted))
    save_qwen(folder / "qwen.json")
    qwen = dict.fromkeys(("qwen2", "Dream"), folder / "qwen.json")
    return {"mpnet": folder / "mpnet.json", **qwen, "": plain}


def save_qwen(path) -> None:
    """Byte-level BPE with Qwen's words."""
    backend = tokenizers_library.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers_library.Regex(QWEN_WORDS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.train_from_iterator(
        ["the low lower lowest of it, word by word"],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    end = [("<|endoftext|>", 0)]
    backend.post_processor = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=end)
    backend.save(str(path))


def make(model_type: str, mode: str, tokenizers, mesh, **model) -> Embedder:
    """A tiny model with random weights, as a run from scratch would make it."""
    tokenizer = tokenizers.get(model_type, tokenizers[""])
    c = config_lib.default_config()
    c.steps, c.data.train[0].path, c.tokenizer = 1, "none.jsonl", f"file:{tokenizer}"
    c.model.arch, c.model.shape, c.model.attention = model_type, SHAPES.get(model_type, COMMON), mode
    c.model.update(model)
    if not ARCHITECTURES[model_type].bounded:
        c.data.max_length.query = c.data.max_length.document = 32
    blueprint, _ = model_source.open_source(config_lib.load(c), tokenizer.parent)
    factory = blueprint.factory(ModelOptions())
    with jax.set_mesh(mesh):
        return Embedder(blueprint, factory, random_params(factory), mesh)


@pytest.mark.parametrize(("model_type", "mode"), CASES)
def test_torch_gives_the_same_vectors_and_the_folder_comes_back(model_type, mode, tokenizers, mesh, tmp_path):
    make(model_type, mode, tokenizers, mesh).save(tmp_path / "folder")
    if model_type not in WITH_CODE:
        found = verify(tmp_path / "folder")  # loading info, reach of attention, padding, fingerprint: all ≤ 1e-5
        assert set(found) == {"jax", "sentence_transformers", "padded"}
    Embedder.load(tmp_path / "folder", mesh=mesh).save(tmp_path / "again")
    for name in ("config.json", "modules.json", "jaxembed.json", "tokenizer.json"):
        first, second = (json.loads((tmp_path / folder / name).read_text()) for folder in ("folder", "again"))
        assert first == second, name
    first, second = (open_tensors(tmp_path / folder) for folder in ("folder", "again"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name], err_msg=name)


def test_bfloat16_folders_hold_half_the_bytes_and_verify(tokenizers, mesh, tmp_path):
    embedder = make("llama", "bidirectional", tokenizers, mesh)
    embedder.save(tmp_path / "whole")
    embedder.save(tmp_path / "half", dtype="bfloat16")
    sizes = [sum(x.nbytes for x in open_tensors(tmp_path / name).values()) for name in ("whole", "half")]
    assert sizes[0] == 2 * sizes[1]
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    verify(tmp_path / "half")


def test_a_folder_that_turned_causal_or_lost_weights_is_found_out(tokenizers, mesh, tmp_path):
    make("llama", "bidirectional", tokenizers, mesh).save(tmp_path)
    said = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert said["requirements"] == {"transformers": ">=5.2.0"}
    config = (tmp_path / "config.json").read_text()
    broken = {key: value for key, value in json.loads(config).items() if key != "is_causal"}
    (tmp_path / "config.json").write_text(json.dumps(broken))  # now TEI's word is there alone
    with pytest.raises(UserError, match="does not see its last one, but the model is bidirectional"):
        verify(tmp_path)
    (tmp_path / "config.json").write_text(config)
    tensors = {name: np.array(x) for name, x in open_tensors(tmp_path).items()}
    write_tensors(tmp_path, {name: x for name, x in tensors.items() if name != "norm.weight"})
    with pytest.raises(UserError, match=r"missing tensor norm\.weight"):
        verify(tmp_path)


def test_what_no_folder_can_say_is_not_exported(tokenizers, mesh, tmp_path):
    with pytest.raises(UserError, match=r"config\.model\.attention: no folder can say this"):
        make("llama", "prefix", tokenizers, mesh)
    embedder = make("llama", "native", tokenizers, mesh)
    mixed = embedder.blueprint.architecture.with_attention(
        embedder.blueprint.hf_config, ("causal", "causal", "bidirectional")
    )
    embedder.blueprint.hf_config.clear()
    embedder.blueprint.hf_config.update(mixed)
    with pytest.raises(UserError, match="what this model's attention sees"):
        embedder.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_transformers_would_not_use_is_refused(tokenizers, mesh):
    with pytest.raises(UserError, match=r"config\.tokenizer: for a qwen2 transformers cuts texts into words by Qwen's"):
        make("qwen2", "causal", {"": tokenizers[""]}, mesh)


def test_two_linear_layers_behind_the_pooling_as_embeddinggemma_has(tokenizers, mesh, tmp_path):
    small = make("gemma3_text", "bidirectional", tokenizers, mesh)
    head = dataclasses.replace(small.blueprint.head, expansion=40, projection=32)
    blueprint = dataclasses.replace(small.blueprint, head=head)
    factory = blueprint.factory(ModelOptions())
    with jax.set_mesh(mesh):
        Embedder(blueprint, factory, random_params(factory), mesh).save(tmp_path / "folder")
    kinds = [module["type"].rsplit(".")[-1] for module in json.loads((tmp_path / "folder/modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    verify(tmp_path / "folder")
    again = Embedder.load(tmp_path / "folder", mesh=mesh)
    assert again.blueprint.head == head
    again.save(tmp_path / "again")
    for part in ("2_Dense", "3_Dense"):
        first, second = (open_tensors(tmp_path / folder / part) for folder in ("folder", "again"))
        np.testing.assert_array_equal(first["linear.weight"], second["linear.weight"])


def edit(path, **fields) -> None:
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_teis_word_alone_becomes_both(tokenizers, mesh, tmp_path):
    """A folder that transformers would open as causal is meant to be bidirectional: so it is read and written again."""
    make("llama", "bidirectional", tokenizers, mesh).save(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    del config["is_causal"]
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    Embedder.load(tmp_path / "folder", mesh=mesh).save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["is_causal"] is False
    verify(tmp_path / "again")


def test_what_generates_is_pooled_at_an_end_token_where_that_is_asked_for(tokenizers, mesh, tmp_path):
    """Base models come as …ForCausalLM without modules.json: their last-token pooling is a guess, not a training."""
    make("llama", "causal", {"": tokenizers["qwen2"]}, mesh).save(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    edit(tmp_path / "tokenizer_config.json", eos_token="<|endoftext|>")
    (tmp_path / "modules.json").unlink()
    edit(tmp_path / "config.json", architectures=["LlamaForCausalLM"])
    assert Embedder.load(tmp_path, mesh=mesh).blueprint.head.pooling == "last"  # as sentence-transformers guesses
    assert Embedder.load(tmp_path, template="echo", mesh=mesh).blueprint.head.pooling == "mean"
    asked = Embedder.load(tmp_path, pooling="last", mesh=mesh).blueprint
    assert asked.tokenizer.appends_eos and asked.tokenizer.encode(["the low"], 3)[0][-1] == 0

    def adapted(**model):
        c = config_lib.default_config()
        c.steps, c.data.train[0].path, c.model.init = 1, "none.jsonl", f"hf:{tmp_path}"
        c.model.update(model)
        return model_source.open_source(config_lib.load(c), tmp_path)[0]

    assert adapted().head.pooling == "last" and not adapted().tokenizer.appends_eos
    assert adapted(pooling="last").tokenizer.appends_eos
    assert adapted(attention="bidirectional").head.pooling == "mean"
    with pytest.raises(UserError, match="pooling = 'cls': the first token of a causal model"):
        adapted(pooling="cls")
    with pytest.raises(UserError, match="pooling = 'cls': the first token of a causal model"):
        Embedder.load(tmp_path, pooling="cls", mesh=mesh)
    assert adapted(pooling="cls", attention="bidirectional").head.pooling == "cls"


def test_a_prompt_that_swallows_the_text_is_not_left_out(tokenizers, mesh):
    """'Query: ' and 'low' are cut into 'Query:' and ' low': the first word would count as prompt."""
    known = {"": tokenizers["qwen2"]}
    c = config_lib.default_config()
    c.steps, c.data.train[0].path, c.tokenizer = 1, "none.jsonl", f"file:{known['']}"
    c.model.arch, c.model.shape, c.model.pool_prompt = "llama", COMMON, False
    c.prompts.query = "the lower:"
    model_source.open_source(config_lib.load(c), known[""].parent)
    c.prompts.query = "the lower: "
    with pytest.raises(UserError, match=r"config\.prompts\.query = 'the lower: ': its last token merges"):
        model_source.open_source(config_lib.load(c), known[""].parent)


def test_longer_texts_by_interpolated_positions(tokenizers, mesh, tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0}
    longer = make("llama", "bidirectional", tokenizers, mesh, rope_scaling=scaling)
    assert longer.blueprint.backbone.max_length == 256
    blueprint = dataclasses.replace(longer.blueprint, max_length=256)
    Embedder(blueprint, longer.factory, longer.params, mesh).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["max_position_embeddings"] == 256 and config["rope_scaling"]["rope_type"] == "yarn"
    verify(tmp_path)
    with pytest.raises(UserError, match="bert has no rotary positions"):
        make("bert", "native", tokenizers, mesh, rope_scaling=scaling)


def test_t5_knows_no_longest_text(tokenizers, mesh, tmp_path):
    make("t5", "native", tokenizers, mesh).save(tmp_path)
    edit(tmp_path / "sentence_bert_config.json", max_seq_length=100)
    longer = Embedder.load(tmp_path, mesh=mesh)
    assert longer.blueprint.max_length == 100  # of 64 that its config speaks of
    from sentence_transformers import SentenceTransformer

    text = "lo " * 90
    peer = SentenceTransformer(str(tmp_path), device="cpu", local_files_only=True)
    assert np.abs(peer.encode([text]) - longer.encode([text])).max() <= 1e-5


def test_one_layer_of_modernbert(tokenizers, mesh, tmp_path):
    export_model(make("modernbert", "native", tokenizers, mesh), tmp_path, layers=1)
    verify(tmp_path)


def test_the_first_layers_of_a_sparse_model(tokenizers, mesh, tmp_path):
    """Of qwen2_moe's three layers the middle one is dense; of qwen3_moe's the others."""
    export_model(make("qwen2_moe", "bidirectional", tokenizers, mesh), tmp_path / "two", layers=2)
    verify(tmp_path / "two")
    export_model(make("qwen2_moe", "bidirectional", tokenizers, mesh), tmp_path / "one", layers=1)
    assert not any("mlp.up_proj" in name for name in open_tensors(tmp_path / "one"))
    with pytest.raises(UserError, match=r"--layers=1: by decoder_sparse_step = 2 .* none of 1 layers is sparse"):
        export_model(make("qwen3_moe", "bidirectional", tokenizers, mesh), tmp_path / "none", layers=1)
    assert not (tmp_path / "none").exists()


def test_vectors_of_any_length_verify(tokenizers, mesh, tmp_path):
    raw = make("mistral", "bidirectional", tokenizers, mesh)
    head = dataclasses.replace(raw.blueprint.head, normalize=False)
    blueprint = dataclasses.replace(raw.blueprint, head=head)
    params = jax.tree.map(lambda x: x, raw.params)
    params["backbone"]["norm"]["scale"] = 100 * params["backbone"]["norm"]["scale"]
    Embedder(blueprint, blueprint.factory(ModelOptions()), params, mesh).save(tmp_path)
    verify(tmp_path)


def test_verification_runs_no_code_of_others(tokenizers, mesh, tmp_path):
    """Our own latent attention in a folder is no leave for what tokenizer_config.json maps to."""
    latent = make("llama", "bidirectional", tokenizers, mesh, pooling="latent", latents=4, latent_heads=4)
    latent.save(tmp_path / "model")
    assert _only_ours(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tok.py").write_text("raise SystemExit('code of others ran')")
    named = {"AutoTokenizer": ["data--tok.Tok", "data--tok.Tok"]}
    edit(tmp_path / "model" / "tokenizer_config.json", auto_map=named)
    assert not _only_ours(tmp_path / "model")
    with pytest.raises(ValueError, match="trust_remote_code"):
        verify(tmp_path / "model")


def test_meshes_that_do_not_divide_a_model_are_refused(tokenizers):
    uneven = sharding.make_mesh(MeshConfig(1, 3), jax.devices()[:3])
    with pytest.raises(UserError, match=r"config\.mesh\.fsdp = 3 does not divide a size of the model, 256"):
        make("llama", "causal", tokenizers, uneven)


def test_sentence_transformers_is_there():
    """Else the cases above would not compare with torch."""
    assert importlib.util.find_spec("sentence_transformers")
