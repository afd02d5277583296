"""Speed of all parts of a run on this machine's devices, optionally compared with PyTorch.

    python benchmarks/speed.py --config=configs/celeba64_pretrain.py --batch=8 --config.data.path=DIR_OR_ZIP
    python benchmarks/speed.py --config=configs/celeba64_pretrain.py --batch=8 --torch=eager --torch=fused

Measures training steps (noise, masks, loss, gradients, clipping, AdamW, EMA) with 10%, 50% and 100% of the patches
visible, a forward pass of the network, and sampling, on random images. Measures loading if config.data.path exists, and
the Inception features of evaluation if their weights exist (config.evaluation.inception_weights). The measurements
alternate for `--rounds` rounds, and medians are printed. Then it measures how long a run waits for a checkpoint, and
how long it takes until the checkpoint is on disk.

"of peak" is the throughput divided by that of a large matrix product, measured in the same rounds. "of roof" is a lower
bound of the time divided by the measured time. The bound is the larger one of two: FLOPs at the rate of the large
product, and HBM bytes at the rate of a large copy. The bytes are estimated from the compiled program; on CPU, the
estimate ignores caches. `--torch` adds the official step in PyTorch, as published (eager), with fused operations, or
compiled; ratios are PyTorch's seconds divided by ours. `--json` writes the numbers to a file. The last line is JSON.
"""

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import roofline
from absl import app, flags, logging

from maskdm_jax import config as config_lib
from maskdm_jax import sampling
from maskdm_jax.build import compute_dtype, make_network
from maskdm_jax.config import Config
from maskdm_jax.data.pipeline import TrainingData
from maskdm_jax.errors import DataError
from maskdm_jax.evaluation import features, inception
from maskdm_jax.models.representation import make_representation
from maskdm_jax.parallel import runtime, sharding
from maskdm_jax.storage import cache_dir
from maskdm_jax.tools import cost
from maskdm_jax.training import checkpoint
from maskdm_jax.training.loop import make_run_mesh
from maskdm_jax.training.start import abstract_state, fresh_state
from maskdm_jax.training.step import jit_step, memory_bytes

CONFIG = runtime.config_flag("Config file; its model, batch, optimizer and mask are used.")
BATCH = flags.DEFINE_integer("batch", None, "Batch size of a step; default: the config's.", lower_bound=1)
VISIBLE = flags.DEFINE_list("visible", ["10", "50", "100"], "Shares of visible patches, in percent.")
SAMPLING_STEPS = flags.DEFINE_integer("sampling_steps", 5, "Steps of a trajectory; 0: no sampling.", 0)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds of measurements.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 0.5, "Minimum seconds per measurement and round.")
TORCH = flags.DEFINE_multi_enum("torch", [], ["eager", "fused", "compiled"], "Also measure PyTorch; needs torch.")
JSON = flags.DEFINE_string("json", None, "Write the numbers to this file.")


@dataclasses.dataclass
class Subject:
    """A program to be timed."""

    what: str  # step 10%, ..., forward, sampling
    by: str  # jax, torch eager, ...
    start: object  # () -> the argument of `wait`
    wait: object
    images: int = 0
    flops: float = 0.0  # of one execution, over all devices
    hbm_bytes: float = 0.0  # read and written in main memory by one execution, over all devices
    memory: int = 0  # bytes per device
    compile_seconds: float = 0.0
    seconds: list = dataclasses.field(default_factory=list)
    repeats: int = 0  # executions of a turn

    def turn(self) -> None:
        """Time successive executions for at least --seconds, waiting only at the end."""
        self.wait(self.start())  # not timed: in a run, too, the same program ran just before
        if not self.repeats:
            self.repeats = 1
            self.repeats = max(1, math.ceil(SECONDS.value / self._run()))
        self.seconds.append(self._run())

    def _run(self) -> float:
        begun = time.perf_counter()
        for _ in range(self.repeats):
            last = self.start()
        self.wait(last)
        return (time.perf_counter() - begun) / self.repeats


