"""The devices of a plan: a TPU slice or GPUs that are not there, or processors of this machine."""

import dataclasses
import importlib.util
import math
import re

import jax
from jax.experimental import topologies

from jaxembed import sharding
from jaxembed.config import MeshConfig, nearest
from jaxembed.errors import UserError
from jaxembed.hardware import CHIPS, Chip
from jaxembed.planning.gpu_targets import TARGETS, target_text

CPU = "cpu"
# Without v4, whose chips the compiler takes for two devices each, and jax on the machine for one.
PLANNED = {chip.name: chip for chip in CHIPS if chip.name in TARGETS or (chip.torus and chip.name != "v4")}
# What has XLA's compiler for a platform: its module.
_COMPILERS = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda13"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are laid out.

    Attributes:
      said: what the user called it, such as 'v5e:16x16'.
      chip: what they are; None for this machine's processors.
      shape: of the grid of a TPU slice; else the number of devices.
    """

    said: str
    chip: Chip | None
    shape: tuple[int, ...]

    @property
    def devices(self) -> list[jax.Device]:
        """The devices, to compile for.

        Raises:
          UserError: the compiler is not installed, or knows no such slice.
        """
        if self.chip is None:
            if len(jax.devices(CPU)) < self.shape[0]:
                raise UserError(f"--topology={self.said}: this process has {len(jax.devices(CPU))} CPU devices")
            return jax.devices(CPU)[: self.shape[0]]
        module = _COMPILERS[self.chip.platform]
        if importlib.util.find_spec(module.partition(".")[0]) is None or importlib.util.find_spec(module) is None:
            raise UserError(
                f"--topology={self.said}: XLA's compiler for it ({module}) is not installed: "
                "pip install -r requirements-aot.txt -c constraints.txt"
            )
        try:
            return list(self._description().devices)
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"--topology={self.said}: {str(error).splitlines()[0]}") from error

    def mesh(self, config: MeshConfig) -> jax.sharding.Mesh:
        """Returns the config's mesh over the devices, as a run there would have it.

        Raises:
          UserError: the config's sizes do not fit the topology.
        """
        devices = self.devices
        try:
            return sharding.make_mesh(config, devices)
        except NotImplementedError as error:
            sizes = ", ".join(f"{axis} {getattr(config, axis)}" for axis in sharding.AXES)
            raise UserError(
                f"config.mesh: {sizes}: these cannot be laid onto {self.said}: take products of whole axes of its grid"
            ) from error

    def _description(self) -> topologies.TopologyDescription:
        if self.chip.platform == "tpu":
            return topologies.get_topology_desc(self.said, "tpu")
        nodes = math.ceil(self.shape[0] / self.chip.node)
        layout = f"1x{nodes}x{self.shape[0] // nodes}"
        return topologies.get_topology_desc(
            platform="cuda", topology_name=self.chip.name, topology=layout, target_config=target_text(self.chip)
        )


def parse(said: str) -> Topology:
    """Reads 'v5e:16x16', 'v5p:4x4x4', 'h100:8' or 'cpu:8'.

    Raises:
      UserError: a chip or a form that is not known.
    """
    name, _, sizes = said.partition(":")
    known = (*PLANNED, CPU)
    if name not in known:
        raise UserError(f"--topology={said}: {name!r} is not one of {', '.join(known)}{nearest(name, known)}")
    chip = PLANNED.get(name)
    axes = chip.torus if chip and chip.torus else 1
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), sizes):
        wanted = {1: "a number of devices", 2: "a grid such as 4x4", 3: "a grid such as 2x2x4"}[axes]
        raise UserError(f"--topology={said}: {name} wants {wanted} behind the colon, such as {name}:{_EXAMPLES[axes]}")
    shape = tuple(map(int, sizes.split("x")))
    if chip and chip.node and shape[0] > chip.node and shape[0] % chip.node:
        raise UserError(f"--topology={said}: more than {chip.node} GPUs come in whole nodes of {chip.node}")
    return Topology(said, chip, shape)


_EXAMPLES = {1: "8", 2: "4x4", 3: "4x4x4"}
