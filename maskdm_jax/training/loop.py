"""The training loop of a run: stages, steps, and hooks that are called between steps."""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import pathlib
import time
import typing

import jax
from clu import parameter_overview

from maskdm_jax import config as config_lib
from maskdm_jax.build import Network, make_network, mask_plans
from maskdm_jax.config import Config
from maskdm_jax.errors import ConfigError, Interrupted, NonFiniteLoss, Preempted
from maskdm_jax.parallel import processes, sharding
from maskdm_jax.storage import is_remote, location, lock_dir, mirrored, write_atomically
from maskdm_jax.training import checkpoint, logs
from maskdm_jax.training.checkpoint import Checkpoints
from maskdm_jax.training.start import begin, check_history, next_stage
from maskdm_jax.training.state import TrainState
from maskdm_jax.training.step import compile_step, memory_bytes

log = logging.getLogger(__name__)

WARM_UP = 10  # steps before a profile: compilation, caches


@dataclasses.dataclass(frozen=True)
class Run:
    """Objects that stages and hooks share. `data` is a `data.pipeline.TrainingData` or has its attributes."""

    config: Config
    folder: pathlib.Path  # of the run, on a disk or in an object store
    workdir: pathlib.Path  # on this machine; its files appear in `folder`
    upload: typing.Callable  # makes them appear now
    mesh: jax.sharding.Mesh
    network: Network
    data: typing.Any
    checkpoints: Checkpoints
    metrics: logs.Metrics
    profile: logs.Profile


class Moment(typing.NamedTuple):
    """A point between two steps, passed to hooks."""

    step: int  # of the run
    stage: str  # name
    stage_step: int
    last: bool  # whether the stage ends here
    state: TrainState
    resume: dict  # position in the data and sums of metrics, for JSON


def train(config: Config, data, workdir, *, make_hooks=lambda run: (), devices=None, profile: int = 0) -> pathlib.Path:
    """Run all remaining stages of a config, and return the folder of the newest checkpoint.

    Start order: the newest checkpoint in `workdir`, else the weights of `config.init_from`, else new weights.

    Args:
      data: `data.pipeline.TrainingData`.
      make_hooks: run -> hooks; called when the start of the run is known. A hook is a function of a `Moment` that is
        called every `hook.every` steps and at the end of each stage; with 0, only at the end. Training waits for it.
      devices: devices to run on; None for all.
      profile: number of steps, a few after the start, to trace into the run folder's `profile`.

    Raises:
      ConfigError, DataError, CheckpointError: settings, data or checkpoint are invalid; raised before training.
      NonFiniteLoss: training diverged.
      Interrupted: Ctrl-C.
      Preempted: SIGTERM was received and the state saved; only if `processes.initialize` catches SIGTERM.
    """
    folder, network, mesh = run_folder(workdir), make_network(config), make_run_mesh(config, devices)
    with contextlib.ExitStack() as closing:
        if processes.is_first():
            closing.enter_context(lock_dir(folder))
        files = mirrored(folder, restore=logs.CONTINUED, active=processes.is_first())
        workdir, upload = closing.enter_context(files)
        closing.enter_context(logs.logging_to(workdir))
        if processes.is_first():
            check_history(config, folder)
        ends = stage_ends(config)
        checkpoints = Checkpoints(folder, keep=config.checkpoint.keep, keep_steps=ends)
        closing.callback(checkpoints.close)
        start = begin(config, network, mesh, checkpoints, data)
        done = ends[start.stage] - config.stage[config.stages[start.stage]].steps + int(start.state.step)
        if done == ends[-1]:
            log.info("nothing left to do: %s finished all %d steps", folder, done)
            return checkpoints.folder / str(done)
        if processes.is_first():
            write_atomically(workdir / "config.json", json.dumps(config_lib.to_dict(config), indent=2).encode())
        table = parameter_overview.get_parameter_overview(start.state.params, include_stats=False)
        log.debug("parameters\n%s", table)  # into log.txt alone
        log.info("%s parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(start.state.params)):,}")
        kind = mesh.devices.flat[0].device_kind
        log.info("%s; %d x %s; run folder %s", data, mesh.size, kind, folder)
        metrics = logs.Metrics(workdir, config, step=done, name=folder.name)
        closing.callback(metrics.close)
        tracing = logs.Profile(workdir / "profile", done + WARM_UP + 1, profile if processes.is_first() else 0)
        closing.callback(tracing.close)
        run = Run(config, folder, workdir, upload, mesh, network, data, checkpoints, metrics, tracing)
        begun = time.perf_counter()
        try:
            run_stages(run, start, (Save(run), *make_hooks(run)))  # saved before hooks that may take hours
        except KeyboardInterrupt:
            saved = checkpoints.latest()
            text = "nothing was saved yet" if saved is None else f"the same command resumes from step {saved}"
            raise Interrupted(f"interrupted; {text}") from None
        checkpoints.wait()
        took = logs.duration(time.perf_counter() - begun)
        log.info("done in %s: %s holds samples, checkpoints/%d, metrics.jsonl, log.txt", took, folder, ends[-1])
        return checkpoints.folder / str(ends[-1])