def main(argv):
    if len(argv) > 1 or CONFIG.value is None:
        raise app.UsageError("give --config=configs/NAME.py; its settings as --config.key=value")
    logging.set_verbosity(logging.ERROR)
    with runtime.program(distributed=False), tempfile.TemporaryDirectory() as cache:
        # A new cache: compile times are real, and a program that was compiled for its cost is not compiled again.
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        result = report(measure(CONFIG.value))
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def measure(settings) -> list[Subject]:
    """Run all measurements, alternating."""
    stage = settings.stages[0]
    settings.stages = (stage,)
    settings[stage].batch_size = BATCH.value or settings[stage].batch_size
    settings.sampling.steps = SAMPLING_STEPS.value or settings.sampling.steps
    dtype = compute_dtype(config_lib.parse(settings).model)
    subjects = [peak(dtype), copy(), *jax_subjects(settings, stage)]
    subjects += [*loading_subjects(settings, stage), *evaluation_subjects(settings)]
    subjects += [subject for form in TORCH.value for subject in torch_subjects(settings, stage, form)]
    for i in range(ROUNDS.value):
        for subject in subjects:
            if sys.stderr.isatty():
                print(f"\rround {i + 1} of {ROUNDS.value}: {subject.what}, {subject.by:20}", end="\r", file=sys.stderr)
            subject.turn()
    return subjects + checkpoint_subjects(settings)


def with_visible(settings, stage: str, percent: str) -> Config:
    """The config with a share of visible patches, by the stage's kind of mask if that has a rate."""
    mask = settings[stage].mask
    mask.kind = "none" if percent == "100" else "patch" if mask.kind in ("none", "crop") else mask.kind
    mask.rate = 1 - float(percent) / 100
    return config_lib.parse(settings)


