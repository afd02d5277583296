"""Benchmark for one GPU, twice nine minutes: training steps in JAX and PyTorch, sampling, attention, memory, a profile.

    PYTHONPATH=. python benchmarks/accelerator.py --out=DIR           # run the rows that are missing, twice
    PYTHONPATH=. python benchmarks/accelerator.py --out=DIR --table   # print the results as Markdown
    PYTHONPATH=. python benchmarks/accelerator.py --out=DIR --small   # rehearse in half a minute, also on CPU

Run it in the root of the repository; it installs, downloads and prepares nothing. It needs jax (0.10 to 0.12, with
CUDA), flax, optax, ml_collections and numpy. If PyTorch is missing or sees no GPU, its measurements are left out and
the reason is printed. If the checkout has no .git, give the commit as `--commit`.

Rows run in order of importance. Each is written to DIR/accelerator.json (DIR/small.json in a rehearsal) when it is
complete, with device, versions, commit and date. If too little is left of `--budget` (540 seconds without imports), a
row is skipped and named, and the next call of the same command runs it. Failed rows are recorded with their error and
run again at the end of the next call. `--cache=FOLDER` keeps compiled JAX programs, which makes later calls faster and
their compile times meaningless.

JAX and PyTorch share the GPU's memory: JAX allocates up to 45% of it as needed, and never frees it; PyTorch uses the
rest. The environment variables XLA_PYTHON_CLIENT_PREALLOCATE and XLA_CLIENT_MEM_FRACTION change that.

The rows are:

- peak, copy: a matrix product and a copy, large enough to be bound by arithmetic and by memory.
- attention: the fused kernel and the plain one, with the largest errors of values and gradients compared with plain
  attention in float32, in standard deviations.
- step: a training step on uint8 images that are already on the device: draw time steps, masks and noise; loss,
  gradients, clipping, AdamW, EMA. `torch_uvit.py` describes the variants of PyTorch's step.
- sampling: whole DDIM trajectories.
- profile: the kernels of a few steps, their share of the time, and the trace, if it is smaller than 8 MiB
  (profile.trace.json.gz for ui.perfetto.dev, profile.xplane.pb for xprof). `--skip=profile` leaves it out.

After a warm-up, the variants of a row alternate: each turn runs executions for half a second and waits for the last.
The table shows the median and the range of the turns. TFLOP/s are computed by a formula for the multiplications and
additions of matrix products and attention, 3 times the forward pass for a step. The FLOPs are the same for all
variants; recomputation does not count. Memory is XLA's plan for the program (arguments, results, temporary buffers),
and for PyTorch the increase of `torch.cuda.max_memory_allocated` since before the model was made. JAX cannot reset its
peak: `jax_peak_bytes_so_far` in the file is the highest value since the start of the program.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax import config
from maskdm_jax.build import make_network, make_sampler, mask_plans
from maskdm_jax.diffusion import samplers
from maskdm_jax.models.ops.attention import attention
from maskdm_jax.models.representation import make_representation
from maskdm_jax.parallel import sharding
from maskdm_jax.training.state import new_state
from maskdm_jax.training.step import abstract_batch, jit_step

LARGEST_TRACE = 8 * 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and how it is trained."""

    name: str
    image_size: int
    width: int
    depth: int
    heads: int
    rate: float  # hidden share, in blocks
    batch: int
    eager_batch: int | None = None  # where PyTorch's plain attention needs too much memory
    block: int = 4  # side of a block, in patches
    jit: int = 0  # patch size of a JiT; 0: U-ViT with patches of 4

    def config(self, *, batch: int | None = None, kernel: str = "auto", sampling_steps: int = 250) -> config.Config:
        """The settings of a run, in bfloat16; its only stage is "train"."""
        c = config.default()
        c.data.update(path="random", image_size=self.image_size)
        c.model.update(width=self.width, depth=self.depth, heads=self.heads, dtype="bfloat16", attention=kernel)
        c.sampling.steps = sampling_steps
        c.stages = ("train",)
        c.train = config.stage(batch_size=batch or self.batch)
        if self.jit:
            c.model.update(network="jit", patch_size=self.jit)
            c.diffusion.update(process="flow", objective="x0")
            c.sampling.method = "heun"
            c.train.update(ema_law="plain", more_ema_decays=(0.9996,))
        if self.rate:
            c.train.mask = config.block(self.rate, block=self.block)
        return config.parse(c)


