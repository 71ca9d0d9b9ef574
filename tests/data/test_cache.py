"""The token cache: its content, its key, and what happens when it is killed, raced, damaged or refused."""

import concurrent.futures
import errno
import gzip
import hashlib
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxembed.config import MaxLength, PromptConfig, SourceConfig
from jaxembed.data import cache as cache_module
from jaxembed.data import cache_writer
from jaxembed.data.cache import DamagedCacheError, TokenCache, build_or_open
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS = [
    {"query": "What is low?", "positive": "The opposite of high.", "group": "g", "instruction": "Answer"},
    {"query": "two", "positive": ["deux", "zwei"], "negative": ["trois", "drei"], "scores": [0.9, 0.8, 0.2, 0.1]},
    "broken",
    {"query": "deux", "positive": "two", "label": 5},
    {"query": "again", "positive": "once more", "label": "5", "group": "g"},
]
PROMPTS = PromptConfig(query="{instruction} query: ", document="")
LENGTHS = MaxLength(query=32, document=16)


@pytest.fixture(scope="module")
def tokenizer(minilm_dir):
    return Tokenizer.load(f"hf:{minilm_dir}")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in ROWS))
    return SourceConfig(path=str(path))


def build(source, tokenizer, root, prompts=PROMPTS, lengths=LENGTHS, on_bad_record="skip"):
    return build_or_open(source, tokenizer, prompts, lengths, root, on_bad_record, show_progress=False)


def hash64(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def test_content(source, tokenizer, tmp_path):
    c = build(source, tokenizer, tmp_path / "cache")
    assert (c.n_records, c.n_texts, c.max_positives, c.max_negatives) == (4, 11, 2, 2)
    assert (c.skipped, c.truncated) == (1, 0)
    assert (c.negative_queries, c.scored) == (False, False)
    assert c.skipped_reasons[0].startswith(f"{source.path}:3: broken JSON")
    assert c.first_text.tolist() == [0, 2, 7, 9, 11]
    assert c.n_positives.tolist() == [1, 2, 1, 1]
    assert c.lines.tolist() == [1, 2, 4, 5]
    assert c.record_name(2) == f"{source.path}:4"
    assert (c.label, c.licence) == ("pairs.jsonl", "")
    texts = ["What is low?", "The opposite of high.", "two", "deux", "zwei", "trois", "drei", "deux", "two"]
    texts += ["again", "once more"]
    prompts = ["Answer query: ", "", " query: ", "", "", "", "", " query: ", "", " query: ", ""]
    for i, (text, prompt) in enumerate(zip(texts, prompts)):
        ids = tokenizer.encode([text], 32, prompt)[0]
        np.testing.assert_array_equal(c.tokens_of(i), ids)
        assert c.lengths[i] == len(ids)
        assert c.prompt_lengths[i] == tokenizer.prompt_length(prompt)
        assert c.hashes[i] == hash64(text)  # of the text alone: the same as query and as document
    assert c.hashes[3] == c.hashes[7] and c.hashes[2] == c.hashes[8]
    assert c.tokens.dtype == np.uint16 and not c.tokens.flags.writeable and not c.tokens.flags.owndata
    assert c.total_tokens == c.lengths.sum() == c.offsets[-1] == len(c.tokens)
    assert c.max_length == c.lengths.max()
    nan = np.nan
    expected = np.float32([nan, nan, nan, 0.9, 0.8, 0.2, 0.1, nan, nan, nan, nan])
    np.testing.assert_array_equal(c.scores, expected)
    assert c.groups[0] == c.groups[3] != 0  # the group wins over the label
    assert c.groups[1] == 0
    assert c.groups[2] not in (0, c.groups[0])


def test_dtypes_are_those_documented(source, tokenizer, tmp_path):
    c = build(source, tokenizer, tmp_path)
    dtypes = {name: getattr(c, name).dtype.name for name in ("first_text", "n_positives", "groups", "lines", "lengths")}
    dtypes |= {name: getattr(c, name).dtype.name for name in ("prompt_lengths", "hashes", "scores", "offsets")}
    assert dtypes == {
        "first_text": "int64",
        "n_positives": "uint16",
        "groups": "uint64",
        "lines": "int64",
        "lengths": "uint16",
        "prompt_lengths": "uint16",
        "hashes": "uint64",
        "scores": "float32",
        "offsets": "int64",
    }


def test_queries_of_hard_negatives(tokenizer, tmp_path):
    rows = [
        {"query": "plain", "positive": "pair", "scores": [1]},
        {"query": "two", "positive": "deux", "negative": ["drei", "vier " * 9], "negative_query": ["three", "fo " * 40]}
        | {"scores": [3, 2, 1]},
        {"query": "one", "positive": "un", "negative": "drei", "scores": [1, 0]},
        {"query": "x", "positive": "y", "negative": "drei", "negative_query": "three", "scores": [1, 0]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = SourceConfig(path=str(path))
    prompts, lengths = PromptConfig("query: ", ""), MaxLength(8, 6)
    with pytest.raises(UserError, match=r"a\.jsonl:3: has no negative_query, unlike the records before"):
        build(source, tokenizer, tmp_path, prompts, lengths, on_bad_record="error")
    c = build(source, tokenizer, tmp_path, prompts, lengths)
    assert (c.n_records, c.skipped, c.lines.tolist()) == (3, 1, [1, 2, 4])
    assert (c.max_negatives, c.negative_queries, c.scored) == (2, True, True)
    assert c.first_text.tolist() == [0, 2, 8, 12]
    texts = ["two", "deux", "drei", rows[1]["negative"][1], "three", rows[1]["negative_query"][1]]
    for i, text in enumerate(texts, start=2):
        prompt, length = ("query: ", 8) if i in (2, 6, 7) else ("", 6)
        np.testing.assert_array_equal(c.tokens_of(i), tokenizer.encode([text], length, prompt)[0])
        assert c.prompt_lengths[i] == (tokenizer.prompt_length(prompt) if prompt else 0)
        assert c.hashes[i] == hash64(text)
    assert (c.truncated, c.lengths[5], c.lengths[7]) == (2, 6, 8)
    np.testing.assert_array_equal(c.scores[2:8], np.float32([np.nan, 3, 2, 1, np.nan, np.nan]))
    path.write_text("\n".join(map(json.dumps, [rows[0], rows[2], rows[1]])))
    with pytest.raises(UserError, match=r"a\.jsonl:3: has a negative_query, unlike the records before"):
        build(source, tokenizer, tmp_path, prompts, lengths, on_bad_record="error")


def test_labels_belong_to_their_source(tokenizer, tmp_path):
    groups = []
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"query": name, "positive": "p", "label": 1}))
        groups.append(build(SourceConfig(path=str(tmp_path / f"{name}.jsonl")), tokenizer, tmp_path).groups[0])
    assert 0 not in groups and groups[0] != groups[1]


