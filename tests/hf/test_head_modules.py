"""Heads beyond plain pooling, written as modules of sentence-transformers, opened there and here again."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from llm_tokenizers import save_tiny_bert

from jaxembed import model_source, sharding
from jaxembed.config import Config, DataConfig, MaxLength, MeshConfig, ModelConfig
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.hf.folder import read_folder
from jaxembed.hf.weights import LATENT_ROWS
from jaxembed.hf.writer import write_folder
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import flatten

pytest.importorskip("torch")
sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = ["", "a", "the lowest and the widest", "Größe 日本 🙂", "many words " * 60]
LATENT = {"pooling": "latent", "latents": 6, "latent_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_bert(folder)
    return folder


@pytest.fixture(autouse=True)
def code_runs_from_here(tmp_path, monkeypatch):
    """transformers copies a folder's code into a cache before it runs it."""
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))


def adapted(base, max_length=0, **model):
    """The blueprint of a config that starts from the folder, and its loader."""
    config = Config(
        steps=1,
        model=ModelConfig(init=f"hf:{base}", **model),
        data=DataConfig(max_length=MaxLength(max_length, max_length)),
        prompts={"query": "query:"},
    )
    return model_source.open_source(config, base)


def opened(base, **model):
    """An Embedder of that model, the fresh parts of its head moved away from where they start."""
    blueprint, load = adapted(base, **model)
    factory = blueprint.factory(ModelOptions())
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = load(factory)
        for part in sorted(params.keys() - {"backbone"}):
            flat, tree = jax.tree.flatten(params[part])
            rng = np.random.default_rng(len(flat))
            noisy = [x + jax.device_put(0.3 * rng.normal(size=x.shape).astype(np.float32), x.sharding) for x in flat]
            params[part] = jax.tree.unflatten(tree, noisy)
    return Embedder(blueprint, factory, params, mesh)


def write(model, out):
    blueprint, head = model.blueprint, model.blueprint.head
    projection = model.params.get("projection")
    write_folder(
        out,
        hf_config=blueprint.hf_config,
        architecture=blueprint.architecture,
        config=blueprint.backbone,
        leaves=flatten(model.params["backbone"]),
        tokenizer=blueprint.tokenizer,
        pooling=head.pooling,
        pool_prompt=head.pool_prompt,
        normalize=head.normalize,
        projection=(projection["kernel"], projection.get("bias")) if projection else None,
        max_length=blueprint.max_length,
        prompts=blueprint.prompts,
        head=flatten({name: part for name, part in model.params.items() if name != "backbone"}),
    )


def open_there(folder, **kwargs):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True, **kwargs)


@pytest.mark.parametrize(
    ("head", "modules"),
    [
        ({"pool_layers": 2, "pooling": "last", "normalize": False}, ["WeightedLayerPooling", "Pooling"]),
        (
            LATENT | {"pool_layers": 1, "projection": 8},
            ["WeightedLayerPooling", "LatentAttention", "Pooling", "Dense", "Normalize"],
        ),
    ],
    ids=["layers", "all"],
)
def test_sentence_transformers_gives_the_same_vectors(base, tmp_path, head, modules):
    model = opened(base, **head)
    out = tmp_path / "out"
    write(model, out)
    latent = "latents" in head
    assert (out / "modeling_latent_attention.py").exists() == latent
    if latent:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            open_there(out)
    theirs = open_there(out, trust_remote_code=latent)
    assert [type(module).__name__ for module in theirs] == ["Transformer", *modules]
    wanted = model.encode(TEXTS)
    np.testing.assert_allclose(theirs.encode(TEXTS), wanted, atol=1e-5 * max(1, np.abs(wanted).max()))

    again = Embedder.load(out, mesh=model.mesh)
    assert again.blueprint.head == model.blueprint.head
    np.testing.assert_array_equal(again.encode(TEXTS), wanted)
    write(again, tmp_path / "again")  # folder → JAX → folder
    for file in out.rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(out)).read_bytes()
    theirs.save(str(tmp_path / "theirs"))  # in their own spelling
    saved = Embedder.load(tmp_path / "theirs", mesh=model.mesh)
    np.testing.assert_array_equal(saved.encode(TEXTS), wanted)
    open_there(tmp_path / "theirs", trust_remote_code=latent)


