"""The high-water mark of memory."""

import resource
import sys
from collections.abc import Sequence

import jax


def peak_bytes(devices: Sequence[jax.Device]) -> int:
    """Returns the most memory that any of these devices has held at once; on CPU, that this process has.

    Args:
      devices: of this process.
    """
    stats = [device.memory_stats() for device in devices]
    if all(stats):
        return max(of_device["peak_bytes_in_use"] for of_device in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
