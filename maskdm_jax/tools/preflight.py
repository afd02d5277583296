"""Checks before a run starts: config, devices, clocks, data, evaluation, run folder, start, memory."""

import functools
import os
import shutil
import time
import uuid

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.build import make_network, mask_plans
from maskdm_jax.config import Config
from maskdm_jax.data.images import Framing
from maskdm_jax.data.pipeline import TrainingData, check_shared_memory, check_unreadable, probe
from maskdm_jax.errors import CheckpointError, PreflightError
from maskdm_jax.evaluation.evaluate import Evaluator, check_comparable
from maskdm_jax.evaluation.features import Images, open_images
from maskdm_jax.parallel import processes, sharding
from maskdm_jax.run import check as check_settings
from maskdm_jax.run import check_processes, open_training_data
from maskdm_jax.storage import is_remote, write_atomically
from maskdm_jax.tools import cost
from maskdm_jax.training import checkpoint
from maskdm_jax.training.logs import duration
from maskdm_jax.training.loop import make_run_mesh, run_folder
from maskdm_jax.training.start import (
    abstract_state,
    changes_since,
    check_history,
    check_trained_for,
    fresh_state,
    initial_weights,
    resumed_stage,
)
from maskdm_jax.training.state import ema_decays

PROBED = 200  # images read, evenly spread over the data
CLOCK_SKEW_LIMIT = 2.0  # seconds; a larger difference confuses logs and schedulers


def examine(config: Config, workdir, say) -> bool:
    """Check everything that a run needs, on every host; a check that fails does not stop the others.

    say: called with the name of a check, whether it passed, and a line of text. The first host reports checks that
      passed; every host reports those that failed. A reason that several checks share is reported once.

    Returns:
      whether all checks passed on all hosts.
    """
    opened = functools.cache(lambda: open_training_data(config))
    checks = dict(
        config=lambda: _config(config, workdir),
        devices=lambda: _devices(config),
        clocks=_clocks,
        data=lambda: _data(config, opened()),
        evaluation=lambda: _evaluation(config, opened),
        folder=lambda: _folder(config, workdir),
        start=lambda: _start(config, workdir, opened()),
    )
    checks |= {f"memory, {name}": lambda name=name: _memory(config, name) for name in config.stages}
    failures = set()
    for name, check in checks.items():
        try:
            passed, text = True, check()
        except Exception as error:  # any failure, so that the other checks still run
            passed, text = False, (str(error).strip().splitlines() or [type(error).__name__])[0]
        if text and (processes.is_first() if passed else text not in failures):
            say(name, passed, text)
        failures |= set() if passed else {text}
    return not processes.gather(len(failures)).any()


def _config(config: Config, workdir) -> str:
    check_processes(config, workdir)  # first, since all processes must take part
    check_settings(config)
    parts = []
    for name in config.stages:
        stage, plans = config.stage[name], mask_plans(config, name)
        visible = sum(plan.visible for plan in plans) / sum(plan.total for plan in plans)
        parts.append(f"{name} {stage.steps:,} steps of {stage.batch_size:,} images, {visible:.0%} visible")
    leaves = jax.tree.leaves(make_network(config).abstract_params())
    return f"{sum(leaf.size for leaf in leaves) / 1e6:,.1f} M parameters; " + "; ".join(parts)


def _devices(config: Config) -> str:
    mesh = make_run_mesh(config)
    total = jax.jit(jnp.sum)(sharding.put(np.ones(mesh.size, np.float32), sharding.batch_sharding(mesh)))
    if float(total) != mesh.size:
        raise PreflightError(f"a sum over {mesh.size} devices gave {float(total):g}")
    kinds = ", ".join(sorted({device.device_kind for device in mesh.devices.flat}))
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"{mesh.size} x {kinds} in {jax.process_count()} processes, as {shape}; a sum over all of them is correct"


def _clocks() -> str:
    processes.barrier("clocks")
    times = processes.gather(time.time())
    skew = times.max() - times.min()
    if skew > CLOCK_SKEW_LIMIT:
        raise PreflightError(f"the hosts' clocks are {skew:.1f} s apart; set them by NTP")
    if times.min() < 1_700_000_000:
        raise PreflightError("the clock is years behind; set it by NTP")
    return f"{skew:.2f} s apart" if len(times) > 1 else "of one process"


