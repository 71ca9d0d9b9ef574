"""Merged models against sums and arcs in NumPy, the search's gradient against differences, and the command."""

import dataclasses
import json
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny_run import SHALLOW, sentence, tiny_config, write_lines

from jaxembed import merge, merging, model_source, sharding
from jaxembed.config import EvalConfig, MeshConfig
from jaxembed.distributed import Peers
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.merging_search import SearchSettings, Space, search
from jaxembed.models.text_encoder import flatten, unflatten
from jaxembed.vectors.record_pairs import read_pairs

PLACES = "backbone/embeddings/position/embedding"
LAYER = "backbone/layers/mlp/up/kernel"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("merge")


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(2, 2), jax.devices()[:4])


@pytest.fixture(scope="module")
def one():
    """The mesh of one device, quicker to compile for."""
    return sharding.make_mesh(MeshConfig(1), jax.devices()[:1])


@pytest.fixture(scope="module")
def blueprint(folder):
    config = tiny_config(folder, model__shape=SHALLOW | {"num_hidden_layers": 2}, prompts={"query": "kaka "})
    return model_source.open_source(config, folder)[0]


def weights_of(blueprint, mesh, seed):
    """Random weights of a model, by leaf, float32."""
    factory = merging.Source("", blueprint, None).factory
    with jax.set_mesh(mesh):
        abstract = flatten(factory.abstract())
    rngs = {path: np.random.default_rng((seed, i)) for i, path in enumerate(sorted(abstract))}
    return {
        path: (rngs[path].normal(scale=0.2, size=x.shape) + path.endswith("scale")).astype(np.float32)
        for path, x in abstract.items()
    }


def source(name, blueprint, leaves):
    """A model that is not on disk."""

    def load(factory):
        mesh, wanted = jax.sharding.get_mesh(), flatten(factory.abstract())
        return unflatten({path: sharding.put(leaves[path], mesh, x.sharding.spec) for path, x in wanted.items()})

    return merging.Source(name, blueprint, load)


