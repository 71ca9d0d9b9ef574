"""Weights read onto devices in pieces: the same arrays on any mesh, and a host that never holds the model twice."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_models import MESHES, ONE, make_mesh

from jaxembed import sharding
from jaxembed.hf import loading
from jaxembed.hf.safetensors_io import open_tensors, write_tensors
from jaxembed.hf.table import Linear, PadRows, Row, import_leaves

LAYERS = 6
ROWS = (Row("table", "table", PadRows(50)), Row("{i}.up", "up", Linear()), Row("norm", "norm"))
SHAPES = {"table": (64, 16), "up": (LAYERS, 16, 24), "norm": (16,)}
SPECS = {"table": ("vocab", None), "up": (None, "embed", "mlp"), "norm": (None,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    rng = np.random.default_rng(0)
    tensors = {"table": rng.normal(size=(50, 16)), "norm": rng.normal(size=16)}
    tensors |= {f"{i}.up": rng.normal(size=(24, 16)) for i in range(LAYERS)}
    path = tmp_path_factory.mktemp("weights")
    write_tensors(path, {name: x.astype(np.float32) for name, x in tensors.items()}, max_shard_bytes=4000)
    return path


@pytest.mark.parametrize("mesh", [ONE, *MESHES.values()], ids=["1", *MESHES])
@pytest.mark.parametrize("piece_bytes", [1, 5000])
def test_pieces_make_the_whole(folder, mesh, piece_bytes, monkeypatch):
    monkeypatch.setattr(loading, "PIECE_BYTES", piece_bytes)
    tensors = open_tensors(folder)
    leaves = import_leaves(ROWS, tensors, SHAPES, LAYERS, where="test")
    on = make_mesh(mesh)
    with jax.set_mesh(on):
        targets = {
            path: jax.ShapeDtypeStruct(
                shape, np.float32, sharding=jax.sharding.NamedSharding(on, sharding.spec(*SPECS[path]))
            )
            for path, shape in SHAPES.items()
        }
        loaded = loading.load_onto(leaves, targets)
    for path, leaf in loaded.items():
        assert leaf.sharding == targets[path].sharding
    np.testing.assert_array_equal(np.asarray(loaded["table"])[:50], tensors["table"])
    assert not np.asarray(loaded["table"])[50:].any()
    for i in range(LAYERS):
        np.testing.assert_array_equal(np.asarray(loaded["up"])[i], tensors[f"{i}.up"].T)


PROGRAM = """
import json, pathlib, resource, sys
import jax, numpy as np
from jaxembed.hf import loading
from jaxembed.hf.safetensors_io import open_tensors
from jaxembed.hf.table import Linear, Row, import_leaves

loading.PIECE_BYTES = 2**24
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
target = jax.ShapeDtypeStruct((8, 2048, 4096), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
small = np.zeros((8, 8, 8), np.float32)
before = peak()
tensors = open_tensors(pathlib.Path(sys.argv[1]))
leaves = import_leaves((Row("{i}", "w", Linear()),), tensors, {"w": target.shape}, 8, where="")
whole = loading.load_onto(leaves, {"w": target})["w"]
print(json.dumps({"above": peak() - before - whole.nbytes, "sum": float(whole[3].sum())}))
"""


def test_the_host_holds_a_piece_beside_the_model(tmp_path):
    """268 MB of weights: what the process needs beside them is a few pieces of 16 MB, not the file once more."""
    tensors = {str(i): np.full((4096, 2048), i, np.float32) for i in range(8)}
    write_tensors(tmp_path, tensors, max_shard_bytes=2**26)
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    said = json.loads(run.stdout)
    assert said["sum"] == 3 * 4096 * 2048
    assert said["above"] < 130e6
