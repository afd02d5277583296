"""Several real processes, started, stopped and killed as the hosts of a pod are."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from maskdm_jax.errors import ConfigError, DistributedError, Preempted
from maskdm_jax.parallel import processes
from maskdm_jax.training import logs

TINY = [
    *("--config=configs/demo.py", "--config.model.width=128", "--config.model.depth=1", "--config.model.heads=2"),
    *("--config.stages=('pretrain',)", "--config.pretrain.batch_size=16", "--config.pretrain.micro_batches=2"),
    *("--config.pretrain.steps=40", "--config.checkpoint.every=3"),
    *("--config.log.every=1", "--config.preview.every=0", "--config.preview.rows=2", "--config.preview.columns=3"),
    *("--config.sampling.steps=2", "--config.log.tensorboard=False"),
]


STARTED = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """A test that fails leaves no endless run behind."""
    yield
    for process in STARTED:
        if process.poll() is None:
            for pid in (*workers(process), process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()
    STARTED.clear()


@pytest.fixture(scope="module")
def start(root, child_env):
    """Start a tiny run of several processes; its output goes to WORKDIR.log."""

    def start(workdir, processes, devices, *args, local=()):
        line = [sys.executable, "launch/local.py", f"--processes={processes}", f"--devices={devices}", *local]
        line += ["--", "launch/train.py", f"--workdir={workdir}", *TINY, *args]
        with open(f"{workdir}.log", "a") as log:
            process = subprocess.Popen(line, cwd=root, env=child_env, stdout=log, stderr=log, start_new_session=True)
        STARTED.append(process)
        return process

    return start


def finish(process, workdir):
    status = process.wait(timeout=300)
    return status, pathlib.Path(f"{workdir}.log").read_text()


def history(workdir):
    lines = logs.read_metrics(workdir / "metrics.jsonl")
    return np.asarray([(line["step"], line["loss"], line["grad_norm"]) for line in lines])


def workers(process):
    """Process numbers of the workers that launch/local.py started."""
    return [int(pid) for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


ENDLESS = "--config.pretrain.steps=1000000"  # a run that cannot end before it is told to


def wait_for(process, workdir, happened):
    """Wait until `happened()`, in a run that is still alive then."""
    while not happened():
        assert process.poll() is None, pathlib.Path(f"{workdir}.log").read_text()[-3000:]
        time.sleep(0.01)


def wait_for_steps(process, workdir, steps):
    wait_for(process, workdir, lambda: (workdir / "metrics.jsonl").exists() and len(history(workdir)) >= steps)


def saved_steps(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()]


def agree(workdir, alone):
    """Whether two histories are the same as far as both go, up to rounding."""
    ours, theirs = history(workdir), history(alone)
    n = min(len(ours), len(theirs))
    np.testing.assert_allclose(ours[:n], theirs[:n], rtol=1e-5)
    return n


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """An undisturbed run of one process on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    status, output = finish(start(workdir, 1, 1, "--config.checkpoint.every=40"), workdir)
    assert status == 0, output[-3000:]
    return workdir


def test_four_processes_are_the_same_run_as_one(start, alone, tmp_path):
    workdir = tmp_path / "run"
    status, output = finish(start(workdir, 4, 1, "--config.mesh.fsdp=2", "--config.checkpoint.every=40"), workdir)
    assert status == 0, output[-3000:]
    assert "4 x cpu" in output
    assert output.count("start: fresh weights") == 1, "one process speaks"
    assert agree(workdir, alone) == 40
    assert (workdir / "samples" / "step_0000040.png").exists()


