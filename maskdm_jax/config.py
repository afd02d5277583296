"""The settings of a run, checked: every key known, every value of the right type and in range.

A config file returns an `ml_collections.ConfigDict`; `parse` turns it into these frozen dataclasses. The
dicts `data`, `model`, ... have a class each below. Every other dict at the top is a stage, and `stages`
names the ones to run, in order.
"""

import dataclasses
import difflib
import math
import types
import typing

from maskdm_jax import diffusion, masking, samplers
from maskdm_jax.data.images import Framing
from maskdm_jax.models.attention import KERNELS
from maskdm_jax.models.backbone import extra_tokens

SAMPLERS = ("ddim", "ddpm", "dpm_solver")
METRICS = ("fid", "kid", "is", "pr")
DTYPES = ("float32", "bfloat16")
_RESERVED = ("step", "stages")


class ConfigError(ValueError):
    """A setting that cannot work; the message names it and says what would."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the images are and how they are read."""

    path: str  # see `data.sources.open_source`; "digits" is the embedded set
    split: str  # of a TFDS data folder; "" otherwise
    image_size: int  # pixels; short side resized (bicubic), centre cropped
    channels: int  # 3 colour, 1 grey
    classes: tuple[str, ...]  # names of those to use, numbered in this order; () for all
    fraction: float  # share of the images to use, drawn once by fraction_seed
    fraction_seed: int  # of that draw; independent of the run's seed
    labels: bool  # of a folder: the first folder level that differs is the class
    label_dropout: float  # probability of hiding a label in training, for classifier-free guidance
    flip: float  # probability of a horizontal flip
    threads: int  # reading threads per process
    workers: int  # extra reading processes; 0 reads in this one

    @property
    def framing(self) -> Framing:
        """What becomes of an image on its way to the network."""
        return Framing(self.image_size, self.channels)


@dataclasses.dataclass(frozen=True)
class Model:
    """The network; see `models.uvit.UViT` and `models.wavelet_uvit.WaveletUViT`."""

    patch_size: int
    wavelet_scale: int  # 0: a U-ViT on pixels. 1, 2, ...: on Haar coefficients, detail patches so much wider
    width: int
    depth: int  # 2k and 2k + 1 are the same network
    heads: int
    mlp_ratio: float
    qv_bias: bool
    num_classes: int  # 0: unconditional
    time_mlp: bool  # learn the time token
    dtype: str  # of the computation: float32 or bfloat16
    attention: str  # auto, or one of models.attention.KERNELS


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Schedule, objective and loss; see `diffusion`."""

    timesteps: int
    schedule: str  # linear, cosine or shifted_cosine
    shift_size: int  # image side for shifted_cosine
    objective: str  # noise, x0 or v
    loss: str  # l2 or l1
    loss_weight: str  # p2 or min_snr
    loss_weight_gamma: float  # 0: off


@dataclasses.dataclass(frozen=True)
class Mask:
    """What is hidden; see `masking.make_plan`."""

    kind: str  # none, patch, block or crop
    rate: float  # hidden share, for patch and block
    block: int  # side in patches, for block
    crop: int  # side in patches, for crop
    tile: int  # show as many patches as fill tiles of so many tokens, such as 128; 0: not so


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run with its own length, batch, optimizer, EMA and mask."""

    steps: int
    batch_size: int  # global
    micro_batches: int  # parts that a batch is computed in, one after the other
    remat: bool  # recompute blocks in the backward pass: less memory, a third more work
    learning_rate: float
    warmup_steps: int
    b1: float
    b2: float
    weight_decay: float
    clip_norm: float  # 0: off
    ema_decay: float
    ema_every: int
    mask: Mask
    detail_mask: Mask | None = None  # of the details of a wavelet model; left out: drawn by the settings of `mask`


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are made from noise; see `samplers`."""

    method: str  # ddim, ddpm (takes all steps) or dpm_solver (DPM-Solver++ multistep)
    steps: int  # of ddim and dpm_solver
    eta: float  # of ddim: 0 deterministic, 1 ancestral
    order: int  # of dpm_solver: 1, 2 or 3
    spacing: str  # of dpm_solver: time_uniform, log_snr or time_quadratic
    guidance: float  # weight w of classifier-free guidance, (1 + w) labelled - w unlabelled; 0: off


@dataclasses.dataclass(frozen=True)
class Preview:
    """Sample grids made while training."""

    every: int  # steps; 0: only at the end of a stage
    rows: int  # of a conditional model: a class each
    columns: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Numbers made of the EMA's samples while training; see `evaluation.evaluate`."""

    every: int  # steps, and the end of each stage; 0: never
    n: int  # samples
    metrics: tuple[str, ...]  # of fid, kid, is, pr
    reference: str  # images to compare with; "": those of the training, as training sees them
    inception_weights: str  # path; "": fetched once


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save and what to keep."""

    every: int  # steps
    keep: int  # newest ones kept; the last of each stage stays as well


@dataclasses.dataclass(frozen=True)
class Log:
    """Where numbers go besides the console and metrics.jsonl."""

    every: int  # steps
    tensorboard: bool
    wandb: bool  # needs `pip install wandb`


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis of the mesh."""

    data: int  # -1: all devices that fsdp leaves
    fsdp: int


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int
    init_from: str  # run folder, checkpoint, .pt or .safetensors whose weights the run starts from; "" starts fresh
    data: Data
    model: Model
    diffusion: Diffusion
    sampling: Sampling
    preview: Preview
    evaluation: Evaluation
    checkpoint: Checkpoint
    log: Log
    mesh: MeshShape
    stages: tuple[str, ...]
    stage: dict[str, Stage]  # by name, those that `stages` lists, in that order


