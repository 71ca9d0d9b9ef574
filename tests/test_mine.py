"""The command that mines: records in, records out, as training reads them."""

import dataclasses
import io
import json
import pathlib

import numpy as np
import pytest
import run_command
import word_models

from jaxembed import distributed
from jaxembed.config import SourceConfig
from jaxembed.data.records import RecordReader
from jaxembed.embedder import Embedder
from jaxembed.mining.tally import Tally
from jaxembed.reporting import curves
from jaxembed.storage import stamp
from jaxembed.vectors.folder import Manifest, ShardWriter
from jaxembed.vectors.quantize import quantize

TEXTS = word_models.sentences(80, 4)


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path) -> pathlib.Path:
    """Records of every kind: several positives, negatives, a group, texts of others."""
    rows = [{"query": TEXTS[i], "positive": TEXTS[40 + i], "id": f"r{i}"} for i in range(20)]
    rows += [{"query": TEXTS[0], "positive": [TEXTS[70], TEXTS[71]], "negative": [TEXTS[72]], "instruction": "find"}]
    rows[-1]["negative_query"] = [TEXTS[73]]
    rows += [{"query": TEXTS[20 + i], "positive": TEXTS[60 + i], "group": "g", "label": "l"} for i in range(4)]
    return write(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def corpus(tmp_path) -> pathlib.Path:
    rows = [{"_id": f"d{i}", "text": text} for i, text in enumerate([*TEXTS[25:39], TEXTS[45], TEXTS[30]])]
    return write(tmp_path / "corpus.jsonl", rows)


def read(path) -> list:
    return list(RecordReader(SourceConfig(path=str(path)), "error", "--data"))


def instructed() -> Embedder:
    """A model whose prompt for queries has a place for instructions."""
    model = word_models.make("bert")
    prompts = {"query": "{instruction} w1 w2 ", "told": "w3 ", "torn": "w4 {instruction} "}
    return Embedder(dataclasses.replace(model.blueprint, prompts=prompts), model.factory, model.params, model.mesh)


def cosine(a: str, b: str, model, instruction: str = "") -> float:
    prompt = model.prompts["query"].replace("{instruction}", instruction)
    x, y = model.encode(a, prompt=prompt), model.encode_document(b)
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def mine(monkeypatch, capsys, pairs, out, *args, **models):
    return run_command.run(
        monkeypatch, capsys, "mine", "--model=tiny", f"--pairs={pairs}", f"--out={out}", *args, **models
    )


def test_records_come_out_with_negatives_and_scores(pairs, corpus, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "mined.jsonl.gz"
    args = ("--negatives=3", "--relative_margin=0.02", f"--corpus={corpus}")
    model = instructed()
    code, said, _ = mine(monkeypatch, capsys, pairs, out, *args, model=model)
    assert code == 0
    before, after = read(pairs), read(out)
    for a, b in zip(before, after, strict=True):
        cut = dataclasses.replace(b, negatives=b.negatives[: len(a.negatives)], scores=())
        assert cut == dataclasses.replace(a, negative_queries=()) and len(b.scores) == len(b.positives) + len(
            b.negatives
        )
        expected = [cosine(b.query, text, model, b.instruction) for text in (*b.positives, *b.negatives)]
        assert b.scores == pytest.approx(expected, abs=2e-6)
        new = b.scores[len(b.positives) + len(a.negatives) :]
        assert all(score <= min(b.scores[: len(b.positives)]) * 0.98 + 1e-6 for score in new)
        assert list(new) == sorted(new, reverse=True)
    line = json.loads(said.splitlines()[-1])
    assert line["records"] == 25 and line["documents"] == 15 + 27 - 1 and line["queries"] == 25
    assert line["negatives"] == sum(len(b.negatives) for b in after) - 1 > 30
    assert line["short"] == sum(len(b.negatives) < 3 for b in after)
    readme = (tmp_path / "new" / "mined.jsonl.gz.report" / "README.md").read_text()
    assert "relative margin | 0.02" in readme and "### Record 1" in readme and "(scores.png)" in readme
    assert "dropped: relative margin" in said and str(tmp_path) not in readme
    code, _, error = mine(monkeypatch, capsys, pairs, out, *args)
    assert code == 2 and "is there already: take another name" in error


def test_stored_vectors_give_the_same_records(pairs, corpus, tmp_path, monkeypatch, capsys):
    model, rows = word_models.make("bert"), [json.loads(line) for line in corpus.read_text().splitlines()]
    said = dataclasses.fields(Manifest)
    texts = dict.fromkeys((field.name for field in said if field.type is str), "")
    said = Manifest(
        **texts
        | {"weights": "weights of tiny", "dtype": "float32", "similarity": "cosine", "layout": "npy"}
        | {"rows": (), "files": ((f"/elsewhere/{corpus.name}", *stamp(corpus)),)}
        | {"width": model.width, "max_length": 32, "shard_size": 5, "calibration": 0, "normalized": False, "raw": False}
    )
    vectors, ids = model.encode_document([row["text"] for row in rows]), [row["_id"] for row in rows]

    def store(name, ids=ids, **changes):
        manifest = dataclasses.replace(said, **changes)
        writer = ShardWriter(tmp_path / name, manifest)
        writer.claim()
        for shard in range(-(-len(ids) // 5)):
            part = slice(5 * shard, 5 * shard + 5)
            writer.write(shard, ids[part], quantize(vectors[part], manifest.dtype))
        writer.finish(len(ids))
        return f"--corpus_vectors={tmp_path / name}"

    args = (f"--corpus={corpus}", "--absolute_margin=0.01", "--sampling=random", "--seed=3")
    assert mine(monkeypatch, capsys, pairs, tmp_path / "a.jsonl", *args)[0] == 0
    assert mine(monkeypatch, capsys, pairs, tmp_path / "b.jsonl", *args, store("vectors"))[0] == 0
    a, b = read(tmp_path / "a.jsonl"), read(tmp_path / "b.jsonl")
    assert [(r.query, r.positives, r.negatives) for r in a] == [(r.query, r.positives, r.negatives) for r in b]
    assert [x for r in a for x in r.scores] == pytest.approx([x for r in b for x in r.scores], abs=2e-6)
    for name, changes, message in (
        ("other", {"weights": "other"}, "vectors of another model"),
        ("signs", {"dtype": "ubinary"}, "ubinary vectors say too little"),
        ("prompt", {"prompt": "query: "}, "encoded with the prompt 'query: '"),
        ("raw", {"raw": True}, "wants the model's vectors as they are"),
        ("field", {"field": "body"}, "not made of this --corpus in this way (field: 'body' → '')"),
        ("files", {"files": (("corpus.jsonl", 5, 6),)}, "in this way (files[0][1]: 5 → "),
        ("named", {"files": (("c.jsonl", *stamp(corpus)),)}, "(files[0][0]: 'c.jsonl' → 'corpus.jsonl')"),
        ("split", {"rows": ("test",)}, "(rows: ['test'] → [])"),
        ("cut", {"max_length": 16}, "(max_length: 16 → 32)"),
        ("order", {"ids": [*ids[:3], ids[4], ids[3], *ids[5:]]}, "text 4 is 'd3' there|text 4 is 'd4' there"),
        ("short", {"ids": ids[:-1]}, "15 vectors for 16 texts"),
    ):
        code, _, error = mine(monkeypatch, capsys, pairs, tmp_path / "c.jsonl", *args, store(name, **changes))
        assert code == 2 and any(each in error for each in message.split("|")), error
        assert not (tmp_path / "c.jsonl").exists()
    told = (f"--corpus_vectors={tmp_path / 'prompt'}", "--query_prompt_name=document", "--prompt_name=query")
    blueprint = dataclasses.replace(model.blueprint, prompts={"query": "query: "})
    model = Embedder(blueprint, model.factory, model.params, model.mesh)
    code, _, error = mine(monkeypatch, capsys, pairs, tmp_path / "c.jsonl", *args, *told, model=model)
    assert code == 0, error
    same = [[r.scores[: len(r.positives)] for r in read(tmp_path / name)] for name in ("b.jsonl", "c.jsonl")]
    assert not np.allclose(
        np.concatenate(same[0]), np.concatenate(same[1]), atol=1e-3
    )  # positives are behind `query: `


def test_a_teacher_decides_and_scores(pairs, tmp_path, monkeypatch, capsys):
    teacher = word_models.make("llama both ways")
    out = tmp_path / "mined.parquet"
    peers = run_command.Recorder()
    monkeypatch.setattr(distributed, "connect", lambda: peers)
    args = ("--teacher=other", "--replace", "--max_score=0.5", "--range=1:20", "--require_full", "--negatives=2")
    assert mine(monkeypatch, capsys, pairs, out, *args, teacher=teacher)[0] == 0
    records = read(out)
    assert len(records) > 5 and all(len(record.negatives) == 2 for record in records)
    for record in records:
        expected = [cosine(record.query, text, teacher) for text in (*record.positives, *record.negatives)]
        assert record.scores == pytest.approx(expected, abs=2e-6)
        assert all(score <= 0.5 for score in record.scores[len(record.positives) :])
    assert TEXTS[72] not in next((r.negatives for r in records if r.instruction), ())
    assert {name: peers.said["command"]["flags"][name] for name in ("negatives", "teacher", "range")} == {
        "negatives": 2,
        "teacher": "other",
        "range": "1:20",
    }
    assert peers.said["command"]["inputs"] == {str(pairs): {"files": [["pairs.jsonl", *stamp(pairs)]], "rows": []}}
    assert peers.said["teacher"]["weights"] == "weights of other" and peers.said["model"]["prompts"] == ["", ""]
    assert peers.said["texts"] == {"queries": 25, "documents": 27}
    out = tmp_path / "none.jsonl"
    code, _, error = mine(monkeypatch, capsys, pairs, out, "--max_score=-1.5", "--require_full")
    assert code == 2 and "no record is left" in error and not [*tmp_path.glob("*none*")]


def test_graded_pairs_are_refused(tmp_path, monkeypatch, capsys):
    rows = [{"sentence1": text, "sentence2": TEXTS[0], "score": 0.5} for text in TEXTS[1:4]]
    graded = write(tmp_path / "sts.jsonl", rows)
    for name, *args in (("mine",), ("clean", "--consistency=1")):
        args = ["--model=never loaded", f"--pairs={graded}", "--format=st", f"--out={tmp_path / 'x.jsonl'}", *args]
        code, _, error = run_command.run(monkeypatch, capsys, name, *args)
        assert code == 2 and "sts.jsonl has graded pairs" in error and len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sts.jsonl"]


def test_prompts_that_are_refused(pairs, tmp_path, monkeypatch, capsys):
    for flag, message in (
        ("--prompt_name=other", "--prompt_name=other: the prompts of --model=tiny are query, document, told, torn"),
        ("--query_prompt_name=other", "--query_prompt_name=other: the prompts of --model=tiny are"),
        ("--prompt_name=torn", "--model=tiny: its prompt 'torn' has {instruction}, but a document"),
    ):
        code, _, error = mine(monkeypatch, capsys, pairs, tmp_path / "x.jsonl", flag, model=instructed())
        assert code == 2 and message in error and len(error.splitlines()) == 1


WRONG = [
    ((), "--model is missing"),
    (("--model=tiny",), "--pairs is missing"),
    (("--model=tiny", "--pairs=PAIRS"), "--out is missing"),
    (("--out=a.txt",), "--out=a.txt: wants a name that ends in .jsonl, .jsonl.gz or .parquet"),
    (("--pairs=nowhere.jsonl",), "--pairs: no such file or folder: nowhere.jsonl"),
    (("--out=PAIRS/x.jsonl",), "cannot be written"),
    (("--range=5",), "--range=5: wants FIRST:LAST"),
    (("--range=9:12",), "--range=9:12 holds 3 ranks, fewer than --negatives=4"),
    (("--relative_margin=1.5",), "--relative_margin=1.5"),
    (("--corpus=nowhere",), "--corpus: no such file"),
    (("--field=body",), "--field and --id_field are columns of --corpus"),
    (("--out=/proc/x.jsonl",), "cannot be written: /proc"),
    (("--corpus_vectors=x",), "--corpus_vectors are vectors of --corpus"),
    (("--seed=1",), "--seed draws negatives by --sampling=random"),
    (("--sampling=worst",), "--sampling"),
    (("--format=csv",), "--format"),
    (("--report=PAIRS",), "is a file, wants a folder"),
]


@pytest.mark.parametrize(("args", "message"), WRONG)
def test_wrong_flags_are_one_line(args, message, pairs, tmp_path, monkeypatch, capsys):
    if args and not args[0].startswith("--model"):
        args = ("--model=tiny", "--pairs=PAIRS", "--out=OUT", *args)
    args = [arg.replace("PAIRS", str(pairs)).replace("OUT", str(tmp_path / "out.jsonl")) for arg in args]
    code, said, error = run_command.run(monkeypatch, capsys, "mine", *args)
    assert code == 2 and message in error and len(error.splitlines()) == 1 and not said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl"]


def test_the_picture_of_scores():
    from matplotlib.image import imread

    from jaxembed.mining.report import draw

    rng = np.random.default_rng(0)
    tally, some = Tally(rng.random(50).astype(np.float32)), rng.random((50, 9)) < 0.5
    tally.add(rng.random((50, 9)).astype(np.float32), {"same group": some}, {}, ~some, ~some, rescored=False)
    assert curves.BINS and imread(io.BytesIO(draw(tally, "title", "cosine"))).shape[:2] == (1000, 1600)
