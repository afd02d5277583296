"""How fast all parts of a run are on the devices that are here, against PyTorch if wanted.

    python benchmarks/speed.py --config=configs/celeba64_pretrain.py --batch=8 --config.data.path=DIR_OR_ZIP
    python benchmarks/speed.py --config=configs/celeba64_pretrain.py --batch=8 --torch=eager --torch=fused

Measures whole training steps (noise, masks, loss, gradients, clipping, AdamW, EMA) with 10%, 50% and 100% of the
patches visible, a forward pass of the network, and sampling, on random images; loading, where config.data.path is
there; the Inception features of evaluation, where its weights are there (config.evaluation.inception_weights). All
take turns, `--rounds` times, and medians are printed. A checkpoint follows: how long a run stands still for it, and
when it is on disk.

"of peak" is the share of what a large matrix product reaches, measured in the same rounds. "of roof" is the least time
by that rate for the arithmetic or by a large copy's for the memory traffic, whichever is more, over the time taken; the
traffic is XLA's estimate, which on CPU leaves caches out of account. `--torch` adds the official step in PyTorch, as
published (eager), with fused attention, or compiled; ratios are of its seconds over ours. `--json` keeps the numbers.
The last line is JSON, too.
"""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
import sys
import tempfile
import time

from absl import app, flags, logging
from ml_collections import config_flags

from maskdm_jax.build import make_network, mask_plans
from maskdm_jax.errors import DataError
from maskdm_jax.storage import cache_dir
from maskdm_jax.training.loop import make_run_mesh
from maskdm_jax.training.start import abstract_state, fresh_state
from maskdm_jax.training.step import jit_step

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; its model, batch, optimizer and mask are used.")
BATCH = flags.DEFINE_integer("batch", None, "Images of a step; the config's when not given.", lower_bound=1)
VISIBLE = flags.DEFINE_list("visible", ["10", "50", "100"], "Shares of visible patches, in percent.")
SAMPLING_STEPS = flags.DEFINE_integer("sampling_steps", 5, "Steps of a trajectory; 0 leaves sampling out.", 0)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 0.5, "Least length of a turn.")
TORCH = flags.DEFINE_multi_enum("torch", [], ["eager", "fused", "compiled"], "Measure PyTorch's, too; needs torch.")
JSON = flags.DEFINE_string("json", None, "Write the numbers to this file.")


@dataclasses.dataclass
class Subject:
    """Something to be timed."""

    what: str  # step 10%, ..., forward, sampling
    by: str  # jax, torch eager, ...
    start: object  # () -> something to wait for
    wait: object
    images: int = 0
    flops: float = 0.0  # of one execution, over all devices
    traffic: float = 0.0  # bytes read and written in memory by one execution, over all devices
    memory: int = 0  # bytes per device
    compile_seconds: float = 0.0
    seconds: list = dataclasses.field(default_factory=list)
    repeats: int = 0  # executions of a turn

    def turn(self) -> None:
        """Time as many executions as fill the least length, one after the other, waiting at the end."""
        self.wait(self.start())  # as in a run, where such a one was there before, not another program
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
    import jax

    from maskdm_jax.parallel import runtime

    runtime.keep_freed_memory()  # as in a run; for PyTorch's steps too
    # A cache of its own: compile times are true, and what is compiled to read its cost is not compiled again to run.
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        result = report(measure(CONFIG.value))
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def measure(settings) -> list[Subject]:
    stage = settings.stages[0]
    settings.stages = (stage,)
    settings[stage].batch_size = BATCH.value or settings[stage].batch_size
    settings.sampling.steps = SAMPLING_STEPS.value or settings.sampling.steps
    subjects = [peak(settings.model.dtype), copy(), *of_jax(settings, stage)]
    subjects += [*of_loading(settings, stage), *of_evaluation(settings)]
    if TORCH.value:
        subjects += of_torch(settings, stage)
    for i in range(ROUNDS.value):
        for subject in subjects:
            if sys.stderr.isatty():
                print(f"\rround {i + 1} of {ROUNDS.value}: {subject.what}, {subject.by:20}", end="\r", file=sys.stderr)
            subject.turn()
    return subjects + of_checkpoint(settings)


