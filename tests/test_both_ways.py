"""State-space models in training: the same on every mesh; causal checkpoints made to read both ways."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_step import MESHES, ONE, TOLERANCE, Bench, assert_near
from tiny_run import tiny_config, write_tokenizer

from jaxembed import model_source, sharding, trainer
from jaxembed.config import LoraConfig, MeshConfig, SsmConfig
from jaxembed.data.batch import Rows
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.export import export_adapter
from jaxembed.models.layers.ssm import Mamba1Shape, Mamba2Shape
from jaxembed.models.mamba import Mamba, MambaConfig
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import flatten
from jaxembed.verification import verify

MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2, "initializer_range": 0.5}
MAMBA2 = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 8,
    "num_heads": 4,
    "head_dim": 8,
    "n_groups": 2,
    "initializer_range": 0.5,
}
BAMBA = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "attn_layer_indices": [1],
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
}
KINDS = {
    "mamba, both ways": {"model__arch": "mamba", "model__shape": MAMBA, "model__attention": "bidirectional"},
    "mamba2, both ways, shared": {
        "model__arch": "mamba2",
        "model__shape": MAMBA2,
        "model__attention": "bidirectional",
        "model__ssm__directions": "shared",
    },
    "bamba": {"model__arch": "bamba", "model__shape": BAMBA, "model__attention": "bidirectional"},
}
HARD = {"model__dropout": 0.1, "model__ssm__chunk": 8, "model__remat": "full", "model__pooling": "mean"}
HARD |= {"model__unroll": 1}
TEXTS = ["a", "three short words", "one two three four five six seven eight nine ten", "words again and again", "more"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("both")


def bench(folder, kind: str, mesh: str, **changes) -> Bench:
    return Bench(tiny_config(folder, **HARD, **KINDS[kind], **changes), MESHES.get(mesh, ONE))


@functools.cache
def reference(folder, kind: str) -> tuple[float, dict[str, np.ndarray]]:
    return bench(folder, kind, "one").gradient()


@pytest.mark.parametrize(
    ("kind", "mesh", "micro_batches"),
    [
        ("mamba, both ways", "data 2, fsdp 2, tensor 2", 1),
        ("mamba, both ways", "data 2, expert 2, sequence 2", 4),
        ("mamba2, both ways, shared", "data 2, fsdp 2, tensor 2", 4),
        ("mamba2, both ways, shared", "data 2, expert 2, sequence 2", 1),
        ("bamba", "data 2, expert 2, sequence 2", 1),
    ],
)
def test_loss_and_gradient_do_not_depend_on_the_mesh(folder, kind, mesh, micro_batches):
    want, want_gradient = reference(folder, kind)
    got, got_gradient = bench(folder, kind, mesh, grad_cache=micro_batches).gradient()
    assert abs(got - want) <= TOLERANCE * abs(want)
    assert all(np.abs(x).max() > 0 for x in want_gradient.values())
    assert_near(got_gradient, want_gradient)


@pytest.mark.parametrize("mixer", [Mamba1Shape(8, 4, 2), Mamba2Shape(4, 2, 4)], ids=["mamba", "mamba2"])
def test_a_row_of_32k_tokens_lies_on_eight_devices(mixer):
    """One text and a half of another, both ways."""
    length = 32_768
    texts = np.where(np.arange(length) < 20_001, 1, 2).astype(np.int32)[None]
    arrays = texts % 7, texts, texts, texts, texts > 0
    config, states = MambaConfig(32, 8, 1, mixer, backward="separate"), []
    for mesh in (MeshConfig(1), MeshConfig(1, sequence=8)):
        mesh = sharding.make_mesh(mesh, jax.devices()[: mesh.sequence])
        with jax.set_mesh(mesh):
            model = jax.jit(lambda: Mamba(jax.random.key(0), config, ModelOptions()))()
            rows = Rows(*(sharding.put(x, mesh, sharding.ROWS) for x in arrays))
            states.append(np.asarray(jax.jit(lambda model, rows: model(rows).last)(model, rows)))
    assert np.ptp(states[0], axis=1).min() > 0.01
    assert np.abs(states[1] - states[0]).max() <= TOLERANCE * np.abs(states[0]).max()


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A folder of each causal model."""
    place = tmp_path_factory.mktemp("causal")
    write_tokenizer(place / "tokenizer.json")
    for arch, shape in (("mamba", MAMBA), ("mamba2", MAMBA2)):
        embedder = opened(place, init="scratch", arch=arch, shape=shape, pooling="mean")
        embedder.save(place / arch)
    return place