def peak(dtype: str) -> Subject:
    """A matrix product on one device, large enough to be bound by arithmetic."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((n, n), dtype)
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    return Subject("peak", "jax", lambda: product(x, x), jax.block_until_ready, flops=2.0 * n**3)


def copy() -> Subject:
    """A copy on one device, bound by memory bandwidth."""
    x = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**28, jnp.float32)
    negated = jax.jit(jnp.negative)
    return Subject("copy", "jax", lambda: negated(x), jax.block_until_ready, hbm_bytes=2.0 * x.nbytes)


def jax_subjects(settings, stage: str) -> list[Subject]:
    """Training steps by share of visible patches; a forward pass and sampling of whole images, by the last weights."""
    subjects = []
    for percent in VISIBLE.value:
        config = with_visible(settings, stage, percent)
        subject, state = step_subject(config, stage, percent)
        subjects.append(subject)
    subjects.append(forward_subject(config, stage, state))
    return subjects + ([sampling_subject(config, stage, state)] if SAMPLING_STEPS.value else [])


def step_subject(config: Config, stage: str, percent: str) -> tuple[Subject, list]:
    """A training step on random images, and a list of one item, its latest state."""
    n, size = config.stage[stage].batch_size, config.data.image_size
    mesh, network = make_run_mesh(config), make_network(config)
    found = cost.training_step(config, stage, jax.devices(), n)
    abstract = abstract_state(config, 0, network, mesh)
    state = [fresh_state(config, network, abstract)]
    step = jit_step(config, stage, mesh, abstract)
    image = np.random.default_rng(0).integers(0, 256, (n, size, size, config.data.channels), np.uint8)
    rows = dict(image=image, label=np.zeros(n, np.int32), index=np.arange(n, dtype=np.uint32))
    batch = sharding.to_global(mesh, rows)

    def start():
        state[0], values = step(state[0], batch)
        return values["loss"]

    about = costs(found, loops=config.stage[stage].micro_batches)
    return Subject(f"step {percent}%", "jax", start, float, **about), state


def forward_subject(config: Config, stage: str, state: list) -> Subject:
    """A forward pass of the network."""
    n, mesh, network = config.stage[stage].batch_size, make_run_mesh(config), make_network(config)
    place = sharding.batch_sharding(mesh)
    noise = np.random.default_rng(0).standard_normal((n, *make_representation(config).shape), np.float32)
    x, t = jax.device_put(noise, place), jax.device_put(np.full(n, 500, np.int32), place)
    labels = t * 0 if config.model.num_classes else None
    begun = time.perf_counter()
    forward = jax.jit(network.apply).lower(state[0].params, x, t, labels).compile()
    about = dict(images=n, compile_seconds=time.perf_counter() - begun, memory=sum(memory_bytes(forward)))
    hbm_bytes = roofline.hbm_bytes(forward.as_text()) * mesh.size
    about |= dict(flops=cost.count_forward_flops(config, n), hbm_bytes=hbm_bytes)
    start = lambda: forward(state[0].params, x, t, labels)
    return Subject("forward", "jax", start, jax.block_until_ready, **about)


def sampling_subject(config: Config, stage: str, state: list) -> Subject:
    """Whole trajectories."""
    n, mesh = config.stage[stage].batch_size, make_run_mesh(config)
    found = cost.sampling(config, jax.devices(), n // mesh.size)
    run, key = sampling.compile_sampling(config, make_network(config), mesh), jax.random.key(0)
    index = jax.device_put(np.arange(n, dtype=np.int32), sharding.batch_sharding(mesh))
    labels = index * 0 if config.model.num_classes else None
    start = lambda: run(state[0].ema, key, index, labels)
    about = costs(found, loops=cost.sampling_steps(config))
    return Subject("sampling", "jax", start, jax.block_until_ready, **about)


def costs(found: cost.Cost, *, loops: int) -> dict:
    """Fields of a `Subject`; loops: see `roofline.hbm_bytes`."""
    hbm_bytes = roofline.hbm_bytes(found.program.as_text(), loops=loops) * found.chips
    about = dict(images=found.batch, memory=found.memory, compile_seconds=found.compile_seconds)
    return about | dict(flops=found.flops * found.chips, hbm_bytes=hbm_bytes)


def loading_subjects(settings, stage: str) -> list[Subject]:
    """Loading of batches, if there is data; with so many per turn that batches read ahead hardly matter."""
    config = with_visible(settings, stage, "100")
    try:
        data = TrainingData(config.data)
    except DataError as error:
        print(f"loading is left out: {error}")
        return []
    data.kept = None  # decode every image again, like a set that does not fit into memory
    size = config.stage[stage].batch_size
    batches, number = data.batches(batch_size=size, seed=0), max(4, 4096 // size)
    read = lambda: [next(batches) for _ in range(number)] and None
    return [Subject("loading", "jax", read, lambda _: None, images=number * size)]


def evaluation_subjects(settings) -> list[Subject]:
    """Inception features of random images, if the network's weights exist."""
    path = settings.evaluation.inception_weights or cache_dir("weights") / inception.FILE
    if not pathlib.Path(path).exists():
        print(f"evaluation is left out: {path} is not there; give config.evaluation.inception_weights")
        return []
    n = 16 if jax.default_backend() == "cpu" else 512
    extract = features.Extractor(path, batch_size=n)
    size = settings.data.image_size
    pictures = np.random.default_rng(0).integers(0, 256, (n, size, size, settings.data.channels), np.uint8)
    images = features.Images("random", n, lambda start, stop: iter(pictures[start:stop]))
    return [Subject("features", "jax", lambda: extract(images), lambda _: None, images=n)]


def checkpoint_subjects(settings) -> list[Subject]:
    """A checkpoint of the whole state: seconds that the run waits for it, and until it is on disk."""
    config = with_visible(settings, settings.stages[0], "100")
    network, mesh = make_network(config), make_run_mesh(config)
    state = fresh_state(config, network, abstract_state(config, 0, network, mesh))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    meta = dict(stage="", stage_step=0, past={}, data={}, window={}, classes=[], card={}, images=None)
    meta |= dict(config=config_lib.to_dict(config))
    stall = Subject("checkpoint", "until training continues", None, None, memory=size)
    whole = Subject("checkpoint", "until it is on disk", None, None, memory=size)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = checkpoint.Checkpoints(folder, keep=1)
        for i in range(1 + min(ROUNDS.value, 3)):
            begun = time.perf_counter()
            checkpoints.save(i, state, meta)
            stalled = time.perf_counter() - begun
            checkpoints.wait()
            if i:  # the first one sets up threads and folders
                stall.seconds.append(stalled)
                whole.seconds.append(time.perf_counter() - begun)
        checkpoints.close()
    return [stall, whole]


