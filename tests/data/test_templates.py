"""Templates and end tokens: ids against their definition, and against sentence-transformers on the saved folder."""

import json

import numpy as np
import pytest
from llm_tokenizers import save_tiny_bert, save_tokenizer

from jaxembed.config import MaxLength, PromptConfig, SourceConfig
from jaxembed.data.cache import build_or_open
from jaxembed.data.templates import META_TASKS, NAMED, parse, several
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import UserError
from jaxembed.models.text_encoder import HeadConfig
from jaxembed.prompting import adapt, require_portable

TEXTS = ["", "a", "the lowest and the widest", "Größe 日本 🙂", "many words " * 60, "<s> </s>"]
PROMPT = "query: "
TEMPLATES = (*NAMED.values(), "{text}", "{text}{text}", "Say: {text} again: {text} means")
WHERE = "config.model.template"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    save_tokenizer(folder)
    return Tokenizer.load(f"hf:{folder}")


@pytest.fixture(scope="module")
def minilm(minilm_dir):
    return Tokenizer.load(f"hf:{minilm_dir}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_bert(folder)
    return folder


def own_ids(tokenizer, text):
    """The ids of a text without what is put around it, by cutting that off."""
    ids = tokenizer.tokenize([text])[0]
    return ids[tokenizer.n_special - tokenizer.n_suffix : len(ids) - tokenizer.n_suffix].tolist()


def in_template(tokenizer, template, text, max_length):
    """The definition: each part tokenised apart, the text cut to what max_length leaves beside the rest."""
    whole = tokenizer.tokenize([""])[0].tolist()
    prefix, suffix = whole[: len(whole) - tokenizer.n_suffix], whole[len(whole) - tokenizer.n_suffix :]
    *before, after = template.split("{text}")
    before = [own_ids(tokenizer, words.rstrip(" ")) for words in before]
    behind = own_ids(tokenizer, after) if after else suffix
    room = max_length - len(prefix) - sum(map(len, before)) - len(behind)
    return [*prefix, *(i for words in before for i in [*words, *own_ids(tokenizer, text)[:room]]), *behind]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["llm", "minilm"])
