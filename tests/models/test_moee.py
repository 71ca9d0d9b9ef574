"""Routing weights as vectors (MoEE): pooled like states, alone, beside them, and as a weighted sum of similarities."""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from llm_tokenizers import VOCAB_SIZE, save_tiny_bert, save_tokenizer
from scipy.stats import spearmanr
from tiny_models import CONFIG, ONE, alone, make_mesh, pack, put_rows, random_params, random_texts

from jaxembed import Embedder, sharding, similarity
from jaxembed.config import MeshConfig
from jaxembed.errors import UserError
from jaxembed.models.layers.rope import RopeConfig
from jaxembed.models.layers.routing import ExpertOptions, ExpertsShape
from jaxembed.models.moee import MODES, combine, routing_width, with_moee
from jaxembed.models.options import ModelOptions
from jaxembed.models.pooling import MODES as POOLING
from jaxembed.models.text_encoder import HeadConfig, ModelFactory, TextEncoder
from jaxembed.models.transformer import Transformer, TransformerConfig

ROPE = RopeConfig(8)
SHAPE = ExpertsShape(count=4, top_k=2, width=16, normalize=True)
DECODER = TransformerConfig(90, 32, 2, 4, 2, 8, 40, 64, ROPE, ROPE, experts=SHAPE)
ROUTED = 2 * SHAPE.count
TEXTS = random_texts(8, longest=12)
LAYOUT = [[0, 1, 2], [4, 3], [6, 5], [7]]
WEIGHT = 0.3


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pooled(tokens, lengths, mode, prompt):
    """The definition: `tokens` are arrays [n, …] of each text, of which `prompt` tokens do not count."""
    vectors = []
    for text, length in zip(tokens, lengths):
        first = min(prompt, length)
        at = np.arange(first, length)
        kept = {"mean": at, "weighted_mean": at, "cls": at[:1], "last": at[-1:]}[mode]
        weights = (kept + 1.0) if mode == "weighted_mean" else np.ones(len(kept))
        part = text[kept].astype(np.float64)
        vectors.append((weights[:, None] * part).sum(0) / max(weights.sum(), 1e-9))
    return np.array(vectors)


@functools.partial(jax.jit, static_argnums=3)
def combined(states, probabilities, rows, head):
    """By each way to combine them."""
    return [combine(states, probabilities, rows, dataclasses.replace(head, moee=moee)) for moee in MODES]


@pytest.mark.parametrize(("mode", "pool_prompt"), [*((mode, True) for mode in POOLING), ("last", False)])
def test_weights_are_pooled_as_states_are_and_layers_lie_side_by_side(mode, pool_prompt):
    texts = [np.concatenate([[7, 8], text[:10]]) for text in TEXTS]
    packed = pack(texts, LAYOUT, 40, prompt=2)
    probabilities = np.random.default_rng(0).random((3, len(LAYOUT), 40, 4)).astype(np.float32)
    states = np.random.default_rng(1).normal(size=(1, packed.slots, 5)).astype(np.float32)
    head = HeadConfig(pooling=mode, pool_prompt=pool_prompt, moee_weight=WEIGHT)
    by_text = [
        np.concatenate(probabilities[:, row, start : start + len(text)], axis=-1)
        for row, start, text in zip(packed.row, packed.start, texts)
    ]
    want = pooled(by_text, [len(text) for text in texts], mode, 0 if pool_prompt else 2)
    parts = states[packed.shard, packed.slot], want
    wanted = {
        "alone": want,
        "concat": np.concatenate(parts, -1),
        "sum": np.concatenate([unit(parts[0]), WEIGHT**0.5 * unit(want)], -1),
    }
    with jax.set_mesh(make_mesh()):
        states = sharding.put(states, jax.sharding.get_mesh(), jax.P(sharding.BATCH, None, None))
        found = combined(states, probabilities, put_rows(packed.rows), head)
    for moee, vectors in zip(MODES, found, strict=True):
        got = np.asarray(vectors)[packed.shard, packed.slot]
        np.testing.assert_allclose(got, wanted[moee], atol=1e-6, err_msg=moee)


def make_factory(head):
    options = ModelOptions()
    return ModelFactory(lambda: TextEncoder(jax.random.key(0), Transformer, DECODER, head, options))


def vectors_of(head, packed, mesh=ONE):
    """The texts' vectors [n, E]."""
    factory = make_factory(head)
    with jax.set_mesh(make_mesh(mesh)):
        assert factory.width == head.width(DECODER)
        vectors = factory.encoder(random_params(factory), put_rows(packed.rows), packed.slots)
    return np.asarray(vectors)[packed.shard, packed.slot]


@functools.cache
def encoded(moee):
    """By a head that normalises nothing."""
    head = HeadConfig("last", moee=moee, moee_weight=WEIGHT, projection=24, normalize=False)
    return vectors_of(head, pack(TEXTS, LAYOUT, 40))


@functools.cache
def probabilities_of_texts():
    """What the backbone's routers say of each text's tokens, [n, N X], computed one text per row."""
    packed = pack(TEXTS, alone(TEXTS), 12)
    factory, options = make_factory(HeadConfig("last", projection=24)), ModelOptions(experts=ExpertOptions(keep=True))
    backbone = ModelFactory(lambda: Transformer(jax.random.key(0), DECODER, options))
    with jax.set_mesh(make_mesh()):
        params = random_params(factory)["backbone"]
        run = jax.jit(lambda params, rows: backbone.bind(params)(rows).routed.probabilities)
        kept = np.asarray(run(params, put_rows(packed.rows)))
    assert kept.shape == (2, len(TEXTS), 12, SHAPE.count)
    real = np.arange(12) < np.array([len(text) for text in TEXTS])[:, None]
    np.testing.assert_allclose(kept.sum(-1), np.broadcast_to(real, kept.shape[:3]), atol=1e-6)
    return [np.concatenate(kept[:, i, : len(text)], -1) for i, text in enumerate(TEXTS)]


