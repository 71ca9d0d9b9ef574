"""What accelerators can do: one table, from public data sheets. No jax here.

A chip is what jax calls a device. Rates are peaks for dense arrays; what a program reaches of them is for others to
say (`jaxembed.planning.roofline`).
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator, as one jax device of it.

    Attributes:
      name: what `--topology` and tables call it.
      platform: jax's word, 'tpu' or 'gpu'.
      device_kinds: the values of `jax.Device.device_kind` that it goes by.
      memory_bytes: of its memory, all that programs could use. (jax takes a part of a GPU's, three quarters unless told
        otherwise.)
      flops: operations a second by the dtype of a product's arrays, at jax's default precision: 'float32' is TF32 on
        GPUs, and on TPUs one pass in bfloat16.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second that leave a chip by one link: to one neighbour on a TPU, to the switch of its node
        on a GPU. As many come in at the same time.
      torus: axes of the grid of links, 2 or 3; 0 for chips around a switch.
      closes: a torus axis closes to a ring where its chips are a multiple of this number.
      node: chips around a switch; 0 on a torus.
      network_bandwidth: bytes a second that leave a chip for another node; 0 on a torus.
    """

    name: str
    platform: str
    device_kinds: tuple[str, ...]
    memory_bytes: int
    flops: Mapping[str, float]
    memory_bandwidth: float
    link_bandwidth: float
    torus: int = 0
    closes: int = 0
    node: int = 0
    network_bandwidth: float = 0.0


def _tpu(name: str, kinds: tuple[str, ...], memory: float, flops: float, bandwidth: float, *grid: float) -> Chip:
    link, torus, closes = grid
    rates = {"bfloat16": flops, "float32": flops}
    return Chip(name, "tpu", kinds, int(memory), rates, bandwidth, link, torus=int(torus), closes=int(closes))


def _gpu(
    name: str, kinds: tuple[str, ...], memory_mib: int, bfloat16: float, bandwidth: float, link: float, nic: float
) -> Chip:
    rates = {"bfloat16": bfloat16, "float32": bfloat16 / 2}  # TF32 runs at half the rate
    return Chip(name, "gpu", kinds, memory_mib * 2**20, rates, bandwidth, link, node=8, network_bandwidth=nic)


CHIPS: tuple[Chip, ...] = (
    # Rates, memory and links: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x); a link's rate in one direction:
    # jax-ml.github.io/scaling-book/tpus. Memory of v5e, v5p and v6e is what XLA's compiler leaves to programs (it
    # names the sum where one does not fit); of the others the data sheet's. An axis of v5e and v6e closes at 16 chips,
    # of v4, v5p and tpu7x at multiples of 4. A chip of tpu7x is two devices.
    _tpu("v4", ("TPU v4",), 32 * 2**30, 275e12, 1.228e12, 45e9, 3, 4),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 15.75 * 2**30, 197e12, 0.819e12, 45e9, 2, 16),
    _tpu("v5p", ("TPU v5", "TPU v5p"), 95.74 * 2**30, 459e12, 2.765e12, 90e9, 3, 4),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 31.25 * 2**30, 918e12, 1.638e12, 90e9, 2, 16),
    _tpu("tpu7x", ("TPU7x",), 96 * 2**30, 1153.5e12, 3.69e12, 100e9, 3, 4),
    # Dense rates, memory and its bandwidth, NVLink in one direction: NVIDIA's data sheets of A100, H100, H200 and B200;
    # MiB as nvidia-smi names them. Between nodes: a network card for each GPU, as in DGX systems (A100 200 Gb/s, else
    # 400 Gb/s).
    _gpu("a100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 81_920, 312e12, 2.039e12, 300e9, 25e9),
    _gpu("h100", ("NVIDIA H100 80GB HBM3",), 81_559, 989e12, 3.35e12, 450e9, 50e9),
    _gpu("h200", ("NVIDIA H200",), 143_771, 989e12, 4.8e12, 450e9, 50e9),
    _gpu("b200", ("NVIDIA B200",), 183_359, 2250e12, 8.0e12, 900e9, 50e9),
    # Known for MFU, not planned for. Dense rates with sums in float32; what has no NVLink sends over PCIe.
    _gpu("gh200", ("NVIDIA GH200 480GB",), 97_871, 989e12, 4.0e12, 450e9, 50e9),
    _gpu("h100-pcie", ("NVIDIA H100 PCIe",), 81_559, 756e12, 2.0e12, 64e9, 50e9),
    _gpu("a100-40", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 40_960, 312e12, 1.555e12, 300e9, 25e9),
    _gpu("l40s", ("NVIDIA L40S",), 46_068, 362e12, 0.864e12, 32e9, 25e9),
    _gpu("l4", ("NVIDIA L4",), 23_034, 121e12, 0.3e12, 32e9, 12.5e9),
    _gpu("a6000", ("NVIDIA RTX A6000",), 49_140, 154.8e12, 0.768e12, 32e9, 12.5e9),
    _gpu("rtx4090", ("NVIDIA GeForce RTX 4090",), 24_564, 165.2e12, 1.008e12, 32e9, 12.5e9),
    _gpu("rtx5090", ("NVIDIA GeForce RTX 5090",), 32_607, 209.5e12, 1.792e12, 64e9, 12.5e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip that a device is, by `jax.Device.device_kind`; None where it is not in the table."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)
