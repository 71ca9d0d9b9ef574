"""Reading and writing safetensors, against the safetensors library and against files made to deceive."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxembed.errors import UserError
from jaxembed.hf.safetensors_io import INDEX, SINGLE, open_tensors, write_tensors


def some_tensors():
    rng = np.random.default_rng(0)
    return {
        "float": rng.normal(size=(3, 5)).astype(np.float32),
        "half": rng.normal(size=(4,)).astype(np.float16),
        "brain": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "ids": np.arange(7, dtype=np.int64),
        "flags": np.array([True, False, True]),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 4), np.float32),
    }


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].tobytes() == tensor.tobytes()


def test_reads_what_the_library_writes(tmp_path):
    save_file(some_tensors(), tmp_path / SINGLE)
    tensors = open_tensors(tmp_path)
    assert_same(tensors, some_tensors())
    assert not tensors["float"].flags.writeable


def test_the_library_reads_what_we_write(tmp_path):
    tensors = some_tensors()
    tensors["turned"] = np.arange(12.0).reshape(3, 4).T
    write_tensors(tmp_path, tensors)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert_same(load_file(tmp_path / SINGLE), tensors)
    assert_same(open_tensors(tmp_path), tensors)


def test_shards_and_their_index(tmp_path):
    tensors = {f"t{i}": np.full((10,), i, np.float32) for i in range(5)}
    write_tensors(tmp_path, iter(tensors.items()), max_shard_bytes=80)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 200
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"
    assert_same(open_tensors(tmp_path), tensors)


def test_nothing_stays_of_a_write_that_fails(tmp_path):
    def tensors():
        yield "a", np.zeros(100)
        yield "b", np.zeros(100)
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        write_tensors(tmp_path, tensors(), max_shard_bytes=100)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "tf_model.h5"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=rf"{name}.*convert them to safetensors"):
        open_tensors(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(UserError, match="has neither"):
        open_tensors(tmp_path)


def test_truncated_file_lists_every_cut_tensor(tmp_path):
    save_file({name: np.zeros(100, np.float32) for name in "abcd"}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:-500])
    with pytest.raises(UserError, match=r"truncated.*cut or absent: c, d"):
        open_tensors(tmp_path)
    for size in (0, 7, 20):
        (tmp_path / SINGLE).write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated"):
            open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{not json", b"", "is not JSON"),
        (b"[" * 100_000, b"", "is not JSON"),
        (b"[]", b"", "wants a dict"),
        (b"\xff\xfe", b"", "is not JSON"),
        ({"a": 3}, b"", "lacks dtype"),
        ({"a": entry([1], 0, 4, "Q7")}, b"1234", "unknown dtype 'Q7'"),
        ({"a": entry([-1], 0, 4)}, b"1234", "not a list of sizes"),
        ({"a": entry([True], 0, 4)}, b"1234", "not a list of sizes"),
        ({"a": entry([1], -4, 0)}, b"1234", "not two offsets"),
        ({"a": entry([2], 0, 4)}, b"1234", "span another number"),
        ({"a": entry([1 << 62, 1 << 62], 0, 4)}, b"1234", "span another number"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234", "'b' begins at byte 0"),
        ({"a": entry([1], 4, 8)}, b"12345678", "begins at byte 4"),
        ({"a": entry([1], 0, 4)}, b"12345", "1 bytes behind the last tensor"),
        (b'{"a": 1, "a": 2}', b"", "twice in the header: a"),
    ],
)
def test_deceitful_headers(tmp_path, header, data, message):
    write_raw(tmp_path / SINGLE, header, data)
    with pytest.raises(UserError, match=message) as caught:
        open_tensors(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / SINGLE))
    assert "\n" not in str(caught.value)


def test_huge_header_is_not_read(tmp_path):
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(UserError, match="no safetensors file"):
        open_tensors(tmp_path)


def test_unaligned_header(tmp_path):
    header = json.dumps({"a": entry([2], 0, 8), "b": entry([2], 8, 12, "BF16")}).encode()
    header += b" " * (1 - len(header) % 2)
    write_raw(tmp_path / SINGLE, header, np.array([1.5, -2.0], "<f4").tobytes() + b"\x80\x3f\x00\x40")
    tensors = open_tensors(tmp_path)
    np.testing.assert_array_equal(tensors["a"], [1.5, -2.0])
    np.testing.assert_array_equal(tensors["b"].astype(np.float32), [1.0, 2.0])


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b"])
def test_index_stays_in_the_folder(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.zeros(1)}, tmp_path / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError, match=r"not the name of a file|leads out of its folder"):
        open_tensors(folder)


def test_links_out_of_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.zeros(1)}, tmp_path / "outside.safetensors")
    (folder / SINGLE).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UserError, match="link leads out of its folder"):
        open_tensors(folder)


def test_links_into_the_blobs_of_a_hub_cache(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    save_file({"a": np.ones(1)}, repository / "blobs" / "123")
    (snapshot / SINGLE).symlink_to("../../blobs/123")
    assert open_tensors(snapshot)["a"] == 1


def test_index_against_its_shards(tmp_path):
    save_file({"a": np.zeros(1)}, tmp_path / "one.safetensors")
    index = tmp_path / INDEX
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "three"}}))
    with pytest.raises(UserError, match=r"missing: three, two\.safetensors"):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(UserError, match="do not hold: b"):
        open_tensors(tmp_path)
    save_file({"a": np.zeros(1)}, tmp_path / "two.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(UserError, match="'a' is also in another file"):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": 3}}))
    with pytest.raises(UserError, match="does not map"):
        open_tensors(tmp_path)


def test_unwritable_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_tensors(tmp_path / "absent", {"a": np.zeros(1)})