def masked(settings, stage: str, percent: str):
    """The config with that share of the patches visible, by the stage's kind of mask where that has a rate."""
    from maskdm_jax import config

    mask = settings[stage].mask
    mask.kind = "none" if percent == "100" else "patch" if mask.kind in ("none", "crop") else mask.kind
    mask.rate = 1 - float(percent) / 100
    return config.parse(settings)


def peak(dtype: str) -> Subject:
    """A matrix product on one device that is large enough to be bound by arithmetic alone."""
    import jax
    import jax.numpy as jnp

    n = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((n, n), dtype)
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    return Subject("peak", "jax", lambda: product(x, x), jax.block_until_ready, flops=2.0 * n**3)


def copy() -> Subject:
    """A pass over one device's memory that is bound by its traffic alone."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**28, jnp.float32)
    negated = jax.jit(jnp.negative)
    return Subject("copy", "jax", lambda: negated(x), jax.block_until_ready, traffic=2.0 * x.nbytes)


def of_jax(settings, stage: str) -> list[Subject]:
    import jax
    import numpy as np

    from maskdm_jax import sampling
    from maskdm_jax.models import representation
    from maskdm_jax.parallel import sharding
    from maskdm_jax.tools import cost

    subjects, devices = [], jax.devices()
    for percent in VISIBLE.value:
        config = masked(settings, stage, percent)
        batch_size, mesh, network = config.stage[stage].batch_size, make_run_mesh(config), make_network(config)
        found = cost.of_training(config, stage, devices, batch_size)
        abstract = abstract_state(config, 0, network, mesh)
        state = [fresh_state(config, network, abstract)]
        step = jit_step(config, stage, mesh, abstract)
        draw, size = np.random.default_rng(0), config.data.image_size
        image = draw.integers(0, 256, (batch_size, size, size, config.data.channels), np.uint8)
        index = np.arange(batch_size)
        rows = dict(image=image, label=np.zeros_like(index, np.int32), index=index.astype(np.uint32))
        batch = sharding.to_global(mesh, rows)

        def start(step=step, state=state, batch=batch):
            state[0], values = step(state[0], batch)
            return values["loss"]

        about = dict(images=batch_size, memory=found.memory, compile_seconds=found.compile_seconds)
        about |= dict(flops=found.flops * len(devices), traffic=found.traffic * len(devices))
        subjects.append(Subject(f"step {percent}%", "jax", start, float, **about))
    # Forward and sampling: whole images, by the last state's weights.
    shape = representation.make_representation(config).shape
    x = jax.device_put(draw.standard_normal((batch_size, *shape), np.float32), sharding.batch_sharding(mesh))
    t = jax.device_put(np.full(batch_size, 500, np.int32), sharding.batch_sharding(mesh))
    labels = t * 0 if config.model.num_classes else None
    begun = time.perf_counter()
    forward = jax.jit(network.apply).lower(state[0].params, x, t, labels).compile()
    about = dict(images=batch_size, compile_seconds=time.perf_counter() - begun)
    about["memory"] = sum(cost.memory_of(forward))
    about |= dict(flops=cost.of_forward(config, batch_size)[0], traffic=cost.traffic(forward.as_text()) * len(devices))
    start = lambda: forward(state[0].params, x, t, labels)
    subjects.append(Subject("forward", "jax", start, jax.block_until_ready, **about))
    if SAMPLING_STEPS.value:
        found = cost.of_sampling(config, devices, batch_size // len(devices))
        run, key = sampling.compile_sampling(config, network, mesh), jax.random.key(0)
        index = jax.device_put(np.arange(batch_size, dtype=np.int32), sharding.batch_sharding(mesh))
        start = lambda: run(state[0].ema, key, index, labels)
        about = dict(images=batch_size, memory=found.memory, compile_seconds=found.compile_seconds)
        about |= dict(flops=found.flops * len(devices), traffic=found.traffic * len(devices))
        subjects.append(Subject("sampling", "jax", start, jax.block_until_ready, **about))
    return subjects


def of_loading(settings, stage: str) -> list[Subject]:
    """Batches read, decoded and stacked, where there is data: so many at a time that what lies ready counts little."""
    from maskdm_jax.data.pipeline import Batches, TrainingData

    config = masked(settings, stage, "100")
    try:
        source = TrainingData(config.data).source
    except DataError as error:
        print(f"loading is left out: {error}")
        return []
    size = config.stage[stage].batch_size
    batches, number = Batches(config.data, batch_size=size, seed=0, source=source), max(4, 4096 // size)
    read = lambda: [next(batches) for _ in range(number)] and None
    return [Subject("loading", "jax", read, lambda _: None, images=number * size)]


def of_evaluation(settings) -> list[Subject]:
    """Inception features of random images, where the network's weights are there."""
    import jax
    import numpy as np

    from maskdm_jax.evaluation import features, inception

    path = settings.evaluation.inception_weights or cache_dir("weights") / inception.FILE
    if not pathlib.Path(path).exists():
        print(f"evaluation is left out: {path} is not there; give config.evaluation.inception_weights")
        return []
    n = 16 if jax.default_backend() == "cpu" else 512
    extract = features.Extractor(inception.load_weights(path), batch_size=n)
    size = settings.data.image_size
    pictures = np.random.default_rng(0).integers(0, 256, (n, size, size, settings.data.channels), np.uint8)
    images = features.Images("random", n, lambda start, stop: iter(pictures[start:stop]))
    return [Subject("features", "jax", lambda: extract(images), lambda _: None, images=n)]


