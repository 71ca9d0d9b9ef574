"""InfoNCE with all its settings, and the sigmoid loss, against loops over every row and column, on many devices."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from embedded_cases import Outcome, assert_same, define, evaluate, make_case, permuted
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.data.batch import HARD_NEGATIVE, NO_GROUP, NO_TEXT, SCOPE_ALL, VOID
from jaxembed.losses import contrastive
from jaxembed.losses.embedded import Embedded, spread
from jaxembed.losses.infonce import infonce
from jaxembed.losses.library import describe
from jaxembed.losses.mixing import mixed_negatives
from jaxembed.losses.sigmoid import sigmoid


def known_matches(e: Embedded, i: int) -> set[int]:
    """The texts that match query i: itself and all its known positives."""
    return {int(e.query_texts.text[i]), *e.query_texts.partners[i].tolist()} - {NO_TEXT}


def is_negative(e: Embedded, block: str, hard_negatives: str, row: tuple[int, int], column: tuple[int, int]) -> bool:
    """Whether a column is a row's negative; both are (pair's place, document's place or -1 for the query)."""
    i, (j, d) = row[0], column
    q, docs = e.query_texts, e.document_texts
    pair, other = (int(q.pair[n] if k < 0 else docs.pair[n, k]) for n, k in (row, column))
    if VOID in (pair, other):
        return False
    text, its = (int(q.text[n] if k < 0 else docs.text[n, k]) for n, k in (row, column))
    is_hard = d >= 0 and int(docs.rank[j, d]) == HARD_NEGATIVE
    if text == its or its in known_matches(e, i):
        return False
    if d < 0 and (text in known_matches(e, j) if block[0] == "d" else False):
        return False
    if d >= 0 and not is_hard and text == int(q.text[j]):
        return False
    if block == "qq" and any(int(docs.text[j, k]) in known_matches(e, i) for k in drawn(e, j)):
        return False
    if block == "dd" and not is_hard and int(q.text[j]) in known_matches(e, i):
        return False
    if pair == other:
        return block == "qd" and is_hard
    if int(q.group[i]) == int(q.group[j]) != NO_GROUP or (is_hard and hard_negatives == "own"):
        return False
    return int(q.scope[i]) in (SCOPE_ALL, int(q.pool[j]))


def drawn(e: Embedded, i: int) -> list[int]:
    """The places of pair i's positives."""
    ranks, pairs = e.document_texts.rank[i], e.document_texts.pair[i]
    return [k for k in range(len(ranks)) if ranks[k] >= 0 and pairs[k] != VOID]


def negatives(e: Embedded, block: str, hard_negatives: str, row: tuple[int, int]) -> list[tuple[int, int]]:
    n, documents = e.documents.shape[:2]
    places = [(j, d) for j in range(n) for d in (range(documents) if block[1] == "d" else (-1,))]
    return [place for place in places if is_negative(e, block, hard_negatives, row, place)]


def dot(e: Embedded, row: tuple[int, int], column: tuple[int, int], teacher: bool = False) -> torch.Tensor:
    q, d = (e.teacher_queries, e.teacher_documents) if teacher else (e.queries, e.documents)
    a, b = (q[n] if k < 0 else d[n, k] for n, k in (row, column))
    return a @ b


