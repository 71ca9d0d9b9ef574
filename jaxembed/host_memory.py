"""How the process gets memory from the system, where the computation runs on its own CPU."""

import ctypes
import os
import sys

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
ACCELERATORS = ("/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


def keep_freed_memory() -> None:
    """Without an accelerator, lets malloc keep large blocks that were freed, to hand them out again.

    A step's temporaries are a gigabyte and more. By default glibc gives such blocks back when they are freed, and the
    system clears new pages for every step: a seventh of a MiniLM step's time. Call it at start-up, before jax is
    imported: threads that allocate before keep arenas of their own. Does nothing without glibc.
    """
    computes_here = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(os.path.exists, ACCELERATORS))
    if not computes_here or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_ARENA_MAX, 1)  # only the main arena can grow beyond 64 MB
    mallopt(M_MMAP_MAX, 0)  # blocks of any size come from the heap
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**28)
