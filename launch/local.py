"""Simulate a pod on one machine: start several processes of a program; if one fails, stop and restart all.

    python launch/local.py --processes=4 --devices=2 --restarts=3 -- launch/train.py --config=configs/demo.py

Each process has --devices CPU devices and acts as a host of the pod. SIGTERM and Ctrl-C are sent to all processes.
"""

import os
import signal
import socket
import subprocess
import sys
import time

from absl import app, flags

from maskdm_jax.errors import ConfigError

PROCESSES = flags.DEFINE_integer("processes", 2, "Number of processes.", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices", 1, "CPU devices per process.", lower_bound=1)
RESTARTS = flags.DEFINE_integer("restarts", 0, "How often to restart all processes after one failed.", lower_bound=0)
GRACE = flags.DEFINE_float("grace", 30.0, "Seconds from the failure of one process until the others are killed.")


def main(argv):
    if len(argv) < 2:
        raise app.UsageError("which program? give it after --, for example -- launch/train.py --config=configs/demo.py")
    stop = []  # signals received, for all processes
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop.append(number))
    for attempt in range(RESTARTS.value + 1):
        status = run(argv[1:], stop)
        if status in (0, ConfigError.status) or stop:  # wrong settings fail every time
            break
        if attempt < RESTARTS.value:
            print(f"ended with status {status}; start {attempt + 2} of {RESTARTS.value + 1}", file=sys.stderr)
            time.sleep(min(2**attempt, 60))
    sys.exit(status if status >= 0 else 128 - status)  # after a signal, as shells do


def run(command: list[str], stop: list[int]) -> int:
    """Run all processes to their end and return the first status that is not 0, else 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = []
    for number in range(PROCESSES.value):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(DEVICES.value),
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_COORDINATOR_BIND_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(PROCESSES.value),
            "JAX_PROCESS_ID": str(number),
        }
        # Each process has its own group, so that a terminal's Ctrl-C reaches it only through this program.
        processes.append(subprocess.Popen([sys.executable, *command], env=environment, start_new_session=True))
    failed, deadline, passed_on = 0, None, 0
    while None in [process.poll() for process in processes]:
        for number in stop[passed_on:]:
            passed_on += 1
            for process in processes:
                if process.poll() is None:
                    process.send_signal(number)
        ended = [process.returncode for process in processes if process.returncode is not None]
        failed = failed or min((status for status in ended if status), default=0)  # a signal before what it caused
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE.value
        for process in processes if deadline and time.monotonic() > deadline else ():
            process.kill()
        time.sleep(0.05)
    return failed or next((process.returncode for process in processes if process.returncode), 0)


if __name__ == "__main__":
    app.run(main)