def define_infonce(
    e: Embedded,
    temperature: torch.Tensor,
    blocks=("qd",),
    partition="joint",
    hard_negatives="all",
    false_negatives="keep",
    false_negative_margin=0.1,
    false_negative_blocks=("qd", "dq", "qq", "dd"),
    margin=0.0,
    hardness=0.0,
    hardness_of="own",
    focal=0.0,
    **how: object,
) -> torch.Tensor:
    """The loss straight from its definition."""
    total, weights = 0.0, 0.0
    for i in range(len(e.queries)):
        if e.query_texts.weight[i] == 0:
            continue
        weights += e.query_texts.weight[i]
        terms = []
        for p in drawn(e, i):
            positive = dot(e, (i, -1), (i, p))
            masses = []
            for block in blocks:
                row = (i, -1) if block[0] == "q" else (i, p)
                by_teacher = false_negatives == "teacher"
                rivals = drawn(e, i) if block[0] == "q" else [p]
                best = max(dot(e, (i, -1), (i, k), by_teacher).item() for k in rivals)
                ceiling = best + false_negative_margin * (abs(best) if false_negatives == "relative" else 1)
                if false_negatives == "keep" or block not in false_negative_blocks:
                    ceiling = np.inf
                mass = []
                for column in negatives(e, block, hard_negatives, row):
                    if dot(e, row, column, by_teacher and ceiling < np.inf).item() > ceiling:
                        continue
                    score = dot(e, row, column)
                    is_own = column[0] == i
                    weighs = hardness_of == "all" or (hardness_of == "own") == is_own
                    mass.append(score / temperature + (hardness * score.detach() if weighs else 0))
                masses.append(mass)
            top = (positive - margin) / temperature
            groups = [list(itertools.chain(*masses))] if partition == "joint" else masses
            for group in groups:
                cost = torch.logsumexp(torch.stack([top, *group]), 0) - top
                terms.append(cost * (1 - torch.exp(-cost)) ** focal if focal and group else cost)
        total = total + e.query_texts.weight[i] * sum(terms) / len(terms)
    return total / weights


def define_sigmoid(e: Embedded, temperature, bias, hard_negatives="all", **how: object) -> torch.Tensor:
    softplus = torch.nn.functional.softplus
    total, weights = 0.0, 0.0
    for i in range(len(e.queries)):
        weight = e.query_texts.weight[i]
        against = [dot(e, (i, -1), c) for c in negatives(e, "qd", hard_negatives, (i, -1))] if weight else []
        loss = sum(softplus(-dot(e, (i, -1), (i, p)) / temperature - bias) for p in drawn(e, i)) if weight else 0
        total = total + weight * (loss + sum(softplus(s / temperature + bias) for s in against))
        weights += weight
    return total / weights


ALL = ("qd", "dq", "qq", "dd")
SETTINGS = {
    "everything": {
        "blocks": ALL,
        "partition": "separate",
        "margin": 0.2,
        "focal": 0.5,
        "hard_negatives": "own",
        "hardness": 3.0,
        "hardness_of": "all",
        "false_negatives": "relative",
        "false_negative_margin": 0.1,
    },
    "plain": {},
    "symmetric": {"blocks": ("qd", "dq"), "partition": "separate"},
    "GTE": {"blocks": ALL},
    "Qwen3": {"blocks": ("qd", "qq", "dd"), "false_negatives": "absolute", "false_negative_margin": 0.1},
    "own hard negatives": {"hard_negatives": "own", "blocks": ALL},
    "relative": {
        "false_negatives": "relative",
        "false_negative_margin": 0.05,
        "blocks": ALL,
        "false_negative_blocks": ("qd", "dd"),
    },
    "additive margin": {"margin": 0.3, "blocks": ("qd", "dq"), "partition": "separate"},
    "EmbeddingGemma": {"hardness": 5.0},
    "LLaVE": {"hardness": 9.0, "hardness_of": "in_batch"},
    "all weighted": {"hardness": 2.0, "hardness_of": "all", "blocks": ALL},
    "focal": {"focal": 0.5},
    "GISTEmbed": {"false_negatives": "teacher", "false_negative_margin": 0.0, "blocks": ("qd", "qq", "dd")},
}
HOW = {  # mesh, exchange, tile
    "1": ("1", "gather", 2048),
    "1, small tiles": ("1", "ring", 5),
    "data 2, ring": ("data 2", "ring", 7),
    "data 8, ring": ("data 8", "ring", 5),
    "data 8, gather": ("data 8", "gather", 5),
    "data 4 x fsdp 2, gather": ("data 4 x fsdp 2", "gather", 2048),
    "data 4 x fsdp 2, ring": ("data 4 x fsdp 2", "ring", 2048),
    "data 2 x tensor 3, ring": ("data 2 x tensor 3", "ring", 5),  # 16 pairs do not spread over tensor
}


