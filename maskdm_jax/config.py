"""The settings of a run: every setting, its default and its meaning, in one place.

A recipe starts from `default()`, an `ml_collections.ConfigDict` with the defaults below, and sets what differs. `parse`
checks the result (every key known, every value of the right type and in range) and freezes it into these dataclasses.
Each top-level dict other than `data`, `model`, ... is a stage of training; `stages` names those to run, in order.

To add a setting, add one field with a default and a comment. The names of samplers, processes, schedules, masks and
networks are the keys of the tables that define them. What fits together is checked when they are built.
"""

import dataclasses
import difflib
import importlib
import inspect
import math
import re
import types
import typing

from ml_collections import ConfigDict

from maskdm_jax.errors import ConfigError


class Rule(typing.NamedTuple):
    """A constraint on a value, and its description in messages."""

    holds: typing.Callable
    text: str | typing.Callable  # a function if the options are only known later


def _one_of(*options) -> Rule:
    return Rule(lambda value: value in options, f"one of {', '.join(map(str, options))}")


def _key_of(module: str, table: str, *, also: str = "", more: typing.Callable = lambda value: False) -> Rule:
    """A key of a table of the package, or `also`, described so, if `more` holds. Modules are imported when needed."""
    keys = lambda: tuple(getattr(importlib.import_module(f"maskdm_jax.{module}"), table))
    return Rule(lambda value: value in keys() or more(value), lambda: f"one of {', '.join(keys())}{also}")


def _between(low: int, high: int) -> Rule:
    return Rule(lambda value: low <= value <= high, f"at least {low} and at most {high:,}")


def _names_a_file(network: str) -> bool:
    return re.fullmatch(r".+\.py:\w+", network) is not None


UNKNOWN = "unknown"  # path of the data of a run that was converted from a file which does not say
INT32 = 2**31 - 1  # steps and sizes are int32 on devices
Count = typing.Annotated[int, _between(1, INT32)]
Natural = typing.Annotated[int, _between(0, INT32)]
Side = typing.Annotated[int, _between(1, 65_536)]
Positive = typing.Annotated[float, Rule(lambda value: value > 0, "above 0")]
NonNegative = typing.Annotated[float, Rule(lambda value: value >= 0, "at least 0")]
Probability = typing.Annotated[float, Rule(lambda value: 0 <= value <= 1, "0 to 1")]
Decay = typing.Annotated[float, Rule(lambda value: 0 <= value < 1, "in [0, 1)")]
Fraction = typing.Annotated[float, Rule(lambda value: 0 < value <= 1, "in (0, 1]")]
Rate = typing.Annotated[float, Rule(lambda value: 0 < value < 1, "in (0, 1)")]
Dtype = typing.Annotated[str, _one_of("auto", "float32", "bfloat16")]
EmaLaw = typing.Annotated[str, _one_of("reference", "plain")]
Seed = typing.Annotated[int, Rule(lambda value: 0 <= value < 2**31, "in [0, 2^31)")]
WideSeed = typing.Annotated[int, Rule(lambda value: 0 <= value < 2**32, "in [0, 2^32)")]


@dataclasses.dataclass(frozen=True)
class Data:
    """The images and how they are read."""

    path: str = ""  # folder, archive, shards, prepared set, TFDS folder, LMDB or address; "digits" is the embedded set
    split: str = ""  # split of a TFDS folder, of Parquet files or of WebDataset shards
    image_size: Side = 64  # pixels; the short side is resized (bicubic), the centre cropped
    channels: Count = 3  # 3 colour, 1 grey; other numbers where the source stores them
    classes: tuple[str, ...] = ()  # names of the classes to use, numbered in this order; () for all
    fraction: Fraction = 1.0  # share of the images to use, drawn by fraction_seed
    fraction_seed: WideSeed = 0  # seed of that draw; the seed of the run does not affect it
    labels: bool = False  # read class labels: of dataset.json or metadata.csv/.jsonl, else of the folders' names
    label_dropout: Decay = 0.0  # probability of hiding a label in training; above 0 allows classifier-free guidance
    flip: Probability = 0.0  # probability of a horizontal flip
    threads: Count = 16  # reading threads per process
    workers: Natural = 0  # reading processes; 0: the main process reads
    max_pixels: Count = 178_956_970  # of an encoded image; larger ones are unreadable, as decompression bombs


