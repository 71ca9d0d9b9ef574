"""The BERT family against transformers, layer by layer, with random weights."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import CONFIG, MESHES, ONE, alone, make_factory, make_mesh, pack, put_rows, random_params, random_texts

from jaxembed.hf.folder import read_folder
from jaxembed.hf.loading import load_onto
from jaxembed.hf.weights import backbone_leaves
from jaxembed.models.bert import Bert
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import ModelFactory, flatten, unflatten

TOLERANCE = 1e-5  # absolute, of states of length sqrt(D)
LAYERS = 3
LAYOUT = [[0, 1, 2], [4, 3], [5, 6], [7]]
TEXTS = random_texts(8, longest=12)
LENGTH = 24
CASES = [
    ("bert", "gelu"),
    ("bert", "gelu_new"),
    ("bert", "relu"),
    ("bert", "silu"),
    ("roberta", "gelu"),
    ("xlm-roberta", "gelu"),
]


def save_peer(model_type: str, activation: str, folder) -> list[list[np.ndarray]]:
    """Saves a random model of transformers; returns the states of every text, layer by layer from the embeddings on."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=CONFIG.vocab_size,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=LENGTH,
        hidden_act=activation,
        pad_token_id=0 if model_type == "bert" else 1,
        type_vocab_size=2,
    )
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # biases and norms too: fresh ones are zeros and ones
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    longest = max(map(len, TEXTS))
    tokens = np.full((len(TEXTS), longest), config.pad_token_id)
    attended = np.zeros_like(tokens)
    for i, text in enumerate(TEXTS):
        tokens[i, : len(text)], attended[i, : len(text)] = text, 1
    with torch.no_grad():
        states = model(torch.tensor(tokens), torch.tensor(attended), output_hidden_states=True).hidden_states
    return [[layer[i, : len(text)].numpy() for i, text in enumerate(TEXTS)] for layer in states]


@pytest.mark.parametrize(("model_type", "activation"), CASES)
def test_states_of_every_layer_equal_transformers(model_type, activation, tmp_path):
    theirs = save_peer(model_type, activation, tmp_path)
    folder = read_folder(tmp_path)
    factory = ModelFactory(lambda: Bert(jax.random.key(0), folder.config, ModelOptions()))

    @jax.jit
    def run(params, rows):
        states = factory.bind(params)(rows, chosen=tuple(range(LAYERS + 1)))
        return states.last, states.chosen

    with jax.set_mesh(make_mesh()):
        wanted = flatten(factory.abstract())
        shapes = {path: leaf.shape for path, leaf in wanted.items()}
        params = unflatten(load_onto(backbone_leaves(folder, shapes), wanted))
        for layout in (alone(TEXTS), LAYOUT):
            packed = pack(TEXTS, layout, LENGTH)
            last, chosen = (np.asarray(x) for x in run(params, put_rows(packed.rows)))
            np.testing.assert_array_equal(last, chosen[-1])
            for layer, states in enumerate(theirs):
                for text, want in enumerate(states):
                    start = packed.start[text]
                    got = chosen[layer, packed.row[text], start : start + len(want)]
                    np.testing.assert_allclose(got, want, atol=TOLERANCE, err_msg=f"layer {layer}, text {text}")


def test_layers_come_in_the_order_asked_for():
    factory = ModelFactory(lambda: Bert(jax.random.key(0), CONFIG, ModelOptions()))
    rows = pack(TEXTS, LAYOUT, LENGTH).rows
    with jax.set_mesh(make_mesh()):
        params, rows = random_params(factory), put_rows(rows)
        run = jax.jit(lambda params, rows, chosen: factory.bind(params)(rows, chosen=chosen), static_argnums=2)
        every, some = run(params, rows, (0, 1, 2, 3)), run(params, rows, (2, 0))
        np.testing.assert_allclose(some.chosen, np.asarray(every.chosen)[[2, 0]], atol=1e-6)
        assert run(params, rows, ()).chosen is None


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_reach_of_attention(attention):
    """Bidirectional: the first token's state depends on the last token. Causal: it depends on itself alone."""
    config = dataclasses.replace(CONFIG, attention=(attention,))
    factory = ModelFactory(lambda: Bert(jax.random.key(0), config, ModelOptions()))
    text = np.arange(5, 13, dtype=np.int32)
    changed = text.copy()
    changed[-1] = 77
    with jax.set_mesh(make_mesh()):
        params = random_params(factory)
        run = jax.jit(lambda params, rows: factory.bind(params)(rows).last)
        before, after = (np.asarray(run(params, put_rows(pack([t], [[0]], 16).rows)))[0, :8] for t in (text, changed))
    moved = np.abs(before - after).max(-1) > 1e-4
    assert moved.all() if attention != "causal" else (moved == ([False] * 7 + [True])).all()