def torch_subjects(settings, stage: str, form: str) -> list[Subject]:
    """The step and the forward pass in PyTorch; form: eager, fused or compiled."""
    config = with_visible(settings, stage, "100")
    known = config.diffusion.process == ("flow" if config.model.network == "jit" else "ddpm")
    if config.model.wavelet_scale or config.model.num_classes or not known:
        raise app.UsageError(
            "--torch compares unconditional models of pixels: U-ViT with DDPM, or JiT with flow matching"
        )
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    configs = [with_visible(settings, stage, percent) for percent in (*VISIBLE.value, "100")]
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    spawn.Process(target=serve_torch, args=(theirs, form, configs, stage, device), daemon=True).start()
    theirs.close()
    pipe.recv()  # it is ready

    def wait(number: int) -> float:
        pipe.send(None)
        return pipe.recv()

    start = lambda number: lambda: pipe.send(number)
    what = [*(f"step {percent}%" for percent in VISIBLE.value), "forward"]
    n, by = config.stage[stage].batch_size, f"torch {form}"
    return [Subject(name, by, start(number), wait, images=n) for number, name in enumerate(what)]


def serve_torch(pipe, form: str, configs: list[Config], stage: str, device: str) -> None:
    """Start steps, one trainer for each config but the last, and forward passes, of the last, by number.

    This is a process of its own, since the waiting threads of PyTorch slow XLA's threads on the same cores.
    """
    import torch_uvit

    runtime.keep_freed_memory()
    starts = [torch_uvit.make_trainer(form, config, stage, device) for config in configs]
    starts[-1] = starts[-1].forward
    last = None
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # the benchmark is done
        while True:
            number = pipe.recv()
            if number is None:
                pipe.send(float(last))
            else:
                last = starts[number]()


def report(subjects: list[Subject]) -> dict:
    """Print a table; return the numbers, with what they were measured on."""
    devices, rows = jax.devices(), []
    best = max(subjects[0].flops / seconds for seconds in subjects[0].seconds) * len(devices)
    moved = max(subjects[1].hbm_bytes / seconds for seconds in subjects[1].seconds) * len(devices)
    print(f"{len(devices)} x {devices[0].device_kind}; a large matrix product: {best / 1e12:,.2f} TFLOP/s", end="")
    print(f"; a large copy: {moved / 1e9:,.0f} GB/s")
    head = ("ms", 10), ("images/s", 12), ("TFLOP/s", 10), ("of peak", 9), ("of roof", 9), ("GiB", 8), ("compiled", 10)
    print(" " * 34 + "".join(f"{name:>{width}}" for name, width in head))
    ours = {subject.what: subject for subject in subjects if subject.by == "jax"}
    above = None
    for subject in subjects[2:]:
        same, seconds = ours.get(subject.what, subject), statistics.median(subject.seconds)
        row = dict(what=subject.what, by=subject.by, seconds=seconds, images_per_second=subject.images / seconds)
        row |= dict(flops_per_second=same.flops / seconds, share_of_peak=same.flops / seconds / best)
        row |= dict(share_of_roof=max(subject.flops / best, subject.hbm_bytes / moved) / seconds)
        row |= dict(memory=subject.memory, compile_seconds=subject.compile_seconds)
        row["over_ours"] = statistics.median(a / b for a, b in zip(subject.seconds, same.seconds, strict=True))
        rows.append(row)
        what = subject.what if subject.what != above else ""
        print(f"{what:12}{subject.by:22}" + _cells(subject, same, row))
        above = subject.what
    return dict(device=devices[0].device_kind, devices=len(devices), peak=best, copy=moved, rows=rows)


def _cells(subject: Subject, same: Subject, row: dict) -> str:
    """A line of the table; same: our subject of that name."""
    cells = [f"{1e3 * row['seconds']:10,.1f}", f"{row['images_per_second']:12,.1f}" if subject.images else ""]
    cells += [f"{row['flops_per_second'] / 1e12:10,.2f}{row['share_of_peak']:9.0%}" if same.flops else ""]
    if subject is not same:
        cells += [f"   {row['over_ours']:.2f} of our seconds"]
    else:
        cells += [f"{row['share_of_roof']:9.0%}" if subject.hbm_bytes else ""]
        cells += [f"{subject.memory / 2**30:8.2f}" if subject.memory else ""]
        cells += [f"{subject.compile_seconds:8.0f} s" if subject.compile_seconds else ""]
    widths = (10, 12, 19, 9, 8, 10)
    return "".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=False)).rstrip()


if __name__ == "__main__":
    runtime.start(main)