@dataclasses.dataclass(frozen=True)
class Jit:
    """What only a JiT has; see `models.jit.JiT`."""

    bottleneck: Count = 128  # width between the two layers that embed a patch
    class_tokens: Natural = 32  # number of class tokens
    class_tokens_from: Natural = 4  # block before which class tokens join the patches
    dropout: Decay = 0.0  # rate of dropout in the middle half of the blocks


@dataclasses.dataclass(frozen=True)
class Model:
    """The network; see `models.uvit.UViT`, `models.wavelet_uvit.WaveletUViT` and `models.jit.JiT`."""

    network: typing.Annotated[str, _key_of("build", "NETWORKS", also=", FILE.py:NAME", more=_names_a_file)] = "uvit"
    patch_size: Count = 4  # side of a patch in pixels (in Haar coefficients for a wavelet model)
    wavelet_scale: Natural = 0  # 0: U-ViT on pixels; s > 0: on Haar coefficients, detail patches s times as wide
    width: Count = 512  # width of a token
    depth: typing.Annotated[int, _between(1, 1_000)] = 13  # blocks; for a U-ViT, 2k and 2k + 1 are the same network
    heads: Count = 8  # attention heads
    mlp_ratio: float = 4.0  # hidden width of an MLP divided by width
    qv_bias: bool = False  # give queries and values a bias; U-ViT only
    num_classes: Natural = 0  # 0: unconditional
    time_mlp: bool = False  # pass the time embedding through an MLP; U-ViT only
    jit: Jit = Jit()
    dtype: Dtype = "auto"  # of the computation; auto: bfloat16 on TPUs and GPUs, float32 on CPU
    outer_blocks: Natural = 0  # k: hidden patches skip all but the first and last k blocks; 0: they are dropped
    returning: typing.Annotated[str, _one_of("itself", "token")] = "itself"  # what hidden patches re-enter as
    attention: typing.Annotated[str, _key_of("models.ops.attention", "KERNELS")] = "auto"  # auto: by platform


@dataclasses.dataclass(frozen=True)
class Flow:
    """Times and noise of flow matching; see `diffusion.process.flow`."""

    times: str = "logit_normal"  # in training: logit_normal or uniform
    mean: float = -0.8  # of logit(t), for logit_normal
    std: NonNegative = 0.8  # of logit(t), for logit_normal
    noise_scale: Positive = 1.0  # standard deviation of the noise; JiT takes image side / 256


