"""Training: the step, and the run around it.

A run is a list of stages. A stage starts from the last one's weights with a new optimizer and EMA.
"""

import contextlib
import functools
import json
import logging
import math
import os
import pathlib
import time
import typing

import jax
import jax.numpy as jnp
import optax

from maskdm_jax import checkpoint, distributed, masking, observe, sharding, torch_checkpoint
from maskdm_jax import config as config_lib
from maskdm_jax.config import Config, ConfigError, Stage
from maskdm_jax.data.pipeline import Batches, open_data
from maskdm_jax.data.sources import card_of
from maskdm_jax.diffusion import denoising_loss, loss_weights, make_schedule
from maskdm_jax.disk import alone_in, write_atomically
from maskdm_jax.evaluation.evaluate import Evaluator, check_comparable, compare
from maskdm_jax.evaluation.features import Images, framed, open_images, sampled
from maskdm_jax.generate import as_loaded, make_generator
from maskdm_jax.network import Network, make_network
from maskdm_jax.representation import make_representation
from maskdm_jax.train_state import TrainState, ema_step_size, learning_rate, make_optimizer, new_state

log = logging.getLogger(__name__)

WARM_UP = 10  # steps before a profile: compilation, caches


class Preempted(RuntimeError):
    """The run was told to stop, and saved; the message names the step and what goes on from it."""


class NonFiniteLoss(RuntimeError):
    """The loss or gradient became NaN or infinite; the message names the step and what to try."""


# --- The step -----------------------------------------------------------------------------------


class Inputs(typing.NamedTuple):
    """What the loss needs of each image; V visible patches of d numbers. A wavelet model has tuples, one per band."""

    x0: jax.Array  # [B, V, d] clean patches
    t: jax.Array  # [B] int32
    eps: jax.Array  # [B, V, d] noise
    positions: jax.Array | None  # [B, V] int32; None when nothing is hidden
    labels: jax.Array | None  # [B] int32, -1 where the label is hidden; None for an unconditional model


def draw_inputs(config: Config, stage: str, key, batch) -> Inputs:
    """Draw flip, mask, time, noise and label dropout for each image from the key and the image's global index alone.

    batch: image uint8 [B, S, S, C], label int32 [B], index uint32 [B].
    """
    space, plans = make_representation(config), config_lib.mask_plans(config, stage)

    def one(image, label, index):
        flip_key, mask_key, t_key, eps_key, label_key = jax.random.split(jax.random.fold_in(key, index), 5)
        if config.data.flip:
            image = jnp.where(jax.random.bernoulli(flip_key, config.data.flip), image[:, ::-1], image)
        bands, structure = jax.tree.flatten(space.cut(space.encode(image[None])))  # one band [1, N, d] if of pixels
        patches, positions, eps = [], [], []
        for i, (band, plan) in enumerate(zip(bands, plans, strict=True)):
            positions.append(masking.sample_positions(plan, jax.random.fold_in(mask_key, i)))
            patches.append(band[0] if plan.hides_nothing else band[0][positions[-1]])  # hidden patches end here
            eps.append(jax.random.normal(jax.random.fold_in(eps_key, i), patches[-1].shape))
        t = jax.random.randint(t_key, (), 0, config.diffusion.timesteps)
        label = jnp.where(jax.random.bernoulli(label_key, config.data.label_dropout), -1, label)
        as_given = lambda parts: jax.tree.unflatten(structure, parts)
        return Inputs(
            x0=as_given(patches),
            t=t,
            eps=as_given(eps),
            positions=None if all(plan.hides_nothing for plan in plans) else as_given(positions),
            labels=label if config.model.num_classes else None,
        )

    return jax.vmap(one)(batch["image"], batch["label"], batch["index"])


def make_loss(config: Config, network: Network) -> typing.Callable:
    """Build `loss(params, inputs)` -> mean loss over the images, a float32 scalar."""
    diffusion = config.diffusion
    schedule = make_schedule(diffusion.schedule, diffusion.timesteps, size=diffusion.shift_size)
    weights = None
    if diffusion.loss_weight_gamma:
        weights = loss_weights(schedule, diffusion.loss_weight, diffusion.loss_weight_gamma)

    def loss(params, inputs: Inputs):
        def predict(x_t, t):
            return network.apply(params, x_t, t, inputs.labels, inputs.positions)

        options = dict(objective=diffusion.objective, loss=diffusion.loss, weights=weights)
        return denoising_loss(predict, schedule, inputs.x0, inputs.t, inputs.eps, **options).mean()

    return loss