def parse(config) -> Config:
    """Check a ConfigDict (or dict) and freeze it.

    Raises:
      ConfigError: a key is unknown or missing, a value has the wrong type or cannot work.
    """
    raw = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    known = {f.name: f.type for f in dataclasses.fields(Config) if f.name != "stage"}
    names = raw.get("stages", ())
    sections = {k: raw.pop(k) for k in list(raw) if k not in known and (isinstance(raw[k], dict) or k in names)}
    top = _read("config", raw, known)
    if not top["stages"]:
        raise ConfigError(f"config.stages is empty; name at least one stage, this config has {sorted(sections)}")
    stages = {name: _build(Stage, f"config.{name}", section) for name, section in sections.items()}
    for name in top["stages"]:
        if name not in stages:
            raise ConfigError(f"config.stages names {name!r}, but the config has only {sorted(sections)}")
    if len(set(top["stages"])) < len(top["stages"]):
        raise ConfigError(f"config.stages names a stage twice: {top['stages']}; give each its own section")
    parsed = Config(**top, stage={name: stages[name] for name in top["stages"]})
    _check(parsed)
    return parsed


def to_dict(config: Config) -> dict:
    """The plain nested dict that `parse` reads back."""
    raw = dataclasses.asdict(config)
    raw |= raw.pop("stage")
    return raw | {"stages": list(config.stages)}


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf in which two config dicts differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