def run_stages(run: Run, start, hooks) -> None:
    """Train from a `start.Start` to the end of the last stage."""
    state, meta = start.state, start.meta
    for index in range(start.stage, len(run.config.stages)):
        if index > start.stage:
            state, meta = next_stage(run.config, index, run.network, run.mesh, state), {}
        state = run_stage(run, index, state, meta, hooks)


def run_stage(run: Run, index: int, state: TrainState, meta: dict, hooks) -> TrainState:
    """Train stage number `index` from `state` (and the position in `meta`, if resumed) to its end."""
    name = run.config.stages[index]
    stage, first = run.config.stage[name], int(state.step)
    offset = stage_ends(run.config)[index] - stage.steps
    log.info("stage %s: %d steps of %d images; %s", name, stage.steps, stage.batch_size, describe_masks(run, name))
    if first == stage.steps:
        return state
    log.info("compiling the step of %s", name)
    begun = time.perf_counter()
    step_fn = compile_step(run.config, name, run.mesh, state)
    _say_compiled(run, name, step_fn, time.perf_counter() - begun)
    batches = run.data.batches(batch_size=stage.batch_size, seed=run.config.seed + index)
    if "data" in meta:
        batches.seek(meta["data"])
    report = StageReport(run, index, first, meta.get("window", {}))
    with contextlib.closing(batches), contextlib.closing(report.progress):
        for step in range(first + 1, stage.steps + 1):
            with report.waiting_for_data():
                batch = sharding.to_global(run.mesh, next(batches))
            with run.profile.step(offset + step):
                state, values = step_fn(state, batch)
            run.profile.after(offset + step, values)
            report.started(step, values)
            last, stop = step == stage.steps, processes.stop_requested()
            due = [hook for hook in hooks if last or (hook.every and step % hook.every == 0)]
            if not due and not stop:
                continue
            report.read()  # a checkpoint must not hold the result of a non-finite step
            resume = dict(data=batches.state(), window=dict(report.window))
            at = Moment(offset + step, name, step, last, state, resume)
            with report.rate.paused():
                if stop:  # skip the hooks: the grace period is for saving
                    stop_run(run, at)
                for hook in due:
                    hook(at)
    return state


def _say_compiled(run: Run, name: str, step_fn, seconds: float) -> None:
    """Log the memory of a step, with a warning if a CPU has less: the system would end the program without a word."""
    state, temporary = memory_bytes(step_fn)
    log.info("compiled in %s; a step needs %.2f GiB per device", logs.duration(seconds), (state + temporary) / 2**30)
    left = processes.free_memory() if run.mesh.devices.flat[0].platform == "cpu" else math.inf
    if temporary * jax.local_device_count() > left:
        log.warning(
            "only %.2f GiB of memory are free; if the system kills the program, raise config.%s.micro_batches, set "
            "config.%s.remat=True, or train a smaller model",
            *(left / 2**30, name, name),
        )


