"""Diffusion language models: folders of the hub, what is written of them for transformers, and the way back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
from test_architectures import save_qwen
from tiny_models import make_mesh
from tiny_run import write_tokenizer

from jaxembed.data.tokenizer import Tokenizer
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.export import export_model
from jaxembed.hf.architectures import ARCHITECTURES, architecture_of
from jaxembed.hf.language_heads import language_of
from jaxembed.hf.safetensors_io import open_tensors, write_tensors
from jaxembed.hf.word_rules import require_cut
from jaxembed.model_source import open_folder
from jaxembed.models.options import ModelOptions

D, F, V, LAYERS = 16, 24, 420, 2
# As the checkpoints say it: GSAI-ML/LLaDA-8B-Instruct and Dream-org/Dream-v0-Instruct-7B.
LLADA = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_layer_norm": False,
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_type": "llama",
    "d_model": D,
    "embedding_size": V,
    "eos_token_id": 3,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 4,
    "max_sequence_length": 32,
    "mlp_hidden_size": F,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": LAYERS,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": V,
    "weight_tying": False,
}
DREAM = {
    "architectures": ["DreamModel"],
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "hidden_act": "silu",
    "hidden_size": D,
    "initializer_range": 0.02,
    "intermediate_size": F,
    "mask_token_id": 1,
    "max_position_embeddings": 32,
    "max_window_layers": LAYERS,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": V,
}
CONFIGS = {"llada": LLADA, "Dream": DREAM}
# What the same tensor is called in transformers.
KIN = {
    "model.transformer.wte.weight": "embed_tokens.weight",
    "model.transformer.blocks.1.attn_norm.weight": "layers.1.input_layernorm.weight",
    "model.transformer.blocks.0.q_proj.weight": "layers.0.self_attn.q_proj.weight",
    "model.transformer.blocks.1.attn_out.weight": "layers.1.self_attn.o_proj.weight",
    "model.transformer.blocks.1.ff_norm.weight": "layers.1.post_attention_layernorm.weight",
    "model.transformer.blocks.0.ff_proj.weight": "layers.0.mlp.gate_proj.weight",
    "model.transformer.blocks.0.up_proj.weight": "layers.0.mlp.up_proj.weight",
    "model.transformer.blocks.0.ff_out.weight": "layers.0.mlp.down_proj.weight",
    "model.transformer.ln_f.weight": "norm.weight",
}
TEXTS = ["lo", "kalo mimi ruse tovu", "nipa kaka lolo " * 3]


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a hub folder's tensors, written down from the code there."""
    if name == "llada":
        layer = {"attn_norm": (D,), "ff_norm": (D,), "ff_out": (D, F), "ff_proj": (F, D), "up_proj": (F, D)}
        layer |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (D, D))
        tops = {"wte": (V, D), "ln_f": (D,), "ff_out": (V, D)}
        found = {f"model.transformer.{top}.weight": shape for top, shape in tops.items()}
        return found | {
            f"model.transformer.blocks.{i}.{part}.weight": shape for i in range(LAYERS) for part, shape in layer.items()
        }
    layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,), "mlp.down_proj.weight": (D, F)}
    layer |= dict.fromkeys(("mlp.gate_proj.weight", "mlp.up_proj.weight"), (F, D))
    layer |= {"self_attn.q_proj.weight": (D, D), "self_attn.q_proj.bias": (D,), "self_attn.o_proj.weight": (D, D)}
    layer |= dict.fromkeys(("self_attn.k_proj.weight", "self_attn.v_proj.weight"), (D // 2, D))
    layer |= dict.fromkeys(("self_attn.k_proj.bias", "self_attn.v_proj.bias"), (D // 2,))
    found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    return found | {f"model.layers.{i}.{part}": shape for i in range(LAYERS) for part, shape in layer.items()}


def write_hub(folder, name: str, **fields) -> None:
    """A random checkpoint as the hub has it."""
    import ml_dtypes

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {n: (0.3 * rng.normal(size=shape)).astype(ml_dtypes.bfloat16) for n, shape in shapes(name).items()}
    write_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | fields))
    (save_qwen if name == "Dream" else write_tokenizer)(folder / "tokenizer.json")


@pytest.fixture(scope="module", params=CONFIGS)
def hub(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / request.param
    write_hub(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def embedder(hub):
    return Embedder.load(hub, mesh=make_mesh())


def read(path):
    return json.loads(path.read_text())


def test_transformers_gives_the_same_vectors_of_the_exported_folder(hub, embedder, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    embedder.save(tmp_path / "out")
    config = read(tmp_path / "out" / "config.json")
    kin = {"llada": ("llama", "LlamaModel"), "Dream": ("qwen2", "Qwen2Model")}[hub.name]
    assert (config["model_type"], *config["architectures"]) == kin and config["is_causal"] is False
    assert config["mask_token_id"] == CONFIGS[hub.name]["mask_token_id"] and "auto_map" not in config
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)
    assert type(theirs[0].auto_model).__name__ == kin[1]
    assert np.abs(theirs.encode(TEXTS) - embedder.encode(TEXTS)).max() <= 1e-5
    before, after = open_tensors(hub), open_tensors(tmp_path / "out")
    assert len(after) == len(before) - 1 and not any("lm_head" in name for name in after)  # no head
    names = KIN if hub.name == "llada" else {name: name.removeprefix("model.") for name in before if "lm_" not in name}
    for theirs, ours in names.items():
        np.testing.assert_array_equal(before[theirs].astype(np.float32), after[ours], err_msg=theirs)
    again = Embedder.load(tmp_path / "out", mesh=make_mesh())
    assert again.blueprint.backbone == embedder.blueprint.backbone


def test_the_hub_s_layout_comes_back_bit_for_bit(hub, embedder, tmp_path):
    export_model(embedder, tmp_path / "out", dtype="bfloat16", layout="hub")
    assert read(tmp_path / "out" / "config.json") == read(hub / "config.json")
    before, after = open_tensors(hub), open_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name
    assert not (tmp_path / "out" / "modules.json").exists()
    with pytest.raises(UserError, match="is there already"):
        export_model(embedder, tmp_path / "out", layout="hub")


def test_fewer_layers_and_what_the_hub_s_layout_cannot_be(hub, embedder, tmp_path):
    export_model(embedder, tmp_path / "one", layers=1, layout="hub")
    config = read(tmp_path / "one" / "config.json")
    assert config.get("n_layers", config.get("num_hidden_layers")) == 1
    assert config.get("torch_dtype", "float32") == "float32"
    assert len(open_tensors(tmp_path / "one")) < len(open_tensors(hub))
    with pytest.raises(UserError, match=r"--dim=8 could cut"):
        export_model(embedder, tmp_path / "cut", dim=8, layout="hub")
    embedder.save(tmp_path / "kin")
    kin = Embedder.load(tmp_path / "kin", mesh=make_mesh())
    with pytest.raises(UserError, match=r"--layout=hub: (llama|qwen2) is a class of transformers"):
        export_model(kin, tmp_path / "none", layout="hub")
    assert not (tmp_path / "none").exists()


def test_a_head_that_was_trained_is_what_the_hub_s_layout_holds(hub, tmp_path):
    blueprint, load = open_folder(hub)
    blueprint = dataclasses.replace(blueprint, language=language_of(blueprint.hf_config))
    factory, mesh = blueprint.factory(ModelOptions()), make_mesh()
    with jax.set_mesh(mesh):
        params = load(factory)
        head = params["language"]["table"]["embedding"]
        params["language"]["table"]["embedding"] = 2 * head
    export_model(Embedder(blueprint, factory, params, mesh), tmp_path / "out", dtype="bfloat16", layout="hub")
    before, after = open_tensors(hub), open_tensors(tmp_path / "out")
    (name,) = blueprint.architecture.unused(blueprint.backbone)
    assert before.keys() == after.keys() and name in ("lm_head.weight", "model.transformer.ff_out.weight")
    np.testing.assert_array_equal(after[name].astype(np.float32), 2 * before[name].astype(np.float32))
    np.testing.assert_array_equal(np.asarray(head)[:V], before[name].astype(np.float32))


def test_a_dream_s_vocabulary_files_are_read_without_its_code(tmp_path):
    """The hub's folder has no tokenizer.json; its tokenizer class is a copy of Qwen 2's."""
    pytest.importorskip("transformers")
    save_qwen(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    n = backend.get_vocab_size()
    added = {"<|endoftext|>": 0, "<|mask|>": n}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    said = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in added.items()},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    (tmp_path / "config.json").write_text(json.dumps(DREAM))
    tokenizer = Tokenizer.load(f"hf:{tmp_path}")
    words = "the lowest of it, word by word"
    expected = [*backend.encode(words, add_special_tokens=False).ids, n]
    assert tokenizer.tokenize([f"{words}<|mask|>"])[0].tolist() == expected
    assert (tokenizer.mask_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (n, 0, 0, n + 1)
    require_cut(ARCHITECTURES["Dream"].cuts, tokenizer, "Dream")


def test_a_model_without_a_head_has_no_layout_of_the_hub(tmp_path):
    write_hub(tmp_path / "llada", "llada")
    head = "model.transformer.ff_out.weight"
    kept = {name: np.array(x) for name, x in open_tensors(tmp_path / "llada").items() if name != head}
    write_tensors(tmp_path / "llada", kept)
    with pytest.raises(UserError, match=f"a head that predicts words, {head}; this model has none"):
        export_model(Embedder.load(tmp_path / "llada", mesh=make_mesh()), tmp_path / "out", layout="hub")


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("llada", {"block_type": "sequential"}, "block_type = 'sequential'"),
        ("llada", {"block_type": None}, ""),
        ("llada", {"alibi": True}, "alibi = True"),
        ("llada", {"layer_norm_type": "default"}, "layer_norm_type = 'default'"),
        ("llada", {"include_qkv_bias": True}, "include_qkv_bias = True"),
        ("llada", {"activation_type": "swiglu"}, "activation_type = 'swiglu'"),
        ("llada", {"n_kv_heads": 3}, "16, 4, 3: wants each to divide"),
        ("llada", {"n_layers": 0}, "n_layers is 0"),
        ("llada", {"num_experts": 64}, "mixtures of experts are not read"),
        ("Dream", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("Dream", {"is_causal": True}, "is_causal = True"),
        ("Dream", {"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_what_is_no_such_block_is_refused(name, fields, said):
    hf = CONFIGS[name] | fields
    if not said:
        del hf["block_type"]
        said = "block_type = 'sequential'"
    with pytest.raises(UserError, match=f"folder/config.json: .*{said}"):
        architecture_of(hf).config_from_hf(hf, "folder/config.json")


def test_fields_that_llada_leaves_open():
    config = ARCHITECTURES["llada"].config_from_hf
    assert config(LLADA | {"n_kv_heads": None}).kv_heads == 4 and config(LLADA | {"n_kv_heads": 2}).kv_heads == 2
    assert config(LLADA | {"mlp_hidden_size": None}).mlp_width == 4 * D
    assert config(LLADA | {"embedding_size": None}).vocab_size == V
    assert config(LLADA | {"embedding_size": 448}).vocab_size == 448
    assert config(LLADA).rope.theta == 500_000.0 and config(LLADA).max_length == 32
    assert config(LLADA).attention == ("bidirectional",)
    with pytest.raises(UserError, match="has no words for scaled positions"):
        ARCHITECTURES["llada"].with_rope_scaling(LLADA, {"rope_type": "linear", "factor": 2.0})
    dream = ARCHITECTURES["Dream"]
    longer = dream.with_rope_scaling(DREAM, {"rope_type": "linear", "factor": 2.0})
    assert dream.config_from_hf(longer).max_length == 64
    with pytest.raises(UserError, match="Dream takes native, bidirectional"):
        dream.with_attention(DREAM, ("causal",))
