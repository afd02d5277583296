"""The host's memory: what a step on the CPU gives back, the next one gets, page by page."""

import ctypes
import glob
import os

import jax

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def keep_freed() -> bool:
    """Let this process keep freed memory, where programs run on the CPU. Call it before anything touches a device.

    XLA takes the buffers of a program from malloc at every execution, which asks the system for fresh pages, for
    hundreds of MiB: clearing and mapping them takes a seventh of a training step. With one heap that is never cut, an
    execution gets the pages of the one before. The process stays as large as it ever was.

    Does nothing beside accelerators, with a C library other than glibc, or where variables (MALLOC_ARENA_MAX,
    GLIBC_TUNABLES, ...) already say what malloc is to do.

    Returns:
      whether it was done.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.getenv("GLIBC_TUNABLES", "")
    elsewhere = jax.config.jax_platforms != "cpu" and any(map(glob.glob, _DEVICE_FILES))
    if told or elsewhere:
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # Threads get heaps of their own otherwise, which hold nothing large.
    return all(mallopt(*option) for option in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))
