"""Losses over tokens: against sums over all masks and hand-written masks; the same however a batch is cut up."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import ONE, make_mesh, pack, random_params

from jaxembed import config as config_lib
from jaxembed import sharding
from jaxembed.config import Config, MaskConfig, MeshConfig
from jaxembed.data.batch import Rows
from jaxembed.losses.masked_diffusion import parts
from jaxembed.losses.objective import terms_of
from jaxembed.losses.predicting import maskable
from jaxembed.losses.table import LOSSES
from jaxembed.models.language_head import LanguageConfig
from jaxembed.models.layers.rope import RopeConfig
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import HeadConfig, ModelFactory, TextEncoder, flatten
from jaxembed.models.transformer import Transformer, TransformerConfig
from jaxembed.reading import ask, noised, passes, predicts_next, token_losses, tokens_of

V, MASK, CLS, SEP = 50, 4, 2, 3
ROPE = RopeConfig(8)
DECODER = TransformerConfig(V, 32, 2, 4, 2, 8, 48, 64, ROPE, ROPE, attention=("bidirectional",), initializer_range=0.2)
LANGUAGE = LanguageConfig(words=V, mask_id=MASK, framing=(0, CLS, SEP, MASK))
TEXTS_PER_PAIR = 2
QUERIES, DOCUMENTS = slice(1, None, 2), slice(0, None, 2)  # the first text that `pack` lays out has an odd number


def factory_of(language: LanguageConfig = LANGUAGE, **changes: Any) -> ModelFactory:
    decoder = dataclasses.replace(DECODER, **changes)
    rest = HeadConfig(), ModelOptions(), None, language
    return ModelFactory(lambda: TextEncoder(jax.random.key(0), Transformer, decoder, *rest))


def config_of(**fields: Any) -> Config:
    c = config_lib.default_config()
    c.data.train[0].path = "any.jsonl"
    c.steps = 10
    c.loss = config_lib.to_json(config_lib.Config())["loss"] | {"name": "masked_diffusion"} | fields
    c.model.arch, c.tokenizer = "llama", "file:any"
    return config_lib.load(c)


def texts_of(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [np.array([CLS, *rng.integers(5, V, n), SEP], np.int32) for n in lengths]


def micro_rows(rows: Rows, micro_batches: int) -> Rows:
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda x: sharding.put(x.reshape(micro_batches, -1, x.shape[-1]), mesh, sharding.MICRO_ROWS), rows
    )


def run(
    config: Config, rows: Rows, factory: ModelFactory, mesh: MeshConfig = ONE, micro_batches: int = 1, seed: int = 7
) -> tuple[float, dict[str, float], dict[str, np.ndarray]]:
    """Loss, metrics and gradient of a batch."""
    with jax.set_mesh(make_mesh(mesh)):

        def loss(params: Any, rows: Rows) -> Any:
            value, metrics, _ = token_losses(
                config, factory, params, rows, TEXTS_PER_PAIR, jnp.uint32(seed), None, None, jnp.float32(0)
            )
            return value, metrics

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, metrics), gradient = step(random_params(factory), micro_rows(rows, micro_batches))
        return float(value), jax.device_get(metrics), flatten(jax.device_get(gradient))


def layouts() -> dict[str, Rows]:
    """The same 16 texts, several to a row, and each alone in a longer one."""
    texts = texts_of([1, 9, 4, 6, 3, 8, 2, 7, 5, 5, 9, 1, 6, 4, 7, 3])
    packed = pack(texts, [[i, 15 - i] for i in range(8)], 24)
    alone = pack(texts, [[i] for i in range(16)], 12)
    return {"packed": packed.rows, "alone": alone.rows}


LOSSES_OVER_TOKENS = {
    "diffusion": {"name": "masked_diffusion"},
    "shifted": {"name": "masked_diffusion", "predicts": "next", "mask_draws": "antithetic", "sides": ("query",)},
    "masked lm": {"name": "masked_lm", "mask_rate": 0.4, "random_rate": 0.2, "keep_rate": 0.2},
    "masked next token": {"name": "masked_next_token", "mask_rate": 0.4},
    "next token": {"name": "next_token"},
}


@pytest.mark.parametrize("name", LOSSES_OVER_TOKENS)
def test_the_cut_of_the_batch_does_not_matter(name: str) -> None:
    config, rows = config_of(**LOSSES_OVER_TOKENS[name], tile=16), layouts()
    factory = factory_of(attention=("causal",) if name == "next token" else ("bidirectional",))
    value, metrics, gradient = run(config, rows["packed"], factory)
    cuts = [("alone", ONE, 1), ("packed", ONE, 4)]
    if name in ("diffusion", "shifted"):
        cuts += [("packed", MeshConfig(2, 1, 2, 1, 2), 1), ("packed", MeshConfig(1, 4, 2), 2)]
    assert metrics[f"asked/{config.loss.title}"] > 10
    for layout, mesh, micro_batches in cuts:
        other, said, slopes = run(config, rows[layout], factory, mesh, micro_batches)
        assert abs(other - value) <= 1e-5 * abs(value)
        for metric in metrics:
            np.testing.assert_allclose(said[metric], metrics[metric], rtol=1e-5)
        for path, slope in gradient.items():
            assert np.abs(slopes[path] - slope).max() <= 1e-5 * np.abs(slope).max(), path


@functools.cache
def all_masks(shift: bool, attention: str = "bidirectional") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A text of 6 words under all 64 masks: masks [64, 6], the words' losses [64, 6] by a dense softmax, the text."""
    text = texts_of([6])[0]
    masks = np.array(list(itertools.product([False, True], repeat=6)))
    read = np.repeat(text[None], 64, 0)
    read[:, 1:7][masks] = MASK
    factory = factory_of(attention=(attention,))
    with jax.set_mesh(make_mesh()):
        rows = pack(list(read), [[i] for i in range(64)], 8).rows
        placed = jax.tree.map(lambda x: sharding.put(x, jax.sharding.get_mesh(), sharding.ROWS), rows)
        model = factory.bind(random_params(factory))
        states = np.asarray(jax.jit(lambda rows: model.word_states(rows)[0])(placed), np.float64)
        table = np.asarray(model.word_table, np.float64)[:V]
    scores = states @ table.T
    losses = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
    places = np.arange(1, 7)
    from_ = places - 1 if shift else places
    return masks, losses[:, from_] - scores[:, from_, text[places]], text


