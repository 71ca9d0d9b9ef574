"""The encoders beside BERT's own, against transformers or the definition: every layer, both ways, on meshes."""

import dataclasses
import fnmatch
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_peers import CUT, LAYERS, NAMES, TEXTS, Peer, save_peer
from tiny_models import ONE, alone, make_mesh, pack, put_rows, random_params

from jaxembed.config import MeshConfig
from jaxembed.hf.architectures import architecture_of
from jaxembed.hf.loading import load_onto
from jaxembed.hf.safetensors_io import open_tensors
from jaxembed.hf.table import export_tensors, import_leaves
from jaxembed.models.layers.dropout import Noise, step_seed
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import ModelFactory, flatten, unflatten

TOLERANCE = 1e-4  # absolute, of states of length sqrt(D)
LENGTH = 48
PACKED = [[0, 1], [4, 3], [5, 6], [7], [2], [], [], []]


class Saved:
    """A peer's folder, and our model of it."""

    def __init__(self, name: str, folder) -> None:
        self.peer: Peer = save_peer(name, folder)
        self.hf_config = json.loads((folder / "config.json").read_text())
        self.architecture = architecture_of(self.hf_config)
        self.config = self.architecture.config_from_hf(self.hf_config)
        self.rows = self.architecture.rows(self.config)
        self.tensors = open_tensors(folder)

    def factory(self) -> ModelFactory:
        return ModelFactory(lambda: self.architecture.backbone(jax.random.key(0), self.config, ModelOptions(unroll=1)))

    def leaves(self, shapes):
        a = self.architecture
        return import_leaves(
            self.rows, self.tensors, shapes, LAYERS, where="", ignored=a.ignored, prefixes=a.prefixes, renames=a.renames
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def get(name: str) -> Saved:
        if name not in made:
            made[name] = Saved(name, tmp_path_factory.mktemp("peer"))
        return made[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_states_of_every_layer_equal_the_peer(name, saved):
    model = saved(name)
    factory = model.factory()

    @jax.jit
    def run(params, rows):
        module = factory.bind(params)
        states = module(rows, chosen=tuple(range(LAYERS + 1)))
        return states.last, states.chosen, module.finish(states.chosen[CUT])

    with jax.set_mesh(make_mesh()):
        wanted = flatten(factory.abstract())
        params = unflatten(load_onto(model.leaves({path: leaf.shape for path, leaf in wanted.items()}), wanted))
        for layout in (alone(TEXTS), PACKED):
            packed = pack(TEXTS, layout, LENGTH)
            last, chosen, cut = (np.asarray(x) for x in run(params, put_rows(packed.rows)))
            np.testing.assert_allclose(chosen[-1], last, rtol=0, atol=1e-6)
            for layer, (ours, theirs) in enumerate(zip([*chosen, cut], [*model.peer.states, model.peer.cut])):
                for text, want in enumerate(theirs):
                    start = packed.start[text]
                    got = ours[packed.row[text], start : start + len(want)]
                    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE, err_msg=f"layer {layer}, text {text}")


@pytest.mark.parametrize("name", NAMES)
def test_the_table_gives_back_the_same_bits(name, saved):
    model = saved(name)
    with jax.set_mesh(make_mesh()):
        leaves = model.leaves({path: leaf.shape for path, leaf in flatten(model.factory().abstract()).items()})
    written = dict(export_tensors(model.rows, {path: leaf[()] for path, leaf in leaves.items()}, LAYERS))
    ignored = model.architecture.ignored
    kept = {n for n in model.tensors if not any(fnmatch.fnmatchcase(n, pattern) for pattern in ignored)}
    assert written.keys() == kept
    for tensor in kept:
        np.testing.assert_array_equal(written[tensor], model.tensors[tensor], err_msg=tensor)


# mpnet is what jina_bert and mt5 are made of: BERT's block with a bias, and a learned one.
@pytest.mark.parametrize("name", ["mt5", "nomic_bert", "modernbert", "jina_bert"])
def test_eight_devices_compute_what_one_does(name, saved):
    """Outputs and gradients with dropout, each within 1e-5 of its largest number."""
    model = saved(name)
    fewer = {"layers": 2} | ({"local": model.config.local[:2]} if model.architecture.model_type == "modernbert" else {})
    config = dataclasses.replace(model.config, **fewer)
    options = ModelOptions(unroll=1, dropout=0.1, attention_dropout=0.1)
    factory = ModelFactory(lambda: model.architecture.backbone(jax.random.key(0), config, options))
    packed = pack(TEXTS, PACKED, LENGTH)
    upstream = np.random.default_rng(0).normal(size=(len(PACKED), LENGTH, config.width))
    upstream = (upstream * (packed.rows.segment_ids > 0)[..., None]).astype(np.float32)

    def loss(params, rows):
        noise = Noise(step_seed(0, jnp.int32(3)), rows.segment_ids, rows.positions)
        states = factory.bind(params)(rows, noise).last
        return (states * jax.sharding.reshard(upstream, jax.typeof(states).sharding.spec)).sum(), states

    found = []
    for mesh in (ONE, MeshConfig(1, 4, 2)):
        with jax.set_mesh(make_mesh(mesh)):
            step = jax.jit(jax.value_and_grad(loss, has_aux=True))
            (_, states), gradients = step(random_params(factory), put_rows(packed.rows))
            found.append({"states": np.asarray(states) * (upstream != 0), **flatten(jax.device_get(gradients))})
    one, eight = found
    for path, want in one.items():
        # A key's bias has no gradient but rounding: softmax takes off what all scores share.
        scale = np.abs(one[path.replace("bias", "kernel")] if path.endswith("key/bias") else want).max()
        assert np.abs(eight[path] - want).max() <= 1e-5 * scale, path