def train_step(state: TrainState, batch, *, draw, loss, stage: Stage, mesh) -> tuple[TrainState, dict]:
    """One optimizer step.

    Args:
      state, batch: see `TrainState` and `draw_inputs`; B = stage.batch_size.
      draw: (key, batch) -> `Inputs`.
      loss: (params, inputs) -> scalar.
      mesh: where state and batch are.

    Returns:
      the next state and float32 scalars: loss, grad_norm (before clipping), learning_rate.
    """
    key = jax.random.fold_in(state.key, state.step)

    def value_and_grad(params, rows):
        return jax.value_and_grad(lambda params: loss(params, draw(key, rows)))(params)

    value, grads = sharding.mean_over_rows(value_and_grad, state.params, batch, parts=stage.micro_batches, mesh=mesh)
    updates, opt_state = make_optimizer(stage).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step_size = ema_step_size(state.step, decay=stage.ema_decay, every=stage.ema_every)
    ema = optax.incremental_update(params, state.ema, step_size)
    metrics = dict(loss=value, grad_norm=optax.tree.norm(grads), learning_rate=learning_rate(stage)(state.step))
    return TrainState(state.step + 1, params, ema, opt_state, state.key), metrics


def compile_step(config: Config, name: str, mesh, abstract: TrainState):
    """Jit the step of stage `name`: the state is donated and stays where `abstract` has it."""
    stage = config.stage[name]
    network = make_network(config, remat=stage.remat)
    draw = functools.partial(draw_inputs, config, name)
    step = functools.partial(train_step, draw=draw, loss=make_loss(config, network), stage=stage, mesh=mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(placed, sharding.batch_sharding(mesh)),
        out_shardings=(placed, sharding.replicated(mesh)),
    )


# --- The run ------------------------------------------------------------------------------------


class Start(typing.NamedTuple):
    """Where a run begins or goes on."""

    stage: int  # index into config.stages
    state: TrainState
    meta: dict  # of the checkpoint, {} if there is none


def train(config: Config, workdir, *, devices=None, profile: int = 0) -> pathlib.Path:
    """Run all stages of a config, or what is left of them, and return the newest checkpoint's folder.

    Start order: the newest checkpoint in `workdir`, else the weights of `config.init_from`, else fresh.
    Runs on all devices, or on the list `devices`. `profile` traces so many steps, a few after the start, into the run
    folder's `profile`.

    Raises:
      ConfigError, DataError, CheckpointError: something cannot work; raised before training begins.
      NonFiniteLoss: training diverged.
      Preempted: a SIGTERM came, and the state was saved; only if `distributed.initialize` asked for this.
    """
    workdir = run_folder(workdir)
    mesh = make_mesh_for(config, devices)
    source = open_data(config.data)
    check_source(config, source)
    network = make_network(config)
    with observe.logging_to(workdir), contextlib.ExitStack() as closing:
        if distributed.is_first():
            closing.enter_context(alone_in(workdir))
        ends = stage_ends(config)
        checkpoints = checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep, keep_steps=ends)
        closing.callback(checkpoints.close)
        start = begin(config, network, mesh, checkpoints, source)
        if distributed.is_first():
            write_atomically(workdir / "config.json", json.dumps(config_lib.to_dict(config), indent=2).encode())
        done = ends[start.stage] - config.stage[config.stages[start.stage]].steps + int(start.state.step)
        if done == ends[-1]:
            log.info("nothing left to do: %s finished all %d steps", workdir, done)
            return checkpoints.folder / str(done)
        _warn(config)
        log.info("parameters\n%s", observe.parameter_table(start.state.params))
        log.info("%d images from %s; %d x %s; run folder %s", len(source), config.data.path, *_devices(mesh), workdir)
        metrics = observe.Metrics(workdir, config, step=done)
        closing.callback(metrics.close)
        run = _Run(config, workdir, mesh, source, network, checkpoints, metrics)
        tracing = observe.Profile(workdir / "profile", done + WARM_UP + 1, profile if distributed.is_first() else 0)
        closing.callback(tracing.close)
        state, meta, begun = start.state, start.meta, time.perf_counter()
        for index in range(start.stage, len(config.stages)):
            if index > start.stage:
                state, meta = next_stage(config, index, network, mesh, state), {}
            state = run.stage(index, state, meta, tracing)
        checkpoints.wait()
        newest = checkpoints.folder / str(ends[-1])
        log.info(
            "done in %s: %s holds %s, checkpoints/%d, metrics.jsonl, log.txt",
            observe.duration(time.perf_counter() - begun),
            workdir,
            run.preview_path(ends[-1]).relative_to(workdir),
            ends[-1],
        )
        return newest


