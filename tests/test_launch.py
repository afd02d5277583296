"""The programs as a person starts them, killed as a machine kills them."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from maskdm_jax.errors import CheckpointError, ConfigError, Interrupted, SamplingError
from maskdm_jax.training import logs

TINY = [
    *("--config.model.width=16", "--config.model.depth=1", "--config.model.heads=2"),
    *("--config.pretrain.batch_size=8", "--config.finetune.batch_size=8"),
    *(
        "--config.pretrain.steps=24",
        "--config.finetune.steps=16",
        "--config.checkpoint.every=5",
        "--config.log.every=2",
    ),
    *("--config.preview.every=0", "--config.preview.rows=2", "--config.preview.columns=2", "--config.sampling.steps=3"),
    "--config.log.tensorboard=False",
]


@pytest.fixture(scope="module")
def launch(root, child_env):
    def command(program, *args, **options):
        line = [sys.executable, str(root / "launch" / f"{program}.py"), *args]
        return subprocess.Popen(
            line, env=child_env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root, **options
        )

    def run(program, *args, **options):
        process = command(program, *args, **options)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    run.command = command
    return run


@pytest.fixture(scope="module")
def demo(launch, tmp_path_factory):
    """An undisturbed tiny demo."""
    workdir = tmp_path_factory.mktemp("demo") / "run"
    code, output = launch("train", "--config=configs/demo.py", f"--workdir={workdir}", *TINY)
    assert code == 0, output
    return workdir, output


def history(workdir):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in logs.read_metrics(workdir / "metrics.jsonl")]


def test_what_a_person_sees(demo):
    workdir, output = demo
    for said in (
        "start: fresh weights",
        " parameters",
        "1797 images",
        "from digits",
        "of 16 patches visible",
        "images/s",
        " left",
    ):
        assert said in output, said
    assert "of 16 patches | " in output
    last = output.strip().splitlines()[-1]
    assert f": {workdir} holds samples, checkpoints/40, metrics.jsonl, log.txt" in last
    for place in ("samples/step_0000040.png", "checkpoints/40", "metrics.jsonl", "log.txt"):
        assert (workdir / place).exists()
    assert "WARNING" not in output
    assert "Traceback" not in output


def folders(workdir):
    """Entries of the checkpoint folder, unfinished ones too."""
    return set(os.listdir(workdir / "checkpoints")) if (workdir / "checkpoints").exists() else set()


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_been(launch, demo, tmp_path):
    """SIGKILL while starting, at a random moment of both stages, and as soon as a checkpoint folder shows up.

    Killed runs have a last stage that never ends, so that no kill can come too late.
    """
    undisturbed, workdir, draw = demo[0], tmp_path / "run", random.Random(0)
    train = ("train", "--config=configs/demo.py", f"--workdir={workdir}", *TINY)
    waits = [
        lambda before: True,
        lambda before: lines(workdir) >= 1,
        lambda before: folders(workdir) - before,
        lambda before: lines(workdir) >= 14,  # of 12 lines in the first stage and 8 in the second
        lambda before: folders(workdir) - before,
    ]
    for wait in waits:
        process = launch.command(*train, "--config.finetune.steps=1000000", start_new_session=True)
        before = folders(workdir)
        while not wait(before):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        if wait is not waits[2]:
            time.sleep(draw.uniform(0, 0.1 if lines(workdir) else 3))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    reached = max(int(name) for name in folders(workdir) if name.isdecimal())
    if reached > 40:  # on a slow machine the last kill came after the steps of the undisturbed run
        train, undisturbed = (*train, f"--config.finetune.steps={reached - 24}"), tmp_path / "longer"
        code, output = launch(*train, f"--workdir={undisturbed}")
        assert code == 0, output
    code, output = launch(*train)
    assert code == 0, output
    assert "start: resuming" in output
    assert history(workdir) == history(undisturbed)
    grid = f"samples/step_{max(reached, 40):07d}.png"
    assert (workdir / grid).read_bytes() == (undisturbed / grid).read_bytes()


def test_ctrl_c_does_not_wait_for_the_compiler(launch, tmp_path):
    args = (
        *TINY,
        "--config.pretrain.steps=1000000",
        "--config.pretrain.batch_size=3",
    )  # not in the cache
    process = launch.command("train", "--config=configs/demo.py", f"--workdir={tmp_path / 'run'}", *args)
    output = ""
    while "compiling the step" not in output:
        output += process.stdout.readline()
        assert process.poll() is None, output
    process.send_signal(signal.SIGINT)
    output += process.communicate(timeout=300)[0]
    assert process.returncode == Interrupted.status, output
    assert re.search(r"^interrupted; (nothing was saved yet|the same command resumes from step \d+)$", output, re.M)
    assert "Traceback" not in output


def test_samples_from_a_run(launch, demo, tmp_path):
    workdir, _ = demo
    out = tmp_path / "samples"
    args = [f"--run={workdir}", f"--out={out}", "--n=6", "--batch=4", "--columns=3", "--labels=7,1"]
    code, output = launch("sample", *args)
    assert code == 0, output
    assert output.strip().splitlines()[-1] == f"done: 6 images in {out}, grid {out}.png"
    assert len(list(out.glob("0*.png"))) == 6
    assert json.loads((out / "samples.json").read_text())["labels"] == [7, 1]
    code, output = launch("sample", *args, "--seed=1")
    assert code == SamplingError.status
    assert "error: " in output
    assert "seed: 0 -> 1" in output
    again = tmp_path / "again" / workdir.name
    shutil.copytree(workdir, again)
    shutil.copytree(next((again / "checkpoints").iterdir()), again / "checkpoints" / "4.damaged")
    (again / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()  # killed while saving
    both = [f"--run={again}/checkpoints/*", f"--out={tmp_path / 'both'}", "--n=2", "--batch=2"]
    code, output = launch("sample", *both)
    assert code == 0, output
    code, output = launch("sample", f"--run={workdir}/checkpoints/*,{again}/checkpoints/*", *both[1:])
    assert code == CheckpointError.status
    assert "would be written to" in output
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert len(steps) > 1
    for step in steps:
        folder = tmp_path / "both" / f"run-{step}"
        assert len(list(folder.glob("0*.png"))) == 2
        assert json.loads((folder / "samples.json").read_text())["checkpoint"].endswith(f"/{step}")
    code, output = launch("sample", f"--run={tmp_path}/no*", f"--out={tmp_path / 'c'}")
    assert code == 1
    assert "error: no checkpoint matches" in output
    code, output = launch("sample", f"--run={workdir}", f"--out={tmp_path / 'b'}", "--n=3", "--format=npz", "--eta=0")
    assert code == 0, output
    assert np.load(tmp_path / "b" / "samples.npz")["images"].shape == (3, 8, 8, 1)


@pytest.mark.parametrize(
    ("words", "line", "message"),
    [
        (
            lambda file: [f"--config={file}"],
            "    config.default().model.width = 'a'",
            "line 3: TypeError: Could not override field 'width'",
        ),
        (lambda file: ["--config", file], "    return", "returns nothing"),
    ],
)
def test_an_error_in_a_users_config_is_shown_with_its_line(launch, tmp_path, words, line, message):
    file = tmp_path / "mine.py"
    file.write_text(f"from maskdm_jax import config\ndef get_config():\n{line}\n")
    code, output = launch("train", *words(str(file)))
    assert code == ConfigError.status
    assert f"error: {file}, {message}" in output or f"error: get_config of {file} {message}" in output
    assert "Traceback" not in output


def test_a_dry_run_that_finds_something(launch, tmp_path):
    args = ["--config=demo", "--dry_run", *TINY, "--config.mesh.data=3", f"--workdir={tmp_path / 'run'}"]
    code, output = launch("train", *args)
    assert code == ConfigError.status, output
    assert "FAIL  devices:" in output
    assert "preflight checks passed" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=configs/demo.py", "--config.model.widht=3"], "error: config.model.widht is not a setting; did you"),
        (["--config=configs/demo.py", "--config.none.x=1"], "error: the config has no 'none'"),
        (
            ["--config=configs/demo.py", "--config.pretrain.steps=1e3"],
            "error: flag --config.pretrain.steps=1e3: '1e3' is not",
        ),
        (
            ["--config=configs/nowhere.py"],
            "error: --config=configs/nowhere.py does not exist; give a FILE.py",
        ),
        (["--config=tests/conftest.py"], "error: tests/conftest.py"),
        (["--config=configs/demo.py", "--config.data.path=nowhere"], "error: 'nowhere' does not exist"),
        (
            ["--config=configs/demo.py", "--workdir=ftp://bucket/x"],
            "error: ftp://bucket/x: give a path on a disk or an address gs://BUCKET/...",
        ),
        (["--config=configs/demo.py", "stray"], "unexpected arguments"),
        ([], "which run? give --config=configs/NAME.py"),
    ],
)
def test_mistakes_end_in_one_clear_line(launch, tmp_path, args, message):
    code, output = launch("train", f"--workdir={tmp_path / 'run'}", *args)
    assert code != 0
    assert message in output
    if message.startswith("error"):
        assert "Traceback" not in output
