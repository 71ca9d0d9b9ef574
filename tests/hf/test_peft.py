"""Adapters by the checkpoint's names, and as folders that peft opens with the same states and vectors."""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_embedder import make
from tiny_models import alone, pack, put_rows, random_texts
from tiny_run import SHAPE as TINY
from tiny_run import tiny_config, write_tokenizer

from jaxembed import model_source, run_folder, sharding
from jaxembed.checkpoint import Checkpoints
from jaxembed.config import LoraConfig, MeshConfig
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.export import export_adapter
from jaxembed.hf.architectures import ARCHITECTURES
from jaxembed.hf.folder import read_folder
from jaxembed.hf.loading import load_onto
from jaxembed.hf.peft import _readme, linear_layers, write_peft
from jaxembed.hf.weights import backbone_leaves
from jaxembed.models.lora import Lora, attach, is_adapter
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import ModelFactory, flatten, split, unflatten
from jaxembed.step import TrainState

LAYERS = 3
SHAPE = {
    "vocab_size": 120,
    "hidden_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
T5 = {"vocab_size": 120, "d_model": 24, "num_layers": LAYERS, "num_heads": 4, "d_kv": 5, "d_ff": 44}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]}
# Plain names, a name that ends as another does, fused tensors, grouped queries, layers that differ.
PEERS = {
    "bert": SHAPE,
    "modernbert": SHAPE | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    "t5": T5,
    "llama": GROUPED,
    "phi3": GROUPED,
    "qwen2_moe": GROUPED | SPARSE | {"shared_expert_intermediate_size": 20},
}
TEXTS = random_texts(6, seed=3, longest=12, vocab_size=120)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(f"file:{write_tokenizer(tmp_path_factory.mktemp('peft') / 'tokenizer.json')}")


def save_peer(model_type, folder, **shape):
    """Saves a random model of transformers."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **PEERS[model_type] | shape)
    model = getattr(transformers, ARCHITECTURES[model_type].hf_class)(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)


def open_as_the_readme_says(out, monkeypatch):
    """Runs the code of README.md in its folder; returns the model."""
    pytest.importorskip("peft")
    monkeypatch.chdir(out)
    said = {}
    exec(re.search("```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1], said)
    return said["model"], said["tokenizer"]


def states_in_torch(model, texts):
    """The last layer's states of each text [tokens, D], all texts in one padded batch."""
    import torch

    tokens = np.zeros((len(texts), max(map(len, texts))), np.int64)
    mask = np.zeros_like(tokens)
    for i, text in enumerate(texts):
        tokens[i, : len(text)], mask[i, : len(text)] = text, 1
    with torch.no_grad():
        states = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).last_hidden_state
    return [states[i, : len(text)].numpy() for i, text in enumerate(texts)]


def random_like(path, leaf):
    values = np.random.default_rng(len(path)).normal(scale=0.3, size=leaf.shape).astype(np.float32)
    return sharding.put(values, jax.sharding.get_mesh(), leaf.sharding.spec)


@pytest.mark.parametrize("model_type", PEERS)
def test_peft_gives_the_same_states(model_type, tmp_path, tokenizer, monkeypatch):
    """Adapters to all linear layers, of random numbers."""
    save_peer(model_type, tmp_path / "base")
    folder = read_folder(tmp_path / "base")
    targets = linear_layers(folder.architecture.rows(folder.config), "", "here")
    lora = Lora(rank=2, scale=1.5, dropout=0.1, targets=targets)

    def backbone(lora):
        made = folder.architecture.backbone(jax.random.key(0), folder.config, ModelOptions(unroll=1))
        if lora:
            attach(made, lora, jax.random.key(1))
        return made

    with jax.set_mesh(sharding.make_mesh(MeshConfig(1), jax.devices()[:1])):
        factory = ModelFactory(functools.partial(backbone, lora))
        wanted = flatten(factory.abstract())
        plain = {path: leaf for path, leaf in wanted.items() if not is_adapter(path)}
        leaves = load_onto(backbone_leaves(folder, {path: leaf.shape for path, leaf in plain.items()}), plain)
        adapters = {path: random_like(path, leaf) for path, leaf in wanted.items() if is_adapter(path)}
        packed = pack(TEXTS, alone(TEXTS), 12)
        run = jax.jit(lambda params, rows: factory.bind(params)(rows).last)
        ours = np.asarray(run(unflatten(leaves | adapters), put_rows(packed.rows)))
        without = ModelFactory(functools.partial(backbone, None))
        bare = np.asarray(
            jax.jit(lambda params, rows: without.bind(params)(rows).last)(unflatten(leaves), put_rows(packed.rows))
        )
    write_peft(
        tmp_path / "out",
        architecture=folder.architecture,
        hf_config=folder.hf_config,
        adapters={path: np.asarray(leaf) for path, leaf in adapters.items()},
        lora=lora,
        base=str(tmp_path / "base"),
        revision=None,
        tokenizer=tokenizer,
        max_length=12,
        pooling="mean",
        pool_prompt=True,
        normalize=True,
        prompts={},
        warning="",
    )
    model, _ = open_as_the_readme_says(tmp_path / "out", monkeypatch)
    theirs = states_in_torch(model, TEXTS)
    for i, want in enumerate(theirs):
        got = ours[i, : len(want)]
        assert np.abs(got - want).max() <= 1e-4 * max(1, np.abs(want).max())
        assert np.abs(bare[i, : len(want)] - want).max() > 0.05
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(said["rank_pattern"].values()) == ({6, 4} if model_type in ("modernbert", "phi3") else set())


