"""Records of every format and kind of file, and the message of every mistake."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxembed.config import SourceConfig
from jaxembed.data.records import Record, RecordReader
from jaxembed.errors import UserError

PAIR = {"query": "q", "positive": "p"}


def write(path, rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(text.encode())
    return path


def read(path, on_bad_record="error", **fields):
    return list(RecordReader(SourceConfig(path=str(path), **fields), on_bad_record, "config.data.train[0]"))


def read_row(tmp_path, row, **fields):
    (record,) = read(write(tmp_path / "a.jsonl", [row]), **fields)
    return record


def test_own_format_takes_every_field(tmp_path):
    row = {
        "query": "q",
        "positive": ["p", "p2"],
        "negative": "n",
        "group": 7,
        "id": "x",
        "scores": [1, 0.5, 0.25],
        "label": 3.0,
        "instruction": "Find it.",
        "negative_query": ["what n answers"],
        "unknown": {"ignored": True},
    }
    expected = Record("q", ("p", "p2"), ("n",), "7", "x", (1.0, 0.5, 0.25), "3", "Find it.", ("what n answers",))
    assert read_row(tmp_path, row) == expected
    assert read_row(tmp_path, row | {"negative_query": "what n answers"}) == expected


def test_empty_optional_fields_are_as_good_as_absent(tmp_path):
    row = PAIR | {"negative": [], "scores": None, "group": None, "label": float("nan"), "instruction": None}
    row |= {"negative_query": []}
    assert read_row(tmp_path, row) == Record("q", ("p",))


def test_scored_pairs(tmp_path):
    assert read_row(tmp_path, {"sentence1": "a", "sentence2": "b", "score": 4}) == Record("a", ("b",), scores=(4.0,))


def test_columns_map_names(tmp_path):
    row = {"q.text": "a", "doc": "b", "sim": 0.5, "positive": "not this", "hard": ["c", "d"], "topic": 4}
    columns = {"query": "q.text", "positive": "doc", "negative": "hard", "group": "topic"}
    assert read_row(tmp_path, row, columns=columns) == Record("a", ("b",), ("c", "d"), group="4")
    row.pop("hard")
    columns = {"query": "q.text", "positive": "doc", "score": "sim"}
    assert read_row(tmp_path, row, columns=columns) == Record("a", ("b",), scores=(0.5,))


@pytest.mark.parametrize("record_format", ["jaxembed", "st", "flagembedding"])
def test_queries_of_negatives_can_be_named_in_any_format(tmp_path, record_format):
    negatives = {"flagembedding": "neg"}.get(record_format, "negative")
    row = {"query": "q", "pos": ["p"], "positive": "p", negatives: ["n", "m"], "other": ["n?", "m?"]}
    columns = {"negative_query": "other"}
    expected = Record("q", ("p",), ("n", "m"), negative_queries=("n?", "m?"))
    assert read_row(tmp_path, row, format=record_format, columns=columns) == expected


def test_texts_format_pairs_each_text_with_itself(tmp_path):
    row = {"text": "a", "title": "b", "group": 3, "id": "x", "label": "c", "instruction": "i"}
    names = {"group": "3", "id": "x", "label": "c", "instruction": "i"}
    assert read_row(tmp_path, row, format="texts") == Record("a", ("a",), **names)
    assert read_row(tmp_path, row, format="texts", columns={"text": "title"}) == Record("b", ("b",), **names)
    for bad, reason in (
        ({"text": ["a", "b"]}, "'text' holds 2 texts, wants one"),
        ({"sentence": "a"}, "no 'text'"),
        ({"text": " "}, "is empty"),
    ):
        with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{reason}"):
            read_row(tmp_path, bad, format="texts")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "embedding": [[0.0]] * 2}), path)
    assert read(path, format="texts") == [Record("a", ("a",)), Record("b", ("b",))]
    for record_format, field in (("texts", "positive"), ("jaxembed", "text")):
        with pytest.raises(UserError, match=f"no field '{field}' in records of format '{record_format}'"):
            read(path, format=record_format, columns={field: "text"})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"anchor": "a", "positive": "b"}, Record("a", ("b",))),
        ({"sentence_A": "a", "sentence_B": "b"}, Record("a", ("b",))),  # by order
        ({"x": "a", "y": "b", "z": "c"}, Record("a", ("b",), ("c",))),
        ({"negative": "c", "positive": "b", "query": "a"}, Record("a", ("b",), ("c",))),  # customary names win
        (
            {"question": "a", "answer": "b", "negative_1": "c", "negative_2": "d", "source": "web"},
            Record("a", ("b",), ("c", "d")),
        ),
        ({"premise": "a", "hypothesis": "b", "label": "neutral"}, Record("a", ("b",))),
        ({"hypothesis": "a", "entailment": "b", "contradiction": "c"}, Record("a", ("b",), ("c",))),
        ({"sentence1": "a", "sentence2": "b", "score": 0.7}, Record("a", ("b",), scores=(0.7,))),
        ({"label": 1, "text1": "a", "text2": "b"}, Record("a", ("b",), scores=(1.0,))),
        (
            {"query": "a", "positive": "b", "negative": "c", "label": [3.0, 1.5]},
            Record("a", ("b",), ("c",), scores=(3.0, 1.5)),
        ),
        ({"id": 5, "anchor": "a", "positive": "b", "doc_id": "x", "dataset_name": "y"}, Record("a", ("b",), id="5")),
    ],
)
def test_sentence_transformers_format(tmp_path, row, expected):
    assert read_row(tmp_path, row, format="st") == expected


def test_sentence_transformers_columns_mapped_and_the_rest_by_order(tmp_path):
    row = {"passage": "b", "title": "a", "wrong": "c"}
    assert read_row(tmp_path, row, format="st", columns={"query": "title"}) == Record("a", ("b",), ("c",))


def test_flagembedding_format(tmp_path):
    row = {"query": "q", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [0.9], "neg_scores": [0.1, 0], "prompt": "Do"}
    expected = Record("q", ("p",), ("n", "m"), scores=(0.9, 0.1, 0.0), instruction="Do")
    assert read_row(tmp_path, row, format="flagembedding") == expected
    assert read_row(tmp_path, {"query": "q", "pos": ["p"]}, format="flagembedding") == Record("q", ("p",))


def test_tevatron_format(tmp_path):
    row = {
        "query_id": 12,
        "query": "q",
        "positive_passages": [{"docid": "1", "title": "T", "text": "body"}, {"docid": "2", "title": "", "text": "b"}],
        "negative_passages": [{"docid": "3", "text": "n"}],
    }
    expected = Record("q", ("T body", "b"), ("n",), id="12")
    assert read_row(tmp_path, row, format="tevatron") == expected
    row["query_text"] = row.pop("query")
    assert read_row(tmp_path, row, format="tevatron") == expected
    by_id = {"query_id": "1", "query_text": "q", "positive_document_ids": ["3"], "negative_document_ids": []}
    with pytest.raises(UserError, match="join them with their corpus"):
        read_row(tmp_path, by_id, format="tevatron")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_kinds_of_json_lines(tmp_path, name):
    data = (
        "\ufeff" + json.dumps(PAIR) + "\r\n\n" + json.dumps({"query": "ü\u2028", "positive": "🙂"}, ensure_ascii=False)
    )
    (tmp_path / name).write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())
    reader = RecordReader(SourceConfig(path=str(tmp_path / name)), "error", "w")
    assert [(reader.line, record) for record in reader] == [
        (1, Record("q", ("p",))),
        (3, Record("ü\u2028", ("🙂",))),
    ]
    assert reader.source.done == reader.source.total == (tmp_path / name).stat().st_size
    assert len(list(reader)) == 2  # it can be read again


def test_parquet(tmp_path):
    table = pa.table(
        {
            "query": ["a", "b", None],
            "positive": [["p"], ["p", "q"], ["p"]],
            "scores": [[1.0], None, [0.5]],
            "group": pa.array([1, None, 2]),
            "embedding": [[0.0] * 4] * 3,
        }
    )
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    reader = RecordReader(SourceConfig(path=str(path)), "skip", "w")
    assert list(reader) == [Record("a", ("p",), group="1", scores=(1.0,)), Record("b", ("p", "q"))]
    assert (reader.source.done, reader.source.total, reader.skipped) == (3, 3, 1)
    assert reader.reasons[0].startswith(f"{path} row 3: no 'query'")
    with pytest.raises(UserError, match=r"a\.parquet row 3: no 'query'"):
        read(path)
    pq.write_table(table.select(["group", "embedding"]), path)
    with pytest.raises(UserError, match="has the columns group, embedding, none that a record of format 'tevatron'"):
        read(path, format="tevatron")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"query": ', "broken JSON"),
        ("[1]", "wants a JSON object, has list"),
        ("1" * 5000, "unreadable JSON"),
        ("[" * 100_000, "unreadable JSON"),
        ({"question": "q", "positive": "p"}, r"no 'query' \(the record has question, positive\)"),
        ({"query": " \n", "positive": "p"}, "'query' is empty"),
        ({"query": "q", "positive": ""}, "'positive' is empty"),
        ({"query": "q", "positive": []}, "'positive' is an empty list"),
        ({"query": "q", "positive": None}, "no 'positive'"),
        ({"query": 3, "positive": "p"}, "'query' wants text, has int"),
        ({"query": ["a", "b"], "positive": "p"}, "holds 2 texts, wants one"),
        ({"query": "q", "positive": ["p", {"text": "x"}]}, "'positive' wants text, has dict"),
        (PAIR | {"negative": ["n", ""]}, "'negative' is empty"),
        (PAIR | {"negative_query": "n?"}, "1 negative queries for 0 negatives, wants one for each"),
        (PAIR | {"negative": ["n", "m"], "negative_query": ["n?"]}, "1 negative queries for 2 negatives"),
        (PAIR | {"negative": "n", "negative_query": [""]}, "'negative_query' is empty"),
        (PAIR | {"scores": [1, 2]}, "2 scores for 1 positives and 0 negatives"),
        (PAIR | {"scores": [float("nan")]}, "'scores' holds NaN"),
        (PAIR | {"scores": [10**400]}, "beyond float32"),
        (PAIR | {"scores": ["1"]}, "'scores' wants numbers, has str"),
        (PAIR | {"scores": [True]}, "'scores' wants numbers, has bool"),
        (PAIR | {"group": ["a"]}, "'group' wants text or a whole number, has list"),
        (PAIR | {"label": 0.5}, "'label' wants text or a whole number, has float"),
        ('{"query": "\\ud800", "positive": "p"}', "lone surrogate"),
        ({"sentence1": "a", "sentence2": "b", "score": "high"}, "'score' wants numbers"),
    ],
)
def test_bad_records_raise_or_are_skipped_with_their_place(tmp_path, row, reason):
    path = write(tmp_path / "a.jsonl", [PAIR, row, PAIR])
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{reason}"):
        read(path)
    reader = RecordReader(SourceConfig(path=str(path)), "skip", "w")
    assert len(list(reader)) == 2
    assert reader.skipped == 1
    assert reader.reasons[0].startswith(f"{path}:2: ")


def test_bytes_that_are_no_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(PAIR).encode() + b'\n{"query": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not UTF-8 \(byte 12 of the line\)"):
        read(tmp_path / "a.jsonl")


def test_only_the_first_reasons_are_kept(tmp_path):
    reader = RecordReader(SourceConfig(path=str(write(tmp_path / "a.jsonl", [PAIR] + ["x"] * 50))), "skip", "w")
    assert len(list(reader)) == 1
    assert reader.skipped == 50
    assert len(reader.reasons) == 5


def test_files_without_records(tmp_path):
    with pytest.raises(UserError, match="no usable record: it is empty"):
        read(write(tmp_path / "a.jsonl", []))
    with pytest.raises(UserError, match=r"all 2 are bad, the first: .*a\.jsonl:1: broken JSON"):
        read(write(tmp_path / "a.jsonl", ["x", "y"]), "skip")


def test_broken_gzip(tmp_path):
    whole = gzip.compress("\n".join([json.dumps(PAIR)] * 1000).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot read on after line \d+"):
        read(tmp_path / "a.jsonl.gz", "skip")
    (tmp_path / "b.jsonl.gz").write_text("plain text")
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: cannot read on after line 0: Not a gzipped file"):
        read(tmp_path / "b.jsonl.gz")


def test_broken_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file"):
        read(tmp_path / "a.parquet")


def test_mistakes_in_the_source(tmp_path):
    path = write(tmp_path / "a.jsonl", [PAIR])
    with pytest.raises(UserError, match=r"config\.data\.train\[0\]\.path: no such file or folder: .*b\.jsonl"):
        read(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"train\[0\]\.path: .*a\.csv ends in none of \.jsonl.*or set source"):
        read(write(tmp_path / "a.csv", [PAIR]))
    assert read(tmp_path / "a.csv", source="jsonl") == [Record("q", ("p",))]
    with pytest.raises(UserError, match=r"columns: there is no field 'postive' .*, did you mean 'positive'\?"):
        read(path, columns={"postive": "p"})
    with pytest.raises(UserError, match=r"columns: no record of .* has hard_negs"):
        read(path, columns={"negative": "hard_negs"})


def write_parts(folder):
    """Four files of one source, one of them in a subfolder and one empty, and files that are not of it."""
    (folder / "sub").mkdir(parents=True)
    write(folder / "b.jsonl", [PAIR | {"id": "b1"}, "", PAIR | {"id": "b3"}])
    (folder / "a.json.gz").write_bytes(gzip.compress(json.dumps(PAIR | {"id": "a1"}).encode()))
    write(folder / "c.jsonl", [])
    write(folder / "sub" / "a.jsonl", [PAIR | {"id": "s1"}, "broken", PAIR | {"id": "s3"}])
    write(folder / ".hidden.jsonl", ["broken"])
    write(folder / "README.md", ["# no record"])
    return folder


@pytest.mark.parametrize("pattern", ["", "**/*.json*", "**/[a-c].json*"])
def test_folders_and_globs_read_files_in_the_order_of_their_names(tmp_path, pattern):
    folder = write_parts(tmp_path / "parts")
    reader = RecordReader(SourceConfig(path=str(folder / pattern)), "skip", "w")
    assert [(record.id, reader.name(reader.line)) for record in reader] == [
        ("a1", f"{folder}/a.json.gz:1"),
        ("b1", f"{folder}/b.jsonl:1"),
        ("b3", f"{folder}/b.jsonl:3"),
        ("s1", f"{folder}/sub/a.jsonl:1"),
        ("s3", f"{folder}/sub/a.jsonl:3"),
    ]
    assert reader.reasons == [f"{folder}/sub/a.jsonl:2: {reader.reasons[0].split(': ', 1)[1]}"]
    assert reader.source.done == reader.source.total == sum(f.stat().st_size for f in reader.source.files)
    with pytest.raises(UserError, match=r"sub/a\.jsonl:2: broken JSON"):
        read(folder / pattern)


def test_parquet_files_need_not_have_the_same_columns(tmp_path):
    pq.write_table(pa.table({"query": ["a", "b"], "positive": ["p", "p"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"positive": ["q"], "query": ["c"], "negative": [["n"]]}), tmp_path / "2.parquet")
    reader = RecordReader(SourceConfig(path=str(tmp_path / "*.parquet")), "error", "w")
    assert [(record.query, reader.name(reader.line).split("/")[-1]) for record in reader] == [
        ("a", "1.parquet row 1"),
        ("b", "1.parquet row 2"),
        ("c", "2.parquet row 1"),
    ]
    assert (reader.source.done, reader.source.total) == (3, 3)


def test_real_files(data_dir):
    assert sum(1 for _ in read(data_dir / "pairs" / "captions_val.jsonl.gz")) == 2983
    with_group = read(data_dir / "pairs" / "captions_val.jsonl.gz")[0]
    assert with_group.group == "val0" and with_group.query.startswith("A group of people")
    assert sum(1 for r in read(data_dir / "pairs" / "nli_triplets.jsonl.gz", format="st") if r.negatives) > 10_000
    assert all(len(r.scores) == 1 for r in read(data_dir / "sts" / "stsb-dev.jsonl.gz"))
