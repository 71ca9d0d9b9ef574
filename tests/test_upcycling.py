"""Dense checkpoints made sparse give the dense vectors; experts of sources are the dense models that they make."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_architectures import make
from tiny_run import sentence, tiny_config, train_on, write_lines, write_tokenizer

from jaxembed import config as config_lib
from jaxembed import model_source, sharding, trainer
from jaxembed.config import ExpertsConfig, LossConfig, MatryoshkaConfig, MeshConfig, RouterConfig, TeacherConfig
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.export import export_model
from jaxembed.hf.architectures import architecture_of
from jaxembed.hf.sparse_kin import SPARSE_KIN
from jaxembed.metrics import read_metrics
from jaxembed.model_source import open_source
from jaxembed.models.text_encoder import flatten
from jaxembed.upcycling import only_expert

TEXTS = ["a", "three short words", "one two three four five six seven eight nine ten", "words again and again", "more"]
MESHES = {"one": MeshConfig(data=1), "data 2, expert 4": MeshConfig(data=2, expert=4)}
DENSE = ("bert", "nomic_bert", "llama", "qwen3")
KIN = {"bert": "nomic_moe", "nomic_bert": "nomic_moe", "llama": "mixtral", "qwen3": "qwen3_moe"}

EPSILONS = ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps")
MIXED = ("causal", "prefix", "bidirectional")


def mesh_of(name: str) -> jax.sharding.Mesh:
    sizes = MESHES[name]
    return sharding.make_mesh(sizes, jax.devices()[: sizes.data * sizes.expert])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of each dense model, whose weights are far from alike in every layer."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizers = {"": write_tokenizer(folder / "tokenizer.json")}
    for arch in DENSE:
        embedder = make(arch, "native", tokenizers, mesh_of("one"))
        with jax.set_mesh(embedder.mesh):
            shaken = jax.tree.map(
                lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), embedder.params
            )
        Embedder(embedder.blueprint, embedder.factory, shaken, embedder.mesh).save(folder / arch)
    return folder


def opened(bases, arch, mesh="one", **experts):
    usual = tiny_config(bases)
    model = dataclasses.replace(
        usual.model, init=f"hf:{bases / arch}", arch="auto", shape={}, experts=ExpertsConfig(**experts)
    )
    config = dataclasses.replace(usual, model=model, tokenizer="auto", mesh=MESHES[mesh])
    blueprint, load = open_source(config, bases / "nowhere")
    factory, mesh = blueprint.factory(model_source.options(config.model)), mesh_of(mesh)
    with jax.set_mesh(mesh):
        return Embedder(blueprint, factory, load(factory), mesh)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("arch", DENSE)
def test_at_step_0_the_vectors_are_those_of_the_dense_model(bases, arch, mesh):
    every = 1 if arch == "llama" else 2
    sparse = opened(bases, arch, mesh, upcycle=4, top_k=2, every=every, router_noise=1.0)
    dense = Embedder.load(f"{bases / arch}")
    assert sparse.blueprint.architecture.model_type == KIN[arch]
    assert (sparse.blueprint.experts.count, sparse.blueprint.experts.top_k) == (4, 2)
    want = dense.encode(TEXTS)
    assert np.ptp(want, axis=0).max() > 0.1
    np.testing.assert_allclose(sparse.encode(TEXTS), want, atol=1e-5)
    routers = np.asarray(flatten(sparse.params)["backbone/experts/router/kernel"])
    assert abs(routers.mean()) < 0.15 and 0.8 < routers.std() < 1.2


def test_which_layers_become_sparse(bases):
    assert opened(bases, "bert", upcycle=2, top_k=1, layers=(2, 0)).blueprint.backbone.sparse == (True, False, True)
    with pytest.raises(UserError, match=r"config\.model\.experts\.layers = \(9,\): the model has layers 0 … "):
        opened(bases, "bert", upcycle=2, top_k=1, layers=(9,))
    with pytest.raises(UserError, match="a llama becomes a mixtral, which has experts in every layer"):
        opened(bases, "llama", upcycle=2, top_k=1, every=2)


@pytest.mark.parametrize("arch", DENSE)
def test_config_json_of_the_kin_keeps_what_the_dense_one_says(bases, arch):
    """Attention that no other program knows, states of all layers; and defaults that the two kinds do not share."""
    hf = json.loads((bases / arch / "config.json").read_text()) | {"output_hidden_states": True}
    rest = {field: value for field, value in hf.items() if field not in ("type_vocab_size", *EPSILONS)}
    dense = architecture_of(hf)
    both = [dense.with_attention(hf, modes) for modes in (() if dense.fixed_attention else (("prefix",), MIXED))]
    for said in (hf, rest, *both):
        made = SPARSE_KIN[arch](said, 2, 1, (0, 1, 2))
        want, got = (vars(architecture_of(x).config_from_hf(x)) for x in (said, made))
        for field in {"vocab_size", "width", "max_length", "rope", "type_vocab", "norm_eps", "attention"} & want.keys():
            assert got[field] == want[field], field
        assert made["output_hidden_states"] is True


def test_what_cannot_be_upcycled_says_so(bases, tmp_path):
    opened(bases, "qwen3", upcycle=2, top_k=1, layers=(1, 2)).save(tmp_path / "sparse")
    assert "| experts | 2 in each of 2 layers; a token takes 1" in (tmp_path / "sparse" / "README.md").read_text()
    usual = tiny_config(bases)
    model = dataclasses.replace(usual.model, init=f"hf:{tmp_path / 'sparse'}", arch="auto", shape={})
    first = MatryoshkaConfig(layers=(1,))
    with pytest.raises(UserError, match=r"config\.matryoshka\.layers: 1: .* none of 1 layers is sparse"):
        trainer.train(dataclasses.replace(usual, model=model, tokenizer="auto", matryoshka=first), tmp_path / "run")
    bad = {
        "teacher": TeacherConfig(model.init),
        "loss": LossConfig(false_negatives="teacher"),
        "mesh": MESHES["data 2, expert 4"],
    }
    with pytest.raises(UserError, match=r"config\.mesh\.expert = 4 does not divide the teacher's 2 experts"):
        trainer.train(dataclasses.replace(usual, **bad), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"config\.model\.experts\.upcycle = 2: config\.model\.init is sparse already"):
        opened(tmp_path, "sparse", upcycle=2, top_k=1)
    with pytest.raises(UserError, match=r"config\.model\.experts\.kernel = 'blocks': the model has no experts"):
        opened(bases, "bert", kernel="blocks")
    with pytest.raises(UserError, match=r"config\.mesh\.expert = 4 does not divide the model's 2 experts"):
        opened(tmp_path, "sparse", mesh="data 2, expert 4")


@pytest.mark.parametrize(
    ("experts", "others", "said"),
    [
        ({"upcycle": 4, "top_k": 5}, {}, r"config\.model\.experts\.top_k = 5: must be in 1 … 4"),
        ({"upcycle": 6}, {"mesh": MeshConfig(expert=4)}, r"config\.mesh\.expert = 4 does not divide .*upcycle = 6"),
        ({"routing": "nearest"}, {}, r"config\.model\.experts\.routing: 'nearest' is not one of token"),
        ({"routing": "source"}, {}, r"'source' is for experts made of a dense model: set \.upcycle"),
        ({"upcycle": 4, "routing": "source"}, {}, r"top_k = 2: with routing 'source' a text has one expert"),
        ({"top_k": 1}, {}, r"top_k = 1 is of no use with .*upcycle = 0"),
        ({"upcycle": 1}, {}, r"upcycle = 1: at least 2 experts"),
        ({"upcycle": 4, "every": 2, "layers": (1,)}, {}, r"every = 2 and .*layers = \(1,\): set one"),
        ({"capacity": 0.5}, {}, r"capacity = 0\.5: must be at least 1"),
        ({"routing": "expert_choice"}, {"mesh": MeshConfig(sequence=2)}, r"leave config\.mesh\.sequence = 1"),
        ({}, {"router": RouterConfig(balance=-1.0)}, r"config\.router\.balance = -1: must not be negative"),
    ],
)
def test_bad_experts_are_refused_by_the_config(bases, experts, others, said):
    usual = tiny_config(bases)
    config = config_lib.to_json(dataclasses.replace(usual, **others))
    config["model"] |= {"init": f"hf:{bases / 'bert'}", "arch": "auto", "shape": {}}
    config["model"]["experts"] |= experts
    with pytest.raises(UserError, match=said):
        config_lib.load(config)


def test_each_source_trains_its_own_expert(bases, tmp_path):
    """Texts of a source meet one expert, the others stay the dense model's; each is exported as a dense model."""
    rng = np.random.default_rng(0)
    c = config_lib.default_config()
    c.update(steps=3, batch_size=16, grad_cache=2, tokenizer="auto", log_to=())
    c.model.init = f"hf:{bases / 'bert'}"
    c.model.experts.update(upcycle=3, top_k=1, every=2, routing="source", served=1)
    c.optimizer.update(learning_rate=1e-2, weight_decay=0.0)
    c.data.cache_dir = str(tmp_path / "cache")
    for name in "ab":
        rows = [{key: sentence(rng, 6, 6) for key in ("query", "positive")} for _ in range(16)]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    source = config_lib.to_json(config_lib.SourceConfig())
    c.data.train = tuple(source | {"path": str(tmp_path / f"{name}.jsonl")} for name in "ab")
    train_on(1, config_lib.load(c), tmp_path / "run", pictures=True)

    lines = [line for line in read_metrics(tmp_path / "run") if "router/load" in line]
    assert (tmp_path / "run" / "report" / "routers.png").is_file() and "router/balance" not in lines[0]
    loads = np.array([line["router/load"] for line in lines])
    assert (loads[..., 2] == 0).all() and (loads[..., :2] > 0).all()  # there is no third source
    load = functools.partial(Embedder.load, mesh=mesh_of("one"))
    run = load(str(tmp_path / "run"))
    up = np.asarray(flatten(run.params)["backbone/experts/up/kernel"])
    first = np.asarray(flatten(load(str(bases / "bert")).params)["backbone/layers/mlp/up/kernel"])[1::2]
    moved = np.abs(up - first[:, None]).max(axis=(0, 2, 3))
    assert moved[0] > 1e-3 < moved[1] and moved[2] < 1e-6
    for expert in (0, 2):
        served = load(str(tmp_path / "run"), expert=expert)
        export_model(served, tmp_path / f"expert{expert}")
        dense = load(str(tmp_path / f"expert{expert}"))
        assert dense.blueprint.architecture.model_type == "bert"
        np.testing.assert_allclose(dense.encode(TEXTS), served.encode(TEXTS), atol=1e-5)
        card = (tmp_path / f"expert{expert}" / "README.md").read_text()
        assert f"holds expert {expert} of 0 … 2" in card and ("are those of expert 1." in card) == (expert != 1)
    np.testing.assert_allclose(load(str(tmp_path / "run" / "export")).encode(TEXTS), run.encode(TEXTS), atol=1e-5)
    apart = [load(str(tmp_path / f"expert{i}")).encode(TEXTS) for i in (0, 2)]
    assert min(np.abs(a - b).max() for a, b in itertools.pairwise(apart)) > 1e-3
    c.model.experts = config_lib.default_config().model.experts
    c.model.init, again = f"run:{tmp_path / 'run'}", tmp_path / "again"
    with pytest.raises(UserError, match=r"routing = 'token', but in run:.* texts' sources pick experts: set it to"):
        open_source(config_lib.load(c), again)
    c.model.experts.routing = "source"
    assert open_source(config_lib.load(c), again)[0].experts.served == 1
    c.data.train *= 2
    with pytest.raises(UserError, match=r"config\.data\.train: 4 sources for the 3 experts of run:"):
        open_source(config_lib.load(c), again)
    with pytest.raises(UserError, match="--expert=3: the model has experts 0 … 2"):
        load(str(tmp_path / "run"), expert=3)
    with pytest.raises(UserError, match="--expert=0 is for models whose texts' sources pick the experts"):
        load(str(bases / "bert"), expert=0)