@pytest.mark.parametrize("draws", ["low_discrepancy", "antithetic", "independent"])
@pytest.mark.parametrize("shift", [False, True])
def test_expectation_is_the_sum_over_all_masks(draws: str, shift: bool) -> None:
    """4,096 copies of a text: the mean over what is drawn is the integral over t, within its Monte-Carlo error."""
    masks, losses, text = all_masks(shift)
    least, n = 1e-3, masks.sum(1)
    t = np.linspace(least, 1, 20_001)
    of_mask = (t[:, None] ** n * (1 - t[:, None]) ** (6 - n) / t[:, None])[:, :]
    density = ((of_mask[1:] + of_mask[:-1]) / 2 * np.diff(t)[:, None]).sum(0) / (1 - least)
    per_mask = (losses * masks).sum(1)
    expected = (density * per_mask).sum() / 6
    config = config_of(mask_draws=draws, predicts="next" if shift else "same")
    copies = pack([text] * 4096, [[2 * i, 2 * i + 1] for i in range(2048)], 16).rows
    value, metrics, _ = run(config, copies, factory_of())
    second = ((of_mask / t[:, None])[1:] * np.diff(t)[:, None]).sum(0) / (1 - least)
    error = np.sqrt(((second * per_mask**2).sum() - (6 * expected) ** 2) / 4096) / 6
    assert abs(value - expected) < 4 * error
    assert error < 0.05 * expected
    assert abs(metrics["asked/masked_diffusion"] / (6 * 4096) - 0.5) < 0.02