def test_truncation_is_counted_and_keeps_a_token_beside_the_prompt(tokenizer, tmp_path, minilm_dir):
    from sentence_transformers import SentenceTransformer

    rows = [{"query": "word " * 50, "positive": "a b c d e f"}, {"query": "one", "positive": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompt = "a prompt that is longer than all: "
    source = SourceConfig(path=str(tmp_path / "a.jsonl"))
    c = build(source, tokenizer, tmp_path, PromptConfig(prompt, ""), MaxLength(6, 8))
    assert c.lengths.tolist() == [6, 8, 6, 3]
    assert c.truncated == 2  # both queries; eight tokens are not too many
    model = SentenceTransformer(str(minilm_dir), device="cpu")
    model.max_seq_length = 6
    theirs = model.preprocess([rows[0]["query"]], prompt=prompt)
    assert c.tokens_of(0).tolist() == theirs["input_ids"][0].tolist()
    assert c.prompt_lengths[0] == theirs["prompt_length"] == 5


def test_many_chunks_make_the_same_cache_as_one(source, tokenizer, tmp_path, monkeypatch):
    whole = build(source, tokenizer, tmp_path / "one")
    monkeypatch.setattr(cache_writer, "_CHUNK_TEXTS", 1)
    pieces = build(source, tokenizer, tmp_path / "many")
    for file in whole.path.iterdir():
        assert (pieces.path / file.name).read_bytes() == file.read_bytes()


def test_wide_tokens_for_a_big_vocabulary(source, tmp_path):
    import tokenizers

    vocabulary = {f"w{i}": i for i in range(70_000)} | {"two": 70_000}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    c = build(source, Tokenizer(backend, {}), tmp_path, PromptConfig("", ""))
    assert c.tokens.dtype == np.uint32
    assert c.tokens_of(2).tolist() == [70_000]


def test_texts_without_tokens_are_bad_records(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.normalizer = tokenizers.normalizers.Replace("~", "")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "a.jsonl").write_text('{"query": "a", "positive": "~"}\n{"query": "a", "positive": "b"}')
    source, plain = SourceConfig(path=str(tmp_path / "a.jsonl")), PromptConfig("", "")
    c = build(source, Tokenizer(backend, {}), tmp_path, plain)
    assert (c.n_records, c.skipped, c.lines.tolist()) == (1, 1, [2])
    with pytest.raises(UserError, match=r"a\.jsonl:1: a text has no token"):
        build(source, Tokenizer(backend, {}), tmp_path, plain, on_bad_record="error")


def test_opened_again_without_tokenising(source, tokenizer, tmp_path, monkeypatch):
    first = build(source, tokenizer, tmp_path)
    monkeypatch.setattr(cache_writer, "fill", lambda *args: pytest.fail("tokenised again"))
    assert build(source, tokenizer, tmp_path).path == first.path


def test_key_covers_what_the_content_depends_on(source, tokenizer, minilm_dir, tmp_path):
    def key(**changes):
        return build(**({"source": source, "tokenizer": tokenizer, "root": tmp_path / "c"} | changes)).path.name

    first = key()
    other_tokenizer = Tokenizer.load(f"hf:{minilm_dir}")
    other_tokenizer._backend.normalizer = None
    changed = [
        key(prompts=PromptConfig("other ", "")),
        key(prompts=PromptConfig(PROMPTS.query, "passage: ")),
        key(lengths=MaxLength(31, 16)),
        key(lengths=MaxLength(32, 15)),
        key(tokenizer=other_tokenizer),
        key(source=SourceConfig(path=source.path, columns={"group": "instruction"})),
        key(source=SourceConfig(path=source.path, format="st")),
    ]
    assert len({first, *changed}) == len(changed) + 1
    assert key(source=SourceConfig(path=source.path, weight=3.0)) == first  # nothing to do with the tokens
    with open(source.path, "a") as file:
        file.write('\n{"query": "new", "positive": "record"}')
    assert key() != first


@pytest.fixture
def folder(tmp_path):
    """A source of three files; the records' texts tell file and line."""
    folder = tmp_path / "parts"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl"):
        pairs = (json.dumps({"query": f"{name} {i}", "positive": "p"}) for i in (1, 2))
        (folder / name).write_text("\n\n".join(pairs))
    return folder


def test_many_files_make_one_cache(folder, tokenizer, tmp_path):
    c = build(SourceConfig(path=str(folder)), tokenizer, tmp_path / "cache", PromptConfig("", ""))
    assert c.lines.tolist() == [1, 3, 4, 6, 7, 9]
    names = [f"{folder}/{name}:{line}" for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl") for line in (1, 3)]
    assert [c.record_name(r) for r in range(c.n_records)] == names
    assert (c.label, pickle.loads(pickle.dumps(c)).label) == ("parts/ (3 files)", "parts/ (3 files)")
    assert json.loads((c.path / "meta.json").read_text())["label"] == c.label


def test_key_follows_the_bytes_of_every_file(folder, tokenizer, tmp_path):
    def cache(pattern=""):
        return build(SourceConfig(path=str(folder / pattern)), tokenizer, tmp_path / "c", PromptConfig("", ""))

    first = cache()
    (folder / "b.jsonl").rename(folder / "bb.jsonl")
    assert cache().path == first.path  # names do not matter, but for the order
    assert cache("**/*.jsonl").path == first.path and cache("**/*.jsonl").label == "parts/**/*.jsonl (3 files)"
    assert cache().label == "parts/ (3 files)"
    (folder / "bb.jsonl").rename(folder / "0.jsonl")
    paths = {first.path, cache().path}
    (folder / "0.jsonl").rename(folder / "b.jsonl")
    with open(folder / "sub" / "c.jsonl", "a") as file:
        file.write("\n")
    paths.add(cache().path)
    (folder / "d.jsonl").write_text("")
    paths.add(cache().path)
    (folder / "a.jsonl").unlink()
    paths.add(cache().path)
    assert len(paths) == 5


def test_every_kind_of_source_gives_the_same_texts(tokenizer, tmp_path):
    import datasets

    rows = [
        {"query": f"q{i}", "positive": [f"p{i}", "p"], "score": [0.5, i / 8], "group": str(i % 3)} for i in range(9)
    ]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for i in range(3):
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / f"{i}.json.gz").write_bytes(gzip.compress("\n".join(lines[3 * i : 3 * i + 3]).encode()))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    sources = [{"path": "a.jsonl"}, {"path": "parts"}, {"path": "a.parquet"}, {"path": "saved", "source": "hf"}]
    caches = []
    for fields in sources:
        source = SourceConfig(**fields | {"path": str(tmp_path / fields["path"])}, columns={"score": "score"})
        caches.append(build(source, tokenizer, tmp_path / "c"))
    for c in caches[1:]:
        assert c.path != caches[0].path
        for name in ("tokens", "offsets", "hashes", "scores", "groups", "first_text", "n_positives", "lines"):
            np.testing.assert_array_equal(getattr(c, name), getattr(caches[0], name))
    assert caches[1].record_name(8) == f"{tmp_path}/parts/2.json.gz:3"
    assert caches[3].record_name(8) == "hf:saved:train row 9"


def test_split_and_licence_of_a_data_set_are_part_of_the_key(tokenizer, tmp_path):
    import datasets

    table = datasets.Dataset.from_list([{"query": f"q{i}", "positive": "p"} for i in range(4)])

    def cache(licence, split):
        table.info.license = licence
        table.save_to_disk(tmp_path / "saved")
        return build(SourceConfig(path=str(tmp_path / "saved"), source="hf", split=split), tokenizer, tmp_path / "c")

    caches = [cache("mit", "train"), cache("mit", "train[:2]"), cache("", "train")]
    assert len({c.path for c in caches}) == 3
    assert [(c.licence, c.n_records) for c in caches] == [("mit", 4), ("mit", 2), ("", 4)]


def test_source_digest_is_remembered_by_size_and_time(source, tokenizer, tmp_path):
    past = time.time_ns() - 10**10
    os.utime(source.path, ns=(past, past))
    first = build(source, tokenizer, tmp_path)
    memo_file = tmp_path / "sources.json"
    digest = hashlib.sha256(pathlib.Path(source.path).read_bytes()).hexdigest()
    assert json.loads(memo_file.read_text()) == {source.path: [os.path.getsize(source.path), past, digest]}
    memo_file.write_text(json.dumps({source.path: [os.path.getsize(source.path), past, "remembered"]}))
    assert build(source, tokenizer, tmp_path).path != first.path
    memo_file.write_text("damaged")
    assert build(source, tokenizer, tmp_path).path == first.path
    os.utime(source.path)  # written just now: not to be trusted by its time alone
    memo_file.unlink()
    assert build(source, tokenizer, tmp_path).path == first.path
    assert not memo_file.exists()


def test_pickled_by_path(source, tokenizer, tmp_path):
    c = build(source, tokenizer, tmp_path)
    data = pickle.dumps(c)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).tokens, c.tokens)
    with pytest.raises(ValueError, match="read-only"):
        c.tokens[0] = 1