@functools.cache
def case(seed: int = 0) -> Embedded:
    return make_case(seed, teacher_width=6)


@functools.cache
def defined(name: str) -> Outcome:
    return define(define_infonce, case(), {"temperature": 0.1}, **SETTINGS[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_equals_its_definition(name):
    got = evaluate(infonce, case(), "data 8", {"temperature": 0.1}, exchange="ring", tile=5, **SETTINGS[name])
    assert_same(got, defined(name))
    assert got.gradients["temperature"] != 0


def test_every_setting_means_something():
    values = [defined(name).value for name in SETTINGS]
    assert len({round(value, 5) for value in values}) == len(values)


OTHERS = {"GTE": ("1", "data 2 x tensor 3, ring"), "GISTEmbed": ("data 8, gather", "data 4 x fsdp 2, ring")}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("everything", how) for how in HOW if how != "data 8, ring"),
        *((name, how) for name, hows in OTHERS.items() for how in hows),
    ],
)
def test_devices_exchanges_and_tiles_change_nothing(name, how):
    mesh, exchange, tile = HOW[how]
    assert_same(
        evaluate(infonce, case(), mesh, {"temperature": 0.1}, exchange=exchange, tile=tile, **SETTINGS[name]),
        defined(name),
    )


@pytest.mark.parametrize("how", ["1", "data 2, ring", "data 8, ring", "data 4 x fsdp 2, gather"])
def test_sigmoid_equals_its_definition(how):
    mesh, exchange, tile = HOW[how]
    learned = {"temperature": 0.3, "bias": -2.0}
    got = evaluate(sigmoid, case(), mesh, learned, exchange=exchange, tile=tile)
    assert_same(got, define(define_sigmoid, case(), learned))
    assert got.gradients["temperature"] != 0 and got.gradients["bias"] != 0


def test_mixed_negatives_join_the_sum():
    """Two mixtures a query, against the formula with the mixtures as they are."""
    mixed, there = (np.asarray(x) for x in mixed_negatives(case(), 2))

    def define_with_mixed(e: Embedded, temperature: torch.Tensor) -> torch.Tensor:
        total = weights = 0
        for i, weight in enumerate(e.query_texts.weight):
            if weight == 0:
                continue
            rivals = [dot(e, (i, -1), column) for column in negatives(e, "qd", "all", (i, -1))]
            rivals += [e.queries[i] @ torch.tensor(np.float64(mixed[i, k])) for k in np.flatnonzero(there[i])]
            costs = []
            for p in drawn(e, i):
                positive = dot(e, (i, -1), (i, p))
                costs.append(
                    torch.logsumexp(torch.stack([positive, *rivals]) / temperature, 0) - positive / temperature
                )
            total, weights = total + weight * sum(costs) / len(costs), weights + weight
        return total / weights

    assert there.any() and not there.all()
    want = define(define_with_mixed, case(), {"temperature": 0.1})
    got = evaluate(infonce, case(), "data 8", {"temperature": 0.1}, mixed_negatives=2)
    assert abs(got.value - want.value) <= 1e-5 * want.value
    assert np.abs(got.gradients["temperature"] - want.gradients["temperature"]) <= 1e-5 * abs(
        want.gradients["temperature"]
    )
    assert (
        np.abs(got.gradients["queries"] - want.gradients["queries"]).max()
        <= 1e-5 * np.abs(want.gradients["queries"]).max()
    )


