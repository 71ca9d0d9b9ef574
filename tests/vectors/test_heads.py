"""Layers on vectors: closed forms against NumPy, training on vectors that a layer can mend, pairs and the cache."""

import numpy as np
import pytest

from jaxembed.errors import UserError
from jaxembed.similarity import unit
from jaxembed.vectors.encoded import CachedEncoder
from jaxembed.vectors.head_training import HeadSettings, reciprocal_rank, train_head
from jaxembed.vectors.heads import (
    Affine,
    Sums,
    fit_drift,
    fit_map,
    fit_pca,
    fit_whitening,
    mean_cosine,
)
from jaxembed.vectors.record_pairs import NONE, Pairs, batches, endless, read_pairs

E = 8


def sums_of(x, y=None, parts=3):
    """The sums of vectors that come in parts."""
    sums = Sums()
    for i in range(parts):
        sums.add(x[i::parts], None if y is None else y[i::parts])
    return sums


@pytest.fixture(scope="module")
def vectors():
    """Vectors that vary more in some directions than in others, far from 0."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(500, E)) * np.linspace(3, 0.1, E) @ np.linalg.qr(rng.normal(size=(E, E)))[0]
    return (mixed + 5).astype(np.float32)


def test_pca_is_the_svd_of_centred_vectors(vectors):
    centred = np.float64(vectors) - np.float64(vectors).mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    layer, kept = fit_pca(sums_of(vectors), 3, True, "--dim=3")
    got, want = layer(vectors), centred @ directions[:3].T
    np.testing.assert_allclose(got, want * np.sign((got * want).sum(0)), atol=2e-5)
    assert kept == pytest.approx((sizes[:3] ** 2).sum() / (sizes**2).sum(), rel=1e-9)
    plain, _ = fit_pca(sums_of(vectors), 3, False, "--dim=3")
    assert plain.bias is None
    np.testing.assert_array_equal(plain.kernel, layer.kernel)
    whole, all_of_it = fit_pca(sums_of(vectors), 0, False, "--dim=0")
    turned = whole(vectors)
    np.testing.assert_allclose(turned @ turned.T, vectors @ vectors.T, rtol=1e-5)
    assert all_of_it == pytest.approx(1)
    assert (np.take_along_axis(whole.kernel, np.abs(whole.kernel).argmax(0)[None], 0) > 0).all()


@pytest.mark.parametrize("dim", [E, 3])
def test_whitened_vectors_vary_alike_in_all_directions(vectors, dim):
    layer, _ = fit_whitening(sums_of(vectors), dim, "--dim")
    white = np.float64(vectors) @ layer.kernel + layer.bias
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(dim), atol=1e-8)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(layer(vectors), white, atol=2e-4)  # in float32
    assert mean_cosine(vectors) > 0.8 and abs(mean_cosine(layer(vectors))) < 0.01


def test_vectors_that_vary_too_little(vectors):
    with pytest.raises(UserError, match="--dim=4: the 3 vectors vary in 2 directions of 8 only"):
        fit_whitening(sums_of(vectors[:3]), 4, "--dim=4")
    assert fit_whitening(sums_of(vectors[:3]), 0, "")[0].kernel.shape == (E, 2)
    with pytest.raises(UserError, match="--ridge=0: the 3 vectors do not vary in all directions"):
        fit_map(sums_of(vectors[:3], vectors[:3]), 0.0, "--ridge=0")


def test_the_mean_cosine_is_that_of_all_pairs(vectors):
    few = vectors[:20]
    cosines = unit(few) @ unit(few).T
    assert mean_cosine(few) == pytest.approx((cosines.sum() - 20) / (20 * 19), rel=1e-5)


def test_drift_takes_off_what_was_added():
    rng = np.random.default_rng(1)
    old = unit(rng.normal(size=(200, E)).astype(np.float32))
    shift = rng.normal(scale=0.3, size=E)
    for length in (1.0, 7.0):
        new = length * (old + shift)  # before they are brought to length 1, which here they are not
        layer = fit_drift(np.float64(new / length).mean(0), np.float64(old).mean(0), length)
        np.testing.assert_allclose(unit(layer(new.astype(np.float32))), old, atol=1e-6)


def test_a_map_leads_back_through_a_turn_and_a_shift():
    rng = np.random.default_rng(2)
    turn, shift = np.linalg.qr(rng.normal(size=(E, E)))[0], rng.normal(size=E)
    old = rng.normal(size=(300, E))
    new = (old - shift) @ turn.T
    layer = fit_map(sums_of(new, old), 0.0, "")
    np.testing.assert_allclose(layer.kernel, turn, atol=1e-9)
    np.testing.assert_allclose(layer.bias, shift, atol=1e-9)
    noisy, ridge = old + rng.normal(scale=0.3, size=old.shape), 0.2
    layer = fit_map(sums_of(new, noisy), ridge, "")
    x, y = new - new.mean(0), noisy - noisy.mean(0)
    rows = np.sqrt(ridge * np.square(x).sum() / E) * np.eye(E)  # ridge regression as least squares of more rows
    want = np.linalg.lstsq(np.concatenate([x, rows]), np.concatenate([y, np.zeros((E, E))]), rcond=None)[0]
    np.testing.assert_allclose(layer.kernel, want, atol=1e-9)


N = 160


def hidden_match(seed=0):
    """Pairs whose vectors agree in half of the dimensions, beneath a louder half that says nothing.

    Raw: the lengths are 3.
    """
    rng = np.random.default_rng(seed)
    meaning = rng.normal(size=(N, E))
    sides = (np.concatenate([meaning, 4 * rng.normal(size=(N, E))], axis=1) for _ in range(2))
    queries, documents = (3 * unit(side.astype(np.float32)) for side in sides)
    numbers = np.arange(N, dtype=np.int32)
    negatives = np.where(np.arange(N)[:, None] % 2, (numbers[:, None] + 7) % N, NONE).astype(np.int32)
    texts = tuple(map(str, range(N)))
    pairs = Pairs(texts, texts, numbers, N + numbers, numbers, negatives, np.full(N, -1, np.int32))
    return pairs, queries, documents


@pytest.mark.parametrize(
    "settings",
    [
        HeadSettings(epochs=12, batch_size=32, learning_rate=0.03, held_out=0.3, patience=12, temperature=0.2),
        HeadSettings(rank=8, epochs=12, batch_size=32, learning_rate=0.05, held_out=0.3, queries_alone=True),
    ],
    ids=["linear", "residual of queries"],
)
def test_training_finds_the_dimensions_that_match(settings):
    pairs, queries, documents = hidden_match()
    told = []
    head = train_head(pairs, queries, documents, settings, True, "--pairs", told.append)
    assert head.pairs == N - 48 and head.held_out == 48 and head.best > 3
    assert head.loss[1] < 0.8 * head.loss[0] and head.loss[1] == pytest.approx(min(told))
    assert head.mrr[1] > 1.5 * head.mrr[0]
    judged = pairs.part(np.isin(pairs.query, np.random.default_rng((0, 0)).permutation(N)[:48]))
    moved = documents if settings.queries_alone else head.layer(documents)
    assert head.mrr[1] == pytest.approx(reciprocal_rank(pairs, judged, head.layer(queries), moved, True))
    if settings.rank:  # the same seed gives the same layer, another does not
        again = train_head(pairs, queries, documents, settings, True, "--pairs").layer
        np.testing.assert_array_equal(again.kernel, head.layer.kernel)
        assert np.linalg.matrix_rank(head.layer.kernel - np.eye(2 * E), tol=1e-5) == 8


def test_a_layer_that_helps_nobody_is_left_as_it_begins():
    pairs, queries, _ = hidden_match()
    settings = HeadSettings(epochs=3, batch_size=32, learning_rate=3.0, patience=2, held_out=0.3, queries_alone=True)
    head = train_head(pairs, queries, queries, settings, True, "--pairs")
    assert head.best == 0 and head.epochs == 2 and head.loss[0] == head.loss[1] and head.mrr == (100, 100)
    np.testing.assert_array_equal(head.layer.kernel, np.eye(2 * E))
    assert not head.layer.bias.any()


def test_fewer_outputs_begin_with_the_directions_of_most_variance():
    pairs, queries, documents = hidden_match()
    settings = HeadSettings(epochs=1, batch_size=32, learning_rate=1e-9, dim=5, held_out=0.3)
    head = train_head(pairs, queries, documents, settings, True, "--pairs")
    sums = sums_of(np.concatenate([queries, documents]))
    np.testing.assert_allclose(head.layer.kernel, fit_pca(sums, 5, False, "")[0].kernel, atol=1e-6)


def test_too_few_queries():
    pairs, queries, documents = hidden_match()
    with pytest.raises(UserError, match=r"--pairs: has 160 queries, of which a part 0\.001 is held out"):
        train_head(pairs, queries, documents, HeadSettings(held_out=0.001), True, "--pairs")


def test_ranks_leave_out_what_is_no_wrong_answer():
    documents = np.float32([[1, 0], [0.9, 0], [0.8, 0], [0.7, 0], [0.6, 0]])
    queries = np.float32([[1, 0], [0, 1]])
    query, positive = np.int32([0, 0, 1]), np.int32([3, 4, 2])
    pairs = Pairs(("q", "r"), tuple("abcde"), query, query + 5, positive, np.full((3, 1), NONE), np.full(3, -1))

    def rank(**changes):
        changed = Pairs(**{**vars(pairs), **changes})
        return 100 / reciprocal_rank(changed, changed.part(np.array([0])), queries, documents, False)

    assert rank() == pytest.approx(4)  # behind a, b and c
    assert rank(query_id=np.int32([0, 0, 6])) == pytest.approx(3)  # a is the query itself
    assert rank(group=np.int32([0, 0, 0])) == pytest.approx(3)  # c is of its group
    assert rank(group=np.int32([0, 0, 0]), negatives=np.int32([[2], [NONE], [NONE]])) == pytest.approx(4)
    assert rank(positive=np.int32([3, 1, 2])) == pytest.approx(2)  # the best of its positives counts
    documents[1] = documents[3]
    assert rank() == pytest.approx(4)  # what is just as near stands before it


def test_records_become_pairs(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(
        '{"query": "a", "positive": ["b", "c"], "negative": ["d", "e"], "group": "g"}\n'
        '{"query": "b", "positive": "c", "label": "g"}\n{"query": "a", "positive": "d"}\n'
    )
    pairs = read_pairs(str(path), "--pairs", 1)
    assert pairs.queries == ("a", "b") and pairs.documents == ("d", "b", "c")
    assert pairs.query.tolist() == [0, 0, 1, 0] and pairs.positive.tolist() == [1, 2, 2, 0]
    assert pairs.negatives.tolist() == [[0], [0], [NONE], [NONE]] and pairs.group.tolist() == [0, 0, 1, -1]
    assert pairs.query_id.tolist() == [3, 3, 1, 3]  # b is a document too
    assert read_pairs(str(path), "--pairs", 0).negatives.shape == (4, 0)
    path.write_text('{"sentence1": "a", "sentence2": "b", "score": 0.5}\n')
    with pytest.raises(UserError, match=r"--probe: .*records\.jsonl has graded pairs"):
        read_pairs(str(path), "--probe", 1)


def test_batches_are_drawn_by_seed_and_epoch():
    one = batches(10, 3, 5, 1)
    assert one.shape == (3, 3) and len(set(one.reshape(-1).tolist())) == 9
    assert (one == batches(10, 3, 5, 1)).all() and not (one == batches(10, 3, 5, 2)).all()
    drawn = endless(10, 3, 5)
    first = [next(drawn).tolist() for _ in range(6)]
    assert first[:3] == batches(10, 3, 5, 0).tolist() and first[3:] == one.tolist()


class Texts:
    """Stands for an embedder, and counts what it is asked for."""

    width, prompts = 2, {"query": "q: ", "document": ""}

    class blueprint:
        head, max_length = "head", 8

        class tokenizer:
            fingerprint = staticmethod(lambda: "words")

    def __init__(self):
        self.asked = 0

    def encode(self, texts, prompt_name, show_progress_bar):
        self.asked += len(texts)
        return np.float32([[len(self.prompts[prompt_name] + text), np.nan if text == "bad" else 1] for text in texts])


def test_the_cache_knows_what_it_has_encoded(tmp_path):
    model = Texts()
    encode = CachedEncoder(model, "weights", tmp_path / "cache")
    first = encode(["a", "bb"], "query")
    np.testing.assert_array_equal(encode(["a", "bb"], "query"), first)
    assert model.asked == 2 and first[:, 0].tolist() == [4, 5]
    encode(["a", "bb"], "document")
    encode(["bb", "a"], "query")
    CachedEncoder(model, "other", tmp_path / "cache")(["a", "bb"], "query")
    assert model.asked == 8 and len(list((tmp_path / "cache").iterdir())) == 4
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"broken")
    np.testing.assert_array_equal(encode(["a", "bb"], "query"), first)
    assert model.asked == 10
    with pytest.raises(UserError, match="1 of 2 vectors are not finite"):
        encode(["a", "bad"], "query")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache=.*file: cannot be written"):
        CachedEncoder(model, "weights", tmp_path / "file")(["a"], "query")


def test_an_affine_layer_is_what_it_says():
    x = np.float32([[1, 2], [3, 4]])
    assert Affine(np.eye(2) * 2)(x).tolist() == [[2, 4], [6, 8]]
    assert Affine(np.eye(2), np.array([1.0, 0]))(x).dtype == np.float32