@pytest.mark.parametrize("damage", ["short", "missing", "no meta", "bad meta", "other version"])
def test_damaged_cache_is_built_anew(source, tokenizer, tmp_path, damage):
    c = build(source, tokenizer, tmp_path)
    tokens = c.tokens.copy()
    meta = c.path / "meta.json"
    if damage == "short":
        with open(c.path / "tokens.bin", "r+b") as file:
            file.truncate(10)
    elif damage == "missing":
        (c.path / "scores.bin").unlink()
    elif damage == "no meta":
        meta.unlink()
    elif damage == "bad meta":
        meta.write_text('{"format": 1')
    else:
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 0}))
    with pytest.raises(DamagedCacheError):
        TokenCache(c.path)
    again = build(source, tokenizer, tmp_path)
    assert again.path == c.path
    np.testing.assert_array_equal(again.tokens, tokens)
    assert [p.name for p in (tmp_path / "tokens").iterdir()] == [c.path.name]


SCRIPT = """
import sys
from jaxembed.config import MaxLength, PromptConfig, SourceConfig
from jaxembed.data.cache import build_or_open
from jaxembed.data.tokenizer import Tokenizer
path, model, root = sys.argv[1:]
c = build_or_open(SourceConfig(path=path), Tokenizer.load("hf:" + model), PromptConfig("", ""), MaxLength(64, 64), root,
                  "error", False)
print(c.n_records, int(c.tokens.sum()))
"""