B256 = dict(image_size=256, width=768, depth=12, heads=12)
S64 = dict(image_size=64, width=512, depth=13, heads=8)
TINY = dict(image_size=32, width=32, depth=3, heads=2)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    product: int = 8192  # side of the matrices
    copied: int = 2**28  # float32 numbers
    rounds: int = 5
    turn: float = 0.5  # seconds
    attention: tuple = ((64, 417, 12, 64), (4, 4097, 12, 64))  # images, tokens, heads, width of a head
    cases: tuple[Case, ...] = (
        Case("MaskDM-B 256, 10% visible", **B256, rate=0.9, batch=64),
        Case("MaskDM-B 256, 50% visible", **B256, rate=0.5, batch=16, eager_batch=8),
        Case("MaskDM-B 256, all visible", **B256, rate=0, batch=8, eager_batch=2),
        Case("MaskDM-S 64, all visible", **S64, rate=0, batch=256),
        Case("JiT-B/16 256, all visible", **B256, rate=0, batch=128, jit=16),
        Case("JiT-B/16 256, 25% visible", **B256, rate=0.75, batch=256, block=2, jit=16),
    )
    sampled: tuple = ((3, 50), (2, 10))  # case and DDIM steps
    torch: tuple[str, ...] = ("eager", "fused", "compiled")
    profiled: int = 5  # steps


