"""Build the parts of a run from its settings: network, noise schedule, mask plans, sampler. Errors name the setting."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from flax import nnx

from maskdm_jax.config import Config, Model
from maskdm_jax.diffusion import masking, samplers
from maskdm_jax.diffusion.gaussian import Schedule, make_schedule
from maskdm_jax.errors import ConfigError, SamplingError, prefixed
from maskdm_jax.models.backbone import extra_tokens
from maskdm_jax.models.ops.attention import KERNELS
from maskdm_jax.models.representation import make_representation
from maskdm_jax.models.uvit import UViT
from maskdm_jax.models.wavelet_uvit import WaveletUViT


@dataclasses.dataclass(frozen=True)
class Network:
    """A network without its parameters, used functionally: a graphdef and a plain dict of parameters."""

    graphdef: nnx.GraphDef
    make: typing.Callable  # rngs -> module
    dtype: jnp.dtype  # of the computation
    shapes: dict = dataclasses.field(compare=False)  # ShapeDtypeStructs of the parameters

    def init(self, key) -> dict:
        """Initial parameters, a nested dict of float32 arrays. Call it under `jax.jit` to place them."""
        return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(key)), nnx.Param))

    def apply(self, params, x, t, labels=None, positions=None):
        """See `UViT.__call__` and `WaveletUViT.__call__`."""
        return nnx.merge(self.graphdef, params)(x, t, labels, positions)

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
    model = config.model
    if model.attention not in ("auto", *KERNELS):
        names = ", ".join(("auto", *KERNELS))
        raise ConfigError(f"config.model.attention is {model.attention!r}; it must be one of {names}")
    if model.attention == "cudnn" and (model.dtype == "float32" or model.width // model.heads % 8):
        raise ConfigError("config.model.attention 'cudnn' is for bfloat16 and heads whose width is a multiple of 8")
    return _network(model, config.data.image_size, config.data.channels, remat)


@functools.lru_cache(maxsize=8)
def _network(model: Model, image_size: int, channels: int, remat: bool) -> Network:
    fields = dataclasses.asdict(model) | dict(image_size=image_size, channels=channels, remat=remat)
    fields["dtype"] = jnp.dtype(model.dtype)
    scale = fields.pop("wavelet_scale")

    def make(rngs):
        return WaveletUViT(scale=scale, **fields, rngs=rngs) if scale else UViT(**fields, rngs=rngs)

    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    return Network(nnx.graphdef(abstract), make, fields["dtype"], nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))


def noise_schedule(config: Config) -> Schedule:
    """The noise schedule of `config.diffusion`.

    Raises:
      ConfigError: its name is unknown.
    """
    diffusion = config.diffusion
    with prefixed(ConfigError, "config.diffusion."):
        return make_schedule(diffusion.schedule, diffusion.timesteps, size=diffusion.shift_size)


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
    plans, extras = [], extra_tokens(config.model.num_classes)
    for (name, mask), grid in zip(masks.items(), grids(config), strict=True):
        if mask.tile and config.model.wavelet_scale:
            raise ConfigError(f"config.{stage}.{name}.tile must be 0: the bands of a wavelet model share their tiles")
        with prefixed(ConfigError, f"config.{stage}.{name}: "):
            plans.append(masking.make_plan(grid=grid, extras=extras, **dataclasses.asdict(mask)))
    return tuple(plans)


def _ddim(settings, predict, x, noise, schedule, *, start, **options):
    steps = settings.steps if start is None else min(settings.steps, start + 1)
    return samplers.ddim(predict, x, noise, schedule, start=start, steps=steps, eta=settings.eta, **options)


def _ddpm(settings, predict, x, noise, schedule, *, start, **options):
    return samplers.ddpm(predict, x, noise, schedule, start=start, **options)


def _dpm_solver(settings, predict, x, noise, schedule, *, start, **options):
    if start is not None:
        raise SamplingError("dpm_solver starts from pure noise only; use ddim or ddpm")
    options |= dict(steps=settings.steps, order=settings.order, spacing=settings.spacing)
    return samplers.dpm_solver(predict, x, schedule, **options)


# By `config.sampling.method`. Each takes (settings, predict, x_T, noise, schedule, start, objective, clip), returns x0.
SAMPLERS = {"ddim": _ddim, "ddpm": _ddpm, "dpm_solver": _dpm_solver}


def make_sampler(config: Config, network: Network):
    """Build `sample(params, x, noise, labels=None, start=None)` -> x0 by `config.sampling`; see `diffusion.samplers`.

    Raises:
      ConfigError: the method or the spacing is unknown.
      SamplingError: raised by `sample` if `start` is given and the sampler does not support it.
    """
    settings, clip, schedule = config.sampling, make_representation(config).clip, noise_schedule(config)
    for name, table in (("method", SAMPLERS), ("spacing", samplers.DPM_SPACINGS)):
        if getattr(settings, name) not in table:
            value = getattr(settings, name)
            raise ConfigError(f"config.sampling.{name} is {value!r}; it must be one of {', '.join(table)}")
    run, objective = SAMPLERS[settings.method], config.diffusion.objective

    def sample(params, x, noise, labels=None, start=None):
        def predict(x, t):
            return network.apply(params, x, t, labels)

        if settings.guidance:
            predict = samplers.guided(predict, lambda x, t: network.apply(params, x, t), settings.guidance)
        return run(settings, predict, x, noise, schedule, start=start, objective=objective, clip=clip)

    return sample
