"""The sampler against the same rule in NumPy, and the command."""

import io
import subprocess
import sys
import types

import numpy as np
import pytest
from rich.console import Console
from word_models import SPECIAL, V, all_scores, log_softmax, make, sentences, tokenizer, without

from jaxembed import sample
from jaxembed.errors import UserError
from jaxembed.filling import Sampling, chances, fill, mask_some

BARRED = (0, 2, 3, 4, *range(55, V))  # special tokens, and what the tokenizer does not know


def by_hand(embedder, ids: np.ndarray, masked: np.ndarray, steps: int) -> np.ndarray:
    """Fills one text in: a loop over rounds, every score of every token."""
    ids, left = np.where(masked, 4, ids).astype(np.int64), masked.copy()
    total = int(masked.sum())
    steps = min(steps or total, total)
    for number in range(steps):
        scores = all_scores(embedder, ids[None])[0]
        scores[:, BARRED] = -np.inf
        sure = np.where(left, log_softmax(scores).max(-1), -np.inf)
        for place in np.argsort(-sure)[: total // steps + (number < total % steps)]:
            ids[place], left[place] = scores[place].argmax(), False
    assert not left.any()
    return ids


@pytest.mark.parametrize(("kind", "devices"), [("bert", 1), ("bert", 8), ("llama both ways", 8)])
def test_words_are_put_in_as_by_hand(kind, devices):
    embedder, one = make(kind, devices), make(kind)
    texts = embedder.blueprint.tokenizer.encode([*sentences(5, 8), *sentences(3, 20, 1)], 32)
    masked = mask_some(texts, embedder.blueprint.language, 0.5, 3)
    assert [int(places.sum()) for places in masked] == [4] * 5 + [10] * 3
    for steps in (0, 3):
        filled = fill(embedder, texts, masked, Sampling(steps))
        for ids, places, words in zip(texts, masked, filled):
            assert words.tolist() == by_hand(one, np.array(ids), places, steps).tolist()
            assert (words == ids)[~places].all() and not np.isin(words[places], BARRED).any()
    assert [x.tolist() for x in fill(embedder, texts, masked, Sampling(3))] != [
        x.tolist() for x in fill(embedder, texts, masked, Sampling(1))
    ]


def test_words_are_drawn_by_their_probabilities():
    embedder, temperature, count = make("bert"), 2.0, 1500
    ids = embedder.blueprint.tokenizer.encode(["w1 w2 w3 w4"], 32)[0]
    masked = ids == 7  # w2
    how = Sampling(temperature=temperature, seed=5)
    drawn = np.array([words[2] for words in fill(embedder, [ids] * count, [masked] * count, how)])
    scores = all_scores(embedder, np.where(masked, 4, ids)[None])[0, 2]
    scores[list(BARRED)] = -np.inf
    want = np.exp(log_softmax(scores / temperature))
    got = np.bincount(drawn, minlength=V) / count
    assert want.max() < 0.9 and not got[list(BARRED)].any()
    assert (np.abs(got - want) < 4 * np.sqrt(want * (1 - want) / count) + 1e-3).all()
    few = [ids] * 20, [masked] * 20
    again, other = (
        [int(words[2]) for words in fill(embedder, *few, Sampling(temperature=temperature, seed=seed))]
        for seed in (5, 6)
    )
    assert again == drawn[:20].tolist() != other


def test_what_guesses_would_restore():
    texts = [np.array([2, 5, 5, 6, 3]), np.array([2, 5, 7, 3])]
    most, drawn = chances(texts, make("bert").blueprint.language)
    assert most == pytest.approx(3 / 5) and drawn == pytest.approx((9 + 1 + 1) / 25)


def test_a_mask_at_the_start_has_no_state_before_it():
    ids = np.array([5, 6, 3])
    with pytest.raises(UserError, match="first token of a text is masked"):
        fill(make("llama both ways"), [ids], [ids == 5], Sampling())


def test_models_that_fill_nothing_in():
    ids = np.array([2, 5, 3])
    for embedder, message in (
        (make("llama"), "the model is causal, it sees nothing behind a masked word"),
        (without(make("bert")), "the model predicts no words"),
    ):
        with pytest.raises(UserError, match=message):
            fill(embedder, [ids], [ids == 5], Sampling())


def run(monkeypatch, **values):
    """What the command does, on a tiny model: its JSON line's figures, and what it prints."""
    defaults = {"text": "", "texts": "", "mask_rate": 0.5, "seed": 1, "steps": 0, "temperature": 0.0, "show": 1}
    monkeypatch.setattr(sample.flags, "FLAGS", types.SimpleNamespace(**defaults | values))
    console = Console(record=True, width=200, force_terminal=True, file=io.StringIO())
    if "text" in values:
        said = sample._fill_one(make("bert"), console)
    else:
        said = sample._restore(make("bert"), sentences(4, 8), console, bar=False)
    return said, console.export_text(styles=True)


def test_the_command_fills_a_text(monkeypatch):
    for text in ("w1 [MASK] w3 w4", "[MASK] w1 w3 [MASK]"):
        said, shown = run(monkeypatch, text=text)
        words = said["filled"].split()
        kept = [(word, given) for word, given in zip(words, text.split()) if given != "[MASK]"]
        assert len(words) == 4 and all(word == given for word, given in kept)
        assert said["masked"] == text.count("[MASK]") and not {*words} & {*SPECIAL}
        assert "[MASK]" in shown and all(word in shown for word in words)
    with pytest.raises(UserError, match="has no masked word: put"):
        run(monkeypatch, text="w1 w2")
    with pytest.raises(UserError, match="42 tokens, the model takes 32"):
        run(monkeypatch, text="[MASK] " * 40)


def test_the_command_restores_texts(monkeypatch):
    said, shown = run(monkeypatch)
    embedder = make("bert")
    tokens = embedder.blueprint.tokenizer.encode(sentences(4, 8), 32)
    masked = mask_some(tokens, embedder.blueprint.language, 0.5, 1)
    filled = fill(embedder, tokens, masked, Sampling())
    right = sum(int((a == b)[c].sum()) for a, b, c in zip(tokens, filled, masked))
    assert said["restored"] == right / 16 and (said["texts"], said["masked"]) == (4, 16)
    assert said["most_frequent"] >= said["unigram"] > 0
    assert shown.count("[MASK]") == 4 and "\x1b[1;31m" in shown  # of the one text that is shown
    assert f"{100 * said['restored']:.2f}" in shown


def test_pieces_are_the_text():
    shown = sample.Shown(tokenizer())
    ids = shown.encode("w1 [MASK] w3", 32)
    assert ids.tolist() == [2, 6, 4, 8, 3]
    assert shown._pieces(ids) == [("w1", 1), (" [MASK]", 2), (" w3", 3)]
    assert shown.decode(ids) == "w1 [MASK] w3"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--text=a [MASK]"], "--model is missing"),
        (["--model=x"], "give one of --text="),
        (["--model=x", "--texts=none.txt"], "--texts: no such file or folder: none.txt"),
        (["--model=x", "--text=a", "--mask_rate=0.2"], "--mask_rate masks words of --texts"),
    ],
)
def test_mistakes_are_one_line_and_code_2(flags, said):
    done = subprocess.run([sys.executable, "-m", "jaxembed.sample", *flags], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and said in done.stderr
