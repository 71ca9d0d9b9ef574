"""What tests of losses share: random steps with every turn that data can take, and a runner on several meshes.

A loss is held against its definition, written as plain loops over a step in torch's float64, whose gradients are exact:

    case = make_case(seed=0)
    want = define(definition, case, {"temperature": 0.1}, margin=0.2)  # definition(embedded, temperature=, margin=)
    got = evaluate(loss, case, "data 8", {"temperature": 0.1}, margin=0.2)
    assert_same(got, want)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
import torch
from jax.sharding import PartitionSpec as P

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.data.batch import HARD_NEGATIVE, NO_GROUP, NO_TEXT, SCOPE_ALL, SCOPE_OWN, VOID, Texts
from jaxembed.losses.embedded import Embedded, spread

MESHES = {
    "1": MeshConfig(1),
    "data 2": MeshConfig(2),
    "data 8": MeshConfig(8),
    "data 4 x fsdp 2": MeshConfig(4, 2),
    "data 2 x tensor 3": MeshConfig(2, 1, 3),
}
VECTORS = ("queries", "documents", "negative_queries")  # what a loss is differentiated by, beside what it learns


def make_case(
    seed: int = 0,
    pairs: int = 16,
    positives: int = 2,
    negatives: int = 3,
    width: int = 8,
    teacher_width: int = 0,
    negative_queries: bool = False,
    unit: bool = True,
) -> Embedded:
    """Draws a step of at least 12 pairs, NumPy arrays, float32 where they are no numbers of something.

    Whatever the seed, at places that it draws: two void pairs; two of weight 0, one of them with vectors of zeros; one
    without scores; one without hard negatives and one with a single one; else void slots at random, filled with zeros
    or with nonsense, scores NaN. Scores lie between 0 and 5, with ties. Two sources, of which the second keeps to its
    half of the batch; one pair takes negatives from everywhere, one only its own. Groups, a query met twice, a positive
    that is another's positive too, a hard negative that is the positive, a document that is another pair's query, and
    known positives that were not drawn.

    Args:
      seed: of the draw.
      pairs: N.
      positives: P, slots for positives; the first is always taken.
      negatives: K, slots for hard negatives.
      width: E.
      teacher_width: F, 0 without teacher vectors.
      negative_queries: whether hard negatives come with a query that they answer.
      unit: vectors of length 1.
    """
    rng = np.random.default_rng(seed)
    void, weightless, unscored, alone, single, twice, anywhere, own = np.split(rng.permutation(pairs)[:12], range(2, 9))
    queries, documents = _texts(rng, pairs, positives, negatives, (void, weightless, unscored, alone, single))

    queries.scope[anywhere], queries.scope[own[:1]] = SCOPE_ALL, SCOPE_OWN
    queries.text[twice] = queries.text[own[1]]
    documents.text[twice, 0] = documents.text[anywhere, 0]
    queries.partners[twice, 0] = documents.text[anywhere, 0]
    if negatives:
        documents.text[own[2], positives] = documents.text[own[2], 0]
        documents.text[single, positives] = queries.text[anywhere]
    queries.partners[own[1], -1] = documents.text[own[2], 0]  # a known positive that was not drawn, but is another's
    queries.partners[queries.pair == VOID] = NO_TEXT
    documents.text[documents.pair == VOID] = NO_TEXT
    # Documents know their query's scope and, the positives, its text.
    documents.scope[:] = queries.scope[:, None]
    documents.partners[:, :, 0] = np.where(documents.partners[:, :, 0] == NO_TEXT, NO_TEXT, queries.text[:, None])

    present = np.concatenate([queries.pair[:, None] != VOID, documents.pair != VOID], axis=1)
    vectors = _vectors(rng, present, width, unit, weightless[0])
    teacher = _vectors(rng, present, teacher_width, True, weightless[0]) if teacher_width else None
    if negative_queries:
        answered = _vectors(rng, present[:, 1 + positives :], width, unit, weightless[0])
    return Embedded(
        vectors[:, 0],
        vectors[:, 1:],
        queries,
        documents,
        answered if negative_queries else None,
        teacher[:, 0] if teacher_width else None,
        teacher[:, 1:] if teacher_width else None,
        np.uint32(seed + 17),
        positives,
    )


def _texts(
    rng: np.random.Generator, pairs: int, positives: int, negatives: int, turns: tuple[np.ndarray, ...]
) -> tuple[Texts, Texts]:
    """Returns what the queries [N] and documents [N, D] are, before texts are made equal."""
    void, weightless, unscored, alone, single = turns
    shape = pairs, positives + negatives
    rank = np.broadcast_to([*range(positives), *(HARD_NEGATIVE,) * negatives], shape).astype(np.int32)
    present = rng.random(shape) < 0.7
    present[:, 0], present[alone, positives:] = True, False
    present[single, positives:] = np.arange(negatives) == 0
    present[void] = False

    pair = rng.permutation(pairs).astype(np.int32)
    pair[void] = VOID
    weight = rng.uniform(0.5, 2, pairs)
    weight[void], weight[weightless] = 0, 0
    source = np.arange(pairs) % 3 // 2
    pool = source * (1 + np.arange(pairs) * 2 // pairs)
    group = np.where(pair % 5 == 0, 7, NO_GROUP)
    text = 100 * (1 + np.arange(pairs)[:, None]) + np.arange(1 + shape[1])
    is_positive = present & (rank >= 0)
    score = rng.integers(0, 11, shape) / 2
    score[unscored] = np.nan
    unknown = np.full((pairs, 1), NO_TEXT)

    def of_documents(value: np.ndarray, otherwise: int, where: np.ndarray = present) -> np.ndarray:
        return np.where(where, value[:, None], otherwise)

    def texts(**fields: np.ndarray) -> Texts:
        kinds = {"weight": np.float32, "score": np.float32}
        return Texts(**{name: np.array(value, kinds.get(name, np.int32)) for name, value in fields.items()})

    return texts(
        pair=pair,
        rank=np.zeros(pairs),
        text=np.where(pair == VOID, NO_TEXT, text[:, 0]),
        partners=np.concatenate(
            [np.where(is_positive[:, :positives], text[:, 1 : 1 + positives], NO_TEXT), unknown], 1
        ),
        group=group,
        source=source,
        pool=pool,
        scope=pool,
        weight=weight,
        score=np.full(pairs, np.nan),
    ), texts(
        pair=of_documents(pair, VOID),
        rank=rank,
        text=np.where(present, text[:, 1:], NO_TEXT),
        partners=of_documents(text[:, 0], NO_TEXT, is_positive)[..., None],
        group=of_documents(group, NO_GROUP),
        source=of_documents(source, 0, np.ones(shape, bool)),
        pool=of_documents(pool, 0, np.ones(shape, bool)),
        scope=of_documents(pool, 0, np.ones(shape, bool)),
        weight=of_documents(weight, 0, is_positive),
        score=np.where(present, score, np.nan),
    )


def _vectors(rng: np.random.Generator, present: np.ndarray, width: int, unit: bool, zeros: int) -> np.ndarray:
    """Returns float32 vectors [N, T, width]; zeros or nonsense where nothing is, zeros for one pair."""
    vectors = rng.normal(size=(*present.shape, width))
    if unit:
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors = np.where(present[..., None], vectors, rng.choice([0.0, 3.0], present.shape)[..., None])
    vectors[zeros] = 0
    return vectors.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a loss gave: its value, its metrics, and its gradients by VECTORS and by what it learns."""

    value: float
    metrics: dict[str, float]
    gradients: dict[str, np.ndarray]


