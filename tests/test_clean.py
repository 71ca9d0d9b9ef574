"""The command that cleans: which records are left, in which order the rules come, what is refused."""

import json
import pathlib

import pytest
import run_command
import word_models

from jaxembed import distributed
from jaxembed.config import SourceConfig
from jaxembed.data.records import RecordReader
from jaxembed.storage import stamp

TEXTS = word_models.sentences(60, 6)


@pytest.fixture
def pairs(tmp_path) -> pathlib.Path:
    """Twenty pairs of a text with itself and one word more, and what each rule is to drop."""
    rows = [{"query": TEXTS[i], "positive": f"{TEXTS[i]} w1", "id": f"r{i}"} for i in range(20)]
    rows += [{"query": TEXTS[0].upper(), "positive": f" {TEXTS[0]}  w1", "id": "exact"}]
    rows += [{"query": TEXTS[1], "positive": f"{TEXTS[1]} w2", "id": "near", "scores": [1.5]}]
    rows += [{"query": TEXTS[30], "positive": TEXTS[50], "negative": [TEXTS[51]], "id": "test"}]
    rows += [{"query": TEXTS[31], "positive": TEXTS[32], "id": "noise"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_rule_drops_what_it_is_for(pairs, tmp_path, monkeypatch, capsys):
    sts = tmp_path / "dev.jsonl"
    sts.write_text(json.dumps({"sentence1": f"{TEXTS[50].title()}!", "sentence2": "other", "score": 1}) + "\n")
    rules = {
        "exact": ["--exact_duplicates"],
        "test": [f"--against={sts}"],
        "near": ["--near_duplicates=0.7"],
        "noise": ["--consistency=3", "--model=tiny"],
    }
    peers = run_command.Recorder()
    monkeypatch.setattr(distributed, "connect", lambda: peers)
    everything = [json.loads(line)["id"] for line in pairs.read_text().splitlines()]

    def left(out, args):
        code, said, error = run_command.run(
            monkeypatch, capsys, "clean", f"--pairs={pairs}", f"--out={tmp_path / out}", *args
        )
        assert code == 0, error
        records = list(RecordReader(SourceConfig(path=str(tmp_path / out)), "error", "--data"))
        line = json.loads(said.splitlines()[-1])
        assert line["read"] == 24 == line["kept"] + sum(line["dropped"].values()) and line["kept"] == len(records)
        return [record.id for record in records], line["dropped"], records

    kept, dropped, records = left("all.parquet", [arg for args in rules.values() for arg in args])
    assert kept == [f"r{i}" for i in range(20)]
    assert records[3].query == TEXTS[3] and records[3].positives == (f"{TEXTS[3]} w1",)
    assert list(dropped) == [
        "exact duplicate",
        "text of dev",
        "13 words of dev",
        "near duplicate",
        "positive not among the first 3",
    ]
    assert list(dropped.values()) == [1, 1, 0, 1, 1]
    inputs = {str(path): {"files": [[path.name, *stamp(path)]], "rows": []} for path in (pairs, sts)}
    assert peers.said["command"]["inputs"] == inputs and peers.said["command"]["flags"]["near_duplicates"] == 0.7
    assert peers.said["model"] == {"weights": "weights of tiny", "records": 21}
    readme = (tmp_path / "all.parquet.report" / "README.md").read_text()
    assert "### near duplicate" in readme and "0.7" in readme and str(tmp_path) not in readme
    kept, _, records = left("exact.jsonl.gz", rules["exact"])
    assert kept == [each for each in everything if each != "exact"]
    assert records[20].scores == (1.5,) and records[21].negatives == (TEXTS[51],)
    kept, _, _ = left("near.jsonl", rules["near"])
    assert kept == [each for each in everything if each not in ("near", "exact")]


WRONG = [
    ([], "no rule: give --exact_duplicates, --against, --near_duplicates or --consistency"),
    (["--exact_duplicates", "--pairs="], "--pairs is missing"),
    (["--exact_duplicates", "--out=PAIRS"], "is there already"),
    (["--consistency=2"], "--consistency asks a model"),
    (["--model=tiny", "--exact_duplicates"], "--model is only asked by --consistency=K"),
    (["--pool=9", "--exact_duplicates"], "--pool is what --consistency=K searches"),
    (["--model=tiny", "--consistency=9", "--pool=9"], "--pool=9 holds no more documents than"),
    (["--against=nowhere.jsonl"], "--against: no such file or folder: nowhere.jsonl"),
    (["--against=PAIRS:nowhere"], "--against: no such file or folder: nowhere"),
    (["--ngram=8", "--exact_duplicates"], "--ngram looks for words of the sets of --against"),
    (["--near_duplicates=1.5"], "--near_duplicates"),
    (["--near_duplicates=nan"], "--near_duplicates=nan: must be finite"),
    (["--against=,"], "--against: an empty name"),
]


@pytest.mark.parametrize(("args", "message"), WRONG)
def test_wrong_flags_are_one_line(args, message, pairs, tmp_path, monkeypatch, capsys):
    args = [f"--pairs={pairs}", f"--out={tmp_path / 'out.jsonl'}", *(arg.replace("PAIRS", str(pairs)) for arg in args)]
    code, said, error = run_command.run(monkeypatch, capsys, "clean", *args)
    assert code == 2 and message in error and len(error.splitlines()) == 1 and not said
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_bad_record_leaves_nothing_behind(pairs, tmp_path, monkeypatch, capsys):
    with pairs.open("a") as file:
        file.write("{\n")
    args = [f"--pairs={pairs}", f"--out={tmp_path / 'out.jsonl'}", "--exact_duplicates"]
    code, _, error = run_command.run(monkeypatch, capsys, "clean", *args)
    assert code == 2 and "pairs.jsonl:25: broken JSON" in error
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