# The same cases in every run: of random ones, one in a thousand has a temperature's gradient that cancels to nothing.
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    share=st.floats(0, 1),
    shape=st.sampled_from([(12, 2, 2, 4), (13, 1, 0, 3), (17, 3, 1, 5)]),
)
def test_any_voids_positives_and_negatives(seed, share, shape):
    """A program per shape, cases at random, from hardly a text missing to hardly one there."""
    rng = np.random.default_rng(seed)
    pairs, positives, hard, width = shape
    some = make_case(seed, pairs=pairs, positives=positives, negatives=hard, width=width)
    gone = rng.random(some.documents.shape[:2]) < share
    gone[:, 0] = False
    void = {"pair": VOID, "text": NO_TEXT, "group": NO_GROUP, "weight": 0}
    texts = some.document_texts
    changed = {
        name: np.where(gone, np.array(x, getattr(texts, name).dtype), getattr(texts, name)) for name, x in void.items()
    }
    changed["partners"] = np.where(gone[..., None], np.int32(NO_TEXT), texts.partners)
    some = dataclasses.replace(some, document_texts=dataclasses.replace(texts, **changed))
    fields = {"blocks": ALL, "false_negatives": "absolute"}
    want = define(define_infonce, some, {"temperature": 0.2}, **fields)
    assert_same(evaluate(infonce, some, "1", {"temperature": 0.2}, tile=5, **fields), want, tolerance=2e-5)


def test_places_change_nothing():
    """Other micro-batches or another order put the pairs in other places."""
    order = np.random.default_rng(0).permutation(len(case().queries))
    got = evaluate(
        infonce, permuted(case(), order), "1", {"temperature": 0.1}, exchange="gather", tile=2048, **SETTINGS["GTE"]
    )
    back = {name: x[np.argsort(order)] if x.ndim else x for name, x in got.gradients.items()}
    assert_same(dataclasses.replace(got, gradients=back), defined("GTE"))


def test_a_pair_without_negatives_costs_nothing_and_stays_finite():
    texts = describe(jnp.eye(4), jnp.ones((4, 2, 4)) / 2, in_batch=False, present=jnp.arange(2) < jnp.ones((4, 1)))
    loss = lambda q: infonce(dataclasses.replace(texts, queries=q), temperature=0.1, focal=0.5)[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(texts.queries)
    assert value == 0 and not gradient.any()


def test_accuracy_counts_queries_whose_positives_beat_every_negative():
    queries = jnp.eye(4)
    texts = describe(queries, queries[jnp.array([0, 1, 3, 2])][:, None])  # pairs 2 and 3 are swapped
    for hardness in (0.0, 3.0):
        assert infonce(texts, temperature=0.1, hardness=hardness, hardness_of="all")[1]["accuracy"] == 0.5
    assert sigmoid(texts, temperature=0.1, bias=0.0)[1]["accuracy"] == 0.5


def test_bfloat16_factors_float32_sums():
    rounded = {
        name: np.asarray(jnp.asarray(getattr(case(), name), jnp.bfloat16), np.float32)
        for name in ("queries", "documents")
    }
    want = define(define_infonce, dataclasses.replace(case(), **rounded), {"temperature": 0.1})
    got = evaluate(
        infonce, dataclasses.replace(case(), **rounded), "data 2", {"temperature": 0.1}, precision="bfloat16"
    )
    assert abs(got.value - want.value) <= 1e-5 * want.value
    for name in ("queries", "documents"):  # the slopes are rounded to bfloat16 too, before the products
        assert np.abs(got.gradients[name] - want.gradients[name]).max() <= 2**-7 * np.abs(want.gradients[name]).max()
    assert got.gradients["queries"].dtype == np.float32


def test_the_ring_is_taken_where_gathering_needs_much_memory(monkeypatch):
    def collectives() -> str:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
        with jax.set_mesh(mesh):
            vectors = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("data")))
            texts = lambda q, d: describe(q, d[:, None], axes=("data",))  # noqa: E731
            return (
                jax.jit(lambda q, d: infonce(spread(texts(q, d)), temperature=0.1)[0]).lower(vectors, vectors).as_text()
            )

    assert "all_gather" in collectives() and "collective_permute" not in collectives()
    monkeypatch.setattr(contrastive, "GATHER_BYTES", 0)
    assert "collective_permute" in collectives() and "all_gather" not in collectives()


def test_no_matrix_of_all_pairs_is_made():
    n, width = 8192, 16
    vectors = jax.ShapeDtypeStruct((n, width), jnp.float32)
    loss = lambda q, d: infonce(describe(q, d[:, None]), temperature=0.1, blocks=ALL, tile=512)[0]  # noqa: E731
    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(vectors, vectors).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * n * 4 / 8
