"""Kill workers of a run again and again, and compare its end with that of an undisturbed one.

    python benchmarks/faults.py --kills=30 --processes=2

Trains a tiny network on the digits in several processes. Each time, a random worker gets SIGKILL or SIGTERM a random
moment after the run has gone on, and all are started again. At the end: every logged step, and parameters, EMA and
moments, must be those of the undisturbed run, bit for bit. Prints a line per kill, and a JSON object last.
"""

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

from absl import app, flags

KILLS = flags.DEFINE_integer("kills", 30, "Workers to kill.", lower_bound=0)
PROCESSES = flags.DEFINE_integer("processes", 2, "Of the run.", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices", 1, "CPU devices of each.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 2000, "Of the run.", lower_bound=10)
SEED = flags.DEFINE_integer("seed", 0, "Of the kills.")
ROOT = pathlib.Path(__file__).parent.parent


def main(_):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="maskdm-faults-"))
    try:
        sys.exit(0 if compare(folder) else 1)
    finally:
        shutil.rmtree(folder)


def compare(folder) -> bool:
    """Run twice, and print how they compare."""
    draw, begun = random.Random(SEED.value), time.perf_counter()
    calm, tried = folder / "calm", folder / "tried"
    if start(calm).wait():
        sys.exit((folder / "calm.log").read_text()[-3000:])
    calm_seconds = time.perf_counter() - begun
    kills, lost, begun = [], 0, time.perf_counter()
    while True:
        before, saved = steps_of(tried), newest(tried)
        lost += before - saved
        process = start(tried)
        aim = before + draw.randint(1, max(1, STEPS.value // (2 * KILLS.value or 1)))
        # A third of the kills come at any moment of the start, the others some steps later.
        patience = time.monotonic() + (draw.uniform(0, 15) if draw.random() < 1 / 3 else 300)
        while process.poll() is None and steps_of(tried) < aim and time.monotonic() < patience:
            time.sleep(0.01)
        if process.poll() is None and len(kills) < KILLS.value:
            victims = workers(process)
            if victims:
                kill = draw.choice([signal.SIGKILL, signal.SIGTERM])
                os.kill(draw.choice(victims), kill)
                kills.append(kill.name)
        status = process.wait()
        print(f"{len(kills):3d} {kills[-1] if kills else '':8} status {status:3d}, {steps_of(tried)} steps logged")
        sys.stdout.flush()
        if status == 0:
            break
    same = {name: tree(calm, name) == tree(tried, name) for name in ("params", "ema", "optimizer")}
    same["history"] = history(calm) == history(tried)
    result = dict(kills=len(kills), kinds={kind: kills.count(kind) for kind in set(kills)}, steps_done_twice=lost)
    result |= dict(same=same, calm_seconds=calm_seconds, seconds=time.perf_counter() - begun)
    print(json.dumps(result))
    return all(same.values()) and len(kills) == KILLS.value


def start(workdir):
    """Start the run, or what is left of it."""
    settings = [
        *("--config=configs/demo.py", "--config.model.width=32", "--config.model.depth=3", "--config.model.heads=2"),
        *("--config.stages=('pretrain',)", f"--config.pretrain.steps={STEPS.value}", "--config.pretrain.batch_size=8"),
        *(
            f"--config.checkpoint.every={max(1, STEPS.value // 100)}",
            "--config.log.every=1",
            "--config.preview.every=0",
        ),
        *("--config.preview.rows=1", "--config.preview.columns=2", "--config.sampling.steps=2"),
        *("--config.log.tensorboard=False", f"--config.mesh.fsdp={PROCESSES.value * DEVICES.value}"),
    ]
    local = [f"--processes={PROCESSES.value}", f"--devices={DEVICES.value}", "--grace=5"]
    line = [sys.executable, "launch/local.py", *local, "--", "launch/train.py", f"--workdir={workdir}", *settings]
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log)


def workers(process) -> list[int]:
    """Process numbers of the children that live."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def history(workdir) -> list:
    """Step, loss and gradient norm of each logged step."""
    from maskdm_jax.training.logs import read_metrics

    path = workdir / "metrics.jsonl"
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(path)] if path.exists() else []


def steps_of(workdir) -> int:
    """Last step that was logged."""
    return max((step for step, _, _ in history(workdir)), default=0)


def newest(workdir) -> int:
    """Step of the newest checkpoint."""
    folder = workdir / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)


def tree(workdir, item: str) -> dict:
    """Bytes of every array of the last checkpoint."""
    import tensorstore

    store = {"driver": "ocdbt", "base": (workdir / "checkpoints" / str(STEPS.value) / item).as_uri() + "/"}
    keys = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
    names = [key.removesuffix(".zarray") for key in keys if key.endswith(".zarray")]
    read = lambda name: tensorstore.open({"driver": "zarr", "kvstore": store | {"path": name}}).result().read().result()
    return {name: read(name).tobytes() for name in names}


if __name__ == "__main__":
    app.run(main)