@dataclasses.dataclass(frozen=True)
class Edm:
    """Noise levels of EDM; see `diffusion.process.edm`."""

    mean: float = -1.2  # of log(sigma) in training
    std: NonNegative = 1.2  # of log(sigma) in training
    sigma_data: Positive = 0.5  # standard deviation of the data
    sigma_min: Positive = 0.002  # lowest noise level of sampling
    sigma_max: Positive = 80.0  # highest noise level of sampling
    rho: Positive = 7.0  # exponent of the spacing of noise levels; 1: equal steps


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Process, objective and loss; see `diffusion.process`. The schedule and its weights are of ddpm."""

    process: typing.Annotated[str, _key_of("diffusion.process", "PROCESSES")] = "ddpm"
    flow: Flow = Flow()
    edm: Edm = Edm()
    timesteps: typing.Annotated[int, _between(1, 100_000)] = 1000  # T
    schedule: typing.Annotated[str, _key_of("diffusion.gaussian", "SCHEDULES")] = "cosine"
    shift_size: Count = 64  # image side that shifted_cosine is shifted for
    objective: typing.Annotated[str, _key_of("diffusion.gaussian", "OBJECTIVES")] = "noise"  # what the network predicts
    loss: typing.Annotated[str, _key_of("diffusion.process", "LOSSES")] = "l2"
    loss_weight: typing.Annotated[str, _key_of("diffusion.gaussian", "LOSS_WEIGHTS")] = "p2"  # weight by time step
    loss_weight_gamma: float = 0.0  # gamma of the weight base^-gamma; 0: equal weights


@dataclasses.dataclass(frozen=True)
class Mask:
    """What is hidden; see `diffusion.masking.make_plan`."""

    kind: typing.Annotated[str, _key_of("diffusion.masking", "KINDS")] = "none"
    rate: float = 0.0  # hidden share, for patch and block
    block: int = 1  # side in patches, for block and strided
    crop: int = 1  # side in patches of the visible window, for crop
    tile: int = 0  # round visible patches up to fill tiles of this many tokens, such as 128; 0: no rounding


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run with its own number of steps, batch size, optimizer, EMA and mask."""

    steps: Count = 200_000
    continues: bool = False  # keep optimizer, EMA and learning rate schedule of the stage before; its mask may differ
    batch_size: Count = 256  # global, over all devices
    micro_batches: Count = 1  # sequential parts of a device's batch; more parts need less memory
    remat: bool = False  # recompute blocks in the backward pass: less memory, a third more FLOPs
    learning_rate: NonNegative = 2e-4
    warmup_steps: Natural = 0  # steps of linear warm-up from 0
    b1: Decay = 0.99  # decay of AdamW's first moment
    b2: Decay = 0.99  # decay of its second moment
    weight_decay: NonNegative = 0.03  # of every tensor but the learned token of `model.returning`
    clip_norm: NonNegative = 1.0  # global gradient norm; 0: off
    ema_decay: Decay = 0.999  # the law reference reaches 0.999 at step 31,723 and 0.9999 at step 1,000,100
    ema_every: Count = 1  # steps between updates of the EMA
    ema_law: EmaLaw = "reference"  # reference: equal to the weights up to step 100; plain: averages from the first step
    more_ema_decays: tuple[float, ...] = ()  # decays of further EMAs, named ema2, ema3, ...
    mask: Mask = Mask()
    detail_mask: Mask | None = None  # for the details of a wavelet model; None: the settings of mask
    shallow: Decay = 0.0  # share of the images that skip the inner blocks, without a label; for weak=shallow

    @property
    def hides(self) -> bool:
        """Whether it has a mask."""
        return any(mask is not None and mask.kind != "none" for mask in (self.mask, self.detail_mask))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled; see `diffusion.samplers`."""

    method: typing.Annotated[str, _key_of("diffusion.samplers", "SAMPLERS")] = "ddim"  # the sampler
    steps: Count = 250  # of all but ddpm, which takes all time steps; heun calls the network twice per step
    eta: Probability = 1.0  # noise of ddim: 0 is deterministic, 1 is like ddpm
    order: typing.Annotated[int, _one_of(1, 2, 3)] = 2  # order of dpm_solver
    spacing: typing.Annotated[str, _key_of("diffusion.samplers", "DPM_SPACINGS")] = "log_snr"  # of dpm_solver, for ddpm
    guidance: NonNegative = 0.0  # weight w of guidance, (1 + w) prediction - w weak prediction; 0: off
    weak: typing.Annotated[str, _one_of("unlabelled", "shallow", "sparse")] = "unlabelled"  # the weak prediction
    weak_rate: Rate = 0.5  # share of the patches that skip the inner blocks with weak=sparse
    guidance_from: Probability = 0.0  # progress, 0 (noise) to 1 (image), from which guidance acts
    guidance_to: Probability = 1.0  # progress up to which it acts
    churn: NonNegative = 0.0  # of heun and euler with edm: noise added per step, S_churn; 0: none
    churn_low: NonNegative = 0.0  # lowest noise level at which churn acts
    churn_high: NonNegative = 1e6  # highest noise level at which churn acts
    churn_scale: NonNegative = 1.0  # standard deviation of churn's noise, S_noise


@dataclasses.dataclass(frozen=True)
class Preview:
    """Sample grids during training."""

    every: Natural = 10_000  # steps; 0: at the end of a stage only
    rows: Count = 4  # in a conditional model, each shows one class
    columns: Count = 4


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics of the EMA's samples during training; see `evaluation.evaluate`."""

    every: Natural = 0  # steps; also at the end of each stage; 0: never
    n: Count = 10_000  # samples
    metrics: tuple[str, ...] = ("fid",)  # of fid, kid, is, pr; or of fd_lite0, kid_lite0, pr_lite0
    reference: str = ""  # images or statistics to compare with; "": the training images
    inception_weights: str = ""  # path; "": downloaded once


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save and what to keep."""

    every: Count = 10_000  # steps
    keep: Count = 2  # newest checkpoints to keep, besides the last of each stage


@dataclasses.dataclass(frozen=True)
class Log:
    """Where metrics go, besides the console and metrics.jsonl."""

    every: Count = 100  # steps
    tensorboard: bool = True
    wandb: bool = False  # needs `pip install wandb`


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis of the mesh."""

    data: typing.Annotated[int, Rule(lambda value: value == -1 or value >= 1, "-1 or at least 1")] = -1  # -1: the rest
    fsdp: Count = 1  # devices over which parameters, EMA and optimizer state are sharded


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: Seed = 0  # of weights, data order, masks, time steps and noise
    init_from: str = ""  # run, checkpoint, .pt or .safetensors to take weights from; "" starts with new weights
    data: Data = Data()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    sampling: Sampling = Sampling()
    preview: Preview = Preview()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    mesh: MeshShape = MeshShape()
    stages: tuple[str, ...] = ()  # names of the stages to run, in order
    stage: dict[str, Stage] = dataclasses.field(default_factory=dict, hash=False)  # by name, as `stages` lists them

    def untrained(self, weak: str) -> str:
        """What training lacks for a weak prediction of guidance; see `sampling.weak`.

        Returns "" if it lacks nothing, or if the weights may have been trained for it elsewhere.
        """
        stages = [self.stage[name] for name in self.stages]
        trained = {
            "unlabelled": (self.data.label_dropout, "data.label_dropout above 0, such as 0.1"),
            "shallow": (any(stage.shallow for stage in stages), "a stage with shallow above 0, such as 0.1"),
            "sparse": (any(stage.hides for stage in stages), "a stage with a mask"),
        }
        enough, wanted = trained[weak]
        return "" if enough or self.init_from or self.data.path == UNKNOWN else wanted