def test_names_of_linear_layers():
    rows = ARCHITECTURES["bert"].rows(ARCHITECTURES["bert"].config_from_hf(SHAPE | {"model_type": "bert"}))
    every = {f"layers/{name}" for name in ("attention/query", "attention/key", "attention/value", "attention/out")}
    every |= {"layers/mlp/up", "layers/mlp/down"}
    for pattern, want in (
        ("", every),
        ("query|value", {"layers/attention/query", "layers/attention/value"}),
        (r"^encoder\.layer\.output\.dense$", {"layers/mlp/down"}),
        ("dense", {"layers/attention/out", "layers/mlp/up", "layers/mlp/down"}),
    ):
        assert set(linear_layers(rows, pattern, "here")) == want
    for pattern in ("LayerNorm", "embeddings", "bias", "pooler"):
        with pytest.raises(UserError, match=f"here = '{pattern}' finds none .*encoder.layer.intermediate.dense"):
            linear_layers(rows, pattern, "here")


def test_experts_and_routers_have_no_adapters():
    arch = ARCHITECTURES["qwen2_moe"]
    rows = arch.rows(arch.config_from_hf(PEERS["qwen2_moe"] | {"model_type": "qwen2_moe"}))
    mlp = ("up", "down", "gate")
    want = {f"layers/attention/{name}" for name in ("query", "key", "value", "out")}
    want |= {f"mlps/{name}" for name in mlp} | {f"experts/shared/{name}" for name in mlp} | {"experts/shared_gate"}
    assert set(linear_layers(rows, "", "here")) == want
    assert linear_layers(rows, r"mlp\.up_proj", "here") == ("mlps/up",)
    for pattern in ("experts", r"mlp\.gate$"):
        with pytest.raises(UserError, match=r"finds none .*layers\.mlp\.shared_expert\.up_proj"):
            linear_layers(rows, pattern, "here")


def test_what_peft_would_take_for_adapters_to_experts_is_refused(tmp_path):
    """peft 0.21 maps the names `gate_proj`, `up_proj`, `down_proj` of a qwen3_moe to its experts, in whatever layer."""
    arch, hf = ARCHITECTURES["qwen3_moe"], GROUPED | SPARSE | {"model_type": "qwen3_moe"}
    lora = Lora(2, 1.0, 0.0, linear_layers(arch.rows(arch.config_from_hf(hf)), "mlp", "here"))
    others = ("adapters", "base", "revision", "tokenizer", "max_length", "pooling", "pool_prompt", "normalize")
    with pytest.raises(UserError, match=r"adapters to a qwen3_moe's dense MLPs .*targets = 'self_attn'"):
        write_peft(
            tmp_path / "out",
            architecture=arch,
            hf_config=hf,
            lora=lora,
            prompts={},
            warning="",
            **dict.fromkeys(others),
        )
    assert not (tmp_path / "out").exists()


def trained_run(workdir, config):
    """A run's folder as training leaves it, its adapters and head of random numbers."""
    blueprint, _ = model_source.open_source(config, workdir)
    run_folder.claim(workdir, config)
    blueprint.save(workdir / model_source.FOLDER)
    factory = blueprint.factory(ModelOptions(), lora=blueprint.lora(config.model.lora))
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        trained = flatten(split(factory.abstract())[0])
        model = unflatten({path: random_like(path, leaf) for path, leaf in trained.items()})
        state = TrainState(jnp.int32(1), {"model": model, "loss": {}}, {}, {})
        checkpoints = Checkpoints(workdir)
        checkpoints.save(state, 1, {}, {})
        checkpoints.close()
    return workdir