def evaluate(
    loss: Callable,
    case: Embedded,
    mesh_name: str = "1",
    learned: Mapping[str, np.typing.ArrayLike] | None = None,
    **fields: float | str | tuple,
) -> Outcome:
    """Evaluates a loss on a mesh, spread as in a train step, compiled once per shapes, mesh and fields.

    Args:
      loss: called as (embedded, **learned, **fields), gives (value, metrics).
      case: of `make_case`.
      mesh_name: one of MESHES.
      learned: arrays or scalars that it is differentiated by, float32.
      **fields: its other arguments, static.
    """
    config = MESHES[mesh_name]
    mesh = sharding.make_mesh(config, jax.devices()[: np.prod([getattr(config, axis) for axis in sharding.AXES])])

    def put(x: np.ndarray) -> jax.Array:
        return sharding.put(x, mesh, P(sharding.BATCH, *(None,) * (x.ndim - 1)) if x.ndim else P())

    vectors = {name: getattr(case, name) for name in VECTORS if getattr(case, name) is not None}
    learned = {name: np.asarray(value, np.float32) for name, value in (learned or {}).items()}
    with jax.set_mesh(mesh):
        whole = jax.tree.map(lambda x: sharding.put(x, mesh, P()), learned)
        program = _program(loss, tuple(sorted(fields.items())))
        (value, metrics), gradients = program((jax.tree.map(put, vectors), whole), jax.tree.map(put, case))
    assert value.shape == () and value.dtype == np.float32
    assert all(metric.shape == () and metric.dtype == np.float32 for metric in metrics.values())
    gradients = {name: np.asarray(x) for part in gradients for name, x in part.items()}
    return Outcome(float(value), {name: float(x) for name, x in metrics.items()}, gradients)