# --- Recipes --------------------------------------------------------------------------------------


def default() -> ConfigDict:
    """All settings at their defaults, and no stage. Recipes start from this."""
    return ConfigDict(to_dict(Config()) | {"stages": ()})


def stage(**changes) -> ConfigDict:
    """A stage with the defaults of `Stage`, except for `changes`; a `mask` comes from `patch`, `block`, ..."""
    return ConfigDict(dataclasses.asdict(Stage()) | changes)


def patch(rate: float) -> dict:
    """A mask that hides int(rate * N) single patches."""
    return dataclasses.asdict(Mask("patch", rate=rate))


def block(rate: float, block: int) -> dict:
    """A mask that hides a share `rate` of the patches, in blocks of block x block."""
    return dataclasses.asdict(Mask("block", rate=rate, block=block))


def strided(block: int) -> dict:
    """A mask that shows one patch of each group of block x block."""
    return dataclasses.asdict(Mask("strided", block=block))


def crop(side: int) -> dict:
    """A mask that shows one window of side x side patches."""
    return dataclasses.asdict(Mask("crop", crop=side))


# --- Reading --------------------------------------------------------------------------------------


def parse(config) -> Config:
    """Check a ConfigDict (or dict) and freeze it. Missing settings take their defaults.

    Raises:
      ConfigError: a key is unknown, or a value has the wrong type or is invalid.
    """
    if not isinstance(config, (ConfigDict, dict)):
        raise ConfigError(f"the config must be a ConfigDict, not {config!r}")
    raw = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    known = {name for name in _fields(Config) if name != "stage"}
    names = raw.get("stages", ())
    sections = {k: raw.pop(k) for k in list(raw) if k not in known and (isinstance(raw[k], dict) or k in names)}
    top = _read(Config, "config", raw, known)
    if not top.get("stages"):
        raise ConfigError(f"config.stages is empty; name at least one stage, this config has {sorted(sections)}")
    stages = {name: _build(Stage, f"config.{name}", section) for name, section in sections.items()}
    for name, section in sections.items():
        if name not in top["stages"] and not section.keys() >= _fields(Stage).keys():  # a stage of a recipe has all
            close = difflib.get_close_matches(name, [*top["stages"], *known], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"config.stages is {top['stages']}"
            raise ConfigError(f"config.{name} is neither a section of settings nor a stage to run; {hint}")
    for name in top["stages"]:
        if name not in stages:
            raise ConfigError(f"config.stages names {name!r}, but the config has only {sorted(sections)}")
    if len(set(top["stages"])) < len(top["stages"]):
        raise ConfigError(f"config.stages names a stage twice: {top['stages']}; give each its own section")
    parsed = Config(**top, stage={name: stages[name] for name in top["stages"]})
    _check(parsed)
    return parsed


def _fields(cls) -> dict:
    return {field.name: field.type for field in dataclasses.fields(cls)}


def _build(cls, path: str, raw):
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must be a dict of settings, not {raw!r}")
    return cls(**_read(cls, path, raw, _fields(cls)))


def _read(cls, path: str, raw: dict, known) -> dict:
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{path}.{key} is not a setting; {hint}")
    return {key: _value(f"{path}.{key}", value, _fields(cls)[key]) for key, value in raw.items()}


def _text(rule: Rule) -> str:
    return rule.text() if callable(rule.text) else rule.text


def _value(path: str, value, kind):
    if typing.get_origin(kind) is typing.Annotated:
        kind, rule = typing.get_args(kind)
        value = _value(path, value, kind)
        if not rule.holds(value):
            raise ConfigError(f"{path} is {value!r}; it must be {_text(rule)}")
        return value
    if dataclasses.is_dataclass(kind):
        return _build(kind, path, value)
    if isinstance(kind, types.UnionType):  # a dataclass or None
        return None if value is None else _value(path, value, typing.get_args(kind)[0])
    if typing.get_origin(kind) is tuple:
        of, example = typing.get_args(kind)[0], "names, such as ('pretrain', 'finetune')"
        example = example if of is str else "numbers, such as (0.9996,)"
        if not isinstance(value, (tuple, list)) or not all(isinstance(v, of) for v in value):
            raise ConfigError(f"{path} must be a tuple of {example}, not {value!r}")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} is {value}; it must be a finite number")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{path} must be a {kind.__name__}, not {value!r}")
    return value