def _data(config: Config, data: TrainingData) -> str:
    if config.data.workers:
        check_shared_memory(config.data, max(s.batch_size for s in config.stage.values()) // jax.process_count())
    found = probe(data.source, Framing.of(config.data), PROBED)
    check_unreadable(found.unreadable, found.images)
    classes = f" in {len(data.classes)} classes" if data.classes else ""
    parts = [f"{len(data):,} images{classes} from {config.data.path}"]
    parts += [
        f"{found.images} of them, evenly spread, read at {found.images / found.seconds:,.0f} images/s by one thread, "
        f"{len(found.unreadable)} unreadable"
    ]
    return "; ".join([*parts, *found.notes])


def _evaluation(config: Config, opened) -> str:
    settings = config.evaluation
    if not settings.every:
        return ""
    evaluator = Evaluator(settings.metrics, settings.inception_weights)
    if settings.reference:
        reference = open_images(settings.reference)
        card = opened().card
        check_comparable(reference, Images("the samples", settings.n, card=card), settings.metrics)
        if reference.statistics_alone:
            evaluator.reference(reference)
    return f"every {settings.every:,} steps with {settings.n:,} samples; weights and reference fit"


def _folder(config: Config, workdir) -> str:
    """Check the space in the run folder; create nothing."""
    workdir = run_folder(workdir)
    if is_remote(workdir):
        probe = workdir / f"dry_run.{uuid.uuid4().hex}"
        write_atomically(probe, b"")
        probe.unlink()
        return f"{workdir} can be written to"
    existing = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PreflightError(f"{existing} cannot be written to; give another --workdir")
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(make_network(config).abstract_params()))
    one = weights * max(3 + len(ema_decays(stage)) for stage in config.stage.values())  # 3: weights and two moments
    needed, free = one * (config.checkpoint.keep + len(config.stages) + 1), shutil.disk_usage(existing).free
    if free < needed:
        raise PreflightError(
            f"{existing} has {free / 1e9:.1f} GB free, but the checkpoints kept, and one more while it is written, "
            f"take {needed / 1e9:.1f} GB; make room or lower config.checkpoint.keep"
        )
    return f"{workdir}: {free / 1e9:,.1f} GB free, {needed / 1e9:.2f} GB needed for checkpoints"


def _start(config: Config, workdir, data: TrainingData) -> str:
    """Make the checks of `training.start.begin`, and say how the run would start; create nothing."""
    workdir, network, mesh = run_folder(workdir), make_network(config), make_run_mesh(config)
    try:
        newest = checkpoint.find(workdir) if workdir.exists() else None
    except CheckpointError:
        newest = None
    if newest is None:
        check_history(config, workdir)
    if newest is None and not config.init_from:
        return "the run would start fresh"
    if newest is None:
        _, found = initial_weights(config, data.classes, abstract_state(config, 0, network, mesh).params)
        return f"the run would start from the weights of {found}"
    checkpoint.check(newest)
    meta = checkpoint.load_meta(newest)
    index = resumed_stage(config, meta, newest)
    check_trained_for(config, data.classes, meta, newest)
    checkpoint.check_fit(newest, abstract_state(config, index, network, mesh))
    return "; ".join([f"the run would resume from step {newest.name}", *changes_since(config, meta, data)])


def _memory(config: Config, name: str) -> str:
    devices = jax.devices()
    found = cost.training_step(config, name, devices, config.stage[name].batch_size)
    shared = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # CPU devices share the machine's memory
    limit = found.limit or shared / len(jax.local_devices())
    text = f"{found.memory / 2**30:.2f} of {limit / 2**30:.1f} GiB per device"
    if found.memory > limit:
        raise PreflightError(f"{text}; raise config.{name}.micro_batches or mesh.fsdp, or set config.{name}.remat=True")
    seconds = min(step_seconds(config, name, found.program, times=3))
    whole = duration(config.stage[name].steps * seconds)
    return f"{text}, compiled in {found.compile_seconds:.0f} s; {seconds:.3g} s per step: {whole} if data keeps up"


def step_seconds(config: Config, name: str, program, times: int) -> list[float]:
    """Seconds of each of some executions of a compiled step, on fresh weights and black images."""
    alone = cost.with_batch(config, name, config.stage[name].batch_size)
    mesh, network, size = make_run_mesh(alone), make_network(alone), alone.data.image_size
    state = fresh_state(alone, network, abstract_state(alone, 0, network, mesh))
    n = alone.stage[name].batch_size // jax.process_count()
    rows = dict(image=np.zeros((n, size, size, alone.data.channels), np.uint8))
    rows |= dict(label=np.zeros(n, np.int32), index=np.arange(n, dtype=np.uint32))
    batch = sharding.to_global(mesh, rows)
    taken = []
    for _ in range(times):
        processes.barrier("step")
        begun = time.perf_counter()
        state, values = program(state, batch)
        jax.block_until_ready(values)
        taken.append(time.perf_counter() - begun)
    return taken
