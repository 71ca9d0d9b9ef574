"""Texts with ids from every kind of source."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from jaxembed.data.texts import TextReader
from jaxembed.errors import UserError

BEIR = [{"_id": "a", "title": "On", "text": "one"}, {"_id": 7, "title": "", "text": "two"}, {"_id": "c", "text": ""}]
PAIRS = [{"query": "q1", "positive": ["p1", "p2"]}, {"query": "q2", "positive": "p3"}]


def read(path, rows, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(TextReader(str(path), "--input", **options))


def test_titles_ids_and_fields(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read(path, BEIR) == [("a", "On one"), ("7", "two"), ("c", "")]
    assert read(path, BEIR, field="text") == [("a", "one"), ("7", "two"), ("c", "")]
    assert read(path, PAIRS, field="query") == [("1", "q1"), ("2", "q2")]
    assert read(path, PAIRS, field="positive") == [("1.0", "p1"), ("1.1", "p2"), ("2", "p3")]
    assert read(path, PAIRS, field="query", id_field="query") == [("q1", "q1"), ("q2", "q2")]


def test_the_same_from_lines_tables_and_several_files(tmp_path):
    rows = [{"id": f"i{n}", "text": f"text {n}"} for n in range(5)]
    want = [(row["id"], row["text"]) for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert list(TextReader(str(tmp_path / "t.parquet"), "--input")) == want
    (tmp_path / "parts").mkdir()
    for name, part in (("a", rows[:2]), ("b", rows[2:])):
        with gzip.open(tmp_path / "parts" / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    assert list(TextReader(str(tmp_path / "parts"), "--input")) == want
    assert list(TextReader(str(tmp_path / "parts" / "*.gz"), "--input")) == want
    (tmp_path / "plain.txt").write_text("text 0\n\ntext 1\r\n")
    assert list(TextReader(str(tmp_path / "plain.txt"), "--input")) == [("1", "text 0"), ("3", "text 1")]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"text": "a"}, {"name": "b"}], {}, r"rows.jsonl:2: no 'text' \(the row has name\): .* --field"),
        ([{"text": 3}], {}, "rows.jsonl:1: 'text' wants text, has int"),
        ([{"text": "a", "id": 1.5}], {}, "_id or id wants a name or a whole number, has 1.5"),
        ([{"text": "a"}], {"id_field": "key"}, "key wants a name"),
        ([{"text": "\ud800"}], {}, "not valid Unicode"),
        ([], {}, "rows.jsonl has no text"),
        ([{"text": []}], {}, "rows.jsonl has no text"),
    ],
)
def test_what_is_no_text_is_said(tmp_path, rows, options, words):
    with pytest.raises(UserError, match=words):
        read(tmp_path / "rows.jsonl", rows, **options)


def test_a_table_without_the_column(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"txt": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="no column 'text', but txt: name one by --field"):
        list(TextReader(str(tmp_path / "t.parquet"), "--input"))
    with pytest.raises(UserError, match="--input: no such file or folder"):
        TextReader(str(tmp_path / "none.jsonl"), "--input")