@pytest.mark.parametrize(("arch", "attention"), [("bert", "native"), ("llama", "bidirectional")])
def test_the_expert_of_a_source_is_taken_out_of_a_sharded_model(bases, arch, attention):
    """Bit for bit the dense model that it was made of; with what later runs said of attention and layers."""
    every = 2 if arch == "bert" else 1
    sparse = opened(bases, arch, "data 2, expert 4", upcycle=4, top_k=1, every=every, routing="source", served=3)
    hf_config = sparse.blueprint.architecture.with_attention(sparse.blueprint.hf_config, (attention,))
    later = dataclasses.replace(sparse.blueprint, hf_config=hf_config | {"output_hidden_states": True})
    with jax.set_mesh(sparse.mesh):
        dense, params = only_expert(later, sparse.params, 3)
        found = jax.device_get(flatten(params))
    want = jax.device_get(flatten(Embedder.load(f"{bases / arch}").params))
    assert found.keys() == want.keys() and all(np.array_equal(found[path], want[path]) for path in want)
    assert dense.architecture.model_type == arch and dense.backbone.attention == ("bidirectional",)
    assert dense.hf_config["output_hidden_states"] is True


def test_sources_reach_the_tokens_of_their_texts():
    """`step._with_sources`: by the texts' numbers, whatever bins and rows they lie in."""
    from jaxembed.data.batch import Batch, PairShape, Rows, Texts
    from jaxembed.step import _with_sources

    pair = PairShape(1, 1)
    pairs, sources = np.array([2, 0, -1, 1, 3, -1]), np.array([5, 7, 0, 6, 8, 0])
    queries = Texts(
        **{f.name: np.zeros(6, np.int32) for f in dataclasses.fields(Texts)} | {"pair": pairs, "source": sources}
    )
    segments = np.array([[[1, 1, 7, 8, 0, 0], [4, 5, 6, 12, 12, 0]]], np.int32)
    rows = Rows(*(np.zeros_like(segments) for _ in range(5)))
    batch = Batch(dataclasses.replace(rows, segment_ids=segments), queries, queries)
    with jax.set_mesh(mesh_of("one")):
        got = jax.jit(lambda batch: _with_sources(batch, pair).source)(jax.tree.map(jnp.asarray, batch))
    by_pair = {0: 7, 1: 6, 2: 5, 3: 8}
    want = [[[by_pair[(s - 1) // 3] if s else None for s in row] for row in micro] for micro in segments]
    for g, w in zip(np.asarray(got).reshape(-1), np.array(want, object).reshape(-1)):
        assert w is None or g == w
