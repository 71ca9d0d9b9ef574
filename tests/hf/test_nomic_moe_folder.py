"""Folders of Nomic's sparse BERT: of the hub layout, opened by our own class as remote code, and read back the same."""

import json

import jax
import numpy as np
import pytest
from tiny_models import random_params
from tiny_run import write_tokenizer

from jaxembed import config as config_lib
from jaxembed import model_source, sharding
from jaxembed.config import MeshConfig
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.export import export_model
from jaxembed.hf import nomic_moe
from jaxembed.hf.architectures import architecture_of
from jaxembed.hf.safetensors_io import open_tensors, write_tensors
from jaxembed.models.options import ModelOptions
from jaxembed.verification import _check_loading, _only_ours, verify

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "num_experts": 3,
}
VARIANTS = {
    "of the hub": {},
    "of a bert": {
        "rotary_emb_fraction": 0.0,
        "type_vocab_size": 2,
        "moe_layers": [0, 2],
        "moe_up_bias": True,
        "moe_normalize_expert_weights": 1,
    },
    "of a nomic_bert": {
        "activation_function": "swiglu",
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "moe_every_n_layers": 0,
        "moe_layers": [0, 1, 2, 3],
        "moe_gated": True,
    },
}
# The public checkpoint's tensors, of a model of these sizes.
PER_LAYER = {
    "attn.Wqkv.weight": (96, 32),
    "attn.Wqkv.bias": (96,),
    "attn.out_proj.weight": (32, 32),
    "attn.out_proj.bias": (32,),
    **{f"norm{n}.{part}": (32,) for n in (1, 2) for part in ("weight", "bias")},
}
DENSE = {"mlp.fc1.weight": (20, 32), "mlp.fc1.bias": (20,), "mlp.fc2.weight": (32, 20), "mlp.fc2.bias": (32,)}
SPARSE = {
    "mlp.router.layer.weight": (3, 32),
    "mlp.experts.mlp.w1": (60, 32),
    "mlp.experts.mlp.w2": (60, 32),
    "mlp.experts.bias": (32,),
}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def folders(mesh, tmp_path_factory):
    """Exported folders of random models, by the name of the variant; each is made once."""
    root = tmp_path_factory.mktemp("folders")
    tokenizer = write_tokenizer(root / "tokenizer.json")

    def get(name):
        folder = root / name.split()[-1]
        if not folder.is_dir():
            c = config_lib.default_config()
            c.steps, c.data.train[0].path, c.tokenizer = 1, "none.jsonl", f"file:{tokenizer}"
            c.model.arch, c.model.shape = "nomic_moe", SIZES | VARIANTS[name]
            blueprint, _ = model_source.open_source(config_lib.load(c), root)
            factory = blueprint.factory(ModelOptions())
            with jax.set_mesh(mesh):
                Embedder(blueprint, factory, random_params(factory), mesh).save(folder)
        return folder

    return get


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of of the hub own kind, to be changed."""
    for file in folders("of the hub").rglob("*"):
        if file.is_file():
            place = tmp_path / file.relative_to(folders("of the hub"))
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", ["of a bert", "of a nomic_bert"])  # test_architectures.py has the hub's own kind
def test_torch_gives_the_same_vectors_and_the_folder_comes_back(name, folders, mesh, tmp_path):
    folder = folders(name)
    assert set(verify(folder)) == {"jax", "sentence_transformers", "padded"}  # no weight missing, all ≤ 1e-5
    Embedder.load(folder, mesh=mesh).save(tmp_path / "again")
    for file in ("config.json", "jaxembed.json"):
        assert read(folder / file) == read(tmp_path / "again" / file)
    assert (tmp_path / "again" / "modeling_nomic_moe.py").read_bytes() == nomic_moe.CODE.read_bytes()
    first, second = open_tensors(folder), open_tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    for tensor in first:
        np.testing.assert_array_equal(first[tensor], second[tensor], err_msg=tensor)


def test_the_tensors_are_those_of_the_public_checkpoint(folders):
    wanted = {
        "embeddings.word_embeddings.weight": (read(folders("of the hub") / "config.json")["vocab_size"], 32),
        "embeddings.token_type_embeddings.weight": (1, 32),
        "emb_ln.weight": (32,),
        "emb_ln.bias": (32,),
    }
    for i in range(4):
        wanted |= {f"encoder.layers.{i}.{name}": shape for name, shape in (PER_LAYER | (DENSE, SPARSE)[i % 2]).items()}
    assert {name: tensor.shape for name, tensor in open_tensors(folders("of the hub")).items()} == wanted
    others = [name for name in open_tensors(folders("of a bert")) if name not in wanted]
    assert {name.split(".", 3)[-1] for name in others if "layers" in name} <= {*SPARSE, *DENSE, "mlp.experts.mlp.b1"}
    assert "embeddings.position_embeddings.weight" in others
    assert "encoder.layers.0.mlp.experts.mlp.v1" in open_tensors(folders("of a nomic_bert"))


def test_left_padding_other_layers_and_what_torch_saves(folders, tmp_path):
    folder = folders("of a bert")
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, local_files_only=True).eval()
    tokens = torch.arange(10, 16)[None]
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
    with torch.no_grad():
        alone = model(tokens, output_hidden_states=True)
        padded = model(left, (torch.arange(9) >= 3)[None].long()).last_hidden_state[:, 3:]
    torch.testing.assert_close(padded, alone.last_hidden_state, rtol=0, atol=1e-5)
    assert len(alone.hidden_states) == 5
    model.save_pretrained(tmp_path)
    saved = read(tmp_path / "config.json")
    assert architecture_of(saved).model_type == "nomic_moe"
    assert nomic_moe.config_from_hf(saved) == nomic_moe.config_from_hf(read(folder / "config.json"))
    first, second = open_tensors(folder), open_tensors(tmp_path)
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_without_remote_code_it_does_not_open(folders):
    """transformers' own nomic_bert is dense: it would fill what it misses with random numbers, and say nothing."""
    with pytest.raises(KeyError, match="needs trust_remote_code=True"):
        sentence_transformers.SentenceTransformer(str(folders("of the hub")), device="cpu", local_files_only=True)


