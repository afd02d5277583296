"""The processes of a run: join, exchange values, and stop together."""

import concurrent.futures
import glob
import hashlib
import importlib.util
import itertools
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import typing

import jax
import numpy as np
from jax.experimental import multihost_utils

from maskdm_jax.errors import DistributedError, Interrupted, Preempted, prefixed

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(*, catch_sigterm: bool = False) -> None:
    """Join the other processes of this run, if there are any. Call it before anything uses a device.

    The first of these that exists determines the processes: the variables JAX_COORDINATOR_ADDRESS (HOST:PORT of process
    0), JAX_NUM_PROCESSES and JAX_PROCESS_ID; a SLURM step with one task per GPU; the hosts of one or more TPU slices.

    Args:
      catch_sigterm: SIGTERM to any process, or SIGHUP from a terminal that closes, does not end it, but makes
        `stop_requested` true at the same step in all processes.

    Raises:
      DistributedError: variables are missing or malformed, or the other processes cannot be reached.
    """
    jax.config.update("jax_enable_preemption_service", catch_sigterm)
    if catch_sigterm and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    known = {name: os.environ.get(name) for name in _VARIABLES}
    if any(known.values()):
        how = _explicit(known)
    elif os.environ.get("SLURM_NTASKS", "1") not in ("", "0", "1") and "SLURM_STEP_NODELIST" in os.environ:
        how = dict(cluster_detection_method="slurm")
    elif _on_tpu():
        how = dict(initialization_timeout=3600)  # s; JAX reads the metadata. Another slice may still be requested.
    elif catch_sigterm:
        how = _alone()
    else:
        return
    with prefixed(
        DistributedError, f"the processes of this run cannot be joined ({how}): ", (RuntimeError, ValueError)
    ):
        jax.distributed.initialize(**how)


def _explicit(known: dict) -> dict:
    missing = [name for name, value in known.items() if not value]
    if missing:
        raise DistributedError(f"{', '.join(missing)} must be set too, or none of {', '.join(_VARIABLES)}")
    try:
        count, number = int(known["JAX_NUM_PROCESSES"]), int(known["JAX_PROCESS_ID"])
    except ValueError:
        count, number = 0, 0
    if not 0 <= number < count or ":" not in known["JAX_COORDINATOR_ADDRESS"]:
        raise DistributedError(
            "JAX_COORDINATOR_ADDRESS must be HOST:PORT and JAX_PROCESS_ID one of 0..JAX_NUM_PROCESSES-1, not "
            + ", ".join(f"{name}={value}" for name, value in known.items())
        )
    return dict(coordinator_address=known["JAX_COORDINATOR_ADDRESS"], num_processes=count, process_id=number)


def _on_tpu() -> bool:
    """Whether this machine has TPUs and libtpu."""
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _alone() -> dict:
    """Arguments for a run of one process, which needs the coordination service to catch SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    local = dict(coordinator_address=address, coordinator_bind_address=address)
    return dict(num_processes=1, process_id=0, cluster_detection_method="deactivate", **local)


def is_first() -> bool:
    """Whether this is the process that writes shared files."""
    return jax.process_index() == 0


def gather(array) -> np.ndarray:
    """Stack arrays of equal shape and dtype from all processes: [processes, *shape], bit for bit."""
    array = np.asarray(array)
    if jax.process_count() == 1:
        return array[None]
    barrier("gather")
    content = np.frombuffer(array.tobytes(), np.uint8)  # a JAX array would round float64 to float32
    gathered = np.asarray(multihost_utils.process_allgather(content))
    return np.frombuffer(gathered.tobytes(), array.dtype).reshape(-1, *array.shape)


def differ(text: str) -> bool:
    """Whether the processes, which must all call this, have different texts."""
    digests = gather(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8))
    return bool((digests != digests[0]).any())


def barrier(name: str) -> None:
    """Wait for all processes, through the coordination service and for up to an hour.

    Call it before a collective that processes may reach at different times, for instance after compiling or reading a
    checkpoint: on CPU, Gloo fails after 30 s.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=name, timeout_ms=3_600_000)


def in_thread(call):
    """Return `call()`, made in a thread, so that Ctrl-C need not wait for C++ code that runs for minutes."""
    result = concurrent.futures.Future()

    def run():
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result()


def spans_processes(mesh) -> bool:
    """Whether a mesh has devices of other processes."""
    return any(device.process_index != jax.process_index() for device in mesh.devices.flat)


def compile_together(lowered, mesh):
    """Compile a lowered program in all processes of a mesh, before any of them runs it. Ctrl-C interrupts it."""
    compiled = in_thread(lowered.compile)
    if spans_processes(mesh):
        barrier("compiled")
    return compiled


_asked = itertools.count(1)  # calls of `stop_requested`


def stop_requested() -> bool:
    """Whether some process received SIGTERM, so that the run must save and stop now.

    All processes must call this at every step; all get the same answer.
    """
    if not jax.distributed.is_initialized() or not jax.config.jax_enable_preemption_service:
        return False
    # JAX stops at the step after the last one that was passed here; before the first call, at step 1. A resumed run
    # that passed its own step numbers would skip step 1, and never stop after a SIGTERM before its first step.
    return multihost_utils.reached_preemption_sync_point(next(_asked))


def exit_all(message: str, status: int = 1) -> typing.NoReturn:
    """Exit with a message. One of several processes names itself, and exits without waiting for the others."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        print(message, file=sys.stderr, flush=True)
        if status == Interrupted.status:
            os._exit(status)  # a compiler may still be running, see `in_thread`
        sys.exit(status)
    print(f"process {jax.process_index()} ({socket.gethostname()}): {message}", file=sys.stderr, flush=True)
    # The exit of the first process aborts the others, in the middle of a save or before a message of their own.
    if status == Preempted.status:
        jax.distributed.shutdown()  # wait for them
    elif is_first():
        time.sleep(2)
    os._exit(status)


def free_memory() -> float:
    """Bytes of this machine's memory that a program can get; infinite where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            found = re.search(r"MemAvailable:\s*(\d+) kB", file.read())
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else math.inf
