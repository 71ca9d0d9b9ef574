"""Folders of vectors: what is written is read, and what is broken is said."""

import errno
import json

import numpy as np
import pytest
from stored_vectors import IDS, VECTORS, manifest, write_shards

from jaxembed.errors import UserError
from jaxembed.vectors import folder as folder_module
from jaxembed.vectors.folder import ShardWriter, VectorFolder
from jaxembed.vectors.quantize import DTYPES, dequantize, quantize, ranges_of


@pytest.mark.parametrize("layout", ["npy", "parquet"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(tmp_path, layout, dtype):
    folder = VectorFolder.open(write_shards(tmp_path / "v", layout=layout, dtype=dtype, prompt="query: "), "--vectors")
    ranges = ranges_of(VECTORS)
    want = dequantize(quantize(VECTORS, dtype, ranges), dtype, 12, ranges)
    assert np.array_equal(folder.vectors(), want)
    assert [start for start, _ in folder.blocks()] == [0, 4, 8]
    assert list(folder.ids()) == IDS
    assert (len(folder), folder.width, folder.prompt, folder.similarity) == (10, 12, "query: ", "cosine")


def test_other_programs_read_the_files(tmp_path):
    import pyarrow.parquet

    plain, table = write_shards(tmp_path / "a"), write_shards(tmp_path / "b", layout="parquet")
    assert np.array_equal(np.load(plain / "vectors-00001.npy"), VECTORS[4:8])
    assert json.loads((plain / "ids-00001.json").read_text()) == IDS[4:8]
    rows = pyarrow.parquet.read_table(table / "vectors-00001.parquet").to_pylist()
    assert [row["id"] for row in rows] == IDS[4:8]
    assert np.array_equal(np.float32([row["vector"] for row in rows]), VECTORS[4:8])


def test_what_does_not_serve_is_refused(tmp_path):
    def refuses(words, path):
        with pytest.raises(UserError, match=words):
            VectorFolder.open(path, "--corpus").vectors()

    refuses("--corpus=.*/none: no manifest.json here", tmp_path / "none")
    refuses("not all vectors are there", write_shards(tmp_path / "half", finished=False))
    write_shards(tmp_path / "gap")
    (tmp_path / "gap" / "vectors-00001.npy").unlink()
    refuses("shard 1 is missing", tmp_path / "gap")
    write_shards(tmp_path / "bad")
    (tmp_path / "bad" / "vectors-00001.npy").write_bytes(b"no")
    refuses("vectors-00001.npy: not a shard of vectors", tmp_path / "bad")
    np.save(tmp_path / "bad" / "vectors-00001.npy", VECTORS[:3])
    refuses("does not hold 4 vectors of 12 dimensions", tmp_path / "bad")
    (tmp_path / "bad" / "manifest.json").write_text('{"format": "another"}')
    refuses("not of the format", tmp_path / "bad")


def test_a_folder_is_one_encodings(tmp_path):
    write_shards(tmp_path / "v", finished=False)
    moved = manifest(model="other/place", input="x", files=(("elsewhere/in.jsonl", 3, 4),))
    ShardWriter(tmp_path / "v", moved).claim()  # the same texts and weights, wherever they lie
    for changes in (
        {"weights": "w2"},
        {"prompt": "p"},
        {"shard_size": 5},
        {"rows": ("test",)},
        {"files": (("in.jsonl", 4, 4),)},
    ):
        with pytest.raises(UserError, match=f"another encoding .*{next(iter(changes))}"):
            ShardWriter(tmp_path / "v", manifest(**changes)).claim()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".manifest.json.17.tmp").write_text("{")
    ShardWriter(tmp_path / "killed", manifest()).claim()  # killed before its first word was out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="has files but no manifest"):
        ShardWriter(tmp_path / "other", manifest()).claim()
    with pytest.raises(UserError, match="is a file"):
        ShardWriter(tmp_path / "other" / "thesis.tex", manifest()).claim()


def test_a_full_disk_leaves_what_is_there(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_shards(tmp_path / "v", (0,), finished=False)
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_whole", full)
        with pytest.raises(UserError, match=r"No space left on device\. The shards that are there stay"):
            ShardWriter(tmp_path / "v", manifest()).write(1, IDS[4:8], VECTORS[4:8])
    assert ShardWriter(tmp_path / "v", manifest()).done() == {0}