@pytest.fixture
def start(minilm_dir, tmp_path):
    """Starts a process that builds the cache of a file of 20,000 records."""
    rows = (json.dumps({"query": f"question {i}", "positive": f"answer {i * i}"}) for i in range(20_000))
    (tmp_path / "big.jsonl").write_text("\n".join(rows))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "big.jsonl"), str(minilm_dir), str(tmp_path / "cache")]
    pipe = subprocess.PIPE
    return lambda: subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def test_two_processes_at_once_both_end_well(start, tmp_path):
    runs = [start(), start()]
    results = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    assert results[0][0] == results[1][0] and results[0][0].startswith("20000 ")
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_one_of_several_builds_and_the_others_wait(source, tokenizer, tmp_path, monkeypatch):
    fill, calls = cache_module.cache_writer.fill, []

    def slow(*args):
        calls.append(args)
        time.sleep(0.2)
        fill(*args)

    monkeypatch.setattr(cache_module.cache_writer, "fill", slow)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        caches = [pool.submit(build, source, tokenizer, tmp_path) for _ in range(3)]
        assert len({cache.result().path for cache in caches}) == 1
    assert len(calls) == 1


def test_killed_build_leaves_nothing_that_is_taken_for_a_cache(start, tmp_path):
    run, tokens = start(), tmp_path / "cache" / "tokens"
    while run.poll() is None and not any(tokens.glob("*.*/tokens.bin")):
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    (left,) = tokens.iterdir()
    assert "." in left.name and not (left / "meta.json").exists()
    again = start()
    assert again.communicate(timeout=60)[0].startswith("20000 ")
    (complete,) = (p for p in tokens.iterdir() if p != left)
    old = time.time() - 2 * cache_module._ABANDONED
    for path in (left, *left.iterdir()):
        os.utime(path, (old, old))
    (complete / "meta.json").unlink()
    assert start().communicate(timeout=60)[0].startswith("20000 ")
    assert list(tokens.iterdir()) == [complete]  # what the killed build left is gone