def test_ids_are_those_of_the_definition(request, kind, template):
    plain = request.getfixturevalue(kind)
    tokenizer = plain.with_template(parse(template, WHERE), WHERE)
    assert tokenizer.copies == template.count("{text}")
    for max_length in (tokenizer.n_special + 1, 64, 1000):
        for text, ids in zip(TEXTS, tokenizer.encode(TEXTS, max_length)):
            assert ids.tolist() == in_template(plain, template, text, max_length)
        assert max(map(len, tokenizer.encode(TEXTS, max_length))) <= tokenizer.longest(max_length)
    assert tokenizer.longest(tokenizer.fitting(90)) <= 90 < tokenizer.longest(tokenizer.fitting(90) + 1)
    again = Tokenizer(tokenizer._backend, tokenizer._special)  # what a saved folder gives back
    assert (again.copies, again.n_special, again.n_suffix) == (
        tokenizer.copies,
        tokenizer.n_special,
        tokenizer.n_suffix,
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_sentence_transformers_gives_the_same_ids(tiny, llm, tmp_path, template):
    """Also where texts are cut: the saved tokenizer.json does it all."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(tiny / name)
    tokenizer = llm.with_template(parse(template, WHERE), WHERE).with_end_token(WHERE)
    tokenizer.save(folder, 40)
    assert Tokenizer.load(f"hf:{folder}").fingerprint() == tokenizer.fingerprint()
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    for max_length in (tokenizer.n_special + 1, 40):
        model.max_seq_length = max_length
        for prompt in ("", PROMPT):
            theirs = [model.preprocess([text], prompt=prompt or None)["input_ids"][0].tolist() for text in TEXTS]
            assert [ids.tolist() for ids in tokenizer.encode(TEXTS, max_length, prompt)] == theirs


@pytest.mark.parametrize(("tokenizer_class", "model_type"), [("PreTrainedTokenizerFast", "qwen3"), (None, "qwen2")])
def test_templates_in_other_tokenizer_classes(llm, tmp_path, tokenizer_class, model_type):
    """qwen2 always gets transformers' own class, which takes over vocabulary and post-processor alone."""
    transformers = pytest.importorskip("transformers")
    tokenizer = llm.with_template(parse("echo", WHERE), WHERE).with_end_token(WHERE)
    tokenizer.save(tmp_path, 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_class is None or type(theirs).__name__ == "TokenizersBackend"
    texts = ["the lowest", "a", "many words " * 60]
    assert theirs(texts, truncation=True)["input_ids"] == [i.tolist() for i in tokenizer.encode(texts, 64)]


def test_left_truncation_of_every_copy(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tmp_path, truncation_side="left")
    tokenizer = Tokenizer.load(f"hf:{tmp_path}").with_template(parse("echo", WHERE), WHERE)
    tokenizer.save(tmp_path / "saved", 40)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "low lower newest widest " * 20
    cut = tokenizer.encode([text], 40)[0].tolist()
    assert theirs(text, truncation=True)["input_ids"] == cut
    assert cut[-1] == tokenizer.tokenize([text])[0][-1] and len(cut) == tokenizer.longest(40)


def test_end_token_comes_after_the_cut(llm, minilm):
    assert not llm.appends_eos
    ended = llm.with_end_token(WHERE)
    assert ended.appends_eos and ended.n_suffix == 1
    for max_length in (3, 1000):
        for text, ids in zip(TEXTS, ended.encode(TEXTS, max_length)):
            assert ids.tolist() == [0, *own_ids(llm, text)[: max_length - 2], 2]
    with pytest.raises(UserError, match=r"asked: the tokenizer has no end token"):
        minilm.with_end_token("asked")


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False, "add_eos_token": True}])
@pytest.mark.parametrize(
    ("tokenizer_class", "model_type"),
    [("LlamaTokenizerFast", "llama"), ("PreTrainedTokenizerFast", "mistral"), ("Qwen2TokenizerFast", "qwen3")],
)
def test_beside_a_tokenizer_json_transformers_5_reads_no_bos_and_eos_flags(
    tmp_path, flags, tokenizer_class, model_type
):
    """The post-processor in it counts alone (`PreTrainedTokenizerBase._from_pretrained` drops the flags)."""
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tmp_path, tokenizer_class=tokenizer_class, **flags)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("the lowest")["input_ids"]
    assert theirs[0] == 0 and theirs[-1] != 2
    assert Tokenizer.load(f"hf:{tmp_path}").tokenize(["the lowest"])[0].tolist() == theirs


@pytest.mark.parametrize("prompt", ["query: ", "ü 🙂", "Instruct: the\nQuery:", "low </s>"])
def test_prompt_lengths_of_an_llm_are_those_of_sentence_transformers(tiny, llm, prompt):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(tiny), device="cpu")
    assert llm.prompt_length(prompt) == model[0]._get_prompt_length(prompt)
    assert llm.prompt_lengths(llm.prompt_length(prompt), np.array([3, 100])).tolist()[1] == llm.prompt_length(prompt)


@pytest.mark.parametrize("template", [template for template in TEMPLATES if template != "{text}"])
@pytest.mark.parametrize("kind", ["llm", "minilm"])
def test_what_stands_before_the_last_copys_text_is_prompt(request, kind, template):
    plain = request.getfixturevalue(kind)
    tokenizer = plain.with_template(parse(template, WHERE), WHERE)
    after = template.split("{text}")[-1]
    n_after = len(own_ids(plain, after)) if after else plain.n_suffix
    for prompt in ("", PROMPT):
        ids = tokenizer.encode(["low lower newest"], 200, prompt)[0]
        first = int(tokenizer.prompt_lengths(tokenizer.prompt_length(prompt), np.array([len(ids)]))[0])
        wanted = own_ids(plain, prompt + "low lower newest")[len(own_ids(plain, prompt)) :]
        assert ids[first : len(ids) - n_after].tolist() == wanted


