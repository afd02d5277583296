"""A whole run: open the data, train, and make previews and metrics by hooks of the training loop."""

import hashlib
import importlib.util
import json
import logging
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.build import make_network, make_sampler, mask_plans
from maskdm_jax.config import Config, Stage, differences, steps_before, to_dict
from maskdm_jax.data.images import Framing, sample_grid, save_png
from maskdm_jax.data.pipeline import TrainingData, probe
from maskdm_jax.diffusion.masking import KINDS
from maskdm_jax.diffusion.samplers import SAMPLERS
from maskdm_jax.errors import ConfigError, DataError
from maskdm_jax.models.representation import make_representation
from maskdm_jax.parallel import processes
from maskdm_jax.sampling import make_generator
from maskdm_jax.training import loop
from maskdm_jax.training.state import EMA_COPY_STEPS, ema_decays, ema_step_size
from maskdm_jax.training.step import make_loss

log = logging.getLogger(__name__)

# Settings that only one process or network uses; see `warnings_of`.
PROCESS_SETTINGS = {
    "ddpm": ("timesteps", "schedule", "shift_size", "loss_weight", "loss_weight_gamma"),
    "flow": ("flow",),
    "edm": ("edm",),
}
NETWORK_SETTINGS = {"uvit": ("qv_bias", "time_mlp"), "jit": ("jit",)}
PROBED = 16  # images read at the start of a run, to warn of what they show


def train(config: Config, workdir, *, devices=None, profile: int = 0) -> pathlib.Path:
    """Train as a config says, with previews and evaluation; see `training.loop.train`."""
    check(config)
    check_processes(config, workdir)
    data = open_training_data(config)
    found = probe(data.source, Framing.of(config.data), PROBED) if processes.is_first() else None

    def make_hooks(run):
        for line in data.source.notes:
            log.debug("%s", line)  # into log.txt alone: the console has shown them
        for line in [*(found.notes if found else []), *warnings_of(config)]:
            log.warning("%s", line)
        hooks = [Previews(run)]
        if config.evaluation.every:
            from maskdm_jax.evaluation.hook import Evaluation

            hooks.append(Evaluation(run))
        return hooks

    return loop.train(config, data, workdir, make_hooks=make_hooks, devices=devices, profile=profile)


def check(config: Config) -> None:
    """Check settings by building all that needs no data: network, masks, loss, sampler. Cheap.

    Raises:
      ConfigError: a setting is invalid; the message names it.
    """
    from maskdm_jax.evaluation.metrics import check_settings

    for name, package in (("wandb", "wandb"), ("tensorboard", "tensorboardX")):
        if getattr(config.log, name) and importlib.util.find_spec(package) is None:
            raise ConfigError(f"config.log.{name} is True but {package} is not installed; pip install {package}")
    sampling = config.sampling
    if sampling.guidance and (wanted := config.untrained(sampling.weak)):
        raise ConfigError(
            f"config.sampling.guidance is {sampling.guidance:g}, but its weak prediction, {sampling.weak!r}, is not "
            f"trained; that needs {wanted}"
        )
    network = make_network(config)
    for remat in {stage.remat for stage in config.stage.values()}:
        make_network(config, remat=remat)  # that of a later stage would otherwise fail after days
    make_loss(config, network)
    make_sampler(config, network)
    check_settings(config.evaluation)
    for name in config.stages:
        mask_plans(config, name)


def check_processes(config: Config, workdir) -> None:
    """Check that all processes have the same settings, run folder, code and JAX; each compiles its own program.

    Where and how a host reads its images may differ; `open_training_data` compares the images.

    Raises:
      ConfigError: they do not; the message says how process 0 and another differ.
    """
    code = hashlib.sha256()
    own = pathlib.Path(config.model.network.rpartition(":")[0])
    for path in [*sorted(pathlib.Path(__file__).parent.rglob("*.py")), *([own] if own.is_file() else [])]:
        code.update(path.read_bytes())
    about = to_dict(config) | {
        "--workdir": str(workdir),
        "JAX": jax.__version__,
        "code": code.hexdigest(),
    }
    about["data"] = {k: v for k, v in about["data"].items() if k not in ("path", "threads", "workers")}
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    longest = processes.gather(np.int64(len(text))).max()
    rows = processes.gather(np.pad(text, (0, longest - len(text)), constant_values=ord(" ")))
    first, *others = (json.loads(row.tobytes()) for row in rows)
    for number, other in enumerate(others, 1):
        if other != first:
            changes = "; ".join(differences(first, other))
            raise ConfigError(
                f"process {number} differs from process 0 ({changes}); start all with the same command and code"
            )