def run_folder(workdir) -> pathlib.Path:
    """The absolute path of a run folder.

    Raises:
      ConfigError: it is an address of an object store.
    """
    if "://" in str(workdir):
        raise ConfigError(f"--workdir={workdir}: give a folder on a disk that all hosts see; a bucket can be mounted")
    return pathlib.Path(workdir).expanduser().absolute()


def make_mesh_for(config: Config, devices=None):
    """The mesh that a config asks for; batches must divide over it."""
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


def check_source(config: Config, source) -> None:
    """Compare the model's classes with the data's."""
    found, wanted = len(source.classes), config.model.num_classes
    if config.data.labels and found != wanted:
        names = ", ".join(source.classes[:8]) + (", ..." if found > 8 else "")
        raise ConfigError(
            f"{config.data.path} has {found} classes ({names}) but config.model.num_classes is {wanted}; "
            f"pass --config.model.num_classes={found}"
        )


def stage_ends(config: Config) -> list[int]:
    """Step of the run at which each stage ends."""
    ends, total = [], 0
    for name in config.stages:
        total += config.stage[name].steps
        ends.append(total)
    return ends


def abstract_state(config: Config, index: int, network: Network, mesh) -> TrainState:
    """Shapes, dtypes and placement of the state in a stage."""
    optimizer = make_optimizer(config.stage[config.stages[index]])
    state = jax.eval_shape(lambda params: new_state(params, optimizer, jax.random.key(0)), network.abstract_params())
    placed = sharding.state_sharding(mesh, state)
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, placed)


def begin(config: Config, network: Network, mesh, checkpoints: checkpoint.Checkpoints, source) -> Start:
    """This run's own checkpoint > `init_from` > fresh; says which in one line."""
    step = checkpoints.newest_whole()
    if step is not None:
        meta = checkpoints.meta(step)
        index = resumed_stage(config, meta, checkpoints.folder / str(step))
        state = checkpoints.restore(step, abstract_state(config, index, network, mesh))
        log.info(
            "start: resuming %s at step %d (%s, step %d)", checkpoints.folder, step, meta["stage"], meta["stage_step"]
        )
        if meta["images"] not in (None, len(source)):  # None: converted from elsewhere
            log.warning(
                "the data changed: %d images then, %d now; the order is another one", meta["images"], len(source)
            )
        elif meta["card"] and meta["card"].get("content_hash") != card_of(source, config.data.framing).get(
            "content_hash"
        ):
            log.warning("the data changed: as many images as then, but their content hash is another")
        for line in config_lib.differences(meta["config"], json.loads(json.dumps(config_lib.to_dict(config)))):
            log.warning("the config changed since that checkpoint: %s", line)
        return Start(index, state, meta)
    abstract = abstract_state(config, 0, network, mesh)
    if not config.init_from:
        log.info("start: fresh weights, seed %d", config.seed)
        return Start(0, fresh_state(config, network, abstract), {})
    params, found = _initial_weights(config.init_from, abstract.params)
    log.info("start: weights of %s, new optimizer", found)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return Start(0, _first_state(config, 0, placed, params, jax.random.key(config.seed)), {})


def fresh_state(config: Config, network: Network, abstract: TrainState) -> TrainState:
    """State at the start of the first stage, with new weights, placed as `abstract` says."""
    placed, key = jax.tree.map(lambda leaf: leaf.sharding, abstract), jax.random.key(config.seed)
    return _first_state(config, 0, placed, jax.jit(network.init, out_shardings=placed.params)(key), key)


