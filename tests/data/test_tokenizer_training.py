"""A tokenizer made from the training texts: its ids elsewhere, always the same ones, and the run that keeps it."""

import json
import os
import subprocess
import sys

import pytest
from test_tokenizer import ODD_TEXTS
from tiny_run import SHAPE, WORDS, tiny_config, write_lines

from jaxembed import model_source, sharding
from jaxembed.config import default_config, load
from jaxembed.data import tokenizer_training
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.data.tokenizer_training import train_tokenizer, training_texts
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError

TEXTS = [f"{a} {b}Of{b.title()} {b}_{a} 日本 Größe" for a, b in zip(WORDS, reversed(WORDS))] * 3
SIZE = 340
IN_A_PROCESS = """
import json, sys
from jaxembed.data.tokenizer_training import train_tokenizer
print(train_tokenizer(json.load(sys.stdin), int(sys.argv[1])).fingerprint())
"""


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, SIZE)


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer._backend.id_to_token(i) for i in tokenizer.tokenize([text])[0]]


def test_special_tokens_and_size(trained):
    assert trained.vocab_size == SIZE
    assert (trained.pad_id, trained.cls_id, trained.sep_id, trained.mask_id) == (0, 2, 3, 4)
    assert (trained.n_special, trained.n_suffix) == (2, 1) and trained.appends_eos


def test_a_word_has_the_same_tokens_wherever_it_stands(trained):
    (inner,) = {tuple(tokens(trained, text)[1:-1]) for text in ("kaka", " KAKA ", "Kaka\n")}
    for text in ("kaka_kaka", "kakaKaka", "KakaKaka", "kaka kaka", "KAKAKaka"):
        assert tokens(trained, text) == ["[CLS]", *inner, *inner, "[SEP]"]


def test_any_text_has_tokens_and_none_is_unknown(trained):
    for text in [*ODD_TEXTS, "".join(map(chr, range(0x250)))]:
        assert "[UNK]" not in tokens(trained, text)
    assert len(trained.tokenize(["🙂"])[0]) == 2 + 4  # four bytes that nothing was learnt of


def test_few_texts_give_a_small_vocabulary():
    assert train_tokenizer(["ab ab"], SIZE).vocab_size == 256 + 5 + 1


