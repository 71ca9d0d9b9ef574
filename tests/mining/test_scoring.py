"""Scores of a model: each text encoded once, searched and compared as the model compares vectors."""

import types

import jax
import numpy as np
import pytest

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.data.record_formats import Record
from jaxembed.errors import UserError
from jaxembed.mining.collection import Collection
from jaxembed.mining.scoring import Scorer, prompts_of, require_searchable
from jaxembed.similarity import all_pairs

RECORDS = [Record(f"q{i}", (f"p{i}", f"c{i}"), (f"n{i % 3}",)) for i in range(12)]
CORPUS = [f"c{i}" for i in range(9)] + ["c4", "c0"]


class Model:
    """Vectors drawn by the text, in place of an embedder; counts what it encodes."""

    def __init__(self, similarity: str) -> None:
        self.blueprint = types.SimpleNamespace(similarity=similarity)
        self.mesh = sharding.make_mesh(MeshConfig(1), jax.devices()[:1])
        self.encoded: list[str] = []

    def encode(self, texts: list[str], prompt: str, **_: object) -> np.ndarray:
        self.encoded += texts
        draws = (np.random.default_rng([*f"{prompt}{text}".encode()]).normal(size=6) for text in texts)
        return np.stack([*draws]).astype(np.float32)


class Stored:
    """The corpus's vectors in blocks, as a folder gives them."""

    width = 6

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors

    def __len__(self) -> int:
        return len(self._vectors)

    def blocks(self):
        for start in range(0, len(self._vectors), 4):
            yield start, self._vectors[start : start + 4]


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("kind", ["encoded", "stored", "pool"])
def test_search_and_scores_are_the_models(similarity, kind):
    model = Model(similarity)
    collection = Collection.of(RECORDS, CORPUS, distinct=kind != "stored")
    vectors = model.encode(collection.documents, "d: ")
    stored = Stored(vectors[: collection.n_corpus]) if kind == "stored" else None
    pool = np.array([1, 4, 7, 8, 20]) if kind == "pool" else np.arange(len(vectors))
    model.encoded = []
    scorer = Scorer(model, collection, ("q: ", "d: "), stored, pool if kind == "pool" else None)
    want = all_pairs(model.encode(collection.queries, "q: "), vectors, similarity)
    model.encoded = model.encoded[: len(collection.queries)]
    scores, numbers = scorer.search(np.array([3, 0, 11]), 4)
    best = pool[np.argsort(-want[[3, 0, 11]][:, pool], axis=1, kind="stable")[:, :4]]
    assert numbers.tolist() == best.tolist()
    np.testing.assert_allclose(scores, np.take_along_axis(want[[3, 0, 11]], best, axis=1), rtol=1e-4, atol=1e-4)
    queries, documents = collection.query[collection.positives.owners], collection.positives.values
    np.testing.assert_allclose(scorer.score(queries, documents), want[queries, documents], rtol=1e-5, atol=1e-5)
    everything = [*collection.queries, *collection.documents[collection.n_corpus if kind == "stored" else 0 :]]
    if kind == "pool":
        assert len(set(model.encoded)) == len(model.encoded) and {*model.encoded} < {*everything}
    else:
        assert sorted(model.encoded) == sorted(everything)


def test_a_similarity_that_no_dot_product_stands_for():
    with pytest.raises(UserError, match="--model=m: compares vectors by Manhattan distance"):
        require_searchable(Model("manhattan"), "--model=m")


@pytest.mark.parametrize(("prompt", "behind"), [("{instruction}: ", ["a: ", ": ", "b{}: "]), ("q: ", ["q: "] * 3)])
def test_instructions_fill_the_prompt(prompt, behind):
    model = Model("dot")
    records = [Record("q", ("p",), instruction="a"), Record("q", ("p",)), Record("q", ("p",), instruction="b{}")]
    scorer = Scorer(model, Collection.of([*records, records[0]]), (prompt, "d: "))
    assert model.encoded == ["q"] * len(set(behind))  # each once, whatever fills no prompt
    queries = np.concatenate([model.encode(["q"], each) for each in behind])
    want = queries @ model.encode(["p"], "d: ")[0]
    np.testing.assert_allclose(scorer.score(np.arange(3), np.zeros(3, np.int64)), want, rtol=1e-6)


def test_prompts_by_name():
    prompts = {"query": "{instruction} ", "document": "", "told": "of {instruction}: "}
    model = types.SimpleNamespace(prompts=prompts, prompt_of=lambda name: prompts[name] if name else "")
    assert prompts_of(model, "--model=m") == ("{instruction} ", "")
    assert prompts_of(model, "--model=m", "document", "") == ("", "")
    with pytest.raises(UserError, match="--prompt_name=x: the prompts of --model=m are query, document, told"):
        prompts_of(model, "--model=m", "query", "x")
    with pytest.raises(UserError, match=r"--model=m: its prompt 'told' has \{instruction\}, but a document"):
        prompts_of(model, "--model=m", "query", "told")