def open_training_data(config: Config) -> TrainingData:
    """Open the images and compare their classes with the model's.

    Raises:
      DataError: the images cannot be opened.
      ConfigError: their number of classes is not the model's.
    """
    data = _open_everywhere(config)
    found, wanted = len(data.classes), config.model.num_classes
    if config.data.labels and found != wanted:
        names = ", ".join(data.classes[:8]) + (", ..." if found > 8 else "")
        raise ConfigError(
            f"{config.data.path} has {found} classes ({names}) but config.model.num_classes is {wanted}; "
            f"pass --config.model.num_classes={found}"
        )
    return data


def _open_everywhere(config: Config) -> TrainingData:
    """Open the images in all processes, and check that they see the same ones.

    Raises:
      DataError: a process cannot open them, or sees others.
    """
    try:
        data, problem = TrainingData(config.data), None
    except (DataError, OSError) as error:
        data, problem = None, error
    counts = processes.gather(np.int64(-1 if data is None else len(data)))
    if problem is not None:
        raise problem
    if (counts < 0).any():
        raise DataError(f"process {np.argmin(counts)} cannot open the images; its message says why")
    identity = json.dumps([len(data), data.card["files_hash"], list(data.classes), data.card["labels_hash"]])
    if processes.differ(identity):
        raise DataError(
            f"the processes see different images or labels (images by process: "
            f"{', '.join(f'{count:,}' for count in counts)}; here {data}); give all hosts the same files"
        )
    return data


def warnings_of(config: Config) -> list[str]:
    """Describe valid settings that are probably mistakes, one line each."""
    lines, longest = [], max(config.stage[name].steps for name in config.stages)
    if config.preview.every > longest:
        lines.append(f"preview.every={config.preview.every} is beyond the end: each stage has one preview, at its end")
    if config.checkpoint.every > longest > 1000:
        lines.append(f"checkpoint.every={config.checkpoint.every} is beyond the end: a failure loses a whole stage")
    space = make_representation(config)
    bands = jax.tree.leaves(jax.eval_shape(space.cut, jnp.zeros((1, *space.shape))))
    numbers = max(band.shape[-1] for band in bands)
    widths = {"width": config.model.width}
    widths |= {"jit.bottleneck": config.model.jit.bottleneck} if config.model.network == "jit" else {}
    narrowest = min(widths, key=widths.get)
    outputs_data = config.diffusion.process != "edm" and config.diffusion.objective == "x0"  # and no noise
    if widths[narrowest] < numbers and not outputs_data:
        lines.append(
            f"a patch has {numbers} values but config.model.{narrowest} is only {widths[narrowest]}, too narrow to "
            f"represent the noise of a patch; use a smaller patch_size, a larger {narrowest}, or the objective x0 of "
            "ddpm or flow"
        )
    stages = [config.stage[name] for name in config.stages]
    if config.model.outer_blocks and not any(stage.hides or stage.shallow for stage in stages):
        lines.append(f"model.outer_blocks={config.model.outer_blocks} has no effect in training: nothing is hidden")
    if config.sampling.weak != "unlabelled" and not config.sampling.guidance:
        lines.append(f"sampling.weak={config.sampling.weak} has no effect: sampling.guidance is 0")
    if config.sampling.guidance_from >= config.sampling.guidance_to:
        lines.append(
            f"guidance has no effect from sampling.guidance_from={config.sampling.guidance_from} to "
            f"sampling.guidance_to={config.sampling.guidance_to}"
        )
    if config.data.label_dropout and not config.data.labels:
        lines.append(f"data.label_dropout={config.data.label_dropout:g} has no effect: data.labels is False")
    lines += _ignored("diffusion", config.diffusion, "process", PROCESS_SETTINGS)
    lines += _ignored("model", config.model, "network", NETWORK_SETTINGS)
    lines += _ignored("sampling", config.sampling, "method", _settings_of(SAMPLERS))
    for name in config.stages:
        stage = config.stage[name]
        if stage.warmup_steps > stage.steps / 3 and not stage.continues:
            lines.append(f"{name}.warmup_steps={stage.warmup_steps} is more than a third of its {stage.steps} steps")
        if not 0 < stage.learning_rate < 0.1:
            lines.append(f"{name}.learning_rate={stage.learning_rate:g} is unusual; recipes have 1e-5 to 2e-3")
        for mask, settings in ((f"{name}.mask", stage.mask), (f"{name}.detail_mask", stage.detail_mask)):
            lines += _ignored(mask, settings, "kind", _settings_of(KINDS)) if settings else []
        lines += _long_emas(stage, name, stage.steps + steps_before(config, name))
    return lines


