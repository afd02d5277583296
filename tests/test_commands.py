"""The commands of the documentation run: page by page, in their order, in small, with stand-ins for data and files."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import maskdm_jax

PAGES = ("README", "training", "processes", "evaluation", "data", "checkpoints", "pytorch", "distributed")
COMMAND = re.compile(
    r"^(?:python )?launch/(?:train|sample|evaluate|convert|interpolate|compile|compare|prepare_data)\.py "
)
# These need the compiler of TPUs, several processes, a store or other people's data; each has tests of its own.
ELSEWHERE = re.compile(r"topology=v|launch/local\.py|gs://|NAME|DOWNLOADS|IMAGENET|shards-|imagenet-1k")
SMALL = dict(width=16, depth=1, heads=2)
OFFICIAL = dict(patch_size=2, width=32, depth=4, heads=4, mlp_ratio=2.0)  # of official_tiny.pt
CALLS = {  # flags that make a program's work small
    "sample": "--n=10 --batch=10 --steps=2",
    "evaluate": "--n=10 --batch=10 --steps=2 --inception_weights={weights}",
    "interpolate": "--n=2 --start=1",
    "convert": "",
    "prepare_data": "",
    "compile": "--samples=0",
    "compare": "",
}


def commands(root, page: str) -> list[list[str]]:
    """The command lines of a page that run here."""
    text = (root / ("README.md" if page == "README" else f"docs/{page}.md")).read_text()
    lines = re.findall(r"^ {4}(.*)$", re.sub(r"\s*\\\n\s*", " ", text), re.MULTILINE)
    lines = [line.split("   #")[0].removeprefix("python ") for line in lines if COMMAND.match(line)]
    return [shlex.split(line) for line in lines if not ELSEWHERE.search(line)]


def in_small(line: list[str], weights) -> list[str]:
    """A command with flags that make its work small."""
    program = re.search(r"(\w+)\.py", line[0])[1]
    recipe = next((word.removeprefix("--config=") for word in line if word.startswith("--config=")), None)
    if recipe is None:
        more = [flag.format(weights=weights) for flag in CALLS[program].split()]
        more += ["--num_heads=4"] if "--num_heads=12" in line else []
        more += ["--class_tokens_from=1"] if "--src=checkpoint-last.pth" in line else []
        return [*line, *more]
    c = maskdm_jax.recipe(recipe.split("/")[1].removesuffix(".py"))
    size, model, steps = 64, SMALL, 2
    if any("outer_blocks" in word for word in line):
        model = model | dict(depth=5)
    if "celebahq_finetune" in recipe:  # which model-20.pt belongs to, here of official_tiny.pt, which is at step 130
        size, model, steps = 16, OFFICIAL, 131
    if c.data.path == "digits":
        size = c.data.image_size
    elif c.data.labels:
        model = model | dict(num_classes=2)
    sections = dict(data=dict(image_size=size, threads=1), model=model, sampling=dict(steps=2), log=dict(every=1))
    sections |= {"model.jit": dict(class_tokens_from=0), "preview": dict(every=0, rows=1, columns=1)}
    sections |= {stage: dict(steps=steps, batch_size=2) for stage in c.stages}
    settings = [f"--config.{part}.{key}={value}" for part, more in sections.items() for key, value in more.items()]
    if recipe.endswith(("_masked.py", "_edm.py")):  # whose second stage differs in its mask alone
        settings.append(f"--config.stages={c.stages[0]}")
    return [*line, *settings, *CALLS.get(program, "").split()]


@pytest.fixture(scope="module")
def run(root, child_env):
    """Run command lines in a folder."""

    def run(folder, lines):
        done = subprocess.run(
            [sys.executable, root / "tests" / "commands.py"],
            input=json.dumps([str(root), lines]),
            env=child_env,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return run


@pytest.fixture(scope="module")
def stage(root, run, inception_weights, tmp_path_factory):
    """A folder with all that the commands read: images, files, a run, samples."""
    folder = tmp_path_factory.mktemp("commands")
    for place, side in (("DIR_OR_ZIP", 64), ("data/imagenet256", 16)):  # that of jit_tiny.pth
        for i in range(10):
            path = folder / place / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)).save(path)
    for name in ("DIR_OR_ARCHIVE", "data/celeba64", "data/celebahq256"):
        (folder / name).symlink_to(folder / "DIR_OR_ZIP")
    for name, path in (("a.png", "cat/0.png"), ("b.png", "dog/1.png")):
        shutil.copy(folder / "DIR_OR_ZIP" / path, folder / name)
    for name in ("configs", "experiments"):
        (folder / name).symlink_to(root / name)
    shutil.copy(root / "tests" / "golden" / "official_tiny.pt", folder / "model-20.pt")
    shutil.copy(root / "tests" / "golden" / "jit_tiny.pth", folder / "checkpoint-last.pth")
    train = ["launch/train.py", "--config=configs/own_images.py", "--config.data.path=DIR_OR_ZIP"]
    train += ["--config.data.labels=True", "--config.model.num_classes=2", "--workdir=runs/mine"]
    jit = ["launch/convert.py", "--src=checkpoint-last.pth", "--dst=runs/imagenet256_jit"]
    run(folder, [in_small(line, None) for line in (train, jit)])
    for name in ("a", "b"):
        shutil.copytree(folder / "runs" / "mine", folder / "runs" / name)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, root, stage, run, inception_weights, tmp_path):
    lines = [in_small(line, inception_weights) for line in commands(root, page)]
    assert lines
    folder = tmp_path / "here"
    shutil.copytree(stage, folder, symlinks=True)
    if page == "README":
        shutil.rmtree(folder / "runs")
    run(folder, lines)