def test_the_encoder_gives_its_routers_weights():
    want = pooled(probabilities_of_texts(), [len(text) for text in TEXTS], "last", 0)
    assert want.shape == (len(TEXTS), ROUTED) and np.ptp(want, axis=0).min() > 0.01
    np.testing.assert_allclose(encoded("alone"), want, atol=1e-5)


def test_a_sums_dot_products_are_the_weighted_sum_of_both_cosines():
    states, weights, both = unit(encoded("")), unit(encoded("alone")), encoded("sum")
    assert both.shape == (len(TEXTS), 24 + ROUTED)
    want = states @ states.T + WEIGHT * (weights @ weights.T)
    np.testing.assert_allclose(both @ both.T, want, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(both, axis=-1), (1 + WEIGHT) ** 0.5, atol=1e-6)


def test_they_depend_neither_on_packing_nor_on_the_mesh():
    head = HeadConfig("last", moee="sum", moee_weight=WEIGHT, projection=24)  # `normalize` changes nothing
    mesh = MeshConfig(1, tensor=2, expert=2, sequence=2)
    shards = sharding.batch_shards(make_mesh(mesh))
    packed = pack(TEXTS, [[4, 5, 0], [7, 6], [1, 3, 2], []], 40, shards)
    assert np.abs(vectors_of(head, packed, mesh) - encoded("sum")).max() <= 1e-5


def test_what_cannot_be_is_refused():
    head = HeadConfig()
    dense_too = dataclasses.replace(DECODER, layers=3, sparse=(False, True, False))
    assert [routing_width(backbone) for backbone in (DECODER, dense_too, CONFIG)] == [ROUTED, SHAPE.count, 0]
    assert with_moee(head, DECODER, "sum", 2.0) == dataclasses.replace(head, moee="sum", moee_weight=2.0)
    assert with_moee(head, CONFIG, "", 1.0) == head
    by_source = dataclasses.replace(DECODER, experts=dataclasses.replace(SHAPE, by_source=True))
    for backbone in (CONFIG, by_source, dataclasses.replace(DECODER, experts=None)):
        with pytest.raises(UserError, match=r"config\.model\.moee = 'alone': the model has no routers"):
            with_moee(head, backbone, "alone", 1.0, "config.model.")
    with pytest.raises(UserError, match=r"moee = 'concat': pooling 'latent' transforms token states"):
        with_moee(dataclasses.replace(head, pooling="latent"), DECODER, "concat", 1.0)
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"moee_weight = .*: wants a number above 0"):
            with_moee(head, DECODER, "sum", weight)


SENTENCES = ["low newest", "the lower naïve query", "Größe and again", "widest passage means one word"]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A folder of transformers: a tiny random Mixtral, which generates."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_any_folder_of_experts_serves_without_training(mixtral):
    """The last token's softmax over all experts, as transformers' own routers say it."""
    import torch
    import transformers

    embedder = Embedder.load(mixtral, moee="alone", mesh=make_mesh())
    assert embedder.width == 8 and embedder.blueprint.head.pooling == "last"
    model = transformers.AutoModelForCausalLM.from_pretrained(mixtral, dtype="float32").eval()
    want = []
    for ids in embedder.tokenizers[0].encode(SENTENCES, embedder.blueprint.max_length, ""):
        with torch.no_grad():
            logits = model(torch.tensor(ids[None].astype(np.int64)), output_router_logits=True).router_logits
        want.append(np.concatenate([torch.softmax(layer, -1)[-1].numpy() for layer in logits]))
    got = embedder.encode(SENTENCES)
    want = unit(np.array(want)) if embedder.blueprint.head.normalize else np.array(want)
    assert np.abs(got - want).max() <= 1e-5
    with pytest.raises(UserError, match="no other program makes vectors of routing weights"):
        embedder.save(mixtral / "out")


def test_evaluate_takes_it_as_a_flag(mixtral, tmp_path):
    pairs = list(itertools.combinations(SENTENCES, 2))
    wanted = [3.0, 1.0, 0.5, 4.0, 2.0, 0.0]
    sets = tmp_path / "pairs.jsonl"
    lines = [{"sentence1": a, "sentence2": b, "score": score} for (a, b), score in zip(pairs, wanted)]
    sets.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {}
    for moee in ("", "alone"):
        embedder = Embedder.load(mixtral, moee=moee, mesh=make_mesh())
        vectors = [embedder.encode([pair[i] for pair in pairs]) for i in (0, 1)]
        found[moee] = similarity.pairwise(*vectors, "cosine")
    both = found[""] + 0.5 * found["alone"]
    scores = {name: 100 * spearmanr(wanted, x).statistic for name, x in [*found.items(), ("sum", both)]}
    command = [sys.executable, "-m", "jaxembed.evaluate", f"--model={mixtral}", f"--sts={sets}"]
    done = subprocess.run([*command, "--moee=sum", "--moee_weight=0.5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])["eval/sts/pairs"]
    assert got == pytest.approx(scores["sum"], abs=0.01)


def test_a_model_without_experts_is_refused(tmp_path):
    save_tiny_bert(tmp_path / "bert")
    with pytest.raises(UserError, match="moee = 'sum': the model has no routers"):
        Embedder.load(tmp_path / "bert", moee="sum")
    with pytest.raises(UserError, match=r"moee='both': .* takes , alone, concat, sum"):
        Embedder.load(tmp_path / "bert", moee="both")
