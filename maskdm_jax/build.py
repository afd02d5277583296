"""Build the parts of a run from its settings: network, process, mask plans, sampler. Errors name the setting."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from flax import nnx

from maskdm_jax.config import Config, Model, Sampling
from maskdm_jax.diffusion import masking, samplers
from maskdm_jax.diffusion.gaussian import Schedule, loss_weights, make_schedule
from maskdm_jax.diffusion.process import LOSSES, Process, ddpm, edm, flow
from maskdm_jax.errors import ConfigError, SamplingError, prefixed
from maskdm_jax.models.backbone import extra_tokens
from maskdm_jax.models.jit import JiT
from maskdm_jax.models.ops.attention import KERNELS
from maskdm_jax.models.representation import make_representation
from maskdm_jax.models.uvit import UViT
from maskdm_jax.models.wavelet_uvit import WaveletUViT


@dataclasses.dataclass(frozen=True)
class Network:
    """A network without its parameters, used functionally: a graphdef and a plain dict of parameters."""

    graphdef: nnx.GraphDef
    make: typing.Callable  # (rngs=) -> module
    dtype: jnp.dtype  # of the computation
    shapes: dict = dataclasses.field(compare=False)  # ShapeDtypeStructs of the parameters

    def init(self, key) -> dict:
        """Initial parameters, a nested dict of float32 arrays. Call it under `jax.jit` to place them."""
        return nnx.to_pure_dict(nnx.state(self.make(rngs=nnx.Rngs(key)), nnx.Param))

    def apply(self, params, x, t, labels=None, positions=None, **options):
        """See `UViT.__call__`, `WaveletUViT.__call__` and `JiT.__call__`."""
        return nnx.merge(self.graphdef, params)(x, t, labels, positions, **options)

    def cast(self, params) -> dict:
        """Cast matrices to the compute dtype, so that repeated calls of `apply` need not cast them."""
        is_matrix = lambda path: path[-1].key == "kernel"
        cast = lambda path, leaf: leaf.astype(self.dtype) if is_matrix(path) else leaf
        return jax.tree_util.tree_map_with_path(cast, params)

    def abstract_params(self) -> dict:
        """ShapeDtypeStructs of the parameters; nothing is computed."""
        return jax.tree.map(lambda leaf: leaf, self.shapes)


def make_network(config: Config, *, remat: bool = False) -> Network:
    """Build the network of a config; `remat` recomputes its blocks in the backward pass.

    Raises:
      ConfigError: the attention kernel is unknown or does not support the model's dtype or head size.
    """
    model = dataclasses.replace(config.model, dtype=compute_dtype(config.model))
    if model.attention not in ("auto", *KERNELS):
        names = ", ".join(("auto", *KERNELS))
        raise ConfigError(f"config.model.attention is {model.attention!r}; it must be one of {names}")
    if model.attention == "cudnn" and (model.dtype == "float32" or model.width // model.heads % 8):
        raise ConfigError("config.model.attention 'cudnn' is for bfloat16 and heads whose width is a multiple of 8")
    return _network(model, config.data.image_size, config.data.channels, remat)


def compute_dtype(model: Model, platform: str = "") -> str:
    """The dtype that a model computes in on a platform of JAX, this machine's by default."""
    if model.dtype != "auto":
        return model.dtype
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


@functools.lru_cache(maxsize=8)
def _network(model: Model, image_size: int, channels: int, remat: bool) -> Network:
    fields = dataclasses.asdict(model) | dict(image_size=image_size, channels=channels, remat=remat)
    fields["dtype"] = jnp.dtype(model.dtype)
    kind, scale, jit = (fields.pop(name) for name in ("network", "wavelet_scale", "jit"))
    if kind == "jit":
        del fields["qv_bias"], fields["time_mlp"]
        make = functools.partial(JiT, **fields, **jit)
    elif scale:
        make = functools.partial(WaveletUViT, scale=scale, **fields)
    else:
        make = functools.partial(UViT, **fields)
    abstract = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    return Network(nnx.graphdef(abstract), make, fields["dtype"], nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))


def noise_schedule(config: Config) -> Schedule:
    """The noise schedule of `config.diffusion`, for the process `ddpm`.

    Raises:
      ConfigError: its name is unknown.
    """
    diffusion = config.diffusion
    with prefixed(ConfigError, "config.diffusion."):
        return make_schedule(diffusion.schedule, diffusion.timesteps, size=diffusion.shift_size)


def _ddpm_process(config: Config) -> Process:
    diffusion, schedule = config.diffusion, noise_schedule(config)
    weights = loss_weights(schedule, diffusion.loss_weight, diffusion.loss_weight_gamma)
    weights = weights if diffusion.loss_weight_gamma else None
    return ddpm(schedule, objective=diffusion.objective, weights=weights)


def _flow_process(config: Config) -> Process:
    options = dataclasses.asdict(config.diffusion.flow)
    return flow(objective=config.diffusion.objective, time_scale=_time_scale(config), **options)


def _edm_process(config: Config) -> Process:
    if config.diffusion.objective != "x0":
        raise ValueError(f"objective is {config.diffusion.objective!r}; it must be x0 for edm")
    return edm(time_scale=_time_scale(config), **dataclasses.asdict(config.diffusion.edm))


def _time_scale(config: Config) -> float:
    """A JiT is told the time as it is; a U-ViT takes times of up to 1,000."""
    return 1.0 if config.model.network == "jit" else 1000.0


