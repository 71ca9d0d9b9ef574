"""Exported folders, opened by sentence-transformers and transformers, against the models that they were made from."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import UserError
from jaxembed.hf.architectures import ARCHITECTURES
from jaxembed.hf.folder import read_folder
from jaxembed.hf.loading import load_onto
from jaxembed.hf.safetensors_io import open_tensors
from jaxembed.hf.weights import backbone_leaves, projection_leaves, unused_tensors
from jaxembed.hf.writer import write_folder
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import HeadConfig, ModelFactory, TextEncoder, flatten

torch = pytest.importorskip("torch")
sentence_transformers = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

TEXTS = ["A man is eating food.", "", "two  spaces", "naïve café 😀", "مرحبا بالعالم", "word " * 100]
CLASSES = {
    "bert": ("BertConfig", "BertModel"),
    "roberta": ("RobertaConfig", "RobertaModel"),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel"),
}


def shapes_of(folder):
    """The shapes of the backbone's leaves, asked of the model itself."""
    make = folder.architecture.backbone
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        factory = ModelFactory(
            lambda: TextEncoder(jax.random.key(0), make, folder.config, HeadConfig(), ModelOptions())
        )
        flat = flatten(factory.abstract())
    return {path.removeprefix("backbone/"): leaf.shape for path, leaf in flat.items()}


def read_all(folder):
    """All leaves of a folder's backbone, in memory."""
    return {path: leaf[()] for path, leaf in backbone_leaves(folder, shapes_of(folder)).items()}


def write(folder, out, **changes):
    """Writes what was read."""
    settings = {
        "hf_config": folder.hf_config,
        "architecture": folder.architecture,
        "config": folder.config,
        "leaves": read_all(folder),
        "tokenizer": Tokenizer.load(f"hf:{folder.transformer}"),
        "pooling": folder.pooling,
        "pool_prompt": folder.pool_prompt,
        "normalize": folder.normalize,
        "projection": None,
        "max_length": folder.max_length,
        "prompts": folder.prompts,
        "unused": unused_tensors(folder),
    }
    write_folder(out, **settings | changes)


def open_there(folder):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, minilm_dir):
    """A maker of tiny random folders with MiniLM's tokenizer, as transformers writes them."""
    made = {}

    def make(arch):
        if arch not in made:
            config_class, model_class = (getattr(transformers, name) for name in CLASSES[arch])
            torch.manual_seed(len(made))
            config = config_class(
                vocab_size=30522,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=24,
                max_position_embeddings=66,
                type_vocab_size=1 if arch == "roberta" else 2,
                initializer_range=0.5,
            )
            made[arch] = tmp_path_factory.mktemp(arch)
            model_class(config).save_pretrained(made[arch])
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
                shutil.copy(minilm_dir / name, made[arch] / name)
        return made[arch]

    return make