def _initial_weights(path: str, abstract) -> tuple[dict, pathlib.Path]:
    """Raw weights of a run folder, a checkpoint, an official `.pt` or a `.safetensors`, placed as `abstract` says."""
    if path.lower().endswith(torch_checkpoint.SUFFIXES):
        found = pathlib.Path(os.path.expanduser(path)).absolute()
        if not found.is_file():
            raise checkpoint.CheckpointError(f"config.init_from {path!r} is not a file")
        params = torch_checkpoint.load_weights(found)
        checkpoint.compare(f"the weights of {found} do not fit config.model", params, abstract)
        return sharding.put(params, jax.tree.map(lambda leaf: leaf.sharding, abstract)), found
    found = checkpoint.find(path)
    return checkpoint.load_item(found, "params", abstract), found


def next_stage(config: Config, index: int, network: Network, mesh, state: TrainState) -> TrainState:
    """State at the start of stage `index`: the weights of the last one, all else new."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, index, network, mesh))
    return _first_state(config, index, placed, state.params, jax.random.key(config.seed))


def _first_state(config: Config, index: int, placed: TrainState, params, key) -> TrainState:
    optimizer = make_optimizer(config.stage[config.stages[index]])
    key = jax.random.fold_in(key, index)  # stages draw from streams of their own
    return jax.jit(new_state, static_argnums=1, out_shardings=placed)(params, optimizer, key)


def resumed_stage(config: Config, meta: dict, where: pathlib.Path) -> int:
    """Index of the stage that a checkpoint belongs to, if the config still agrees with its history."""
    past = list(meta["past"].items())
    expected = [(name, config.stage[name].steps) for name in config.stages]
    index = len(past)
    if expected[:index] != past or index >= len(expected) or expected[index][0] != meta["stage"]:
        raise ConfigError(
            f"{where} was made by stages {[*past, (meta['stage'], '...')]}, the config has {expected}; use the stages "
            "of that run, or another --workdir with --config.init_from to start from its weights"
        )
    name, steps = expected[index]
    if meta["stage_step"] > steps:
        raise ConfigError(
            f"{where} is at step {meta['stage_step']} of stage {name!r}, but config.{name}.steps is {steps}"
        )
    return index


def _warn(config: Config) -> None:
    """Say what will run but hardly work."""
    shape = jax.eval_shape(make_representation(config).cut, jnp.zeros((1, *make_representation(config).shape)))
    numbers = max(band.shape[-1] for band in jax.tree.leaves(shape))
    if config.model.width < numbers:
        log.warning(
            "a patch has %d numbers but config.model.width is only %d: the noise of a patch cannot pass through the "
            "network; take a smaller patch_size or a larger width",
            numbers,
            config.model.width,
        )


def _describe(plans) -> str:
    if len(plans) == 1:
        return str(plans[0])
    return "; ".join(f"{band}: {plan}" for band, plan in zip(("approximation", "details"), plans, strict=True))


def _devices(mesh) -> tuple[int, str]:
    return mesh.size, mesh.devices.flat[0].device_kind


class _Run:
    """What the stages of a run share."""

    def __init__(self, config, workdir, mesh, source, network, checkpoints, metrics):
        self.config, self.workdir, self.mesh, self.source = config, workdir, mesh, source
        self.network, self.checkpoints, self.metrics = network, checkpoints, metrics
        self.ends = stage_ends(config)
        self.card = card_of(source, config.data.framing)
        self.evaluation = _Evaluation(config, source, self.card) if config.evaluation.every else None
        self.unreadable = set()  # images found so, over all stages
        self.generate = make_generator(config, network, mesh, config.preview.rows * config.preview.columns)

    def stage(self, index: int, state: TrainState, meta: dict, tracing: observe.Profile) -> TrainState:
        """Train stage `index` from `state` (and the position in `meta`, if resumed) to its end."""
        name = self.config.stages[index]
        stage, plans = self.config.stage[name], config_lib.mask_plans(self.config, name)
        visible, total = sum(plan.visible for plan in plans), sum(plan.total for plan in plans)
        first, offset = int(state.step), self.ends[index] - stage.steps
        log.info("stage %s: %d steps of %d images; %s", name, stage.steps, stage.batch_size, _describe(plans))
        if first == stage.steps:
            return state
        batches = Batches(
            self.config.data,
            batch_size=stage.batch_size,
            seed=self.config.seed + index,
            source=self.source,
            unreadable=self.unreadable,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )
        step_fn = compile_step(self.config, name, self.mesh, jax.tree.map(lambda x: x, state))
        window = _Window(**meta.get("window", {}))
        progress = observe.Progress(name, step=first, steps=stage.steps)
        rate = observe.Rate()
        if "data" in meta:
            batches.seek(meta["data"])

        def finish(step, values):
            """Take in the numbers of a step that has been computed."""
            values = {key: float(value) for key, value in jax.device_get(values).items()}
            if not all(map(math.isfinite, values.values())):
                raise NonFiniteLoss(self._diverged(name, step, offset + step, values))
            window.add(values)
            rate.tick()
            if step % self.config.log.every and step != stage.steps:
                return
            per_second, waited = rate.read()
            means = window.take()
            images = per_second * stage.batch_size
            text = (
                f"loss {means['loss']:.4f} | {images:,.0f} images/s | {visible} of {total} tokens | "
                f"{observe.duration(self._time_left(index, step, per_second))} left"
                + (f" | {waited:.0%} of the time waiting for data" if waited > 0.03 else "")
            )
            progress.numbers(step, text)
            extra = dict(images_per_second=images, waiting_for_data=waited, visible_tokens=visible, stage=name)
            self.metrics.write(offset + step, means | extra)

        # Step k is read after step k + 1 was started, so that the device never waits for Python.
        pending = None
        with contextlib.closing(batches), contextlib.closing(progress):
            for step in range(first + 1, stage.steps + 1):
                with rate.waiting(lambda before=pending: before is not None and before[1]["loss"].is_ready()):
                    batch = sharding.to_global(self.mesh, next(batches))
                with tracing.step(offset + step):
                    state, values = step_fn(state, batch)
                tracing.after(offset + step, values)
                if pending:
                    finish(*pending)
                pending = (step, values)
                progress.advance()
                last = step == stage.steps
                due = lambda every, step=step, last=last: last or (every and step % every == 0)
                preview, save = due(self.config.preview.every), due(self.config.checkpoint.every)
                evaluate = self.evaluation and due(self.config.evaluation.every)
                stop = distributed.stop_requested(offset + step)
                if preview or save or evaluate or stop:
                    finish(*pending)  # a checkpoint must not hold what a non-finite step made
                    pending = None
                    with rate.paused():
                        if stop:  # the time that is left is for saving
                            self._stop(index, step, state, batches, window)
                        if preview:
                            self._preview(offset + step, state.ema)
                        if evaluate:
                            self._evaluate(offset + step, state.ema)
                        if save:
                            self._save(index, step, state, batches, window)
        return state

    def preview_path(self, step: int) -> pathlib.Path:
        """Sample grid made at a step of the run."""
        return self.workdir / "samples" / f"step_{step:07d}.png"

    def _preview(self, step: int, ema) -> None:
        rows, columns = self.config.preview.rows, self.config.preview.columns
        labels = names = None
        if self.config.model.num_classes:
            of_row = [row % self.config.model.num_classes for row in range(rows)]
            labels, names = (
                [label for label in of_row for _ in range(columns)],
                [self.source.classes[c] for c in of_row],
            )
        # The same noise each time: successive grids show the same images becoming better.
        images = self.generate(ema, self.config.seed, range(rows * columns), labels)
        path = self.preview_path(step)
        if distributed.is_first():
            observe.save_image(path, observe.sample_grid(images, columns, names))
            self.metrics.image(step, "samples", path)
        log.info("samples of the EMA at step %d: %s", step, path)

    def _evaluate(self, step: int, ema) -> None:
        loaded = as_loaded(self.config, self.network, ema, self.source.classes, self.card, self.workdir)
        values = self.evaluation(loaded)
        self.metrics.write(step, {f"eval/{name}": value for name, value in values.items()})
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("evaluation of %d samples of the EMA at step %d: %s", self.config.evaluation.n, step, text)

    def _save(self, index: int, step: int, state: TrainState, batches: Batches, window: "_Window") -> None:
        names = self.config.stages
        meta = dict(
            stage=names[index],
            stage_step=step,
            past={name: self.config.stage[name].steps for name in names[:index]},
            data=batches.state(),
            window=window.sums(),
            images=len(self.source),
            classes=self.source.classes,
            card=self.card,
            config=config_lib.to_dict(self.config),
        )
        self.checkpoints.save(self.ends[index] - self.config.stage[names[index]].steps + step, state, meta)

    def _stop(self, index: int, step: int, state: TrainState, batches: Batches, window: "_Window"):
        self._save(index, step, state, batches, window)
        self.checkpoints.wait()
        distributed.wait_for_all("saved")  # whoever ends first may take the others along
        raise Preempted(
            f"told to stop: saved at step {step} of stage {self.config.stages[index]}; the same command goes on from it"
        )

    def _time_left(self, index: int, step: int, per_second: float) -> float:
        """Seconds to the end of the run, later stages estimated by their visible patches."""

        def cost(name):
            plans = config_lib.mask_plans(self.config, name)
            return self.config.stage[name].batch_size * sum(plan.visible for plan in plans)

        names = self.config.stages
        later = sum(self.config.stage[name].steps * cost(name) for name in names[index + 1 :]) / cost(names[index])
        return (self.config.stage[names[index]].steps - step + later) / max(per_second, 1e-9)

    def _diverged(self, name: str, stage_step: int, step: int, values: dict) -> str:
        self.checkpoints.wait()
        latest = self.checkpoints.latest()
        stage = self.config.stage[name]
        good = (
            "there is no checkpoint yet"
            if latest is None
            else f"last good checkpoint: {self.checkpoints.folder / str(latest)}"
        )
        return (
            f"step {step} ({name}, step {stage_step}) is not finite: loss {values['loss']}, gradient norm "
            f"{values['grad_norm']}; {good}. Run the same command again, from there, with a lower "
            f"--config.{name}.learning_rate (now {stage.learning_rate:g}), with --config.{name}.clip_norm=1.0 (now "
            f"{stage.clip_norm:g}), or with --config.model.dtype=float32 (now {self.config.model.dtype})"
        )


class _Evaluation:
    """Numbers of a network's samples against the run's reference, whose features are computed once."""

    def __init__(self, config: Config, source, card: dict):
        """Reads weights and reference, so that what cannot work is said before training."""
        self._config = config
        settings = config.evaluation
        self._evaluator = Evaluator(settings.inception_weights, batch_size=min(64, settings.n))
        if settings.reference:
            self._reference = open_images(settings.reference)
            samples = Images("the samples", settings.n, iterate=None, card=card)
            check_comparable(self._reference, samples, settings.metrics)
        else:
            self._reference = framed(config.data.path, source, config.data.framing)
        if isinstance(self._reference, Images):
            log.info("features of the %d images of the reference, computed once", self._reference.n)
        self._reference = self._evaluator.reference(self._reference, settings.metrics)

    def __call__(self, loaded) -> dict[str, float]:
        settings = self._config.evaluation
        images = sampled(loaded, settings.n, seed=self._config.seed, batch_size=self._evaluator.batch_size)
        return compare(self._reference, self._evaluator.samples(images, settings.metrics), settings.metrics)


class _Window:
    """Sums of metrics since the last log line. Saved with checkpoints, so that means survive a restart."""

    def __init__(self, count: int = 0, **sums: float):
        self._count, self._sums = count, sums

    def add(self, values: dict) -> None:
        """Take in a step; the learning rate is not averaged."""
        for key, value in values.items():
            self._sums[key] = value if key == "learning_rate" else self._sums.get(key, 0.0) + value
        self._count += 1

    def take(self) -> dict:
        """Means, and start anew."""
        means = {k: v if k == "learning_rate" else v / self._count for k, v in self._sums.items()}
        self._count, self._sums = 0, {}
        return means

    def sums(self) -> dict:
        """Arguments that make this window again."""
        return {"count": self._count, **self._sums}
