"""Google's store: paths as in any other, and checkpoints that orbax writes there by itself."""

import jax
import numpy as np
import pytest
from gcs_server import serving
from store_server import other_machine
from test_checkpoint import NAME, make_state, mesh_of, save
from tiny_run import write_records, write_tokenizer

from jaxembed.checkpoint import FOLDER, Checkpoints, find, restore_model
from jaxembed.checkpoint_mirror import complete_steps
from jaxembed.config import MaxLength, PromptConfig, SourceConfig
from jaxembed.data import cache_writer
from jaxembed.data.cache import build_or_open
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import StoreLost, UserError
from jaxembed.storage import StorePath, filling, local, path_of, remove, send, sizes, stamp


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("copies")) as url:
        yield url


def test_a_path_is_read_and_written(bucket):
    place = path_of(f"{bucket}/place")
    assert not place.exists()
    with filling(place, "done") as folder:
        (folder / "a").mkdir()
        (folder / "a" / "b.txt").write_text("two\nlines\n")
        (folder / "done").write_text("")
    assert place.is_dir() and sizes(place) == {"a/b.txt": 10, "done": 0}
    file = place / "a" / "b.txt"
    with file.open() as stream:
        assert list(stream) == [b"two\n", b"lines\n"]
    before = stamp(file)
    file.write_bytes(b"two\nlines!")
    assert stamp(file) != before and (local(place) / "a" / "b.txt").read_text() == "two\nlines!"
    assert path_of(f"{bucket}/**/*.txt").glob_files() == (file,)
    with pytest.raises(UserError, match=r"^gs://wrong/x: cannot be written: "):
        path_of("gs://wrong/x").write_bytes(b"")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError("Forbidden: tests/x\nno access"), UserError),
        (401, UserError),
        (503, StoreLost),
        (ConnectionResetError(104, "Connection reset by peer"), StoreLost),
    ],
)
def test_what_may_pass_is_told_from_what_will_not(bucket, monkeypatch, error, kind):
    from gcsfs.retry import HttpError  # the package looks at once for the server that `bucket` names

    def fail(*_):
        raise HttpError({"code": error, "message": "said"}) if isinstance(error, int) else error

    place = path_of(f"{bucket}/x")
    monkeypatch.setattr(place.store, "cat_file", fail)
    with pytest.raises(UserError, match=r"^gs://tests/x: cannot be read: ") as raised:
        place.read_bytes()
    assert type(raised.value) is kind


def test_what_another_process_has_removed_is_no_error(bucket, tmp_path, monkeypatch):
    place, files = path_of(f"{bucket}/removed"), StorePath.files
    monkeypatch.setattr(StorePath, "files", lambda self: {"gone": {}, **files(self)})
    (tmp_path / "mark").write_text("")
    send(tmp_path, place, "mark")
    assert files(place).keys() == {"mark"}
    remove(place, "mark")
    assert not files(place)


def test_machines_that_build_a_token_cache_at_once_do_not_disturb_each_other(bucket, tmp_path, monkeypatch):
    source = SourceConfig(path=str(write_records(tmp_path / "pairs.jsonl", 20, 3)))
    tokenizer = Tokenizer.load(f"file:{write_tokenizer(tmp_path / 'tokenizer.json')}")
    prompts, lengths, place = PromptConfig("", ""), MaxLength(20, 20), path_of(f"{bucket}/cache")
    fill, files = cache_writer.fill, StorePath.files

    def opened():
        return build_or_open(source, tokenizer, prompts, lengths, str(place), "error", False)

    def another_is_faster(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_writer, "fill", fill)
            other_machine(tmp_path / "faster", patch)
            opened()
        fill(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "fill", another_is_faster)
        patch.setattr(place.store, "rm_file", None)  # so that nobody finds a part of it
        cache = opened()
    assert sizes(place / "tokens" / cache.path.name) == sizes(cache.path)
    other_machine(tmp_path / "third", monkeypatch)
    monkeypatch.setattr(StorePath, "files", lambda self: {**files(self), "gone": {}})
    np.testing.assert_array_equal(opened().tokens, cache.tokens)  # tokenised, as not all can be copied


def test_checkpoints_are_kept_found_and_restored(bucket):
    workdir = path_of(f"{bucket}/run")
    save(workdir, [1], keep=1, best=NAME, scores={1: 30.0})
    save(workdir, [4], keep=1, best=NAME, scores={4: 20.0})  # started again
    assert complete_steps(workdir / FOLDER) == [1, 4] and find(f"{workdir}").name == "4"
    (workdir / FOLDER / "5" / "half").write_bytes(b"")  # what a kill leaves
    checkpoints = Checkpoints(workdir)
    assert checkpoints.latest() == 4 and checkpoints.meta(4) == {"rungs": [4]}
    with jax.set_mesh(mesh_of(1)):
        got = checkpoints.restore(4, jax.eval_shape(lambda: make_state(0, True)))
        model = restore_model(f"{workdir}@1", jax.eval_shape(lambda: make_state(0, True)).params["model"])
    checkpoints.close()
    np.testing.assert_array_equal(got.params["model"]["layer"]["kernel"][0], [4, 5, 6, 7])
    np.testing.assert_array_equal(model["layer"]["kernel"][0], [2, 3, 4, 5])  # the average, one more
