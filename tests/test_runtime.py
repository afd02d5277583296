"""A step's pages are there for the next one."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from maskdm_jax.errors import ConfigError, Interrupted
from maskdm_jax.parallel import processes, runtime
from maskdm_jax.storage import atomic_path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="malloc's settings are glibc's")

PROGRAM = """
import json, resource, statistics
import jax, jax.numpy as jnp
from maskdm_jax.parallel import runtime
kept = runtime.keep_freed_memory()
twice = lambda x: x[:, :16] @ x[:16]  # buffers beyond 64 MiB
step = jax.jit(lambda x: twice(twice(x)) * 1e-9)
x = jnp.ones((4200, 4200))
faults = []
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = step(x)
    x.block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, statistics.median(faults[8:])]))  # the heap grows in some of the first ones
"""


def run(env):
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_program_executed_again_faults_no_pages_in(child_env):
    told = ("MALLOC_", "GLIBC_TUNABLES")
    env = {name: value for name, value in child_env.items() if not name.startswith(told)}
    kept, faults = run(env)
    assert kept
    left_alone, many = run(env | {"MALLOC_ARENA_MAX": "8"})
    assert not left_alone, "who set variables decides"
    assert faults < 0.01 * many, (faults, many)


def test_a_run_outlives_its_terminal(monkeypatch):
    """What nobody reads is dropped, and the SIGHUP of a terminal that closes saves like SIGTERM."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as gone:
        stream = runtime._Stderr(gone)
        assert not stream.isatty()
        print("a line", file=stream, flush=True)
        with pytest.raises(BrokenPipeError):
            gone.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # so that it can be closed
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **_: None)
    service = processes.jax.config.jax_enable_preemption_service
    received, before = [], signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    try:
        processes.initialize(catch_sigterm=True)
        os.kill(os.getpid(), signal.SIGHUP)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, hung_up)
        signal.signal(signal.SIGTERM, before)
        processes.jax.config.update("jax_enable_preemption_service", service)


def test_a_write_to_a_full_disk_names_the_file(tmp_path):
    with (
        pytest.raises(OSError, match="No space left on device: '.*samples.npz'"),
        atomic_path(tmp_path / "samples.npz"),
        open("/dev/full", "w") as full,
    ):
        full.write("x")
    assert not list(tmp_path.iterdir())


def test_a_platform_that_does_not_exist_is_a_wrong_setting(monkeypatch, capsys):
    for setup in ("keep_freed_memory", "keep_compiled_programs"):
        monkeypatch.setattr(runtime, setup, lambda: None)
    for name in ("stderr", "unraisablehook"):  # `program` replaces them
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(SystemExit) as end, runtime.program(distributed=False):
        raise RuntimeError("Unable to initialize backend 'wrong': it is not in the list\nof known backends")
    assert end.value.code == ConfigError.status
    assert "error: Unable to initialize backend 'wrong'" in capsys.readouterr().err


def test_ctrl_c_in_a_callback_is_not_lost(monkeypatch):
    for name in ("stderr", "unraisablehook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    for setup in ("keep_freed_memory", "keep_compiled_programs"):
        monkeypatch.setattr(runtime, setup, lambda: None)

    def interrupted(phase, info):
        gc.callbacks.remove(interrupted)
        signal.raise_signal(signal.SIGINT)

    ends = []
    monkeypatch.setattr(processes, "exit_all", lambda *end: ends.append(end))
    with runtime.program(distributed=False):
        gc.callbacks.append(interrupted)
        gc.collect()
        threading.Event().wait(60)  # blocks as training does while it waits for the compiler
    assert ends == [("interrupted", Interrupted.status)]


def test_beside_accelerators_nothing_changes(monkeypatch):
    import jax

    monkeypatch.setattr(runtime, "_DEVICE_FILES", ("/dev/null",))
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: pytest.fail("asked"))
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        assert not runtime.keep_freed_memory()
    finally:
        jax.config.update("jax_platforms", before)