# --- Constraints between settings -----------------------------------------------------------------


def _need(ok: bool, path: str, value, text: str) -> None:
    if not ok:
        raise ConfigError(f"config.{path} is {value!r}; it must be {text}")


def _check(config: Config) -> None:
    data, diffusion = config.data, config.diffusion
    _need(bool(data.path), "data.path", data.path, "the path or address of images, or 'digits'")
    _need(len(set(data.classes)) == len(data.classes), "data.classes", data.classes, "without repetitions")
    _check_model(config)
    _check_labels(config)
    if diffusion.schedule == "linear":  # scaled by 1000 / T, its last beta, 0.02, reaches 1 at T = 20
        more = "more than 20 for the linear schedule"
        _need(diffusion.timesteps > 20, "diffusion.timesteps", diffusion.timesteps, more)
    if diffusion.process == "ddpm":
        limit = f"1 to config.diffusion.timesteps = {diffusion.timesteps}"
        _need(config.sampling.steps <= diffusion.timesteps, "sampling.steps", config.sampling.steps, limit)
    for before, name in zip(("", *config.stages), config.stages, strict=False):
        if config.stage[name].continues:
            _check_continues(config, before, name)
    for name, stage in config.stage.items():
        decays = stage.more_ema_decays
        _need(all(0 <= decay < 1 for decay in decays), f"{name}.more_ema_decays", decays, "numbers in [0, 1)")
        divisor = f"a divisor of batch_size {stage.batch_size}"
        _need(stage.batch_size % stage.micro_batches == 0, f"{name}.micro_batches", stage.micro_batches, divisor)
        if stage.detail_mask and not config.model.wavelet_scale:
            raise ConfigError(f"config.{name}.detail_mask is for wavelet models, but config.model.wavelet_scale is 0")


def _check_continues(config: Config, before: str, name: str) -> None:
    if not before:
        raise ConfigError(f"config.{name}.continues is True, but {name} is the first stage; there is none to continue")
    free = ("steps", "continues", "batch_size", "micro_batches", "remat", "mask", "detail_mask", "shallow")
    for field in _fields(Stage).keys() - set(free):
        old, new = (getattr(config.stage[stage], field) for stage in (before, name))
        _need(old == new, f"{name}.{field}", new, f"{old!r} as in {before}, which it continues")