def test_code_that_is_not_ours_is_not_run(copied):
    assert _only_ours(copied)
    with (copied / "modeling_nomic_moe.py").open("a") as file:
        file.write("raise SystemExit('code of others ran')\n")
    assert not _only_ours(copied)
    with pytest.raises(UserError, match="code that jaxembed did not write"):
        verify(copied)
    config = read(copied / "config.json") | {"auto_map": {"AutoModel": "others--modeling.Model"}}
    (copied / "config.json").write_text(json.dumps(config))
    assert not _only_ours(copied)
    assert set(verify(copied)) == {"jax"}


def test_missing_experts_are_found_out(copied):
    tensors = {name: np.array(x) for name, x in open_tensors(copied).items()}
    write_tensors(copied, {name: x for name, x in tensors.items() if not name.endswith("3.mlp.experts.mlp.w2")}.items())
    model = transformers.AutoModel.from_pretrained(copied, trust_remote_code=True, local_files_only=True)
    with pytest.raises(UserError, match=r"missing_keys: encoder\.layers\.3\.mlp\.experts\.mlp\.w2"):
        _check_loading(copied, type(model))
    with pytest.raises(UserError, match=r"missing tensor encoder\.layers\.3\.mlp\.experts\.mlp\.w2"):
        Embedder.load(copied)


def test_the_first_layers_alone(folders, mesh, tmp_path):
    whole = open_tensors(folders("of a bert"))
    export_model(Embedder.load(folders("of a bert"), mesh=mesh), tmp_path / "one", layers=1)
    assert read(tmp_path / "one" / "config.json")["moe_layers"] == [0]
    first = open_tensors(tmp_path / "one")
    assert first.keys() == {name for name in whole if not name.startswith(tuple(f"encoder.layers.{i}" for i in "123"))}
    assert all(np.array_equal(tensor, whole[name]) for name, tensor in first.items())
    with pytest.raises(UserError, match=r"--layers=1: moe_every_n_layers = 2: none of the 1 layers has experts"):
        export_model(Embedder.load(folders("of the hub"), mesh=mesh), tmp_path / "none", layers=1)