def opened(place, **model) -> Embedder:
    usual = tiny_config(place)
    said = {"arch": "auto", "shape": {}} | model
    tokenizer = usual.tokenizer if said["init"] == "scratch" else "auto"
    config = dataclasses.replace(usual, model=dataclasses.replace(usual.model, **said), tokenizer=tokenizer)
    blueprint, load = model_source.open_source(config, place / "nowhere")
    lora = blueprint.lora(config.model.lora)
    factory = blueprint.factory(model_source.options(config.model), lora=lora)
    mesh = sharding.make_mesh(MeshConfig(1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        return Embedder(blueprint, factory, load(factory), mesh)


@pytest.mark.parametrize(("arch", "directions"), [("mamba", "separate"), ("mamba2", "shared")])
def test_a_causal_checkpoint_reads_both_ways(causal, tmp_path, arch, directions):
    before = Embedder.load(causal / arch)
    how = {"init": f"hf:{causal / arch}", "attention": "bidirectional", "ssm": SsmConfig(directions)}
    model = opened(causal, **how)
    leaves, old = flatten(model.params), flatten(before.params)
    assert model.blueprint.architecture.model_type == f"bi{arch}"
    assert all((np.asarray(leaves[path]) == np.asarray(x)).all() for path, x in old.items())
    second = {path: x for path, x in leaves.items() if path not in old}
    assert bool(second) == (directions == "separate")
    for path, x in second.items():
        assert (np.asarray(x) == np.asarray(leaves[path.replace("/backward/", "/mixer/")])).all()
    vectors = model.encode(TEXTS)
    assert np.abs(vectors - before.encode(TEXTS)).max() > 0.01
    model.save(tmp_path / "both")
    again = Embedder.load(tmp_path / "both")
    np.testing.assert_array_equal(again.encode(TEXTS), vectors)
    card = (tmp_path / "both" / "README.md").read_text()
    assert "trust_remote_code" in card and "every text both ways" in card

    adapted = opened(causal, **how, lora=LoraConfig(rank=2))
    np.testing.assert_allclose(adapted.encode(TEXTS), vectors, atol=1e-6)


def test_a_run_with_adapters_goes_on_and_out(causal, tmp_path):
    """Its base is the causal folder; what it exports is one model, the same in torch."""
    model = {"init": f"hf:{causal / 'mamba'}", "arch": "auto", "shape": {}, "attention": "bidirectional"}
    model |= {"lora__rank": 2, "lora__alpha": 4.0, "pooling": "mean", "unroll": 1}
    changes = {f"model__{field}": value for field, value in model.items()}
    config = tiny_config(causal, **changes, tokenizer="auto", steps=2, batch_size=8, log_to=())
    trainer.train(config, tmp_path / "run")
    vectors = Embedder.load(tmp_path / "run").encode(TEXTS)
    folder = tmp_path / "run" / "export"
    np.testing.assert_allclose(Embedder.load(folder).encode(TEXTS), vectors, atol=1e-5)
    assert max(verify(folder).values()) < 1e-5
    with pytest.raises(UserError, match="has made a model that reads both ways"):
        export_adapter(str(tmp_path / "run"), tmp_path / "adapter")


def test_texts_read_from_their_ends_are_those_of_reversed_texts(causal):
    """A shared backward mixer in one layer is the forward one of the text turned round."""
    model = opened(causal, init=f"hf:{causal / 'mamba'}", attention="bidirectional", ssm=SsmConfig("shared"))
    plain, turned = (
        model.encode([" ".join(words) for words in texts])
        for texts in ([t.split() for t in TEXTS], [t.split()[::-1] for t in TEXTS])
    )
    assert np.abs(plain - turned).max() > 1e-3  # [CLS] and [SEP] do not turn round, and order counts


@pytest.mark.parametrize(
    ("arch", "changes", "said"),
    [
        ("mamba", {"attention": "prefix"}, r"config\.model\.attention = 'prefix': mamba takes native, causal"),
        ("mamba", {"ssm__directions": "shared"}, r"ssm\.directions = 'shared': it is for a causal mamba"),
        ("mamba", {"ssm__chunk": -1}, r"config\.model\.ssm\.chunk = -1: tokens in a chunk"),
        ("mamba", {"pool_layers": 1}, r"config\.model\.pool_layers = 1: transformers gives other states of a mamba's"),
        ("mamba", {"ssm__kernel": "fast"}, r"config\.model\.ssm\.kernel: 'fast' is not one of"),
    ],
)
def test_what_cannot_be_says_so(causal, arch, changes, said):
    model = {"init": f"hf:{causal / arch}", "arch": "auto", "shape": {}} | changes
    with pytest.raises(UserError, match=said):
        config = tiny_config(causal, **{f"model__{field}": value for field, value in model.items()}, tokenizer="auto")
        model_source.open_source(config, causal / "nowhere")