def grids(config: Config) -> tuple[tuple[int, int], ...]:
    """Rows and columns of patches, of the image or of each band of a wavelet model."""
    side, scale = config.data.image_size // config.model.patch_size, config.model.wavelet_scale
    if not scale:
        return ((side, side),)
    return ((side // 2, side // 2), (side // 2 // scale, side // 2 // scale))


def mask_plans(config: Config, stage: str) -> tuple[masking.MaskPlan, ...]:
    """The mask plans of a stage: one, or one for each band of a wavelet model."""
    masks = {"mask": config.stage[stage].mask}
    if config.model.wavelet_scale:
        masks["detail_mask"] = config.stage[stage].detail_mask or config.stage[stage].mask
    plans, extras = [], extra_tokens(config.model.num_classes)
    for (name, mask), grid in zip(masks.items(), grids(config), strict=True):
        if mask.tile and config.model.wavelet_scale:
            raise ConfigError(f"config.{stage}.{name}.tile must be 0: the bands of a wavelet model share their tiles")
        try:
            plans.append(masking.make_plan(grid=grid, extras=extras, **dataclasses.asdict(mask)))
        except ValueError as error:
            raise ConfigError(f"config.{stage}.{name}: {error}") from None
    return tuple(plans)


def _build(cls, path: str, raw):
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must be a dict of settings, not {raw!r}")
    optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    return cls(**_read(path, raw, {f.name: f.type for f in dataclasses.fields(cls)}, optional))


def _read(path: str, raw: dict, kinds: dict, optional=frozenset()) -> dict:
    for key in raw:
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(kinds)}"
            raise ConfigError(f"{path}.{key} is not a setting; {hint}")
    missing = [key for key in kinds if key not in raw and key not in optional]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; see configs/demo.py for a complete config")
    return {key: _value(f"{path}.{key}", raw[key], kind) for key, kind in kinds.items() if key in raw}


def _value(path: str, value, kind):
    if dataclasses.is_dataclass(kind):
        return _build(kind, path, value)
    if isinstance(kind, types.UnionType):  # of a dataclass and None
        return None if value is None else _value(path, value, typing.get_args(kind)[0])
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{path} must be a tuple of names, such as ('pretrain', 'finetune'), not {value!r}")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} is {value}; it must be a finite number")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{path} must be a {kind.__name__}, not {value!r}")
    return value


