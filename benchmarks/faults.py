"""Kill processes of a run repeatedly, and compare its result with that of an uninterrupted run.

    python benchmarks/faults.py --kills=30 --processes=2
    python benchmarks/faults.py --kills=10 --processes=2,1,4 --workdir=gs://BUCKET/faults
    python benchmarks/faults.py --kills=10 --processes=1 --workdir=s3://BUCKET/faults

Trains a tiny network on the digits in several processes. Repeatedly, a random process receives SIGKILL or SIGTERM at a
random moment, and all processes are restarted, in turn as many as --processes says, with equally many devices
altogether. At the end, every logged step, parameters, EMA and moments must equal those of the uninterrupted run bit for
bit. Prints a line per kill and, as the last line, a JSON object.
"""

import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging

from maskdm_jax.errors import ConfigError
from maskdm_jax.storage import local_copy, location

KILLS = flags.DEFINE_integer("kills", 30, "Number of kills.", lower_bound=0)
PROCESSES = flags.DEFINE_list("processes", ["2"], "Processes of the run; several numbers take turns.")
WORKDIR = flags.DEFINE_string("workdir", None, "New run folder of the killed run; default: a temporary one.")
DEVICES = flags.DEFINE_integer("devices", 2, "CPU devices of all processes; a multiple of their number.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 2000, "Steps of the run.", lower_bound=10)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the kills.")
ROOT = pathlib.Path(__file__).parent.parent


def main(_):
    logging.set_verbosity(logging.WARNING)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="maskdm-faults-"))
    try:
        sys.exit(0 if compare(folder) else 1)
    finally:
        shutil.rmtree(folder)


def compare(folder) -> bool:
    """Train without and with kills; print the comparison. True if all is equal and all kills happened."""
    draw, begun = random.Random(SEED.value), time.perf_counter()
    calm, killed = folder / "calm", location(WORKDIR.value or folder / "killed")
    turns = itertools.cycle(map(int, PROCESSES.value))
    if start(calm, int(PROCESSES.value[0]), folder).wait():
        sys.exit((folder / "calm.log").read_text()[-3000:])
    calm_seconds = time.perf_counter() - begun
    kills, lost, begun = [], 0, time.perf_counter()
    while True:
        before, saved = steps_of(killed), newest(killed)
        lost += before - saved
        process = start(killed, next(turns), folder)
        aim = before + draw.randint(1, max(1, STEPS.value // (2 * KILLS.value or 1)))
        # A third of the kills come during startup, the others some steps later.
        patience = time.monotonic() + (draw.uniform(0, 15) if draw.random() < 1 / 3 else 300)
        while process.poll() is None and steps_of(killed) < aim and time.monotonic() < patience:
            time.sleep(0.01 if WORKDIR.value is None else 0.2)
        if process.poll() is None and len(kills) < KILLS.value:
            victims = workers(process)
            if victims:
                kill = draw.choice([signal.SIGKILL, signal.SIGTERM])
                os.kill(draw.choice(victims), kill)
                kills.append(kill.name)
        status = process.wait()
        print(f"{len(kills):3d} {kills[-1] if kills else '':8} status {status:3d}, {steps_of(killed)} steps logged")
        sys.stdout.flush()
        if status == 0:
            break
        if status == ConfigError.status:
            sys.exit((folder / f"{killed.name}.log").read_text()[-3000:])
    same = {name: tree(calm, name) == tree(killed, name) for name in ("params", "ema", "optimizer")}
    same["history"] = history(calm) == history(killed)
    result = dict(kills=len(kills), kinds={kind: kills.count(kind) for kind in set(kills)}, steps_done_twice=lost)
    result |= dict(same=same, calm_seconds=calm_seconds, seconds=time.perf_counter() - begun)
    print(json.dumps(result))
    return all(same.values()) and len(kills) == KILLS.value


def start(workdir, processes: int, logs):
    """Start the run, or resume it."""
    settings = {
        "model.width": 32,
        "model.depth": 1,
        "model.heads": 2,
        "stages": ("pretrain",),
        "pretrain.steps": STEPS.value,
        "pretrain.batch_size": 8,
        "checkpoint.every": max(1, STEPS.value // 100),
        "log.every": 1,
        "log.tensorboard": False,
        "preview.every": 0,
        "preview.rows": 1,
        "preview.columns": 2,
        "sampling.steps": 2,
        "mesh.fsdp": DEVICES.value,
    }
    line = [
        sys.executable,
        "launch/local.py",
        f"--processes={processes}",
        f"--devices={DEVICES.value // processes}",
        "--grace=5",
    ]
    line += ["--", "launch/train.py", "--config=configs/demo.py", f"--workdir={workdir}"]
    line += [f"--config.{name}={value}" for name, value in settings.items()]
    with open(logs / f"{workdir.name}.log", "a") as log:
        return subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log)


def workers(process) -> list[int]:
    """Process ids of the running children."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def history(workdir) -> list:
    """Step, loss and gradient norm of each logged step."""
    from maskdm_jax.training.logs import read_metrics

    path = workdir / "metrics.jsonl"
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(path)] if path.exists() else []


def steps_of(workdir) -> int:
    """The last logged step."""
    return max((step for step, _, _ in history(workdir)), default=0)


def newest(workdir) -> int:
    """Step of the newest checkpoint."""
    folder = workdir / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return max((int(path.name) for path in found if path.name.isdecimal()), default=0)


def tree(workdir, item: str) -> dict:
    """Bytes of every array of the last checkpoint."""
    import tensorstore

    with local_copy(workdir / "checkpoints" / str(STEPS.value) / item) as folder:
        store = {"driver": "ocdbt", "base": folder.as_uri() + "/"}
        keys = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
        array = lambda name: tensorstore.open({"driver": "zarr", "kvstore": store | {"path": name}}).result()
        names = [key.removesuffix(".zarray") for key in keys if key.endswith(".zarray")]
        return {name: array(name).read().result().tobytes() for name in names}


if __name__ == "__main__":
    app.run(main)