def test_dropout_is_off_without_noise():
    rows = pack(TEXTS, LAYOUT, LENGTH).rows
    states = []
    with jax.set_mesh(make_mesh()):
        for rate in (0.0, 0.5):
            options = ModelOptions(dropout=rate, attention_dropout=rate)
            factory = ModelFactory(lambda options=options: Bert(jax.random.key(0), CONFIG, options))
            params = random_params(factory)
            states.append(np.asarray(jax.jit(lambda p, r, f=factory: f.bind(p)(r).last)(params, put_rows(rows))))
    np.testing.assert_array_equal(*states)


# Parameters as the table of `jaxembed.sharding` lays them out; all of a layer's have the stack of layers in front.
SPECS = {
    "embeddings/token/embedding": (("tensor", "fsdp"), None),
    "embeddings/position/embedding": (None, "fsdp"),
    "embeddings/type/embedding": (None, "fsdp"),
    "embeddings/norm/scale": (None,),
    "embeddings/norm/bias": (None,),
    **{f"layers/attention/{name}/kernel": (None, "fsdp", "tensor", None) for name in ("query", "key", "value")},
    **{f"layers/attention/{name}/bias": (None, "tensor", None) for name in ("query", "key", "value")},
    "layers/attention/out/kernel": (None, "tensor", None, "fsdp"),
    "layers/attention/out/bias": (None, None),
    "layers/mlp/up/kernel": (None, "fsdp", "tensor"),
    "layers/mlp/up/bias": (None, "tensor"),
    "layers/mlp/down/kernel": (None, "tensor", "fsdp"),
    "layers/mlp/down/bias": (None, None),
    **{f"layers/{norm}/{leaf}": (None, None) for norm in ("attention_norm", "mlp_norm") for leaf in ("scale", "bias")},
}


def test_parameters_are_sharded_as_the_table_says():
    factory = make_factory()
    with jax.set_mesh(make_mesh(MESHES["data 2, fsdp 2, tensor 2"])):
        params = flatten(jax.jit(factory.fresh)())
        specs = {path.removeprefix("backbone/"): jax.typeof(leaf).sharding.spec for path, leaf in params.items()}
        assert {path: tuple(spec) for path, spec in specs.items()} == SPECS
        for path, leaf in params.items():  # each device holds its part alone
            parts = np.prod([2 ** len([spec] if isinstance(spec, str) else spec or ()) for spec in leaf.sharding.spec])
            assert leaf.addressable_shards[0].data.size * parts == leaf.size, path
        assert {x.sharding.spec for x in flatten(factory.abstract()).values()} == set(specs.values())


def test_fresh_weights_do_not_depend_on_the_mesh():
    factory = make_factory()
    found = []
    for mesh in (ONE, *MESHES.values()):
        with jax.set_mesh(make_mesh(mesh)):
            found.append(flatten(jax.device_get(jax.jit(factory.fresh)())))
    for other in found[1:]:
        for path, leaf in found[0].items():
            np.testing.assert_array_equal(other[path], leaf, err_msg=path)
    kernels = found[0]["backbone/layers/mlp/up/kernel"]
    assert abs(kernels.std() / CONFIG.initializer_range - 1) < 0.05 and not np.array_equal(kernels[0], kernels[1])