def _check(config: Config) -> None:
    data, model, diff = config.data, config.model, config.diffusion

    def need(path, value, ok, what):
        if not ok:
            raise ConfigError(f"config.{path} is {value!r}; it must be {what}")

    def choice(path, value, options):
        need(path, value, value in options, f"one of {', '.join(map(str, options))}")

    def at_least(path, value, low):
        need(path, value, value >= low, f"at least {low}")

    for path, value in {
        "data.image_size": data.image_size,
        "data.threads": data.threads,
        "model.patch_size": model.patch_size,
        "model.width": model.width,
        "model.depth": model.depth,
        "model.heads": model.heads,
        "diffusion.timesteps": diff.timesteps,
        "diffusion.shift_size": diff.shift_size,
        "preview.rows": config.preview.rows,
        "preview.columns": config.preview.columns,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "log.every": config.log.every,
        "mesh.fsdp": config.mesh.fsdp,
    }.items():
        at_least(path, value, 1)
    at_least("data.workers", data.workers, 0)
    at_least("model.num_classes", model.num_classes, 0)
    at_least("preview.every", config.preview.every, 0)
    at_least("evaluation.every", config.evaluation.every, 0)
    for name in config.evaluation.metrics or ("",):
        choice("evaluation.metrics", name, METRICS)
        at_least("evaluation.n", config.evaluation.n, {"is": 10, "pr": 4}.get(name, 2))
    need("mesh.data", config.mesh.data, config.mesh.data == -1 or config.mesh.data >= 1, "-1 or at least 1")
    need("seed", config.seed, 0 <= config.seed < 2**31, "in [0, 2^31)")
    need("data.channels", data.channels, data.channels in (1, 3), "3 (colour) or 1 (grey)")
    need("data.fraction", data.fraction, 0 < data.fraction <= 1, "in (0, 1]")
    need("data.fraction_seed", data.fraction_seed, 0 <= data.fraction_seed < 2**32, "in [0, 2^32)")
    need("data.classes", data.classes, len(set(data.classes)) == len(data.classes), "without repetitions")
    need("data.flip", data.flip, 0 <= data.flip <= 1, "a probability")
    need("data.path", data.path, bool(data.path), "a folder or .zip of images, or 'digits'")
    at_least("model.wavelet_scale", model.wavelet_scale, 0)
    if model.wavelet_scale:
        unit = 2 * model.patch_size * model.wavelet_scale
        if data.image_size % unit:
            need("data.image_size", data.image_size, False, f"a multiple of 2 * patch_size * wavelet_scale = {unit}")
        if data.label_dropout or config.sampling.guidance:
            raise ConfigError(
                "a wavelet model (config.model.wavelet_scale) has no token for 'no label', as in the reference; set "
                "config.data.label_dropout and config.sampling.guidance to 0"
            )
    if data.image_size % model.patch_size:
        sides = [p for p in range(1, data.image_size + 1) if data.image_size % p == 0]
        need("model.patch_size", model.patch_size, False, f"a divisor of data.image_size {data.image_size}: {sides}")
    need("model.width", model.width, model.width % 2 == 0, "even (the time embedding is half cosines, half sines)")
    need("model.heads", model.heads, model.width % model.heads == 0, f"a divisor of model.width {model.width}")
    need("model.mlp_ratio", model.mlp_ratio, int(model.mlp_ratio * model.width) >= 1, "larger")
    choice("model.dtype", model.dtype, DTYPES)
    choice("model.attention", model.attention, ("auto", *KERNELS))
    if model.attention == "cudnn" and (model.dtype == "float32" or model.width // model.heads % 8):
        raise ConfigError("config.model.attention 'cudnn' is for bfloat16 and heads whose width is a multiple of 8")
    if model.num_classes and not data.labels:
        raise ConfigError(
            "config.model.num_classes is set but config.data.labels is False; set both for a conditional model, "
            "or --config.model.num_classes=0 for an unconditional one"
        )
    if data.labels and not model.num_classes:
        raise ConfigError(
            "config.data.labels is True but config.model.num_classes is 0; give the number of classes, or "
            "--config.data.labels=False for an unconditional model"
        )
    choice("diffusion.schedule", diff.schedule, ("linear", "cosine", "shifted_cosine"))
    if diff.schedule == "linear":  # scaled to its number of steps, it would destroy the image in one step
        need("diffusion.timesteps", diff.timesteps, diff.timesteps > 20, "more than 20 for the linear schedule")
    choice("diffusion.objective", diff.objective, diffusion.OBJECTIVES)
    choice("diffusion.loss", diff.loss, diffusion.LOSSES)
    choice("diffusion.loss_weight", diff.loss_weight, ("p2", "min_snr"))
    choice("sampling.method", config.sampling.method, SAMPLERS)
    need(
        "sampling.steps",
        config.sampling.steps,
        1 <= config.sampling.steps <= diff.timesteps,
        f"1 to config.diffusion.timesteps = {diff.timesteps}",
    )
    choice("sampling.order", config.sampling.order, (1, 2, 3))
    choice("sampling.spacing", config.sampling.spacing, samplers.DPM_SPACINGS)
    at_least("sampling.guidance", config.sampling.guidance, 0)
    if config.sampling.guidance and not model.num_classes:
        raise ConfigError("config.sampling.guidance needs a conditional model; config.model.num_classes is 0")
    need("data.label_dropout", data.label_dropout, 0 <= data.label_dropout < 1, "in [0, 1)")
    need("sampling.eta", config.sampling.eta, 0 <= config.sampling.eta <= 1, "0 (deterministic) to 1")
    for name, stage in config.stage.items():
        for key in ("steps", "batch_size", "micro_batches", "ema_every"):
            at_least(f"{name}.{key}", getattr(stage, key), 1)
        for key in ("learning_rate", "warmup_steps", "weight_decay", "clip_norm"):
            at_least(f"{name}.{key}", getattr(stage, key), 0)
        for key in ("b1", "b2", "ema_decay"):
            need(f"{name}.{key}", getattr(stage, key), 0 <= getattr(stage, key) < 1, "in [0, 1)")
        if stage.batch_size % stage.micro_batches:
            need(f"{name}.micro_batches", stage.micro_batches, False, f"a divisor of batch_size {stage.batch_size}")
        if stage.detail_mask and not model.wavelet_scale:
            raise ConfigError(f"config.{name}.detail_mask is for wavelet models, but config.model.wavelet_scale is 0")
        mask_plans(config, name)