def of_checkpoint(settings) -> list[Subject]:
    """A checkpoint of the whole state: until the run may go on, and until it is on disk."""
    import jax

    from maskdm_jax.training import checkpoint

    config = masked(settings, settings.stages[0], "100")
    network, mesh = make_network(config), make_run_mesh(config)
    state = fresh_state(config, network, abstract_state(config, 0, network, mesh))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    stall = Subject("checkpoint", "until the run goes on", None, None, memory=size)
    whole = Subject("checkpoint", "until it is on disk", None, None, memory=size)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = checkpoint.Checkpoints(folder, keep=1)
        for i in range(1 + min(ROUNDS.value, 3)):
            begun = time.perf_counter()
            checkpoints.save(i, state, {})
            stalled = time.perf_counter() - begun
            checkpoints.wait()
            if i:  # the first one sets up what all share
                stall.seconds.append(stalled)
                whole.seconds.append(time.perf_counter() - begun)
        checkpoints.close()
    return [stall, whole]


def of_torch(settings, stage: str) -> list[Subject]:
    """The official step: U-ViT, boolean masks after embedding, AdamW, clipping, EMA; `tests/torch_twin.py`."""
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
    import jax
    import torch
    import torch_twin

    config = masked(settings, stage, "100")
    model, data, training = config.model, config.data, config.stage[stage]
    if model.wavelet_scale or model.num_classes:
        raise app.UsageError("--torch compares unconditional models of pixels")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    sizes = dict(in_chans=data.channels, patch_size=model.patch_size, img_size=data.image_size)
    sizes |= dict(encoder_embed_dim=model.width, encoder_depth=model.depth, encoder_heads=model.heads)
    sizes |= dict(mlp_ratio=model.mlp_ratio, qkv_bias=model.qv_bias, mlp_time_embed=model.time_mlp)
    b, side = training.batch_size, data.image_size // model.patch_size
    half = torch.autocast(device, torch.bfloat16, enabled=model.dtype == "bfloat16")
    images = torch.randn(b, data.channels, data.image_size, data.image_size, device=device)
    t = torch.full((b,), 500, device=device)

    def patches(x):
        p = model.patch_size
        return x.view(b, data.channels, side, p, side, p).permute(0, 2, 4, 3, 5, 1).reshape(b, side**2, -1)

    def subjects(form):
        network = torch_twin.UViT(sizes).to(device)
        average = torch_twin.UViT(sizes).to(device)
        ema = torch_twin.Ema(network, average, training.ema_decay, training.ema_every).to(device)
        ema.initted.fill_(True)
        ema.step.fill_(200)
        optimizer = torch.optim.AdamW(network.parameters(), training.learning_rate, (training.b1, training.b2))
        for module in network.modules():
            if isinstance(module, torch_twin.Attention):
                module.fused = form != "eager"
        called = torch.compile(network) if form == "compiled" else network

        def step(visible):
            hidden = torch.ones(b, side**2, dtype=torch.bool, device=device)
            for row in hidden:
                row[torch.randperm(side**2, device=device)[:visible]] = False
            noise = torch.randn_like(images)
            with half:
                found = called(0.7 * images + 0.7 * noise, t, hidden if visible < side**2 else None)
            wanted = patches(noise)[~hidden].view(b, visible, -1) if visible < side**2 else noise
            loss = ((found.float() - wanted) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            if training.clip_norm:
                torch.nn.utils.clip_grad_norm_(network.parameters(), training.clip_norm)
            optimizer.step()
            ema.update()
            return loss.detach()

        @torch.no_grad()
        def forward():
            with half:
                called(images, t)

        by = f"torch {form}"
        for percent in VISIBLE.value:
            visible = mask_plans(masked(settings, stage, percent), stage)[0].visible
            yield Subject(f"step {percent}%", by, lambda visible=visible: step(visible), float, images=b)
        yield Subject("forward", by, forward, lambda _: wait(), images=b)

    return [subject for form in TORCH.value for subject in subjects(form)]


def report(subjects: list[Subject]) -> dict:
    """Print a table; the numbers, with what they were measured on."""
    import jax

    devices, rows = jax.devices(), []
    best = max(subjects[0].flops / seconds for seconds in subjects[0].seconds) * len(devices)
    moved = max(subjects[1].traffic / seconds for seconds in subjects[1].seconds) * len(devices)
    print(f"{len(devices)} x {devices[0].device_kind}; a large matrix product: {best / 1e12:,.2f} TFLOP/s", end="")
    print(f"; a large copy: {moved / 1e9:,.0f} GB/s")
    print(
        f"{'':12}{'':22}{'ms':>10}{'images/s':>12}{'TFLOP/s':>10}{'of peak':>9}{'of roof':>9}{'GiB':>8}{'compiled':>10}"
    )
    ours = {subject.what: subject for subject in subjects if subject.by == "jax"}
    above = None
    for subject in subjects[2:]:
        same, seconds = ours.get(subject.what, subject), statistics.median(subject.seconds)
        row = dict(what=subject.what, by=subject.by, seconds=seconds, images_per_second=subject.images / seconds)
        row |= dict(flops_per_second=same.flops / seconds, share_of_peak=same.flops / seconds / best)
        row |= dict(share_of_roof=max(subject.flops / best, subject.traffic / moved) / seconds)
        row |= dict(memory=subject.memory, compile_seconds=subject.compile_seconds)
        row["over_ours"] = statistics.median(a / b for a, b in zip(subject.seconds, same.seconds, strict=True))
        rows.append(row)
        cells = [f"{1e3 * seconds:10,.1f}", f"{row['images_per_second']:12,.1f}" if subject.images else ""]
        cells += [f"{row['flops_per_second'] / 1e12:10,.2f}{row['share_of_peak']:9.0%}" if same.flops else ""]
        if subject is not same:
            cells += [f"   {row['over_ours']:.2f} of our seconds"]
        else:
            cells += [f"{row['share_of_roof']:9.0%}" if subject.traffic else ""]
            cells += [f"{subject.memory / 2**30:8.2f}" if subject.memory else ""]
            cells += [f"{subject.compile_seconds:8.0f} s" if subject.compile_seconds else ""]
        widths = (10, 12, 19, 9, 8, 10)
        print(
            f"{subject.what if subject.what != above else '':12}{subject.by:22}"
            + "".join(f"{c:{w}}" for c, w in zip(cells, widths, strict=False)).rstrip()
        )
        above = subject.what
    return dict(device=devices[0].device_kind, devices=len(devices), peak=best, copy=moved, rows=rows)


if __name__ == "__main__":
    app.run(main)