def test_a_run_as_a_folder_of_adapters(tmp_path, monkeypatch):
    """Its vectors are those of the run; what such a folder cannot hold is refused."""
    make(tmp_path).save(tmp_path / "base")
    make(tmp_path, model__shape=TINY | {"initializer_range": 0.2}).save(tmp_path / "other")
    same = {"model__init": f"hf:{tmp_path / 'base'}", "model__arch": "auto", "model__shape": {}, "tokenizer": "auto"}
    lora = {"model__lora__rank": 3, "model__lora__targets": "query|dense", "model__lora__rslora": True}
    run = trained_run(tmp_path / "run", tiny_config(tmp_path, **same, **lora))
    export_adapter(str(run), tmp_path / "out")
    model, tokenizer = open_as_the_readme_says(tmp_path / "out", monkeypatch)
    texts = ["kalo miru", "seto " * 8, "vuni pa", "loka"]
    states = states_in_torch(model, [tokenizer(text)["input_ids"] for text in texts])
    means = np.stack([state.mean(0) for state in states])
    want = means / np.linalg.norm(means, axis=1, keepdims=True)
    assert np.abs(Embedder.load(run).encode(texts) - want).max() <= 1e-5
    assert np.abs(Embedder.load(tmp_path / "base").encode(texts) - want).max() > 0.05
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["lora_alpha"] / said["r"] == pytest.approx(LoraConfig().alpha / 3**0.5)

    with pytest.raises(UserError, match="is there already"):
        export_adapter(str(run), tmp_path / "out")
    assert "**" not in (tmp_path / "out" / "README.md").read_text()  # nothing to warn of

    for name, changes, message in (
        ("projected", lora | {"model__projection": 8}, "has trained its projection too"),
        ("whole", {}, "lora.rank is 0"),
        ("second", lora | {"model__init": f"run:{run}"}, "stand on run:.*run, no folder"),
        ("moved", lora, "the weights of config.model.init = 'hf:.*base' are not those that its adapters were trained"),
    ):
        other = trained_run(tmp_path / name, tiny_config(tmp_path, **same | changes))
        if name == "moved":
            shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "base")
        with pytest.raises(UserError, match=message):
            export_adapter(str(other), tmp_path / "nothing")
        assert not (tmp_path / "nothing").exists()


def test_a_base_that_sees_less_is_warned_of(tmp_path, monkeypatch):
    """A causal base, adapters for a bidirectional model: whoever opens it without config= gets other states."""
    peft = pytest.importorskip("peft")
    backend = Tokenizer.load(f"file:{write_tokenizer(tmp_path / 'tokenizer.json')}")
    save_peer("llama", tmp_path / "base", vocab_size=backend.vocab_size, max_position_embeddings=40)
    backend.save(tmp_path / "base", 30)
    monkeypatch.chdir(tmp_path)  # the run names its base by a relative path
    same = {"model__init": "hf:base", "model__arch": "auto", "model__shape": {}, "tokenizer": "auto"}
    lora = {"model__lora__rank": 2, "model__attention": "bidirectional", "model__pooling": "mean"}
    trained_run(tmp_path / "run", tiny_config(tmp_path, **same, **lora))
    warning = "**Opened without `config=AutoConfig.from_pretrained(here)`, as `AutoPeftModelForFeatureExtraction` and "
    warning += "`AutoModel` do it too, the model is causal and its vectors are wrong.**"
    command = [sys.executable, "-m", "jaxembed.export", "--workdir=run", "--out=out", "--adapter"]
    path = str(pathlib.Path(model_source.__file__).parents[1])
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path})
    assert said.stdout.splitlines() == [warning, '{"exported": "out"}'], said.stderr
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"\n\n{warning}\n\n```python" in readme and "base_model" not in readme
    base = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str((tmp_path / "base").resolve())

    model, _ = open_as_the_readme_says(tmp_path / "out", monkeypatch)
    right, by_auto = (
        np.concatenate(states_in_torch(opened, TEXTS))
        for opened in (model, peft.AutoPeftModelForFeatureExtraction.from_pretrained(".").eval())
    )
    assert np.abs(right - by_auto).max() > 0.05
    assert f"base_model: {json.dumps('org/name')}" in _readme("LlamaModel", "org/name", None, "", {})
