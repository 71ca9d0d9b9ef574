"""How long a step takes, by what its instructions compute and move: a roofline (Williams et al. 2009) for each of them.

An instruction takes the longer of its products at the chip's rate and its traffic at the memory's, instructions take
turns. Collectives pass blocks round rings, as in "How to scale your model" (jax-ml.github.io/scaling-book/sharding).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax

from jaxembed.hardware import Chip
from jaxembed.planning.hlo import Collective, Program

# Parts of the peaks that large programs reach. Products: what large ones reach on H100 (about 700 of 989 TFLOP/s) and
# TPUs' layers of transformers; memory: what a copy reaches; links: large messages.
OF_PRODUCTS, OF_MEMORY, OF_LINKS = 0.7, 0.8, 0.8
LAUNCH_SECONDS = {"gpu": 3e-6, "tpu": 1e-6}  # from one instruction to the next


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a chip reaches.

    Attributes:
      flops: operations a second by the dtype that is multiplied, in XLA's words ('bf16', 'f32').
      of_batched: the part of these that many small products at once reach, as in attention.
      memory: bytes a second, read and written.
      launch: seconds of an instruction that does nothing.
      network: seconds that one collective takes.
    """

    flops: Mapping[str, float]
    of_batched: float
    memory: float
    launch: float
    network: Callable[[Collective], float]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step's time and what it is made of, in seconds on each chip.

    Attributes:
      products: matrix products alone, were there nothing else.
      memory: memory traffic alone.
      network: collectives alone.
      exposed: the part of these that nothing hides.
      step: the whole.
    """

    products: float
    memory: float
    network: float
    exposed: float
    step: float


def estimate(program: Program, rates: Rates) -> Estimate:
    """Adds up a program's instructions and collectives."""
    products = memory = on_chip = 0.0
    for work in program.work:
        rate = rates.flops.get(work.dtype, max(rates.flops.values())) * (rates.of_batched if work.batched else 1)
        of_products = work.flops / rate
        of_memory = work.bytes / rates.memory
        products += work.count * of_products
        memory += work.count * of_memory
        on_chip += work.count * (max(of_products, of_memory) + rates.launch)
    hidden = sum(c.count * rates.network(c) for c in program.collectives if c.hidden)
    waited = sum(c.count * rates.network(c) for c in program.collectives if not c.hidden)
    exposed = waited + max(0.0, hidden - on_chip)
    return Estimate(products, memory, hidden + waited, exposed, on_chip + exposed)


def rates_of(chip: Chip, mesh: jax.sharding.Mesh, grid: Sequence[int]) -> Rates:
    """Returns what a chip reaches among the others of a mesh, whose chips lie on a grid (of a torus)."""
    flops = {xla: OF_PRODUCTS * chip.flops[name] for xla, name in (("bf16", "bfloat16"), ("f32", "float32"))}
    devices = list(mesh.devices.flat)

    def network(collective: Collective) -> float:
        group = [devices[i] for i in collective.group]
        ways = _ways_on_torus(chip, grid, group, collective.kind) if chip.torus else _ways_of_nodes(chip, group)
        return collective.sent_bytes / (OF_LINKS * ways)

    return Rates(flops, 1.0, OF_MEMORY * chip.memory_bandwidth, LAUNCH_SECONDS[chip.platform], network)


def _ways_on_torus(chip: Chip, grid: Sequence[int], group: list[jax.Device], kind: str) -> float:
    """Returns bytes a second that leave a chip towards the others of its group.

    A group spans some axes of the grid. Along each, blocks go both ways where the axis closes to a ring and the group
    takes all of it, else one way at a time. A permutation goes to one neighbour.
    """
    if kind == "collective-permute":
        return chip.link_bandwidth
    extents = [len({device.coords[axis] for device in group}) for axis in range(3)]
    whole_cubes = chip.torus == 2 or all(size % chip.closes == 0 for size in grid)
    rings = [
        2 if whole_cubes and extent % chip.closes == 0 and extent == size else 1
        for extent, size in zip(extents, (*grid, 1))
        if extent > 1
    ]
    return chip.link_bandwidth * max(1, sum(rings))  # two cores of one chip share no less than a link


def _ways_of_nodes(chip: Chip, group: list[jax.Device]) -> float:
    """Returns bytes a second that leave a GPU: through its node's switch, or where a group spans nodes the network.

    Over the border of a node, as many rings go side by side as the group has GPUs there, each with a card of its own.
    """
    nodes = len({device.process_index for device in group})
    across = chip.network_bandwidth * (len(group) // nodes)
    return min(chip.link_bandwidth, across) if nodes > 1 else chip.link_bandwidth