class Save:
    """The hook that saves checkpoints."""

    def __init__(self, run: Run):
        self.every, self._run = run.config.checkpoint.every, run

    def __call__(self, at: Moment) -> None:
        """Start writing a checkpoint."""
        config, data = self._run.config, self._run.data
        past = config.stages[: config.stages.index(at.stage)]
        meta = dict(
            stage=at.stage,
            stage_step=at.stage_step,
            past={name: config.stage[name].steps for name in past},
            images=len(data),
            classes=data.classes,
            card=data.card,
            config=config_lib.to_dict(config),
        )
        self._run.upload()  # a checkpoint must not be newer than the metrics beside it
        self._run.checkpoints.save(at.step, at.state, meta | at.resume)


def stop_run(run: Run, at: Moment) -> typing.NoReturn:
    """Save and raise `Preempted`."""
    log.info("SIGTERM received; saving step %d to %s", at.step, run.checkpoints.folder)
    if at.last:
        log.warning("what the run does at the end of stage %s, such as its preview, is left out", at.stage)
    Save(run)(at)
    run.checkpoints.wait()
    processes.barrier("saved")  # a process that exits may abort the others
    raise Preempted(
        f"SIGTERM received; saved at step {at.stage_step} of stage {at.stage}; the same command resumes from it"
    )


class StageReport:
    """The metrics of a stage: read one step late, check, average over a window, log."""

    def __init__(self, run: Run, index: int, first: int, window: dict):
        self._run, self._name, self._pending = run, run.config.stages[index], None
        self._stage = run.config.stage[self._name]
        self._offset = stage_ends(run.config)[index] - self._stage.steps
        self._visible, self._total = _patches(run.config, self._name)
        self._later = sum(_cost(run.config, name) for name in run.config.stages[index + 1 :])
        self._later /= _cost(run.config, self._name) / self._stage.steps  # in steps of this stage
        self.window = dict(window)  # sums of metrics, and their count; saved, so that means survive a restart
        self.rate, self._logged = logs.Rate(), first
        self.progress = logs.Progress(self._name, step=first, steps=self._stage.steps)

    def waiting_for_data(self):
        """Context for waiting for a batch; its time counts if the device becomes idle."""
        before = self._pending
        return self.rate.waiting(lambda: before is not None and before[1]["loss"].is_ready())

    def started(self, step: int, values) -> None:
        """Record a dispatched step and read the previous one, so that the device never waits for Python."""
        self.read()
        self._pending = (step, values)
        self.progress.update()

    def read(self) -> None:
        """Read the values of the pending step.

        Raises:
          NonFiniteLoss: one of them is not finite.
        """
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        values = {key: float(value) for key, value in jax.device_get(values).items()}
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteLoss(_advice(self._run, self._name, step, self._offset + step, values))
        for key, value in (values | dict(count=1)).items():
            self.window[key] = value if key == "learning_rate" else self.window.get(key, 0) + value
        if step % self._run.config.log.every == 0 or step == self._stage.steps:
            self._log(step)

    def _log(self, step: int) -> None:
        per_second, waited = self.rate.read(step - self._logged)
        count = self.window.pop("count")
        means = {key: value if key == "learning_rate" else value / count for key, value in self.window.items()}
        self.window, self._logged = {}, step
        images = per_second * self._stage.batch_size
        left = (self._stage.steps - step + self._later) / max(per_second, 1e-9)
        parts = [f"loss {means['loss']:.4f}", f"lr {means['learning_rate']:.1e}", f"{images:,.0f} images/s"]
        parts += [f"{self._visible} of {self._total} patches", f"{logs.duration(left)} left"]
        parts += [f"{waited:.0%} of the time waiting for data"] * (waited > 0.03)
        of_run = f"(run step {self._offset + step}) " if self._offset else ""
        self.progress.numbers(step, of_run + " | ".join(parts))
        extra = dict(images_per_second=images, waiting_for_data=waited, visible_patches=self._visible, stage=self._name)
        self._run.metrics.write(self._offset + step, means | extra)