def torch_vectors(source, max_length, pooling, projection, normalize):
    """The vectors of TEXTS by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source).eval()
    vectors = []
    for text in TEXTS:
        ids = tokenizer(text.strip(), truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**ids).last_hidden_state[0].numpy().astype(np.float64)
        weights = {
            "mean": np.ones(len(hidden)),
            "cls": np.eye(len(hidden))[0],
            "last": np.eye(len(hidden))[-1],
            "weighted_mean": np.arange(1, len(hidden) + 1),
        }[pooling]
        vector = weights @ hidden / weights.sum()
        if projection is not None:
            kernel, bias = projection
            vector = vector @ kernel + (0 if bias is None else bias)
        vectors.append(vector / np.linalg.norm(vector) if normalize else vector)
    return np.stack(vectors)


@pytest.mark.parametrize("arch", list(CLASSES))
def test_transformers_finds_every_tensor(tiny, tmp_path, arch):
    folder = read_folder(tiny(arch))
    assert folder.model_type == arch
    write(folder, tmp_path / "out")
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__name__ == ARCHITECTURES[arch].hf_class
    original = transformers.AutoModel.from_pretrained(tiny(arch)).state_dict()
    assert original.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original[name]), name


@pytest.mark.parametrize(
    ("arch", "pooling", "normalize", "projection"),
    [
        ("bert", "mean", True, None),
        ("bert", "cls", False, "biased"),
        ("roberta", "last", True, "plain"),
        ("xlm-roberta", "weighted_mean", False, None),
    ],
)
def test_sentence_transformers_gives_the_same_vectors(tiny, tmp_path, arch, pooling, normalize, projection):
    rng = np.random.default_rng(0)
    if projection:
        bias = rng.normal(size=8).astype(np.float32) if projection == "biased" else None
        projection = rng.normal(size=(16, 8)).astype(np.float32), bias
    source = tiny(arch)
    write(
        read_folder(source),
        tmp_path / "out",
        pooling=pooling,
        normalize=normalize,
        projection=projection,
        max_length=24,
        prompts={"query": "query: ", "document": ""},
        default_prompt_name="document",
        similarity="dot",
    )
    model = open_there(tmp_path / "out")
    assert model.max_seq_length == 24
    assert model.prompts == {"query": "query: ", "document": ""}
    assert (model.default_prompt_name, model.similarity_fn_name) == ("document", "dot")
    wanted = torch_vectors(source, 24, pooling, projection, normalize)
    np.testing.assert_allclose(model.encode(TEXTS), wanted, atol=2e-5 * np.abs(wanted).max())

    again = read_folder(tmp_path / "out")
    assert (again.pooling, again.normalize, again.max_length) == (pooling, normalize, 24)
    assert (again.default_prompt_name, again.similarity) == ("document", "dot")
    assert again.prompts == {"query": "query: ", "document": ""}
    if projection:
        leaves = projection_leaves(again.dense)
        np.testing.assert_array_equal(leaves["projection/kernel"][()], projection[0])
        assert ("projection/bias" in leaves) == (projection[1] is not None)
    else:
        assert again.dense is None


def test_prompts_left_out_of_pooling(tiny, tmp_path):
    write(read_folder(tiny("bert")), tmp_path / "out", pool_prompt=False, prompts={"query": "query: "})
    assert open_there(tmp_path / "out")[1].include_prompt is False
    assert read_folder(tmp_path / "out").pool_prompt is False


def test_minilm_there_and_back_is_bit_equal(minilm_dir, tmp_path):
    write(read_folder(minilm_dir), tmp_path / "out", extra_files={"README.md": b"# Card\n"})
    original = transformers.AutoModel.from_pretrained(minilm_dir).state_dict()
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.state_dict().keys() == original.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original[name]), name
    theirs, ours = open_there(minilm_dir), open_there(tmp_path / "out")
    np.testing.assert_array_equal(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert ours.max_seq_length == theirs.max_seq_length == 256
    assert (tmp_path / "out" / "README.md").read_text() == "# Card\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leaves_from_a_mesh(tiny, tmp_path):
    folder = read_folder(tiny("bert"))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    make = folder.architecture.backbone
    with jax.set_mesh(mesh):
        factory = ModelFactory(
            lambda: TextEncoder(jax.random.key(0), make, folder.config, HeadConfig(), ModelOptions())
        )
        targets = {path.removeprefix("backbone/"): leaf for path, leaf in flatten(factory.abstract()).items()}
        shapes = {path: leaf.shape for path, leaf in targets.items()}
        arrays = load_onto(backbone_leaves(folder, shapes), targets)
        write(folder, tmp_path / "out", leaves=arrays)
    assert arrays["layers/mlp/up/kernel"].sharding.shard_shape((2, 16, 24)) == (2, 8, 12)
    written, source = open_tensors(tmp_path / "out"), open_tensors(tiny("bert"))
    assert written.keys() == source.keys()
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, source[name])


def test_bfloat16(tiny, tmp_path):
    rng = np.random.default_rng(0)
    projection = rng.normal(size=(16, 8)).astype(np.float32), None
    write(read_folder(tiny("bert")), tmp_path / "out", dtype="bfloat16", projection=projection, normalize=True)
    assert {str(tensor.dtype) for tensor in open_tensors(tmp_path / "out").values()} == {"bfloat16"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    vectors = open_there(tmp_path / "out").encode(TEXTS)
    wanted = torch_vectors(tiny("bert"), 66, "mean", projection, True)
    np.testing.assert_allclose(vectors, wanted, atol=0.05)


@pytest.mark.parametrize("arch", list(CLASSES))
def test_a_model_from_scratch(minilm_dir, tmp_path, arch):
    entry = ARCHITECTURES[arch]
    tokenizer = Tokenizer.load(f"hf:{minilm_dir}")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    hf_config = entry.fresh_hf_config(shape, tokenizer)
    config = entry.config_from_hf(hf_config)
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        factory = ModelFactory(
            lambda: TextEncoder(jax.random.key(0), entry.backbone, config, HeadConfig(), ModelOptions())
        )
        params = flatten(jax.jit(factory.fresh)())
    write_folder(
        tmp_path / "out",
        hf_config=hf_config,
        architecture=entry,
        config=config,
        leaves={path.removeprefix("backbone/"): leaf for path, leaf in params.items()},
        tokenizer=tokenizer,
        pooling="mean",
        pool_prompt=True,
        normalize=True,
        projection=None,
        max_length=config.max_length,
        prompts={},
    )
    _, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    vectors = open_there(tmp_path / "out").encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert not open_tensors(tmp_path / "out")["pooler.dense.weight"].any()
    assert read_folder(tmp_path / "out").config == config


def test_keys_that_no_longer_hold_are_dropped(tiny, tmp_path):
    folder = read_folder(tiny("bert"))
    stale = {"auto_map": {"AutoModel": "x.Y"}, "_name_or_path": "a/b", "architectures": ["BertForMaskedLM"]}
    write(folder, tmp_path / "out", hf_config=folder.hf_config | stale)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    assert not {"auto_map", "_name_or_path", "transformers_version"} & config.keys()


def test_what_is_replaced_and_what_is_not(tiny, tmp_path):
    folder = read_folder(tiny("bert"))
    out = tmp_path / "out"
    out.mkdir()
    write(folder, out)
    write(folder, out, pooling="cls")  # an exported folder
    assert read_folder(out).pooling == "cls"

    class FullDisk:
        def save(self, folder, max_length):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"out: cannot be written: .*No space left"):
        write(folder, out, pooling="mean", tokenizer=FullDisk())
    assert read_folder(out).pooling == "cls"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    for foreign in (tiny("bert"), tiny("bert") / "config.json"):
        with pytest.raises(UserError, match="is there already and is no exported folder"):
            write(folder, foreign)
    with pytest.raises(ValueError, match="hf_config does not describe"):
        write(folder, out, hf_config=folder.hf_config | {"hidden_size": 32})
    with pytest.raises(ValueError, match="not one of the prompts"):
        write(folder, out, default_prompt_name="query")