def uint_mix(h: np.ndarray) -> np.ndarray:
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


@pytest.mark.parametrize("shift", [False, True])
def test_gradient_is_that_of_a_dense_loss_over_the_same_masks(shift: bool) -> None:
    """The masks are drawn anew in NumPy; each text stands alone, its scores whole, its loss written out."""
    texts, seed = texts_of([1, 9, 4, 6]), 11
    own = int(uint_mix(np.uint64(seed ^ 0x2545F491)))
    rows = pack(texts, [[0, 1], [2, 3]], 16).rows
    config = config_of(predicts="next" if shift else "same", mask_least=0.2)
    factory = factory_of()
    value, _, gradient = run(config, rows, factory, seed=seed)
    of_texts, total = [], 0.0
    start = int(uint_mix(uint_mix(np.uint64(own ^ int(uint_mix(np.uint64(3))))) ^ np.uint64(0)))
    of_masks = int(uint_mix(np.uint64(own ^ int(uint_mix(np.uint64(0))))))
    for i, text in enumerate(texts):
        number = np.uint64(2_000_000_000 + i)
        t = 0.2 + 0.8 * ((((start + (int(number) - 1) * 0x9E3779B9) % 2**32) >> 9) + 0.5) / 2**23
        places = np.arange(1, len(text) - 1)
        bits = uint_mix(uint_mix(np.uint64(of_masks) ^ number) ^ places.astype(np.uint64))
        masked = places[bits.astype(np.float64) < t * 2**32]
        of_texts.append((text, masked, t))
        total += len(places)
    with jax.set_mesh(make_mesh()):
        read = [np.where(np.isin(np.arange(len(text)), masked), MASK, text) for text, masked, _ in of_texts]
        placed = jax.tree.map(
            lambda x: sharding.put(x, jax.sharding.get_mesh(), sharding.ROWS),
            pack(read, [[i] for i in range(4)], 16).rows,
        )

        def dense(params: Any) -> jax.Array:
            model = factory.bind(params)
            states, table = (jax.sharding.reshard(x, P()) for x in (model.word_states(placed)[0], model.word_table))
            scores = jax.nn.log_softmax(states @ table[:V].T)
            losses = (
                -scores[i, masked - shift, text[masked]].sum() / t for i, (text, masked, t) in enumerate(of_texts)
            )
            return sum(losses) / total

        want, slopes = jax.jit(jax.value_and_grad(dense))(random_params(factory))
    assert abs(value - float(want)) <= 1e-5 * float(want)
    for path, slope in flatten(jax.device_get(slopes)).items():
        assert np.abs(gradient[path] - slope).max() <= 1e-5 * np.abs(slope).max(), path


def drawn(fields: dict[str, Any], shift: bool = False) -> tuple[np.ndarray, ...]:
    """What is read, the targets, the weights, and the texts [R, L] of many texts."""
    texts = texts_of([9] * 512)
    rows = pack(texts, [[i] for i in range(512)], 12, prompt=3).rows
    term = terms_of(config_of(**fields), over_tokens=True)[0]
    with jax.set_mesh(make_mesh()):
        placed = jax.tree.map(lambda x: x[0], micro_rows(rows, 1))
        language = dataclasses.replace(LANGUAGE, shift=shift)
        asked = ask(term, placed, language, TEXTS_PER_PAIR, jnp.uint32(1))
        return np.asarray(asked.ids), np.asarray(asked.targets), np.asarray(asked.weights), rows.tokens


def test_what_masked_lm_reads_and_asks() -> None:
    fields = {"name": "masked_lm", "mask_rate": 0.3, "random_rate": 0.1, "keep_rate": 0.2, "sides": ("document",)}
    read, targets, weights, tokens = drawn(fields)
    asked = weights > 0
    assert not asked[:, :3].any()  # the prompt
    assert not asked[:, 10:].any()  # the end of the text, and padding
    assert not asked[QUERIES].any()
    assert abs(asked[DOCUMENTS, 3:10].mean() - 0.3) < 0.03
    np.testing.assert_array_equal(targets[asked], tokens[asked])
    np.testing.assert_array_equal(read[~asked], tokens[~asked])
    assert abs((read[asked] == MASK).mean() - 0.7) < 0.06
    assert abs((read[asked] == tokens[asked]).mean() - 0.2) < 0.05


