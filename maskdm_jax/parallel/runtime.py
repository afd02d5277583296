"""The start and end of a command-line program: compilation cache, host memory, processes, errors."""

import contextlib
import ctypes
import glob
import os
import traceback

import jax

from maskdm_jax.errors import MaskDMError, Preempted
from maskdm_jax.parallel import processes
from maskdm_jax.storage import cache_dir

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


@contextlib.contextmanager
def program(*, distributed: bool = True, catch_sigterm: bool = False):
    """Run the body of a launcher: set up JAX, join the other processes, exit with one line on an expected error.

    Args:
      distributed: join the other processes of this run; see `processes.initialize`.
      catch_sigterm: see `processes.initialize`.
    """
    keep_freed_memory()
    keep_compiled_programs()
    try:
        if distributed:
            processes.initialize(catch_sigterm=catch_sigterm)
        yield
    except Preempted as stop:
        processes.exit_all(str(stop), processes.PREEMPTED)
    except (MaskDMError, OSError) as error:
        processes.exit_all(f"error: {error}")
    except KeyboardInterrupt:
        processes.exit_all("interrupted; run the same command again to go on")
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in reason:
            processes.exit_all(
                "error: not enough memory; in training raise the stage's micro_batches or set its remat=True, "
                f"elsewhere lower --batch ({reason})"
            )
        if jax.process_count() == 1:
            raise
        processes.exit_all(f"error: another process of this run must have ended: {reason}")
    except Exception:
        if jax.process_count() == 1:
            raise
        processes.exit_all(traceback.format_exc())


def keep_compiled_programs() -> None:
    """Keep compiled programs on disk, in the cache folder unless $JAX_COMPILATION_CACHE_DIR is set."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir("xla")))


def keep_freed_memory() -> bool:
    """Keep freed pages so that the next CPU step reuses them. Call this before anything uses a device.

    XLA:CPU allocates the buffers of a program with malloc at every execution. Mapping and clearing new pages for
    hundreds of MiB takes a seventh of a training step. With one heap that is never trimmed, an execution reuses the
    pages of the previous one; the process keeps its largest size.

    Returns:
      True if malloc was configured; False on machines with accelerators, with a C library other than glibc, or if
      environment variables (MALLOC_ARENA_MAX, GLIBC_TUNABLES, ...) already configure malloc.
    """
    configured = any(name.startswith("MALLOC_") for name in os.environ)
    configured |= "glibc.malloc" in os.getenv("GLIBC_TUNABLES", "")
    elsewhere = jax.config.jax_platforms != "cpu" and any(map(glob.glob, _DEVICE_FILES))
    if configured or elsewhere:
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # One arena: the heaps of other arenas are too small for large buffers.
    return all(mallopt(*option) for option in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))