@pytest.fixture(scope="module")
def leaves(blueprint, mesh):
    return [weights_of(blueprint, mesh, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def sources(blueprint, leaves):
    return [source(f"model {i}", blueprint, each) for i, each in enumerate(leaves)]


def got(embedder):
    return {path: np.asarray(x) for path, x in flatten(embedder.params).items()}


def test_sums_are_those_of_the_tensors(sources, leaves, mesh):
    seen = []
    merged = merging.linear(sources, [0.5, 0.2, 0.3], mesh, lambda name, embedder: seen.append(name))
    for path, leaf in got(merged).items():
        want = sum(np.float64(weight) * each[path] for weight, each in zip((0.5, 0.2, 0.3), leaves))
        np.testing.assert_allclose(leaf, want, atol=2e-7)
    assert seen == ["model 0", "model 1", "model 2"] and merged.run is None


def test_task_vectors_of_one_model_lead_to_it(sources, leaves, mesh):
    whole = got(merging.linear(sources[:2], [1 - 1, 1], mesh))
    half = got(merging.linear(sources, [1 - 0.7, 0.5, 0.2], mesh))
    for path, leaf in whole.items():
        np.testing.assert_array_equal(leaf, leaves[1][path])
        base, one, two = (np.float64(each[path]) for each in leaves)
        np.testing.assert_allclose(half[path], base + 0.5 * (one - base) + 0.2 * (two - base), atol=4e-7)


def test_a_model_merged_with_itself_stays(sources, leaves, mesh):
    again = got(merging.linear([sources[0]] * 2, [0.5, 0.5], mesh))
    turned = got(merging.between(sources[0], sources[0], 0.3, mesh))
    for path, leaf in leaves[0].items():
        np.testing.assert_array_equal(again[path], leaf)
        np.testing.assert_allclose(turned[path], leaf, rtol=3e-7)


def arc(a, b, t):
    """Slerp of two tensors, float64."""
    a, b = np.float64(a), np.float64(b)
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def test_slerp_is_the_arc_of_each_layers_tensors(sources, leaves, mesh):
    merged = got(merging.between(*sources[:2], 0.3, mesh))
    for path, leaf in merged.items():
        pairs = list(zip(leaf, leaves[0][path], leaves[1][path])) if path.startswith("backbone/layers/") else []
        for found, a, b in pairs or [(leaf, leaves[0][path], leaves[1][path])]:
            np.testing.assert_allclose(found, arc(a, b, 0.3), atol=1e-6, err_msg=path)
    assert merged[LAYER].shape[0] == 2


def test_slerp_has_its_ends_and_passes_where_there_is_no_arc(blueprint, leaves, mesh):
    a, near = leaves[0], {path: leaf * 1.5 for path, leaf in leaves[0].items()}
    zero = {path: leaf * 0 for path, leaf in a.items()}
    one, *others = (source("", blueprint, each) for each in (a, leaves[1], near, zero))
    for t, want in ((0.0, a), (1.0, leaves[1])):
        for path, leaf in got(merging.between(one, others[0], t, mesh)).items():
            np.testing.assert_allclose(leaf, want[path], atol=1e-6)
    for other, factor in ((others[1], 1.25), (others[2], 0.5)):
        for path, leaf in got(merging.between(one, other, 0.5, mesh)).items():
            np.testing.assert_allclose(leaf, factor * a[path], rtol=1e-6, err_msg=path)


def test_weights_that_are_not_finite(blueprint, sources, leaves, mesh):
    broken = leaves[0] | {LAYER: leaves[0][LAYER] * np.nan}
    with pytest.raises(UserError, match=f"not finite, first in {LAYER}"):
        merging.linear([sources[1], source("", blueprint, broken)], [0.5, 0.5], mesh)


def test_models_that_do_not_fit(blueprint, folder, mesh, monkeypatch):
    def changed(**fields):
        return dataclasses.replace(blueprint, hf_config=blueprint.hf_config | fields)

    class Other:
        fingerprint = staticmethod(lambda: "other")

    head = dataclasses.replace(blueprint.head, projection=8)
    models = {
        "a": blueprint,
        "deep": changed(num_hidden_layers=3),
        "epsilon": changed(layer_norm_eps=1e-3),
        "head": dataclasses.replace(blueprint, head=head),
        "pooled": dataclasses.replace(blueprint, head=dataclasses.replace(blueprint.head, pooling="cls")),
        "words": dataclasses.replace(blueprint, tokenizer=Other()),
        "t5": dataclasses.replace(blueprint, hf_config={"model_type": "t5"}),
        "start": changed(initializer_range=0.5),
    }
    monkeypatch.setattr(merging, "_open", lambda spec: merging.Source(spec, models[spec], None))
    for name, message in (
        ("deep", r"a and deep cannot become one model: backbone/layers/.* is \(2, .*\) in the first, \(3, .*the other"),
        ("epsilon", "norm_eps of their backbones differs"),
        ("head", r"projection/kernel is none in the first, \(32, 8\) in the other"),
        ("pooled", "pooling of their heads differs: mean and cls"),
        ("words", "different tokenizers"),
        ("t5", "a bert and a t5"),
    ):
        with pytest.raises(UserError, match=message):
            merging.open_sources(["a", name], mesh)
    assert len(merging.open_sources(["a", "start", "a"], mesh)) == 3
    opened = merging.open_sources(["a", "start"], mesh, "pooled")  # a bare transformer pools as it likes
    assert [each.spec for each in opened] == ["a", "start", "pooled"]


@pytest.fixture(scope="module")
def probe(folder):
    """Records whose positives are their queries said another way: the words in another order."""
    rng = np.random.default_rng(5)
    rows = []
    for i in range(24):
        words = sentence(rng, 6, 8)
        said = {"query": words, "positive": " ".join(rng.permutation(words.split())), "negative": sentence(rng, 6, 8)}
        rows.append(said if i % 3 else said | {"negative": []})
    return read_pairs(str(write_lines(folder / "probe.jsonl", rows)), "--probe", 1)


def test_the_searchs_gradient_is_that_of_the_loss(sources, probe, mesh):
    base, *towards = (each.read(mesh) for each in sources)
    with jax.set_mesh(mesh):
        towards = tuple(jax.tree.map(lambda x, y: x - y, each, base) for each in towards)
    space = Space(Embedder(sources[0].blueprint, sources[0].factory, base, mesh), towards, True, 0.2)
    at, step = np.array([0.3, 0.4], np.float32), 0.02
    loss, gradient = space.gradient(at, probe)
    assert loss == pytest.approx(space.mean_loss(at, probe, len(probe)), rel=1e-5)
    for i in range(2):
        ahead, behind, far, back = (
            space.mean_loss(at + step * np.eye(2, dtype=np.float32)[i] * n, probe, len(probe)) for n in (1, -1, 2, -2)
        )
        slope = (8 * (ahead - behind) - (far - back)) / (12 * step)  # of the fourth order
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-2)


def test_the_search_prefers_what_serves_the_probe(blueprint, leaves, probe, one):
    """Without places, a text's vector does not depend on its words' order: that is one task vector, noise the other."""
    base = leaves[0] | {PLACES: 5 * leaves[0][PLACES]}
    good = base | {PLACES: 0 * base[PLACES]}
    rng = np.random.default_rng(7)
    worse = {path: leaf + rng.normal(scale=0.1, size=leaf.shape).astype(np.float32) for path, leaf in base.items()}
    found = search(
        source("base", blueprint, base),
        [source("worse", blueprint, worse), source("good", blueprint, good)],
        probe,
        SearchSettings(steps=8, batch_size=24, learning_rate=0.3, temperature=0.1),
        True,
        one,
    )
    worse_weight, good_weight = found.weights
    of_base, of_worse, of_good, of_mean, of_found = found.losses
    assert good_weight > 3 * worse_weight and of_good < min(of_base, of_worse)
    assert of_found < of_mean - 0.02
    named = {"worse": worse, "good": good}
    merged = got(found.model)
    for path, leaf in merged.items():
        want = base[path] + sum(w * (named[n][path] - base[path]) for n, w in zip(("worse", "good"), found.weights))
        np.testing.assert_allclose(leaf, want, atol=1e-6)


def test_the_command_writes_a_model_and_its_scores(sources, leaves, folder, one, monkeypatch, capsys):
    monkeypatch.setattr(sharding, "make_mesh", lambda config: one)
    models = [str(folder / "a"), str(folder / "b")]
    for model, each in zip(models, sources):
        each.with_params(each.read(one), one).save(model)
    rng = np.random.default_rng(3)
    rows = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": i} for i in range(5)]
    sts = write_lines(folder / "alike.jsonl", rows)
    out = folder / "merged"
    flag = types.SimpleNamespace(models=models, base="", out=str(out), method="weighted", dtype="float32")
    monkeypatch.setattr(merge.flags, "FLAGS", flag)
    monkeypatch.setattr("rich.console.Console", lambda **said: Console(width=150, **said))
    merge._merge(EvalConfig(sts=(str(sts),)), [0.25, 0.75], Peers())
    shown = capsys.readouterr().out
    said = json.loads(shown.splitlines()[-1])
    assert said["merged"] == str(out) and said["weights"] == dict(zip(models, [0.25, 0.75]))
    assert {*said["models"]} == {*models} and "eval/sts/alike" in said
    assert "sts/alike" in shown and "0.7500" in shown
    card = (out / "README.md").read_text()
    assert re.search(r"Merged of [^ /]+/a \(0.25\), [^ /]+/b \(0.75\), by `jaxembed.merge --method=weighted`.", card)
    again = Embedder.load(out, mesh=one)
    assert again.blueprint.prompts == {"query": "kaka "}
    np.testing.assert_allclose(got(again)[LAYER], 0.25 * leaves[0][LAYER] + 0.75 * leaves[1][LAYER], atol=2e-7)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--models=a,b", "--method=weighted", "--weights=1"], "wants a finite number for each of the 2 models"),
        (["--models=a,b", "--method=search", "--base=c"], "--method=search wants --probe"),
        (["--models=a,b", "--out=tests"], "--out=tests: is there already and is no exported folder"),
    ],
)
def test_mistakes_are_one_line_and_code_2(flags, said):
    command = [sys.executable, "-m", "jaxembed.merge", "--out=merged", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and said in done.stderr
