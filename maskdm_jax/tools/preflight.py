"""What can be known of a run before it starts: config, devices, clocks, data, evaluation, run folder, memory."""

import os
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.build import make_network, mask_plans
from maskdm_jax.config import Config
from maskdm_jax.data.images import Framing, decode
from maskdm_jax.data.pipeline import UNREADABLE_LIMIT
from maskdm_jax.data.sources import read_patiently
from maskdm_jax.errors import CheckpointError, DataError, PreflightError
from maskdm_jax.evaluation import inception
from maskdm_jax.evaluation.features import open_images
from maskdm_jax.parallel import processes, sharding
from maskdm_jax.run import open_training_data
from maskdm_jax.tools import cost
from maskdm_jax.training import checkpoint
from maskdm_jax.training.loop import make_run_mesh, run_folder
from maskdm_jax.training.start import abstract_state, resumed_stage

PROBED = 200  # images that are read, spread over the data
CLOCKS_APART = 2.0  # seconds; more than that confuses logs and schedulers


def examine(config: Config, workdir, say) -> bool:
    """Check everything that a run needs, on every host, and go on after what fails.

    say: called with the name of a check, whether it is fine, and a line of text; by all hosts for what fails, else by
      the first alone. What several checks fail for is said once.

    Returns:
      whether all is fine everywhere.
    """
    checks = dict(
        config=lambda: _config(config),
        devices=lambda: _devices(config),
        clocks=_clocks,
        data=lambda: _data(config),
        evaluation=lambda: _evaluation(config),
        folder=lambda: _folder(config, workdir),
    )
    checks |= {f"memory, {name}": lambda name=name: _memory(config, name) for name in config.stages}
    fine, said = True, set()
    for name, check in checks.items():
        try:
            good, text = True, check()
        except Exception as error:  # whatever is wrong; the other checks are worth having
            good, text = False, (str(error).strip().splitlines() or [type(error).__name__])[0]
        if text and (processes.is_first() if good else text not in said):
            say(name, good, text)
        said |= set() if good else {text}
        fine &= good
    return bool(processes.gather(fine).all())


def _config(config: Config) -> str:
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
    return f"{mesh.size} x {kinds} in {jax.process_count()} processes, as {shape}; they can talk to each other"


def _clocks() -> str:
    processes.barrier("clocks")
    times = processes.gather(time.time())
    apart = times.max() - times.min()
    if apart > CLOCKS_APART:
        raise PreflightError(f"the hosts' clocks are {apart:.1f} s apart; set them by NTP")
    if times.min() < 1_700_000_000:
        raise PreflightError("the clock is years behind; set it by NTP")
    return f"{apart:.2f} s apart" if len(times) > 1 else "of one process"


def _data(config: Config) -> str:
    source = open_training_data(config).source
    numbers = np.unique(np.linspace(0, len(source) - 1, min(PROBED, len(source))).astype(int))
    unreadable, start = [], time.perf_counter()
    for i in numbers:
        try:
            decode(read_patiently(source, int(i))[0], Framing.of(config.data))
        except Exception as error:  # whatever a decoder throws at a damaged file
            unreadable.append(f"{source.names[int(i)]}: {str(error) or type(error).__name__}")
    rate = len(numbers) / (time.perf_counter() - start)
    if len(unreadable) > max(UNREADABLE_LIMIT * len(numbers), 1):
        raise DataError(f"{len(unreadable)} of {len(numbers)} images are unreadable ({unreadable[0]}, ...)")
    classes = f" in {len(source.classes)} classes" if source.classes else ""
    return (
        f"{len(source):,} images{classes} from {config.data.path}; {len(numbers)} of them, spread over all, read at "
        f"{rate:,.0f} images/s by one thread, {len(unreadable)} unreadable"
    )


def _evaluation(config: Config) -> str:
    settings = config.evaluation
    if not settings.every:
        return ""
    weights = pathlib.Path(settings.inception_weights).expanduser() if settings.inception_weights else None
    inception.load_weights(weights or inception.fetch_weights())
    if settings.reference:
        open_images(settings.reference)
    return f"every {settings.every:,} steps with {settings.n:,} images; weights and reference can be read"


def _folder(config: Config, workdir) -> str:
    """Whether the run folder takes what the run will write; it is not made for this."""
    workdir = run_folder(workdir)
    there = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise PreflightError(f"{there} cannot be written to; give another --workdir")
    network, mesh = make_network(config), make_run_mesh(config)
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(network.abstract_params())) * 4
    needed, free = one * (config.checkpoint.keep + len(config.stages) + 1), shutil.disk_usage(there).free
    if free < needed:
        raise PreflightError(
            f"{there} has {free / 1e9:.1f} GB free, but the checkpoints that are kept, and one more while it is "
            f"written, take {needed / 1e9:.1f} GB; make room or lower config.checkpoint.keep"
        )
    text = f"{workdir}: {free / 1e9:,.1f} GB free, {needed / 1e9:.2f} GB needed for checkpoints"
    try:
        newest = checkpoint.find(workdir) if workdir.exists() else None
    except CheckpointError:
        newest = None
    if newest is None:
        return f"{text}; it would start " + (f"from {config.init_from}" if config.init_from else "fresh")
    checkpoint.check(newest)
    index = resumed_stage(config, checkpoint.load_meta(newest), newest)
    checkpoint.check_fit(newest, abstract_state(config, index, network, mesh))
    return f"{text}; it would go on from {newest.name}"


def _memory(config: Config, name: str) -> str:
    devices = jax.devices()
    found = cost.of_training(config, name, devices, config.stage[name].batch_size)
    shared = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # CPU devices have the machine's memory together
    limit = found.limit or shared / len(jax.local_devices())
    text = f"{found.memory / 2**30:.2f} of {limit / 2**30:.1f} GiB per device"
    if found.memory > limit:
        raise PreflightError(f"{text}; raise config.{name}.micro_batches or mesh.fsdp, or set config.{name}.remat=True")
    return f"{text}, compiled in {found.compile_seconds:.0f} s"