def test_same_result_in_other_processes_and_with_other_threads(trained):
    assert train_tokenizer(TEXTS, SIZE).fingerprint() == trained.fingerprint()
    for seed, threads in (("1", "1"), ("2", "4")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        command = [sys.executable, "-c", IN_A_PROCESS, str(SIZE)]
        done = subprocess.run(
            command, input=json.dumps(TEXTS), env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == trained.fingerprint()


def test_same_ids_in_transformers_and_again_here(trained, tmp_path):
    from transformers import AutoTokenizer

    trained.save(tmp_path, 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*ODD_TEXTS, *TEXTS[:5], "def getHTTPResponse(self, max_size=12345):\n    return None"]
    expected = [ids.tolist() for ids in trained.encode(texts, 64)]
    assert theirs(texts, truncation=True, max_length=64)["input_ids"] == expected
    again = Tokenizer.load(f"hf:{tmp_path}")
    assert again.fingerprint() == trained.fingerprint()


def test_same_ids_in_the_exported_folder_in_sentence_transformers(tmp_path):
    import jax
    from sentence_transformers import SentenceTransformer

    config = tiny_config(tmp_path, tokenizer=f"train:bpe:{SIZE}")
    blueprint, load_weights = model_source.open_source(config, tmp_path / "run")
    factory, mesh = blueprint.factory(model_source.options(config.model)), sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        Embedder(blueprint, factory, load_weights(factory), mesh).save(tmp_path / "export")
    model = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    for text in [*ODD_TEXTS, *TEXTS[:5]]:
        (ids,) = blueprint.tokenizer.encode([text], blueprint.max_length)
        assert model.preprocess([text])["input_ids"][0].tolist() == ids.tolist()


def test_texts_are_those_of_all_sources_and_stages_with_their_prompts(tmp_path):
    def source(name: str, **changes):
        rows = [{"query": f"{name} q", "positive": [f"{name} p", f"{name} P"], "negative": f"{name} n"}]
        rows[0] |= changes.pop("row", {})
        return {"path": str(write_lines(tmp_path / f"{name}.jsonl", rows)), **changes}

    c = default_config()
    c.steps, c.model.arch, c.model.shape, c.tokenizer = 1, "bert", SHAPE, f"train:bpe:{SIZE}"
    c.prompts = {"query": "ask {instruction}: ", "document": ""}
    first = source("a", row={"instruction": "now"})
    c.data.train = (first, source("b", prompt={"query": "", "document": "read: "}))
    later = {"train": (first, source("c"))}
    c.stages = ({"steps": 1}, {"steps": 1, "data": later})
    a = ["ask now: a q", "a p", "a P", "a n"]
    b = ["b q", "read: b p", "read: b P", "read: b n"]
    assert list(training_texts(load(c))) == [*a, *b, "ask : c q", "c p", "c P", "c n"]


def test_many_texts_are_sampled_evenly_and_always_alike(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "MAX_TEXTS", 100)
    monkeypatch.setattr(tokenizer_training, "MAX_CHARACTERS", 3)
    texts = [f"{i:03}…" for i in range(1000)]
    kept = tokenizer_training._sample(iter(texts))
    assert len(set(kept)) == len(kept) == 100 and {len(text) for text in kept} == {3}
    assert kept == tokenizer_training._sample(iter(texts))
    assert 30 < sum(int(text) >= 500 for text in kept) < 70
    assert tokenizer_training._sample(texts[:50]) == [text[:3] for text in texts[:50]]


@pytest.mark.parametrize("arch", ["bert", "roberta", "xlm-roberta"])
def test_every_architecture_takes_it(tmp_path, arch):
    config = tiny_config(tmp_path, tokenizer=f"train:bpe:{SIZE}", model__arch=arch)
    blueprint, _ = model_source.open_source(config, tmp_path / "run")
    hf = blueprint.hf_config
    assert (hf["vocab_size"], hf["pad_token_id"], hf["eos_token_id"]) == (blueprint.tokenizer.vocab_size, 0, 3)


def test_a_run_keeps_its_tokenizer(tmp_path):
    config = tiny_config(tmp_path, tokenizer=f"train:bpe:{SIZE}")
    first, _ = model_source.open_source(config, tmp_path / "run")
    first.save(tmp_path / "run" / model_source.FOLDER)
    for name in ("a", "b"):
        write_lines(tmp_path / f"{name}.jsonl", [{"query": "all other texts", "positive": "than before"}])
    again, _ = model_source.open_source(config, tmp_path / "run")
    assert again.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    other, _ = model_source.open_source(config, tmp_path / "another run")
    assert other.tokenizer.fingerprint() != first.tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("tokenizer", "init", "said"),
    [
        ("train:wordpiece:8192", "scratch", "wants 'train:bpe:SIZE'"),
        ("train:bpe", "scratch", "wants 'train:bpe:SIZE'"),
        ("train:bpe:many", "scratch", "wants 'train:bpe:SIZE'"),
        ("train:bpe:-5", "scratch", "wants 'train:bpe:SIZE'"),
        ("train:bpe:260", "scratch", "at least 261 tokens"),
        ("train:bpe:8192", "hf:folder", "the weights of hf:folder know the tokens of their own tokenizer"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path, tokenizer, init, said):
    with pytest.raises(UserError, match=r"config\.tokenizer") as refused:
        tiny_config(tmp_path, tokenizer=tokenizer, model__init=init)
    assert said in str(refused.value) and "\n" not in str(refused.value)