def test_what_cannot_be(llm):
    with pytest.raises(
        UserError, match=r"model.template = 'prompt_oel': wants prompt_eol, echo, or a text with {text}"
    ):
        parse("prompt_oel", WHERE)
    with pytest.raises(UserError, match=r"\{instruction\} belongs into prompts"):
        parse("{instruction}: {text}", WHERE)
    with pytest.raises(UserError, match="'meta_eol': those are several"):
        parse("meta_eol", WHERE)
    once = llm.with_template(parse("prompt_eol", WHERE), WHERE)
    with pytest.raises(UserError, match=r"config.model.template: the tokenizer has a template already"):
        once.with_template(parse("echo", WHERE), WHERE)
    with pytest.raises(UserError, match="no room"):
        once.encode(["a"], once.n_special)
    assert several("meta_eol") == META_TASKS and several("echo") == ("echo",)
    assert len({parse(task, WHERE).before for task in META_TASKS}) == 8


def test_pooling_that_goes_with_a_template(llm, minilm):
    mean, last = HeadConfig(), HeadConfig("last")

    def adapted(head, tokenizer, pooling="auto", template=""):
        head, tokenizer = adapt(head, tokenizer, pooling, template, "config.model.")
        ends = tokenizer.tokenize(["a"])[0][-1] == tokenizer.eos_id
        return head.pooling, head.pool_prompt, ends

    assert adapted(mean, llm) == ("mean", True, False)
    assert adapted(mean, llm, "last") == ("last", True, True)
    assert adapted(last, llm) == adapted(last, llm, "last") == ("last", True, False)  # as it was trained
    assert adapted(mean, llm, "auto", "prompt_eol") == adapted(mean, llm, "last", "prompt_eol") == ("last", True, False)
    assert adapted(mean, llm, "mean", "prompt_eol") == ("mean", True, False)
    assert adapted(mean, llm, "auto", "echo") == ("mean", False, False)
    assert adapted(mean, llm, "last", "echo") == ("last", True, True)
    assert adapted(HeadConfig("mean", False), llm, "last", "echo") == ("last", True, True)
    echo = adapt(mean, llm, "auto", "echo")
    for said in (echo, adapt(HeadConfig("mean", False), llm, "auto", "So: {text}")):
        with pytest.raises(UserError, match=r"no folder can say .*pooling = 'last'.*export = False"):
            require_portable(*said)
    require_portable(*adapt(mean, llm, "last", "echo"))
    require_portable(*adapt(HeadConfig("mean", False), llm, "auto", ""))
    assert adapt(*echo, "weighted_mean", "")[0].pool_prompt is False  # a run that starts from an echo run


def test_cache_of_echoed_texts(llm, tmp_path):
    source = tmp_path / "pairs.jsonl"
    rows = [{"query": "low", "positive": "newest " * 50}, {"query": "the", "positive": "widest"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = llm.with_template(parse("echo", WHERE), WHERE)
    limit = tokenizer.n_special + 10
    prompts = PromptConfig(query=PROMPT, document="")
    settings = (source, tokenizer, prompts, MaxLength(limit, limit), tmp_path / "cache", "error", False)
    cache = build_or_open(SourceConfig(path=str(settings[0])), *settings[1:])
    assert cache.truncated == 1 and cache.max_length == tokenizer.longest(limit) == limit + 10
    texts = [(row[side], PROMPT if side == "query" else "") for row in rows for side in ("query", "positive")]
    for i, (text, prompt) in enumerate(texts):
        ids = tokenizer.encode([text], limit, prompt)[0]
        np.testing.assert_array_equal(cache.tokens_of(i), ids)
        n_text = min(10, len(own_ids(llm, prompt + text))) - len(own_ids(llm, prompt))
        assert cache.prompt_lengths[i] == len(ids) - max(1, n_text)
    with pytest.raises(UserError, match=r"max_length.query = 65000: must be in"):
        build_or_open(
            SourceConfig(path=str(source)), tokenizer, prompts, MaxLength(65_000, 9), tmp_path, "error", False
        )