def _long_emas(stage: Stage, name: str, steps: int) -> list[str]:
    """Describe the EMAs whose memory is longer than `steps`, the steps since their start, and those that are equal."""
    lines, known, first = [], set(), EMA_COPY_STEPS if stage.ema_law == "reference" else 0
    for number, decay in enumerate(ema_decays(stage), 1):
        law = dict(every=stage.ema_every, law=stage.ema_law)
        sizes = np.asarray(ema_step_size(np.arange(first, steps), decay=decay, **law))
        share = np.prod(1 - sizes[1:].astype(float))
        setting = f"{name}.ema_decay={decay}" if number == 1 else f"{decay} in {name}.more_ema_decays"
        if steps > first and share > 1 / math.e:
            lines.append(
                f"{share:.0%} of the EMA at the end of {name} still come from the weights of step {first}: lower "
                f"{setting} or {name}.ema_every={stage.ema_every}, or train longer"
            )
        if sizes.tobytes() in known:
            lines.append(
                f"{setting} has no effect: in {steps} steps, the law {stage.ema_law!r} gives an equal EMA twice"
            )
        known.add(sizes.tobytes())
    return lines


def _ignored(path: str, settings, choice: str, used: dict[str, tuple[str, ...]]) -> list[str]:
    """Name the settings of a section that are not the defaults, but that its choice ignores.

    Args:
      path: of the section.
      choice: name of the setting that decides.
      used: names of the settings that each of its values uses; values that are not listed may use all.
    """
    value, default = getattr(settings, choice), type(settings)()
    others = set().union(*used.values()).difference(used[value]) if value in used else ()
    changed = [name for name in sorted(others) if getattr(settings, name) != getattr(default, name)]
    return [f"{path}.{name} has no effect: {path}.{choice} is {value!r}" for name in changed]


def _settings_of(table) -> dict[str, tuple[str, ...]]:
    return {name: entry.settings for name, entry in table.items()}


class Previews:
    """The hook that samples grids from the EMA, always from the same noise."""

    def __init__(self, run: loop.Run):
        self.every, self._run, settings = run.config.preview.every, run, run.config.preview
        self._generate = make_generator(run.config, run.mesh, settings.rows * settings.columns)

    def __call__(self, at: loop.Moment) -> None:
        """Write a grid to samples/step_STEP.png; each row of a conditional model shows one class."""
        run, settings = self._run, self._run.config.preview
        labels = names = None
        if run.config.model.num_classes:
            of_row = [row % run.config.model.num_classes for row in range(settings.rows)]
            labels = [label for label in of_row for _ in range(settings.columns)]
            names = [run.data.classes[label] for label in of_row]
        images = self._generate(at.state.ema, run.config.seed, range(settings.rows * settings.columns), labels)
        path = run.workdir / "samples" / f"step_{at.step:07d}.png"
        if processes.is_first():
            save_png(path, sample_grid(images, settings.columns, names))
            run.metrics.image(at.step, "samples", path)
        classes = run.config.model.num_classes
        some = f" ({settings.rows} of {classes} classes)" if classes > settings.rows else ""
        log.info("samples of the EMA at step %d%s: %s", at.step, some, run.folder / "samples" / path.name)