SMALL = Sizes(
    product=256,
    copied=2**20,
    rounds=2,
    turn=0.01,
    attention=((2, 17, 2, 16),),
    cases=(
        Case("tiny, 50% visible", **TINY, rate=0.5, batch=4, eager_batch=2),
        Case("tiny JiT, 25% visible", **TINY | dict(depth=6), rate=0.75, batch=4, block=2, jit=4),
    ),
    sampled=((0, 2),),
    torch=("eager", "fused"),
    profiled=2,
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One entry of the JSON file."""

    name: str
    seconds: float  # approximate duration
    run: typing.Callable  # () -> dict


def all_rows(sizes: Sizes, out: pathlib.Path) -> list[Row]:
    """Every row, in order of importance; the profile writes files to `out`."""
    rows = [Row("peak", 15, lambda: peak_row(sizes)), Row("copy", 5, lambda: copy_row(sizes))]
    for shape in sizes.attention:
        rows.append(Row(f"attention, {shape[1]} tokens", 20, functools.partial(attention_row, shape, sizes)))
    for case in sizes.cases:
        rows.append(Row(f"step, {case.name}", 90, functools.partial(step_row, case, sizes)))
    for number, steps in sizes.sampled:
        case = sizes.cases[number]
        name = f"sampling, {case.name.split(',')[0]}, {steps} DDIM steps"
        rows.append(Row(name, 35, functools.partial(sampling_row, case, steps, sizes)))
    return [*rows, Row("profile", 20, lambda: profile_row(sizes, out))]


def main(argv=None) -> None:
    args = parse_args(argv)
    path = args.out / ("small.json" if args.small else "accelerator.json")
    if args.table:
        print(table(read(path)))
        return
    share_memory()
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.small:
        raise SystemExit(f"this benchmark is for a GPU, but JAX sees only {device.device_kind}; --small runs anywhere")
    others = {row["device"] for row in read(path).values()} - {device.device_kind}
    if others:
        raise SystemExit(f"{path} has results of {', '.join(others)}, this is {device.device_kind}; give another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", str(args.cache))
    rows = all_rows(SMALL if args.small else Sizes(), args.out)
    rows = [row for row in rows if not row.name.startswith(tuple(args.skip))]
    skipped = run_rows(rows, path, budget=args.budget, about=about(args.commit))
    print(table(read(path)))
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}; run the same command again")


def share_memory() -> None:
    """Leave GPU memory to PyTorch. JAX reads these variables when it first touches a device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; JAX refuses both together
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.45")


def parse_args(argv):
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--out", type=pathlib.Path, required=True, help="folder for accelerator.json and the profile")
    flags.add_argument("--budget", type=float, default=540, help="seconds for all rows together")
    flags.add_argument("--small", action="store_true", help="rehearse with tiny networks and few executions")
    flags.add_argument("--table", action="store_true", help="only print the results so far")
    flags.add_argument("--skip", action="append", default=[], help="leave out rows with this prefix; repeatable")
    flags.add_argument("--cache", type=pathlib.Path, help="folder to keep compiled JAX programs in")
    flags.add_argument("--commit", help="commit to record, if the repository has no .git")
    return flags.parse_args(argv)


# --- Rows and their file --------------------------------------------------------------------------


def run_rows(rows: list[Row], path: pathlib.Path, *, budget: float, about: dict) -> dict[str, str]:
    """Run the missing rows that fit into the budget; returns the others with the reasons."""
    begun, results, skipped = time.monotonic(), read(path), {}
    open_rows = [row for row in rows if "error" in results.get(row.name, {"error": None})]
    open_rows.sort(key=lambda row: row.name in results)  # failed ones go last
    for row in open_rows:
        left = budget - (time.monotonic() - begun)
        if row.seconds > left:
            skipped[row.name] = f"it needs about {row.seconds:.0f} s, {max(left, 0):.0f} s are left"
            continue
        print(f"{row.name} (about {row.seconds:.0f} s, {left:.0f} s are left)", flush=True)
        started, now = time.monotonic(), datetime.datetime.now(datetime.UTC)
        facts = about | dict(date=now.isoformat(timespec="seconds"))
        write(path, results | {row.name: facts | dict(error="the program ended during this row")})
        try:
            result = row.run()
        except Exception as error:
            result = dict(error=one_line(error))
            print(f"  {result['error']}", flush=True)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        costs = dict(jax_peak_bytes_so_far=peak, wall_seconds=round(time.monotonic() - started, 1))
        results[row.name] = facts | result | costs
        write(path, results)
        release_memory()
    return skipped


def read(path: pathlib.Path) -> dict[str, dict]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: pathlib.Path, results: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"[:400]


def release_memory() -> None:
    gc.collect()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()  # else the next row compiles for varying shapes
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def about(commit: str | None) -> dict:
    """Device, commit and versions, on which the numbers depend."""
    versions = dict(python=platform.python_version())
    for name in ("jax", "jaxlib", "flax", "optax", "numpy", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    device = jax.devices()[0]
    versions["runtime"] = " ".join(device.client.platform_version.split())
    return dict(device=device.device_kind, commit=commit or git_commit(), versions=versions)


def git_commit() -> str:
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + (" with changes" if changes.stdout.strip() else "")


# --- Taking turns ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Subject:
    """A program to be timed."""

    start: typing.Callable  # () -> launches one execution
    wait: typing.Callable = jax.block_until_ready  # called with the result of the last `start`
    batch: int = 0  # images of one execution
    flops: float = 0  # of one execution
    moved: int = 0  # bytes read and written by one execution
    memory: int | None = None  # bytes
    compile_seconds: float | None = None
    note: str = ""
    loss: typing.Callable | None = None  # result of `start` -> float
    repeats: int = 0  # executions of a turn
    seconds: list[float] = dataclasses.field(default_factory=list)  # of an execution, by turn
    last: float | None = None  # loss

    def turn(self, length: float) -> None:
        """Time successive executions for about `length` seconds; the first turn only warms up."""
        self._run(1)
        if not self.repeats:
            self.repeats = max(1, math.ceil(length / self._run(1)))
            return
        self.seconds.append(self._run(self.repeats))

    def _run(self, repeats: int) -> float:
        begun = time.perf_counter()
        for _ in range(repeats):
            result = self.start()
        self.wait(result)
        seconds = (time.perf_counter() - begun) / repeats
        if self.loss:
            self.last = self.loss(result)
            if not math.isfinite(self.last):
                raise FloatingPointError(f"the loss is {self.last}")
        return seconds

    def facts(self) -> dict:
        """Medians and their conditions, for the JSON file."""
        median = statistics.median(self.seconds)
        found = dict(seconds=median, turns=self.seconds, executions_per_turn=self.repeats)
        found |= dict(batch=self.batch, images_per_second=self.batch / median) if self.batch else {}
        found |= dict(flops=self.flops, tflops_per_second=self.flops / median / 1e12) if self.flops else {}
        found |= dict(bytes_per_second=self.moved / median) if self.moved else {}
        more = dict(memory_bytes=self.memory, compile_seconds=self.compile_seconds, loss=self.last, note=self.note)
        return found | {name: value for name, value in more.items() if value not in (None, "")}


def take_turns(makers: dict[str, typing.Callable], sizes: Sizes) -> dict[str, dict]:
    """Make a subject by each maker and time them in turns. An error of one is recorded; the others continue.

    A maker is () -> Subject, or a string, the reason why there is none.
    """
    subjects, found = {}, {by: dict(skipped=maker) for by, maker in makers.items() if isinstance(maker, str)}

    def attempt(by, do):
        try:
            do()
        except Exception as error:
            subjects.pop(by, None)
            found[by] = dict(error=one_line(error))
            print(f"  {by}: {found[by]['error']}", flush=True)

    def prepare(by):
        subjects[by] = makers[by]()
        subjects[by].turn(sizes.turn)  # JAX allocates before PyTorch caches the free memory

    for by in makers:
        if by not in found:
            attempt(by, lambda by=by: prepare(by))
    for _ in range(sizes.rounds):
        for by in list(subjects):
            attempt(by, lambda by=by: subjects[by].turn(sizes.turn))
    found |= {by: subject.facts() for by, subject in subjects.items()}
    return {by: found[by] for by in makers}


@functools.cache
def torch_problem() -> str | None:
    """The reason why PyTorch cannot be measured here, or None."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch cannot be imported: {error}"
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no GPU"
    return None


def torch_device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def torch_wait(_=None) -> None:
    import torch

    if torch_device() == "cuda":
        torch.cuda.synchronize()


# --- The rows -------------------------------------------------------------------------------------


def peak_row(sizes: Sizes) -> dict:
    n = sizes.product

    def ours():
        x, y = (jax.random.normal(key, (n, n), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
        product = jax.jit(jnp.matmul)
        return Subject(lambda: product(x, y), flops=2 * n**3)

    def theirs():
        import torch

        x, y = torch.randn(2, n, n, device=torch_device()).bfloat16()
        return Subject(lambda: x @ y, torch_wait, flops=2 * n**3)

    return dict(by=take_turns({"jax": ours, "torch": torch_problem() or theirs}, sizes))


def copy_row(sizes: Sizes) -> dict:
    n = sizes.copied

    def ours():
        x, negated = jax.random.normal(jax.random.key(0), n), jax.jit(jnp.negative)
        return Subject(lambda: negated(x), moved=8 * n)

    def theirs():
        import torch

        x = torch.randn(n, device=torch_device())
        return Subject(lambda: torch.neg(x), torch_wait, moved=8 * n)

    return dict(by=take_turns({"jax": ours, "torch": torch_problem() or theirs}, sizes))


def attention_row(shape: tuple[int, int, int, int], sizes: Sizes) -> dict:
    """The fused kernel against the plain one, in bfloat16."""
    fused = "cudnn" if jax.default_backend() == "gpu" else "auto"
    inputs = [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4)]

    def forward(kernel):
        return jax.jit(lambda q, k, v, g: attention(q, k, v, kernel))

    def both(kernel):
        def run(q, k, v, g):
            out, backward = jax.vjp(lambda *qkv: attention(*qkv, kernel), q, k, v)
            return out, *backward(g)

        return jax.jit(run)

    with jax.default_matmul_precision("highest"):
        exact = both("plain")(*(x.astype(jnp.float32) for x in inputs))
    errors = {}
    for kernel in (fused, "plain"):
        deviation = [jnp.abs(a - b).max() / b.std() for a, b in zip(both(kernel)(*inputs), exact, strict=True)]
        errors[kernel] = dict(zip(("values", "to q", "to k", "to v"), map(float, deviation), strict=True))
    del exact
    b, t, heads, d = shape
    flops = 4.0 * b * heads * t**2 * d

    def subject(program, flops):
        begun = time.perf_counter()
        compiled = program.lower(*inputs).compile()
        seconds = time.perf_counter() - begun
        return compiled_subject(compiled, seconds, lambda: compiled(*inputs), batch=b, flops=flops)

    makers = {f"{kernel}, forward": lambda kernel=kernel: subject(forward(kernel), flops) for kernel in errors}
    makers |= {
        f"{kernel}, forward and backward": lambda kernel=kernel: subject(both(kernel), 3 * flops) for kernel in errors
    }
    return dict(shape=shape, errors=errors, by=take_turns(makers, sizes))


def compiled_subject(compiled, seconds: float, start, **facts) -> Subject:
    """A subject of JAX, with the memory planned by XLA; `seconds` is the compile time."""
    plan = compiled.memory_analysis()
    memory = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return Subject(start, memory=memory + plan.temp_size_in_bytes, compile_seconds=seconds, **facts)


@functools.cache
def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


@functools.cache
def initial_state(network):
    """The program that makes the state of a network."""
    make = lambda: new_state(network.init(jax.random.key(0)), config.Stage(), jax.random.key(1))
    return jax.jit(make, out_shardings=sharding.replicated(one_device()))


def random_batch(case: Case) -> dict:
    shape = (case.batch, case.image_size, case.image_size, 3)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    index = np.arange(case.batch)
    rows = dict(image=image, label=np.zeros_like(index, np.int32), index=index.astype(np.uint32))
    return sharding.to_global(one_device(), rows)


@functools.cache
def compiled_step(case: Case, kernel: str):
    """The compiled step and its compile time in seconds."""
    settings, mesh = case.config(kernel=kernel), one_device()
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))
    abstract = jax.tree.map(place, jax.eval_shape(initial_state(make_network(settings))))
    begun = time.perf_counter()
    compiled = jit_step(settings, "train", mesh, abstract).lower(abstract, abstract_batch(settings, "train", mesh))
    return compiled.compile(), time.perf_counter() - begun


def our_step(case: Case, kernel: str = "auto") -> Subject:
    step, seconds = compiled_step(case, kernel)
    settings, batch = case.config(kernel=kernel), random_batch(case)
    state = [initial_state(make_network(settings))()]

    def start():
        state[0], values = step(state[0], batch)
        return values["loss"]

    flops = 3 * forward_flops(settings) * case.batch
    return compiled_subject(step, seconds, start, batch=case.batch, flops=flops, loss=float)


def our_step_or_plain(case: Case) -> Subject:
    """Our step. If the platform's attention kernel fails, use plain attention and say so in the note."""
    try:
        return our_step(case)
    except Exception as error:
        note = f"plain attention, because: {one_line(error)}"
    print(f"  jax: {note}", flush=True)
    return dataclasses.replace(our_step(case, "plain"), note=note)


def torch_step(case: Case, form: str) -> Subject:
    import torch
    import torch_uvit

    batch = case.eager_batch if form == "eager" and case.eager_batch else case.batch
    settings, on_gpu = case.config(batch=batch), torch_device() == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    trainer = torch_uvit.make_trainer(form, settings, "train", torch_device())
    begun = time.perf_counter()
    torch_wait(trainer())
    seconds = time.perf_counter() - begun
    torch_wait(trainer())
    memory = torch.cuda.max_memory_allocated() - before if on_gpu else None
    flops = 3 * forward_flops(settings) * batch
    return Subject(trainer, torch_wait, batch=batch, flops=flops, memory=memory, compile_seconds=seconds, loss=float)


def step_row(case: Case, sizes: Sizes) -> dict:
    makers = {"jax": lambda: our_step_or_plain(case)}
    makers |= {f"torch {form}": torch_problem() or (lambda form=form: torch_step(case, form)) for form in sizes.torch}
    found = take_turns(makers, sizes)
    ours = found["jax"].get("images_per_second")
    for theirs in found.values():
        if ours and "images_per_second" in theirs:
            theirs["time_over_ours"] = ours / theirs["images_per_second"]
    (plan,) = mask_plans(case.config(), "train")
    return dict(by=found, visible=plan.visible, patches=plan.total)


def sampling_row(case: Case, steps: int, sizes: Sizes) -> dict:
    settings = case.config(sampling_steps=steps)
    network, space = make_network(settings), make_representation(settings)
    sample = make_sampler(settings, network)

    def run(params, key, index):
        x, noise = samplers.image_noise(key, index, space.shape)
        return space.decode(sample(network.cast(params), x, noise))

    def ours():
        args = initial_state(network)().params, jax.random.key(0), jnp.arange(case.batch)
        begun = time.perf_counter()
        compiled = jax.jit(run).lower(*args).compile()
        seconds = time.perf_counter() - begun
        flops = steps * forward_flops(settings, visible=False) * case.batch
        return compiled_subject(compiled, seconds, lambda: compiled(*args), batch=case.batch, flops=flops)

    return dict(by=take_turns({"jax": ours}, sizes), steps=steps)


def forward_flops(settings: config.Config, *, visible: bool = True) -> float:
    """Multiplications and additions of the forward pass for an image: matrix products and attention."""
    model, (plan,) = settings.model, mask_plans(settings, "train")
    patches = plan.visible if visible else plan.total
    if model.network == "jit":
        return _jit_forward_flops(settings, patches)
    tokens, width, half = patches + 1, model.width, model.depth // 2
    of_block = 2 * tokens * width**2 * (4 + 2 * model.mlp_ratio) + 4 * tokens**2 * width
    of_skip = 2 * tokens * 2 * width**2
    of_patch = 2 * width * model.patch_size**2 * settings.data.channels  # embedding; the head has as many
    return (2 * half + 1) * of_block + half * of_skip + 2 * patches * of_patch


def _jit_forward_flops(settings: config.Config, patches: int) -> float:
    model, own = settings.model, settings.model.jit
    width, hidden, patch = model.width, int(int(model.width * model.mlp_ratio) * 2 / 3), model.patch_size**2 * 3
    flops = 2 * patches * (patch * (own.bottleneck + width) + own.bottleneck * width)
    for block in range(model.depth):
        tokens = patches + own.class_tokens * (block >= own.class_tokens_from)
        flops += 2 * tokens * width * (4 * width + 3 * hidden) + 4 * tokens**2 * width + 12 * width**2
    return flops + 2 * (256 + width + 2 * width) * width


# --- The profile ----------------------------------------------------------------------------------


def profile_row(sizes: Sizes, out: pathlib.Path) -> dict:
    """Trace a few steps of the first case: time by kernel, and the trace as files in `out`."""
    subject = our_step_or_plain(sizes.cases[0])
    subject.turn(0)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 1
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(sizes.profiled):
                result = subject.start()
            subject.wait(result)
        wall = time.perf_counter() - begun
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        found = dict(case=sizes.cases[0].name, steps=sizes.profiled, kernels=kernels_of(trace, sizes.profiled))
        files = {}
        for path in trace.parent.iterdir():
            name = f"profile.{path.name.split('.', 1)[1]}"
            files[name] = path.stat().st_size
            if files[name] < LARGEST_TRACE:
                shutil.copy(path, out / name)
    busy = sum(kernel["seconds_per_step"] for kernel in found["kernels"])
    return found | dict(busy_seconds_per_step=busy, traced_seconds=wall, files=files)


def kernels_of(trace: pathlib.Path, steps: int) -> list[dict]:
    """Seconds of each kind of kernel in a trace, longest first; on CPU, of each operation on XLA's threads."""
    total, count = collections.Counter(), collections.Counter()
    where = ("/device:GPU", "Stream") if jax.default_backend() == "gpu" else ("/host:CPU", "tf_XLA")  # plane, line
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            if plane.name.startswith(where[0]) and line.name.startswith(where[1]):
                for event in line.events:
                    name = re.sub(r"[._]\d+$", "", event.name)[:100]  # fusion_7 and fusion_12 are of one kind
                    total[name] += event.duration_ns / 1e9
                    count[name] += 1
    facts = lambda name: dict(seconds_per_step=total[name] / steps, per_step=count[name] / steps)
    return [dict(name=name) | facts(name) for name, seconds in total.most_common() if seconds]


# --- Tables ---------------------------------------------------------------------------------------


def table(results: dict[str, dict]) -> str:
    """All results as Markdown."""
    if not results:
        return "no results yet"
    parts = [conditions(results), times(results), attention_errors(results), kernels(results)]
    failures = [f"- {name}: {row['error']}" for name, row in results.items() if "error" in row]
    for name, row in results.items():
        for by, facts in row.get("by", {}).items():
            failures += [f"- {name}, {by}: {facts[key]}" for key in ("error", "skipped", "note") if key in facts]
    parts += ["\n".join(["Left out, failed or changed:", "", *failures])] if failures else []
    return "\n\n".join(part for part in parts if part)


def best(results: dict, row: str, key: str) -> float | None:
    """The highest rate of a row, over all variants."""
    return max((facts[key] for facts in results.get(row, {}).get("by", {}).values() if key in facts), default=None)


def conditions(results: dict) -> str:
    rows = list(results.values())
    of = lambda key, length=None: ", ".join(dict.fromkeys(row[key][:length] for row in rows))
    versions = {json.dumps(row["versions"]): row["versions"] for row in rows}.values()
    lines = [f"{of('device')}, commit {of('commit')}, {of('date', 10)}."]
    lines += [", ".join(f"{k} {v}" for k, v in version.items() if v) + "." for version in versions]
    peak, copied = best(results, "peak", "tflops_per_second"), best(results, "copy", "bytes_per_second")
    lines += [f"A large bfloat16 product: {peak:,.3g} TFLOP/s."] if peak else []
    lines += [f"A large copy: {copied / 1e9:,.0f} GB/s read and written."] if copied else []
    return "\n".join(lines)


def times(results: dict) -> str:
    lines = ["| | | batch | ms | range | images/s | TFLOP/s | of peak | GiB | compiled in | its time over ours |"]
    lines += ["|---|---|" + "--:|" * 9]
    peak = best(results, "peak", "tflops_per_second")
    for name, row in results.items():
        for by, facts in row.get("by", {}).items():
            if "seconds" not in facts or name in ("peak", "copy"):
                continue
            spread = (max(facts["turns"]) - min(facts["turns"])) / facts["seconds"]
            rate = facts["tflops_per_second"]
            cells = [name, by, facts["batch"], f"{1e3 * facts['seconds']:,.2f}", f"{spread:.1%}"]
            cells += [f"{facts['images_per_second']:,.1f}", f"{rate:,.3g}", f"{rate / peak:.0%}" if peak else ""]
            cells += [f"{facts['memory_bytes'] / 2**30:.1f}" if "memory_bytes" in facts else ""]
            cells += [f"{facts['compile_seconds']:.0f} s" if "compile_seconds" in facts else ""]
            cells += [f"{facts['time_over_ours']:.2f}" if "time_over_ours" in facts and by != "jax" else ""]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def attention_errors(results: dict) -> str:
    rows = [(name, row) for name, row in results.items() if "errors" in row]
    lines = ["Largest error in standard deviations, against plain attention in float32:", ""]
    lines += ["| | | values | gradient to q | to k | to v |", "|---|---|--:|--:|--:|--:|"]
    for name, row in rows:
        for kernel, errors in row["errors"].items():
            lines.append(f"| {name} | {kernel} | {' | '.join(f'{error:.4f}' for error in errors.values())} |")
    return "\n".join(lines) if rows else ""


def kernels(results: dict, number: int = 12) -> str:
    row = results.get("profile", {})
    if "kernels" not in row:
        return ""
    busy = row["busy_seconds_per_step"]
    lines = [f"Kernels of a step, {row['case']} ({1e3 * busy:.2f} ms in all):", ""]
    lines += ["| kernel | per step | ms per step | share |", "|---|--:|--:|--:|"]
    for kernel in row["kernels"][:number]:
        seconds = kernel["seconds_per_step"]
        lines.append(f"| `{kernel['name']}` | {kernel['per_step']:g} | {1e3 * seconds:.3f} | {seconds / busy:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
