"""Google's store: paths as in any other, and checkpoints that orbax writes there by itself."""

import jax
import numpy as np
import pytest
from gcs_server import serving
from test_checkpoint import NAME, make_state, mesh_of, save

from jaxembed.checkpoint import FOLDER, Checkpoints, find, restore_model
from jaxembed.checkpoint_mirror import complete_steps
from jaxembed.errors import UserError
from jaxembed.storage import filling, local, path_of, sizes, stamp


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
