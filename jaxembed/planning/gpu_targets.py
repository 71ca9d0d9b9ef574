"""What XLA's compiler wants to know of a GPU that is not there: a GpuTargetConfigProto in text form, written here.

Figures: NVIDIA's CUDA C++ programming guide (limits by compute capability) and the architectures' white papers.
"""

import dataclasses

from jaxembed.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU's processors.

    Attributes:
      capability: compute capability, major and minor.
      cores: streaming multiprocessors.
      clock_ghz: of these, at most.
      shared_kib: memory that a multiprocessor's blocks share, in all; a block may have 1 KiB less.
      l2_mib: second-level cache.
    """

    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    shared_kib: int
    l2_mib: int


TARGETS = {
    "a100": Target((8, 0), 108, 1.41, 164, 40),
    "h100": Target((9, 0), 132, 1.98, 228, 50),
    "h200": Target((9, 0), 132, 1.98, 228, 50),
    "b200": Target((10, 0), 148, 1.965, 228, 126),
}


def target_text(chip: Chip) -> str:
    """Returns the description of a GPU of `jaxembed.hardware.CHIPS`."""
    t = TARGETS[chip.name]
    return f"""
platform_name: "CUDA"
gpu_device_info {{
  cuda_compute_capability {{ major: {t.capability[0]} minor: {t.capability[1]} }}
  core_count: {t.cores}
  clock_rate_ghz: {t.clock_ghz}
  fpus_per_core: {64 if t.capability[0] == 8 else 128}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {(t.shared_kib - 1) * 1024}
  shared_memory_per_core: {t.shared_kib * 1024}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: {t.l2_mib * 2**20}
  memory_bandwidth: {int(chip.memory_bandwidth)}
  device_memory_size: {chip.memory_bytes}
}}
"""
