"""Folders of models that read both ways, opened by our own torch class as remote code; exact tensors; old names."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params
from tiny_run import write_tokenizer

from jaxembed import config as config_lib
from jaxembed import model_source, sharding
from jaxembed.config import MeshConfig
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.hf import mamba
from jaxembed.hf.architectures import ARCHITECTURES, architecture_of
from jaxembed.hf.folder import read_folder
from jaxembed.hf.safetensors_io import open_tensors
from jaxembed.hf.table import import_leaves
from jaxembed.hf.writer import write_folder
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import ModelFactory, flatten
from jaxembed.verification import FINGERPRINT, TOLERANCE, _only_ours, verify

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "use_bias": True}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def embedder(mesh, tmp_path_factory):
    """A random Mamba that reads both ways."""
    root = tmp_path_factory.mktemp("made")
    c = config_lib.default_config()
    c.steps, c.data.train[0].path = 1, "none.jsonl"
    c.tokenizer = f"file:{write_tokenizer(root / 'tokenizer.json')}"
    c.model.arch, c.model.shape = "bimamba", SHAPE
    c.data.max_length.query = c.data.max_length.document = 32
    blueprint, _ = model_source.open_source(config_lib.load(c), root)
    factory = blueprint.factory(ModelOptions())
    with jax.set_mesh(mesh):
        return Embedder(blueprint, factory, random_params(factory), mesh)


@pytest.fixture(scope="module")
def folder(embedder, tmp_path_factory):
    """Its folder."""
    folder = tmp_path_factory.mktemp("written") / "folder"
    embedder.save(folder)
    return folder


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("side", ["left", "right"])
def test_sentence_transformers_gives_the_same_vectors_whichever_side_is_padded(folder, side):
    """With biases of the maps into the mixers, behind which padding would show."""
    model = sentence_transformers.SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, trust_remote_code=True
    )
    model.tokenizer.padding_side = side
    assert model.tokenizer(["ka", "ka lo mi"], padding=True)["attention_mask"][0][0 if side == "left" else -1] == 0
    said = read(folder / FINGERPRINT)
    vectors = model.encode(said["texts"], show_progress_bar=False)
    assert np.abs(vectors - np.array(said["vectors"])).max() <= TOLERANCE


def test_the_folder_says_what_opens_it_and_what_torch_saves_is_read(folder, tmp_path):
    config = read(folder / "config.json")
    assert (config["model_type"], config["architectures"]) == ("bimamba", ["BiMambaModel"])
    assert (folder / mamba.CODE.name).read_bytes() == mamba.CODE.read_bytes()
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    model.save_pretrained(tmp_path)
    saved = read(tmp_path / "config.json")
    arch = architecture_of(saved)
    assert arch.config_from_hf(saved) == arch.config_from_hf(config)
    first, second = open_tensors(folder), open_tensors(tmp_path)
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
    assert sum("backward_mixer" in name for name in first) == sum(".mixer." in name for name in first) > 0


def test_without_remote_code_it_does_not_open(folder):
    """transformers' own Mamba would find all of its tensors in it, and read from left to right."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def test_code_that_is_not_ours_is_not_run(folder, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    assert _only_ours(copied)
    with (copied / mamba.CODE.name).open("a") as file:
        file.write("raise SystemExit('code of others ran')\n")
    assert not _only_ours(copied)
    with pytest.raises(UserError, match="code that jaxembed did not write"):
        verify(copied)


def written(embedder, out, **changes):
    """Writes an embedder's folder, without a head."""
    blueprint = embedder.blueprint
    settings = {
        "hf_config": blueprint.hf_config,
        "architecture": blueprint.architecture,
        "config": blueprint.backbone,
        "leaves": flatten(embedder.params["backbone"]),
        "tokenizer": blueprint.tokenizer,
        "pooling": "mean",
        "pool_prompt": True,
        "normalize": True,
        "projection": None,
        "max_length": 32,
        "prompts": {},
    }
    with jax.set_mesh(embedder.mesh):
        write_folder(out, **settings | changes)


def test_decays_steps_and_skips_are_written_in_full_precision(embedder, folder, tmp_path):
    embedder.save(tmp_path / "half", dtype="bfloat16")
    verify(tmp_path / "half")
    whole, half = open_tensors(folder), open_tensors(tmp_path / "half")
    kept = {name for name, tensor in half.items() if tensor.dtype == np.float32}
    assert {name.split("mixer.")[-1] for name in kept} == {"A_log", "D", "dt_proj.bias"}
    for name, tensor in half.items():
        np.testing.assert_array_equal(tensor, whole[name] if name in kept else whole[name].astype(jnp.bfloat16))


def test_a_mean_of_layers_is_refused_both_ways(embedder, folder, tmp_path):
    """transformers' state-space models give no states of the embeddings, and those of the last layer twice."""
    head = {"layer_mean/scale": np.ones(2, np.float32)}
    with pytest.raises(UserError, match=r"config\.model\.pool_layers\): transformers gives other states of a bimamba"):
        written(embedder, tmp_path / "out", head=head)
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    modules = read(copied / "modules.json")
    modules.insert(1, {"path": "1_Mean", "type": "sentence_transformers.models.WeightedLayerPooling"})
    (copied / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="a mean of layers is not supported of a bimamba"):
        read_folder(copied)


def test_names_of_older_files_are_read(folder, mesh):
    """Those of MambaForCausalLM, with the table's first name."""
    named = {f"backbone.{name}": tensor for name, tensor in open_tensors(folder).items() if "backward" not in name}
    named["backbone.embedding.weight"] = named.pop("backbone.embeddings.weight")
    named["lm_head.weight"] = named["backbone.embedding.weight"]
    arch, hf = ARCHITECTURES["mamba"], read(folder / "config.json")
    config = arch.config_from_hf(hf)
    with jax.set_mesh(mesh):
        factory = ModelFactory(lambda: arch.backbone(jax.random.key(0), config, ModelOptions()))
        shapes = {path: leaf.shape for path, leaf in flatten(factory.abstract()).items()}
    names = {"ignored": arch.ignored, "prefixes": arch.prefixes, "renames": arch.renames}
    leaves = import_leaves(arch.rows(config), named, shapes, config.layers, where="old", **names)
    table = leaves["token/embedding"][()]
    np.testing.assert_array_equal(table[: config.vocab_size], named["lm_head.weight"])
