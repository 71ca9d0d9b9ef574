"""What the environment says of a run's processes, and what one process holds of a batch."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.distributed import Peers, Start, read_environment
from jaxembed.errors import UserError

THREE = {"JAXEMBED_COORDINATOR": "host:1234", "JAXEMBED_PROCESSES": "4", "JAXEMBED_PROCESS": "3"}


def test_what_the_environment_says():
    assert read_environment({}) == Start()
    assert read_environment({"JAXEMBED_PROCESSES": "1"}) == Start()  # as launchers say of one process
    assert read_environment(THREE) == Start(4, 3, "host:1234")
    assert read_environment(THREE | {"JAXEMBED_TIMEOUT": "20"}) == Start(4, 3, "host:1234", timeout=20)
    assert read_environment({"JAXEMBED_START": "auto"}) == Start(auto=True)
    assert read_environment({"JAXEMBED_START": "", "JAXEMBED_PROCESS": ""}) == Start()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"JAXEMBED_START": "slurm"}, "JAXEMBED_START='slurm': wants 'auto'"),
        (THREE | {"JAXEMBED_START": "auto"}, "give either"),
        (THREE | {"JAXEMBED_PROCESS": "4"}, "the last is 3"),
        (THREE | {"JAXEMBED_PROCESS": "-1"}, "JAXEMBED_PROCESS='-1': wants a whole number"),
        (THREE | {"JAXEMBED_PROCESS": ""}, "without the rest"),
        (THREE | {"JAXEMBED_COORDINATOR": "host"}, "wants HOST:PORT"),
        (THREE | {"JAXEMBED_PROCESSES": "four"}, "JAXEMBED_PROCESSES='four'"),
        ({"JAXEMBED_TIMEOUT": "2"}, "JAXEMBED_TIMEOUT='2': wants a whole number, 6 or more"),
    ],
)
def test_what_it_cannot_say(environment, said):
    with pytest.raises(UserError, match=said):
        read_environment(environment)


def test_one_process_has_nobody_to_agree_with():
    with Peers() as peers:
        assert peers.main and peers.count == 1
        peers.require_same("config", {"seed": 0})
        peers.wait()
    with pytest.raises(UserError, match="as it is"), Peers():  # its errors are its own
        raise UserError("as it is")


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 4}, {"data": 2, "tensor": 4}, {"fsdp": 4, "sequence": 2}])
def test_own_shards_are_those_whose_rows_this_process_is_asked_for(sizes):
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    shards = sharding.batch_shards(mesh)
    rows_Rx2 = np.arange(2 * shards).reshape(shards, 2)
    asked = set()

    def part(index: tuple[slice, ...]) -> np.ndarray:
        asked.update(rows_Rx2[index][:, 0] // 2)
        return rows_Rx2[index]

    layout = jax.sharding.NamedSharding(mesh, P(sharding.BATCH))
    jax.make_array_from_callback(rows_Rx2.shape, layout, part)
    assert sharding.own_shards(mesh) == tuple(sorted(asked))


@pytest.mark.parametrize("spec", [P(), P("fsdp"), P(None, ("tensor", "fsdp")), P("tensor", "fsdp")])
def test_to_host_brings_the_whole_array(spec):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    array = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(sharding.to_host(sharding.put(array, mesh, spec)), array)
    assert sharding.to_host(array) is array