def test_a_shifted_loss_asks_the_state_before() -> None:
    read, targets, weights, tokens = drawn({"name": "masked_next_token", "mask_rate": 0.5})
    rows, places = np.nonzero(weights)
    np.testing.assert_array_equal(targets[rows, places], tokens[rows, places + 1])
    np.testing.assert_array_equal(read[rows, places + 1], MASK)
    assert (read == MASK).sum() == rows.size


def test_next_token_asks_for_all_but_the_first() -> None:
    read, targets, weights, tokens = drawn({"name": "next_token"})
    np.testing.assert_array_equal(read, tokens)
    np.testing.assert_array_equal(weights[:, :10], 1)
    np.testing.assert_array_equal(weights[:, 10:], 0)
    np.testing.assert_array_equal(targets[:, :10], tokens[:, 1:11])


def test_parts_of_a_step_are_spread_evenly() -> None:
    """The farthest that the t of n texts are from even: some 2 / n, where independent ones are 1 / √n from it."""
    farthest = {}
    rows = pack(texts_of([1] * 500), [[i] for i in range(500)], 4).rows
    with jax.set_mesh(make_mesh()):
        placed = jax.tree.map(lambda x: x[0], micro_rows(rows, 1))
        tokens = tokens_of(placed, placed.segment_ids > 0, LANGUAGE, jnp.uint32(5))
        for draws in ("low_discrepancy", "antithetic", "independent"):
            t = np.asarray(parts(tokens, draws))[:, 0]
            if draws == "antithetic":
                np.testing.assert_allclose(t[1:-1:2] + t[2::2], 1, atol=1e-6)
            farthest[draws] = np.abs(np.sort(t) - np.arange(500) / 500).max()
    assert farthest["low_discrepancy"] < 4 / 500
    assert farthest["independent"] > 6 / 500


def test_noised_views() -> None:
    rows = pack(texts_of([9] * 512), [[i] for i in range(512)], 12).rows
    with jax.set_mesh(make_mesh()):
        placed = micro_rows(rows, 4)
        seen = np.asarray(noised(placed, MaskConfig(query=0.4), LANGUAGE, TEXTS_PER_PAIR, jnp.uint32(2)).tokens)
    seen = seen.reshape(512, 12)
    np.testing.assert_array_equal(seen[DOCUMENTS], rows.tokens[DOCUMENTS])
    assert abs((seen[QUERIES, 1:10] == MASK).mean() - 0.4) < 0.03
    assert not (seen[:, [0, 10]] == MASK).any()


def test_first_tokens_are_not_asked_of_states_before() -> None:
    rows = pack(texts_of([4, 4]), [[0, 1]], 12).rows
    with jax.set_mesh(make_mesh()):
        placed = jax.tree.map(lambda x: x[0], micro_rows(rows, 1))
        plain = dataclasses.replace(LANGUAGE, shift=True, framing=())
        tokens = tokens_of(placed, placed.segment_ids > 0, plain, jnp.uint32(5))
        np.testing.assert_array_equal(np.asarray(maskable(tokens)), rows.positions > 0)


def test_how_often_a_step_reads() -> None:
    assert passes(config_of()) == (False, (0.5005,))
    assert passes(config_of(name="masked_lm", mask_rate=0.3)) == (False, (0.3,))
    assert passes(config_of(name="infonce")) == (True, ())
    assert predicts_next([config_of(name="next_token").loss, config_of().loss], learned=False)
    assert not predicts_next([config_of(name="next_token").loss, config_of(predicts="same").loss], learned=True)
    assert {name for name, entry in LOSSES.items() if entry.over_tokens} == {
        fields["name"] for fields in LOSSES_OVER_TOKENS.values()
    }