def _cost(config: Config, name: str) -> float:
    """FLOPs of the blocks in a stage, up to a factor, an estimate of its time."""
    model, (visible, total) = config.model, _patches(config, name)
    outer = 2 * model.outer_blocks / model.depth  # share of the blocks that process hidden patches, too
    extra = model.jit.class_tokens * (1 - model.jit.class_tokens_from / model.depth) if model.network == "jit" else 0

    def flops(patches):  # of products with weights, and of attention
        return (patches + extra) * (6 * model.width + patches + extra)

    images = config.stage[name].steps * config.stage[name].batch_size
    return images * (outer * flops(total) + (1 - outer) * flops(visible))


def _patches(config: Config, name: str) -> tuple[int, int]:
    """Numbers of visible and of all patches of an image in a stage."""
    plans = mask_plans(config, name)
    return sum(plan.visible for plan in plans), sum(plan.total for plan in plans)


def _advice(run: Run, name: str, stage_step: int, step: int, values: dict) -> str:
    run.checkpoints.wait()
    latest, stage = run.checkpoints.latest(), run.config.stage[name]
    good = f"last good checkpoint: {run.checkpoints.folder / str(latest)}" if latest else "there is no checkpoint yet"
    return (
        f"step {step} ({name}, step {stage_step}) is not finite: loss {values['loss']}, gradient norm "
        f"{values['grad_norm']}; {good}. Run the same command again, from there, with a lower "
        f"--config.{name}.learning_rate (now {stage.learning_rate:g}), with --config.{name}.clip_norm=1.0 (now "
        f"{stage.clip_norm:g}), or with --config.model.dtype=float32 (now {run.config.model.dtype})"
    )


def describe_masks(run: Run, name: str) -> str:
    """One line about the masks of a stage."""
    plans = mask_plans(run.config, name)
    outer = run.config.model.outer_blocks
    skipped = f"; hidden patches take part in the first and last {outer} blocks" if outer else ""
    if len(plans) == 1:
        return f"{plans[0]}{skipped}"
    bands = zip(("approximation", "details"), plans, strict=True)
    return "; ".join(f"{band}: {plan}" for band, plan in bands) + skipped


def stage_ends(config: Config) -> list[int]:
    """Step of the run at which each stage ends."""
    return list(itertools.accumulate(config.stage[name].steps for name in config.stages))


def run_folder(workdir) -> pathlib.Path:
    """The absolute path of a run folder, or its address in an object store.

    Raises:
      ConfigError: it cannot be a folder.
    """
    checkpoint.check_path(workdir)
    folder = location(workdir)
    if is_remote(folder):
        return folder
    if str(workdir).startswith("~") and os.path.expanduser(workdir) == str(workdir):
        raise ConfigError(f"--workdir={workdir}: there is no such home folder")
    blocking = [path for path in (folder, *folder.parents) if os.path.lexists(path) and not path.is_dir()]
    if blocking:
        raise ConfigError(f"--workdir={workdir}: {blocking[0]} is not a folder")
    return folder


def make_run_mesh(config: Config, devices=None):
    """Make the mesh of a config.

    Raises:
      ConfigError: the devices do not form it, a batch does not divide over it, or the attention kernel is for another
        platform.
    """
    try:
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from None
    platform, kernel = mesh.devices.flat[0].platform, config.model.attention
    if {"splash": "tpu", "cudnn": "gpu"}.get(kernel, platform) != platform:
        raise ConfigError(f"config.model.attention {kernel!r} is not for devices of {platform}; take 'auto'")
    for name, stage in config.stage.items():
        if stage.batch_size // stage.micro_batches % mesh.size:
            raise ConfigError(
                f"config.{name}.batch_size {stage.batch_size} in {stage.micro_batches} micro-batches does not divide "
                f"over {mesh.size} devices"
            )
    return mesh