@pytest.mark.parametrize(
    ("model", "prompt"),
    [
        ({"pooling": "last"}, "query: "),  # an end token is appended
        ({"pooling": "weighted_mean", "pool_prompt": False}, "Instruct: the lowest\nQuery:"),
        ({"template": "prompt_eol"}, "query: "),
        ({"template": "echo", "pooling": "last"}, "query: "),
        ({"template": "So: {text} again", "pooling": "mean"}, ""),
    ],
    ids=["end", "no-prompt", "eol", "echo", "words-mean"],
)
def test_prompts_templates_and_end_tokens_travel_with_the_tokenizer(base, tmp_path, model, prompt):
    ours = opened(base, **model)
    write(ours, tmp_path / "out")
    theirs = open_there(tmp_path / "out")
    texts = TEXTS[1:]  # of an empty text and its prompt there is nothing to pool there
    wanted = ours.encode(texts, prompt=prompt)
    np.testing.assert_allclose(theirs.encode(texts, prompt=prompt or None), wanted, atol=1e-5)
    np.testing.assert_array_equal(Embedder.load(tmp_path / "out", mesh=ours.mesh).encode(texts, prompt=prompt), wanted)


def test_what_a_folder_cannot_say_is_refused_at_the_start(base, tmp_path):
    for wrong, message in (
        ({"template": "echo"}, "pools the last copy of the text alone.*pooling = 'last', or config.export = False"),
        (
            {"template": "echo", "pooling": "last", "max_length": 96},
            r"query = 96: .* at most \d+ of a text that is read 2",
        ),
        ({"max_length": 97}, "query = 97: this bert takes at most 96$"),
        ({"pool_layers": 4}, "pool_layers = 4, but .* has 3 layers"),
        (LATENT | {"latent_heads": 3}, "latent_heads = 3 does not divide the model's width, 16"),
    ):
        with pytest.raises(UserError, match=message):
            adapted(base, **wrong)
    echo = Embedder.load(base, template="echo")
    with pytest.raises(UserError, match=r"no folder can say .* only a part of what stands in a template is pooled"):
        write(echo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_echoed_texts_fit_the_model(base):
    blueprint, _ = adapted(base, template="echo", pooling="last")
    assert blueprint.tokenizer.longest(blueprint.max_length) in (95, 96)
    assert max(map(len, blueprint.tokenizer.encode(["many words " * 60], blueprint.max_length))) <= 96


def test_damaged_modules(base, tmp_path):
    write(opened(base, **LATENT, pool_layers=1), tmp_path / "good")
    configs = {
        "1_WeightedLayerPooling": ({"layer_start": 5}, "layer_start = 5, num_hidden_layers = 3 do not fit 3 layers"),
        "2_LatentAttention": ({"heads": 3}, r"width, latents, heads = \[16, 6, 3\] do not fit a model of width 16"),
        "3_Pooling": ({"pooling_mode": "cls"}, "latent attention with pooling other than the mean"),
        ".": ({"output_hidden_states": False}, "config.json lacks output_hidden_states: true; add it there"),
    }
    for module, (change, message) in configs.items():
        folder = tmp_path / f"bad{module}"
        shutil.copytree(tmp_path / "good", folder)
        file = folder / module / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(UserError, match=message):
            read_folder(folder)
    folder = tmp_path / "missing"
    shutil.copytree(tmp_path / "good", folder)
    shutil.copy(folder / "1_WeightedLayerPooling" / "model.safetensors", folder / "2_LatentAttention")
    with pytest.raises(UserError, match="weights do not fit the model") as caught:
        Embedder.load(folder)
    assert all(row.hf in str(caught.value) for row in LATENT_ROWS[:3]) and "layer_weights" in str(caught.value)


def test_matryoshka_depths_of_a_mean_of_layers_are_refused(base):
    config = Config(steps=1, model=ModelConfig(init=f"hf:{base}", pool_layers=1))
    config = dataclasses.replace(config, matryoshka=dataclasses.replace(config.matryoshka, layers=(2,)))
    with pytest.raises(UserError, match=r"matryoshka.layers: a model that pools several layers"):
        model_source.open_source(config, base)