def test_stopped_killed_and_continued_on_other_processes(start, alone, tmp_path):
    """SIGTERM to one of two workers, SIGKILL to one of two others: nothing is lost, and one process finishes.

    Each run is endless until the last one, so that no signal can come too late.
    """
    workdir, draw = tmp_path / "run", random.Random(0)
    process = start(workdir, 2, 4, "--config.mesh.fsdp=2", ENDLESS)
    wait_for(process, workdir, lambda: "stage pretrain:" in pathlib.Path(f"{workdir}.log").read_text())
    os.kill(draw.choice(workers(process)), signal.SIGTERM)
    status, output = finish(process, workdir)
    assert status == Preempted.status, output[-3000:]
    assert output.count("SIGTERM received; saved at step") == 2
    assert "Traceback" not in output
    saved = max(saved_steps(workdir))
    assert saved == len(history(workdir)), "the very step that it stopped at"

    process = start(workdir, 2, 1, ENDLESS, local=["--grace=0.5", "--restarts=1"])
    wait_for(process, workdir, lambda: max(saved_steps(workdir)) > saved)
    os.kill(draw.choice(workers(process)), signal.SIGKILL)
    wait_for(process, workdir, lambda: pathlib.Path(f"{workdir}.log").read_text().count("stage pretrain:") == 3)
    os.kill(draw.choice(workers(process)), signal.SIGTERM)
    status, output = finish(process, workdir)
    assert status == Preempted.status, output[-3000:]
    assert "ended with status -9; start 2 of 2" in output

    steps = max(40, *saved_steps(workdir))
    status, output = finish(start(workdir, 1, 1, f"--config.pretrain.steps={steps}"), workdir)
    assert status == 0, output[-3000:]
    assert len(history(workdir)) == steps
    assert agree(workdir, alone) == 40


def test_a_wrong_setting_ends_all_with_its_message_and_is_not_tried_again(start, tmp_path):
    process = start(tmp_path / "run", 2, 1, "--config.model.heads=3", local=["--restarts=1"])
    status, output = finish(process, tmp_path / "run")
    assert status == ConfigError.status, output[-3000:]
    for number in range(2):
        assert re.search(rf"^process {number} \(.+\): error: .*heads", output, re.MULTILINE)
    assert "start 2 of 2" not in output
    assert "Fatal Python error" not in output, "stack dumps hide the message"
    assert "Traceback" not in output


def test_the_same_folder_twice_at_once(start, alone, tmp_path):
    workdir = tmp_path / "run"
    first = start(workdir, 1, 1, ENDLESS)
    wait_for_steps(first, workdir, 1)
    second = start(workdir, 1, 1)
    assert second.wait(timeout=300) == 1
    assert "another process is writing there; wait for it" in pathlib.Path(f"{workdir}.log").read_text()
    os.kill(*workers(first), signal.SIGTERM)
    assert finish(first, workdir)[0] == Preempted.status
    np.testing.assert_array_equal(history(workdir)[:40], history(alone)[: len(history(workdir))])


@pytest.mark.parametrize(
    ("variables", "chips", "expected"),
    [
        (dict(JAX_COORDINATOR_ADDRESS="x:1", JAX_NUM_PROCESSES="3", JAX_PROCESS_ID="2"), False, dict(num_processes=3)),
        (dict(SLURM_NTASKS="4", SLURM_STEP_NODELIST="n[1-2]"), False, dict(cluster_detection_method="slurm")),
        (dict(SLURM_NTASKS="1", SLURM_STEP_NODELIST="n1"), False, dict(num_processes=1, process_id=0)),
        (dict(SLURM_NTASKS="many"), False, dict(num_processes=1, process_id=0)),
        ({}, True, dict(initialization_timeout=3600)),
        ({}, False, dict(num_processes=1, process_id=0)),
    ],
)
def test_the_others_are_found_by_what_there_is(monkeypatch, variables, chips, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = []
    monkeypatch.setattr(processes, "_on_tpu", lambda: chips)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: found.append(how))
    processes.initialize(catch_sigterm=True)
    assert found[0].items() >= expected.items()
    assert bool(found[0]) == bool(expected)
    if not variables and not chips:
        processes.initialize()
        assert len(found) == 1, "alone, and with no signal to catch, there is nobody to join"


def test_the_scripts_can_be_read(root):
    scripts = sorted(map(str, (root / "launch").glob("*.sh")))
    for path in scripts:
        subprocess.run(["bash", "-n", path], check=True)
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    if shellcheck.exists():
        subprocess.run([shellcheck, *scripts], check=True)
    flags = re.findall(r"--xla_\w+=\w+", (root / "launch" / "slurm.sh").read_text())
    assert flags  # XLA ends a process that is given a flag it does not know
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, check=True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID must be set too"),
        ({"JAX_COORDINATOR_ADDRESS": "x:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "_PROCESSES=two"),
        ({"JAX_COORDINATOR_ADDRESS": "x:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2"),
        ({"JAX_COORDINATOR_ADDRESS": "x", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "must be HOST:PORT"),
    ],
)
def test_garbled_surroundings_are_named(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=message):
        processes.initialize()