@functools.cache
def _program(loss: Callable, fields: tuple[tuple[str, float | str | tuple], ...]) -> Callable:
    def call(by: tuple[dict, dict], case: Embedded) -> tuple[jax.Array, dict[str, jax.Array]]:
        vectors, learned = by
        return loss(spread(dataclasses.replace(case, **vectors)), **learned, **dict(fields))

    return jax.jit(jax.value_and_grad(call, has_aux=True))


def define(
    definition: Callable,
    case: Embedded,
    learned: Mapping[str, np.typing.ArrayLike] | None = None,
    **fields: float | str | tuple,
) -> Outcome:
    """Evaluates a definition, called as `evaluate` calls a loss, on torch tensors in float64; it gives the value alone.

    Its gradients are torch's.
    """

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(x, np.float64 if np.issubdtype(x.dtype, np.floating) else np.int64))

    tensors = jax.tree.map(tensor, case)
    by = {name: getattr(tensors, name).requires_grad_() for name in VECTORS if getattr(case, name) is not None}
    learned = {name: tensor(np.asarray(x, np.float32)).requires_grad_() for name, x in (learned or {}).items()}
    value = definition(tensors, **learned, **fields)
    by |= learned
    gradients = torch.autograd.grad(value, list(by.values()), allow_unused=True, materialize_grads=True)
    return Outcome(float(value.detach()), {}, {name: x.numpy() for name, x in zip(by, gradients)})


def assert_same(got: Outcome, want: Outcome, tolerance: float = 1e-5) -> None:
    """Compares values and gradients: max|got − want| / max|want| of each array; exactly 0 where the definition's is."""
    assert abs(got.value - want.value) <= tolerance * abs(want.value), (got.value, want.value)
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        error = np.abs(got.gradients[name] - gradient).max(initial=0)
        assert error <= tolerance * np.abs(gradient).max(initial=0), (name, error, np.abs(gradient).max(initial=0))
        if gradient.ndim:
            assert not got.gradients[name][~gradient.any(-1)].any(), f"{name}: what counts nowhere has a gradient"


def emptied(case: Embedded) -> Embedded:
    """Returns a step of the same shapes in which every slot is void and every vector zero."""
    void = {"pair": VOID, "text": NO_TEXT, "group": NO_GROUP, "weight": 0, "score": np.nan}

    def texts(x: Texts) -> Texts:
        return dataclasses.replace(x, **{name: np.full_like(getattr(x, name), value) for name, value in void.items()})

    zeros = {name: np.zeros_like(getattr(case, name)) for name in VECTORS if getattr(case, name) is not None}
    return dataclasses.replace(
        case, query_texts=texts(case.query_texts), document_texts=texts(case.document_texts), **zeros
    )


def permuted(case: Embedded, order: np.ndarray) -> Embedded:
    """Returns the same pairs in another order of their places, as other devices or micro-batches would have them."""
    return jax.tree.map(lambda x: x[order] if x.ndim else x, case)