def test_a_failing_build_leaves_nothing(source, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"pairs\.jsonl:3: broken JSON"):
        build(source, tokenizer, tmp_path, on_bad_record="error")
    assert not list((tmp_path / "tokens").iterdir())

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_writer.os, "fsync", full)
    with pytest.raises(UserError, match=rf"cache_dir: cannot write the token cache in {tmp_path}: No space left"):
        build(source, tokenizer, tmp_path)
    assert not list((tmp_path / "tokens").iterdir())


def test_cache_dir_that_cannot_be_written(source, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the token cache in .*file: Not a directory"):
        build(source, tokenizer, tmp_path / "file")


def test_source_that_changes_while_it_is_read(source, tokenizer, tmp_path, monkeypatch):
    fill = cache_writer.fill

    def fill_and_change(*args):
        fill(*args)
        with open(source.path, "a") as file:
            file.write("\n")

    monkeypatch.setattr(cache_writer, "fill", fill_and_change)
    with pytest.raises(UserError, match="changed while it was being tokenised"):
        build(source, tokenizer, tmp_path)
    assert not list((tmp_path / "tokens").iterdir())


@pytest.mark.parametrize("lengths", [MaxLength(2, 16), MaxLength(16, 0), MaxLength(16, 70_000)])
def test_impossible_lengths(source, tokenizer, tmp_path, lengths):
    with pytest.raises(UserError, match=r"config\.data\.max_length\.(query|document) = \d+: must be in 3 … 65535"):
        build(source, tokenizer, tmp_path, lengths=lengths)


def test_progress_goes_to_standard_error(source, tokenizer, tmp_path, capsys):
    build_or_open(source, tokenizer, PROMPTS, MaxLength(32, 16), tmp_path, "skip", show_progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "Tokenising pairs.jsonl" in err and "4 records" in err


def test_real_pairs(data_dir, tokenizer, tmp_path):
    path = data_dir / "pairs" / "captions_val.jsonl.gz"
    c = build(SourceConfig(path=str(path)), tokenizer, tmp_path, PromptConfig("", ""), MaxLength(256, 256))
    assert (c.n_records, c.n_texts, c.skipped) == (2983, 5966, 0)
    assert np.unique(c.groups).size > 900 and 0 not in c.groups  # about three pairs of each photograph's captions
    np.testing.assert_array_equal(np.diff(c.offsets), c.lengths)
