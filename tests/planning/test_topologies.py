"""Topologies by name, the chips' table, and what is refused."""

import importlib.util

import jax
import pytest

from jaxembed.config import MeshConfig
from jaxembed.errors import UserError
from jaxembed.hardware import CHIPS, chip_of
from jaxembed.planning.gpu_targets import TARGETS, target_text
from jaxembed.planning.topology import PLANNED, parse


@pytest.mark.parametrize(
    ("said", "shape"),
    [("v5e:16x16", (16, 16)), ("v5p:4x4x4", (4, 4, 4)), ("v6e:4x4", (4, 4)), ("h200:1", (1,)), ("h100:16", (16,))],
)
def test_names(said, shape):
    topology = parse(said)
    assert topology.shape == shape
    assert topology.chip.name == said.partition(":")[0]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("v5x:4x4", "'v5x' is not one of .*, did you mean 'v5e'|v5p"),
        ("v5e", "v5e wants a grid such as 4x4 behind the colon, such as v5e:4x4"),
        ("v5e:16", "v5e wants a grid such as 4x4"),
        ("v5p:4x4", "v5p wants a grid such as 2x2x4"),
        ("h100:2x4", "h100 wants a number of devices"),
        ("h100:0", "h100 wants a number of devices"),
        ("h100:12", "more than 8 GPUs come in whole nodes of 8"),
        ("cpu:", "cpu wants a number of devices"),
    ],
)
def test_what_is_no_topology(said, message):
    with pytest.raises(UserError, match=message):
        parse(said)


def test_devices_of_this_machine():
    assert parse("cpu:4").mesh(MeshConfig(fsdp=2)).shape["data"] == 2
    with pytest.raises(UserError, match=r"config\.mesh: data 3.* do not multiply to the 4 devices"):
        parse("cpu:4").mesh(MeshConfig(data=3))
    with pytest.raises(UserError, match="this process has 8 CPU devices"):
        parse("cpu:16").mesh(MeshConfig())


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="XLA's compiler for TPUs is here")
@pytest.mark.parametrize("said", ["v5e:4x4", "h100:8"])
def test_a_compiler_that_is_not_installed(said):
    with pytest.raises(UserError, match=r"is not installed: pip install -r requirements-aot\.txt"):
        parse(said).mesh(MeshConfig())


def test_the_table_of_chips():
    assert chip_of("TPU v5 lite").name == "v5e"
    assert chip_of("NVIDIA H200").flops["bfloat16"] == 989e12
    assert chip_of("cpu") is None
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(set(kinds)) == len(kinds)
    for chip in CHIPS:
        assert bool(chip.torus) != bool(chip.node)  # a grid or a switch
        assert set(chip.flops) == {"bfloat16", "float32"}
        assert chip.flops["bfloat16"] > 50 * chip.memory_bandwidth > 50 * chip.link_bandwidth
        assert (chip.name in PLANNED) == (chip.name in TARGETS or (bool(chip.torus) and chip.name != "v4"))
    assert all(chip_of(kind).platform == "gpu" for kind in ("NVIDIA L4", "NVIDIA GeForce RTX 4090"))


def test_descriptions_of_gpus():
    for chip in CHIPS:
        if chip.name in TARGETS:
            text = target_text(chip)
            assert f"device_memory_size: {chip.memory_bytes}\n" in text
            assert text.count("{") == text.count("}")


def test_devices_are_those_of_the_process():
    assert parse("cpu:8").devices == jax.devices()
