"""Token ids against sentence-transformers and transformers, on texts of every kind."""

import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, processors, trainers

from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import UserError

ODD_TEXTS = [
    "",
    "   ",
    "a",
    "Hello, World!",
    "\x00",
    "nul\x00inside \x01\x02\x7f",
    "tab\tnew\nline\r\u2028end",
    "🙂👩‍👩‍👧 family",
    "שלום עולם",
    "مرحبا بالعالم",
    "東京は日本の首都です。",
    "é e\u0301 ﬁ Ⅷ İ ß",
    "\u200b\ufeff\ufffd",
    "[CLS] [SEP] [MASK] [PAD] <s> </s> <mask>",
    "x" * 500,
    "漢字" * 400,
    "many words " * 5000,
]


@pytest.fixture(scope="module")
def minilm(minilm_dir):
    return Tokenizer.load(f"hf:{minilm_dir}")


def open_in_sentence_transformers(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def their_ids(model, texts, prompt=None):
    return [model.preprocess([text], prompt=prompt)["input_ids"][0].tolist() for text in texts]


def our_ids(tokenizer, texts, max_length, prompt=""):
    return [ids.tolist() for ids in tokenizer.encode(texts, max_length, prompt)]


def model_folder(minilm_dir, folder, without=("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")):
    """A copy of the MiniLM folder with links for its weights and without some files."""
    shutil.copytree(minilm_dir, folder, ignore=shutil.ignore_patterns("*.safetensors", *without))
    (folder / "model.safetensors").symlink_to(minilm_dir / "model.safetensors")
    return folder


def corpus():
    words = ["low", "lower", "newest", "widest", "Größe", "naïve", "query", "passage", "日本", "🙂", "the", "and"]
    return [" ".join(np.random.default_rng(i).choice(words, 12)) for i in range(200)]


def roberta_like():
    """Byte-level BPE, RoBERTa's post-processor, a mask token that eats the space before it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    mask = AddedToken("<mask>", lstrip=True, special=True)
    special = ["<s>", "<pad>", "</s>", "<unk>", mask]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return backend


def xlm_roberta_like():
    """Unigram on metaspace words, as sentencepiece models become."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(
        corpus(),
        trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return backend


def no_special_tokens():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def test_special_tokens_and_size(minilm):
    ids = (minilm.pad_id, minilm.cls_id, minilm.sep_id, minilm.eos_id, minilm.mask_id)
    assert ids == (0, 101, 102, -1, 103)
    assert minilm.vocab_size == 30522
    assert (minilm.n_special, minilm.n_suffix) == (2, 1)
    assert minilm.appends_eos


def test_same_ids_and_prompt_lengths_as_sentence_transformers(minilm, minilm_dir):
    model = open_in_sentence_transformers(minilm_dir)
    for prompt in ("", "query: ", "Represent this sentence for searching relevant passages:", "ü 🙂", "x [SEP]"):
        assert our_ids(minilm, ODD_TEXTS, 256, prompt) == their_ids(model, ODD_TEXTS, prompt or None)
        if prompt:
            assert minilm.prompt_length(prompt) == model[0]._get_prompt_length(prompt)
    for max_length in (3, 8, 64):
        model.max_seq_length = max_length
        assert our_ids(minilm, ODD_TEXTS, max_length) == their_ids(model, ODD_TEXTS)


def test_saved_folder_gives_the_same_ids_in_sentence_transformers(minilm, minilm_dir, tmp_path):
    folder = model_folder(minilm_dir, tmp_path / "m", without=("tokenizer*", "special*", "vocab.txt"))
    minilm.save(folder, 256)
    assert their_ids(open_in_sentence_transformers(folder), ODD_TEXTS) == our_ids(minilm, ODD_TEXTS, 256)
    written = json.loads((folder / "tokenizer.json").read_text())
    assert written["truncation"] is None and written["padding"] is None
    assert Tokenizer.load(f"hf:{folder}").fingerprint() == minilm.fingerprint()


@pytest.mark.parametrize(
    ("make", "model_type"), [(roberta_like, "roberta"), (xlm_roberta_like, "xlm-roberta"), (roberta_like, "qwen3")]
)
def test_saved_tokenizer_gives_the_same_ids_in_transformers(tmp_path, make, model_type):
    from transformers import AutoTokenizer

    make().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(f"file:{tmp_path / 'tokenizer.json'}")
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (1, 0, 2, 4)
    folder = tmp_path / "saved"
    tokenizer.save(folder, 32)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.model_max_length == 32
    assert theirs(ODD_TEXTS, truncation=True)["input_ids"] == our_ids(tokenizer, ODD_TEXTS, 32)
    padded = theirs(["low", "the newest and the widest"], padding=True)["input_ids"]
    assert padded[0][-1] == tokenizer.pad_id and padded[1][-1] == tokenizer.sep_id
    assert Tokenizer.load(f"hf:{folder}").fingerprint() == tokenizer.fingerprint()


def test_left_truncation(tmp_path, minilm_dir):
    from transformers import AutoTokenizer

    shutil.copy(minilm_dir / "tokenizer.json", tmp_path)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "truncation_side": "left", "pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(f"hf:{tmp_path}")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs(ODD_TEXTS, truncation=True, max_length=16)["input_ids"]
    assert our_ids(tokenizer, ODD_TEXTS, 16) == expected
    tokenizer.save(tmp_path / "saved", 16)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(ODD_TEXTS, truncation=True)["input_ids"] == expected


def test_lower_case_of_sentence_bert_config(tmp_path, minilm_dir):
    folder = model_folder(minilm_dir, tmp_path / "m")
    content = json.loads((minilm_dir / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}  # keeps the case
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    )
    cased = Tokenizer.load(f"hf:{folder}")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": True}))
    lower = Tokenizer.load(f"hf:{folder}")
    texts = ["Hello WORLD", "ÉCOLE İstanbul", "plain"]
    assert our_ids(lower, texts, 64) == their_ids(open_in_sentence_transformers(folder), texts)
    assert our_ids(lower, texts, 64) != our_ids(cased, texts, 64)
    assert lower.fingerprint() != cased.fingerprint()


def test_folder_with_a_vocabulary_only(minilm, minilm_dir, tmp_path):
    folder = model_folder(minilm_dir, tmp_path / "m", without=("tokenizer.json",))
    tokenizer = Tokenizer.load(f"hf:{folder}")
    assert our_ids(tokenizer, ODD_TEXTS, 256) == our_ids(minilm, ODD_TEXTS, 256)
    assert tokenizer.pad_id == 0 and tokenizer.vocab_size == 30522


def test_code_in_a_folder_is_never_run(minilm_dir, tmp_path):
    folder = model_folder(minilm_dir, tmp_path / "m", without=("tokenizer.json", "tokenizer_config.json"))
    (folder / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Custom: pass\n")
    settings = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="cannot make one from the vocabulary files"):
        Tokenizer.load(f"hf:{folder}")
    shutil.copy(minilm_dir / "tokenizer.json", folder)
    assert Tokenizer.load(f"hf:{folder}").vocab_size == 30522
    assert not (tmp_path / "ran").exists()


def test_tokenizer_without_special_tokens():
    tokenizer = Tokenizer(no_special_tokens(), {"unk_token": "[UNK]", "pad_token": "[PAD]"})
    assert (tokenizer.n_special, tokenizer.n_suffix, tokenizer.appends_eos, tokenizer.pad_id) == (0, 0, False, -1)
    assert our_ids(tokenizer, ["a b a", ""], 2) == [[0, 1], []]
    assert tokenizer.prompt_length("a b") == 2


def test_encode_gives_uint32_and_leaves_no_state(minilm):
    whole = minilm.encode(["one two three four"], 256)[0]
    assert whole.dtype == np.uint32
    assert minilm.encode(["one two three four"], 3)[0].tolist() == [101, whole[1], 102]
    assert minilm.encode(["one two three four"], 256)[0].tolist() == whole.tolist()
    with pytest.raises(UserError, match="2 tokens has no room beside 2 special tokens"):
        minilm.encode(["a"], 2)
    assert minilm.prompt_length("") == 0


def test_fingerprint_survives_pickling_and_tells_tokenizers_apart(minilm):
    assert pickle.loads(pickle.dumps(minilm)).fingerprint() == minilm.fingerprint()
    assert Tokenizer(roberta_like(), {}).fingerprint() == Tokenizer(roberta_like(), {}).fingerprint()
    assert Tokenizer(roberta_like(), {}).fingerprint() != Tokenizer(roberta_like(), {"sep_token": "</s>"}).fingerprint()


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="wants 'hf:FOLDER' or 'file:PATH"):
        Tokenizer.load("bert-base-uncased")
    with pytest.raises(UserError, match="there is no folder"):
        Tokenizer.load(f"hf:{tmp_path / 'absent'}")
    with pytest.raises(UserError, match="there is no file"):
        Tokenizer.load(f"file:{tmp_path / 'absent.json'}")
    with pytest.raises(UserError, match="holds no tokenizer"):
        Tokenizer.load(f"hf:{tmp_path}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(f"hf:{tmp_path}")
    roberta_like().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not readable as JSON"):
        Tokenizer.load(f"hf:{tmp_path}")


def test_import_stays_light():
    code = "import sys, jaxembed.data.tokenizer, jaxembed.data.records, jaxembed.data.cache; print(*sys.modules)"
    root = pathlib.Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert not loaded & {"jax", "torch", "transformers", "pyarrow", "rich", "tensorflow"}