def _check_model(config: Config) -> None:
    size, model = config.data.image_size, config.model
    if model.wavelet_scale:
        unit = 2 * model.patch_size * model.wavelet_scale
        text = f"a multiple of 2 * patch_size * wavelet_scale = {unit}"
        _need(size % unit == 0, "data.image_size", size, text)
    sides = [p for p in range(1, size + 1) if size % p == 0]
    text = f"a divisor of data.image_size {size}: {sides}"
    _need(model.patch_size in sides, "model.patch_size", model.patch_size, text)
    even = "even (the time embedding is half cosines, half sines)"
    _need(model.width % 2 == 0, "model.width", model.width, even)
    _need(model.width % model.heads == 0, "model.heads", model.heads, f"a divisor of model.width {model.width}")
    if model.network != "uvit":
        _need(not model.wavelet_scale, "model.wavelet_scale", model.wavelet_scale, "0 for another network than a U-ViT")
    if model.network == "jit":
        rotated = "such that model.width / model.heads is a multiple of 4"
        _need(model.width // model.heads % 4 == 0, "model.heads", model.heads, rotated)
        later = f"below model.depth {model.depth}"
        _need(
            model.jit.class_tokens_from < model.depth, "model.jit.class_tokens_from", model.jit.class_tokens_from, later
        )
    blocks = model.depth if model.network == "jit" else model.depth | 1
    half = f"below half of the {blocks} blocks, or no block is left for hidden patches to skip"
    _need(2 * model.outer_blocks < blocks, "model.outer_blocks", model.outer_blocks, half)
    if model.outer_blocks and _names_a_file(model.network):
        raise ConfigError("config.model.outer_blocks must be 0 for a network of one's own")
    if model.returning == "token" and not model.outer_blocks:
        raise ConfigError("config.model.returning is 'token', but config.model.outer_blocks is 0")
    least = f"at least 1 / model.width = {1 / model.width:.2g}"
    _need(int(model.mlp_ratio * model.width) >= 1, "model.mlp_ratio", model.mlp_ratio, least)


def _check_labels(config: Config) -> None:
    data, model, guidance = config.data, config.model, config.sampling.guidance
    trained_shallow = [name for name, stage in config.stage.items() if stage.shallow]
    unlabelled = data.label_dropout or (guidance and config.sampling.weak != "sparse") or trained_shallow
    if model.wavelet_scale and model.num_classes and unlabelled:
        raise ConfigError(
            "a wavelet model (config.model.wavelet_scale) has no token for 'no label', as in the reference; set "
            "config.data.label_dropout and the stages' shallow to 0, and config.sampling.guidance to 0 or its weak to "
            "'sparse'"
        )
    if trained_shallow and not model.outer_blocks:
        raise ConfigError(f"config.{trained_shallow[0]}.shallow needs config.model.outer_blocks above 0")
    if data.labels != (model.num_classes > 0):
        raise ConfigError(
            f"config.data.labels is {data.labels} but config.model.num_classes is {model.num_classes}; set both for a "
            "conditional model, or --config.data.labels=False and --config.model.num_classes=0 for an unconditional one"
        )
    weak = config.sampling.weak
    if guidance and weak == "unlabelled" and not model.num_classes:
        raise ConfigError(
            "config.sampling.guidance needs a conditional model, and config.model.num_classes is 0; with "
            "config.model.outer_blocks, set config.sampling.weak to 'sparse' or 'shallow'"
        )
    if guidance and weak != "unlabelled" and not model.outer_blocks:
        raise ConfigError(f"config.sampling.weak is {weak!r}, which needs config.model.outer_blocks above 0")


def steps_before(config: Config, name: str) -> int:
    """Steps of the stages that stage `name` continues, with the same optimizer and EMA."""
    total, chain = 0, list(config.stages[: config.stages.index(name) + 1])
    while len(chain) > 1 and config.stage[chain.pop()].continues:
        total += config.stage[chain[-1]].steps
    return total


# --- Showing --------------------------------------------------------------------------------------


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


def describe(config: Config) -> str:
    """Every setting of a run as a command-line flag with its comment, one per line."""
    lines = []

    def add(node, prefix):
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(type(node)), re.MULTILINE))
        for name, kind in _fields(type(node)).items():
            value = getattr(node, name)
            if dataclasses.is_dataclass(value):
                add(value, f"{prefix}{name}.")
            elif name != "stage":
                line = f"--{prefix}{name}={value!r}"
                rules = [_text(rule) for rule in typing.get_args(kind)[1:] if isinstance(rule, Rule)]
                choices = [text for text in rules if text.startswith("one of")]
                about = "; ".join(([comments[name]] if name in comments else []) + choices)
                lines.append(f"{line:48}# {about}" if about else line)

    add(config, "config.")
    for name, stage in config.stage.items():
        add(stage, f"config.{name}.")
    return "\n".join(lines)