PROCESSES = {"ddpm": _ddpm_process, "flow": _flow_process, "edm": _edm_process}  # by `config.diffusion.process`


def make_process(config: Config) -> Process:
    """Build the diffusion process of a config.

    Raises:
      ConfigError: a setting of `config.diffusion` is unknown or does not fit the process.
    """
    diffusion = config.diffusion
    for name, table in (("process", PROCESSES), ("loss", LOSSES)):
        if getattr(diffusion, name) not in table:
            value = getattr(diffusion, name)
            raise ConfigError(f"config.diffusion.{name} is {value!r}; it must be one of {', '.join(table)}")
    with prefixed(ConfigError, "config.diffusion."):
        return PROCESSES[diffusion.process](config)


def grids(config: Config) -> tuple[tuple[int, int], ...]:
    """Rows and columns of patches, of the image or of each band of a wavelet model."""
    side, scale = config.data.image_size // config.model.patch_size, config.model.wavelet_scale
    if not scale:
        return ((side, side),)
    return ((side // 2, side // 2), (side // 2 // scale, side // 2 // scale))


def mask_plans(config: Config, stage: str) -> tuple[masking.MaskPlan, ...]:
    """The mask plans of a stage: one, or one for each band of a wavelet model.

    Raises:
      ConfigError: a mask does not fit the grid of patches.
    """
    masks = {"mask": config.stage[stage].mask}
    if config.model.wavelet_scale:
        masks["detail_mask"] = config.stage[stage].detail_mask or config.stage[stage].mask
    model = config.model
    plans, extras = [], model.jit.class_tokens if model.network == "jit" else extra_tokens(model.num_classes)
    for (name, mask), grid in zip(masks.items(), grids(config), strict=True):
        if mask.tile and config.model.wavelet_scale:
            raise ConfigError(f"config.{stage}.{name}.tile must be 0: the bands of a wavelet model share their tiles")
        with prefixed(ConfigError, f"config.{stage}.{name}: "):
            plans.append(masking.make_plan(grid=grid, extras=extras, **dataclasses.asdict(mask)))
    return tuple(plans)


def _ddim(settings, predict, x, noise, process, *, start, clip):
    steps = settings.steps if start is None else min(settings.steps, start + 1)
    options = dict(objective=process.objective, clip=clip, start=start, steps=steps, eta=settings.eta)
    return samplers.ddim(predict, x, noise, process.schedule, **options)


def _ddpm(settings, predict, x, noise, process, *, start, clip):
    return samplers.ddpm(predict, x, noise, process.schedule, objective=process.objective, clip=clip, start=start)


def _dpm_solver(settings, predict, x, noise, process, *, start, clip):
    if start is not None:
        raise SamplingError("dpm_solver starts from pure noise only; use ddim or ddpm, or heun or euler")
    options = dict(clip=clip, steps=settings.steps, order=settings.order)
    if process.schedule is None:
        return samplers.continuous_dpm_solver(predict, x, process, **options)
    options |= dict(objective=process.objective, spacing=settings.spacing)
    return samplers.dpm_solver(predict, x, process.schedule, **options)


def _ode(settings, predict, x, noise, process, *, start, clip):
    churn = samplers.Churn(settings.churn, settings.churn_low, settings.churn_high, settings.churn_scale)
    options = dict(steps=settings.steps, heun=settings.method == "heun", churn=churn, start=start)
    return samplers.ode(predict, x, noise, process, **options)


# By `config.sampling.method`: (settings, predict, noise, noise function, process, start, clip) -> x0.
DISCRETE = {"ddim": _ddim, "ddpm": _ddpm, "dpm_solver": _dpm_solver}
CONTINUOUS = {"heun": _ode, "euler": _ode, "dpm_solver": _dpm_solver}


def make_sampler(config: Config, network: Network):
    """Build `sample(params, x, noise, labels=None, start=None)` -> x0 by `config.sampling`; see `diffusion.samplers`.

    Raises:
      ConfigError: the method is unknown or not for the process, or the spacing is unknown.
      SamplingError: raised by `sample` if `start` is given and the sampler does not support it.
    """
    settings, clip, process = config.sampling, make_representation(config).clip, make_process(config)
    methods = CONTINUOUS if process.schedule is None else DISCRETE
    for name, table in (("method", methods), ("spacing", samplers.DPM_SPACINGS)):
        if getattr(settings, name) not in table:
            value, of = getattr(settings, name), f" for the process {config.diffusion.process}"
            raise ConfigError(f"config.sampling.{name} is {value!r}; it must be one of {', '.join(table)}{of}")
    if settings.churn and config.diffusion.process != "edm":
        raise ConfigError(f"config.sampling.churn is {settings.churn:g}; only the process edm takes it, others take 0")

    def sample(params, x, noise, labels=None, start=None):
        def predict(x, t, labels=labels):
            return network.apply(params, *process.told(x, t), labels)

        if settings.guidance:
            predict = samplers.guided(predict, functools.partial(predict, labels=None), _guidance(settings, process))
        return methods[settings.method](settings, predict, x, noise, process, start=start, clip=clip)

    return sample


def _guidance(settings: Sampling, process: Process):
    """The weight of guidance: a number, or a function of the time if it acts in an interval."""
    low, high = settings.guidance_from, settings.guidance_to
    if (low, high) == (0, 1):
        return settings.guidance

    def weight(t):
        along = process.progress(t)
        return jnp.where(((along > low) | (low == 0)) & (along < high), settings.guidance, 0.0)

    return weight
