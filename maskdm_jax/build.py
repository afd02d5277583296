"""Build the parts of a run from its settings: network, process, mask plans, sampler. Errors name the setting."""

import dataclasses
import functools
import os
import runpy
import typing

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskdm_jax.config import Config, Model, Sampling
from maskdm_jax.diffusion import masking, samplers
from maskdm_jax.diffusion.gaussian import Schedule, make_schedule
from maskdm_jax.diffusion.process import PROCESSES, Process
from maskdm_jax.diffusion.samplers import SAMPLERS
from maskdm_jax.errors import ConfigError, SamplingError, prefixed
from maskdm_jax.models.backbone import extra_tokens
from maskdm_jax.models.jit import JiT
from maskdm_jax.models.representation import make_representation
from maskdm_jax.models.uvit import UViT
from maskdm_jax.models.wavelet_uvit import WaveletUViT


@dataclasses.dataclass(frozen=True)
class Network:
    """A network without its parameters, which are a nested dict of float32 arrays."""

    init: typing.Callable  # key -> initial parameters; call it under `jax.jit` to place them
    apply: typing.Callable  # (params, x, t, labels=None, positions=None, **options) -> output; see `UViT.__call__`
    dtype: jnp.dtype  # of the computation
    shapes: dict = dataclasses.field(compare=False)  # ShapeDtypeStructs of the parameters

    def cast(self, params) -> dict:
        """Cast matrices to the compute dtype, so that repeated calls of `apply` need not cast them."""
        is_matrix = lambda path: path[-1].key == "kernel"
        cast = lambda path, leaf: leaf.astype(self.dtype) if is_matrix(path) else leaf
        return jax.tree_util.tree_map_with_path(cast, params)

    def abstract_params(self) -> dict:
        """A copy of `shapes`, which callers may change."""
        return jax.tree.map(lambda leaf: leaf, self.shapes)


def make_network(config: Config, *, remat: bool = False) -> Network:
    """Build the network of a config; `remat` recomputes its blocks in the backward pass.

    `config.model.network` is one of `NETWORKS`, or FILE.py:NAME for a network of one's own, made by NAME(model,
    image_size, channels) with `config.model`: an nnx.Module class, which also takes `rngs`, or any function or class
    whose result has `init(key, x, t, labels)` -> params and `apply(params, x, t, labels, positions)`, such as a Linen
    module. x is a batch of images [B, S, S, C], or of visible patches [B, V, p*p*C] with their indices `positions` [B,
    V]; t is [B], labels int32 [B] (-1: none) or None. The output has x's shape.

    Raises:
      ConfigError: the attention kernel does not support the model's dtype or head size, or the file has no such
        network.
    """
    model = dataclasses.replace(config.model, dtype=compute_dtype(config.model))
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
    dtype = jnp.dtype(model.dtype)
    if model.network not in NETWORKS:
        if remat:
            raise ConfigError("a stage's remat must be False for a network of one's own, which can use jax.checkpoint")
        network = _own_network(model, image_size, channels)
        _check_shapes(network, model, image_size, channels)
        return network
    names = ("patch_size", "width", "depth", "heads", "mlp_ratio", "num_classes", "attention")
    common = {name: getattr(model, name) for name in names}
    common |= dict(image_size=image_size, channels=channels, dtype=dtype, remat=remat)
    common |= dict(outer=model.outer_blocks, mask_token=model.returning == "token")
    return _from_nnx(functools.partial(NETWORKS[model.network](model), **common), dtype)


def _uvit(model: Model):
    options = dict(qv_bias=model.qv_bias, time_mlp=model.time_mlp)
    if model.wavelet_scale:
        return functools.partial(WaveletUViT, scale=model.wavelet_scale, **options)
    return functools.partial(UViT, **options)


# By `config.model.network`: `config.model` -> the network, without the arguments that all networks have.
NETWORKS = {"uvit": _uvit, "jit": lambda model: functools.partial(JiT, **dataclasses.asdict(model.jit))}


def _from_nnx(make, dtype) -> Network:
    """The network of a function (rngs=) -> nnx.Module."""
    abstract = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    graphdef = nnx.graphdef(abstract)

    def apply(params, x, t, labels=None, positions=None, **options):
        return nnx.merge(graphdef, params)(x, t, labels, positions, **options)

    init = lambda key: nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(key)), nnx.Param))
    return Network(init, apply, dtype, nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))


def _own_network(model: Model, image_size: int, channels: int) -> Network:
    """The network of a user's file; see `make_network`.

    Raises:
      ConfigError: there is no such file, it cannot be run, or has no such name.
    """
    file, _, name = model.network.rpartition(":")
    if not os.path.isfile(file):
        raise ConfigError(f"config.model.network: there is no file {file!r} in {os.getcwd()}; its path is as given")
    with prefixed(ConfigError, f"config.model.network: {file} cannot be run (", Exception, ")"):
        names = runpy.run_path(file)
    if name not in names:
        own = [key for key, value in names.items() if getattr(value, "__module__", "") == "<run_path>"]
        raise ConfigError(f"config.model.network: {file} defines no {name}, but {', '.join(own) or 'nothing'}")
    make, dtype = names[name], jnp.dtype("float32")  # it may compute in any dtype, so `cast` must not round
    with prefixed(ConfigError, f"config.model.network: {model.network} cannot be built (", Exception, ")"):
        if isinstance(make, type) and issubclass(make, nnx.Module):
            return _from_nnx(functools.partial(make, model, image_size, channels), dtype)
        module = make(model, image_size, channels)
        labels = jnp.zeros(1, "int32") if model.num_classes else None
        init = lambda key: module.init(key, jnp.zeros((1, image_size, image_size, channels)), jnp.zeros(1), labels)
        return Network(init, module.apply, dtype, jax.eval_shape(init, jax.random.key(0)))


def _check_shapes(network: Network, model: Model, image_size: int, channels: int) -> None:
    """Trace a user's network on images and on visible patches.

    Raises:
      ConfigError: the network fails, its output does not have x's shape, or its parameters are not in nested dicts.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(network.shapes)]
    if not all(path and all(isinstance(key, jax.tree_util.DictKey) for key in path) for path in paths):
        raise ConfigError(f"config.model.network: {model.network} must keep its parameters in nested dicts of arrays")
    patches, labels = (image_size // model.patch_size) ** 2, jnp.zeros(2, "int32") if model.num_classes else None
    visible = np.zeros((2, max(1, patches // 2)), "int32")
    whole = (2, image_size, image_size, channels)
    for shape, positions in ((whole, None), ((*visible.shape, model.patch_size**2 * channels), visible)):
        x, t = jax.ShapeDtypeStruct(shape, "float32"), jnp.zeros(2)
        call = f"(x {list(shape)}, t, labels, positions {None if positions is None else list(positions.shape)})"
        with prefixed(ConfigError, f"config.model.network: {model.network} fails when called with {call}: ", Exception):
            out = jax.eval_shape(network.apply, network.abstract_params(), x, t, labels, positions)
        if getattr(out, "shape", None) != shape:
            shapes = jax.tree.map(lambda leaf: list(leaf.shape), out)
            raise ConfigError(
                f"config.model.network: {model.network} returns {shapes} for x of {list(shape)}; return x's shape"
            )


def noise_schedule(config: Config) -> Schedule:
    """The noise schedule of `config.diffusion`, for the process `ddpm`."""
    diffusion = config.diffusion
    return make_schedule(diffusion.schedule, diffusion.timesteps, size=diffusion.shift_size)


def make_process(config: Config) -> Process:
    """Build the diffusion process of a config.

    Raises:
      ConfigError: a setting of `config.diffusion` does not fit the process.
    """
    with prefixed(ConfigError, "config.diffusion."):
        return PROCESSES[config.diffusion.process](config.diffusion, time_scale(config.model))


def time_scale(model: Model) -> float:
    """Factor of the time input of a network for flow matching and EDM: 1 for a JiT, 1,000 for the others."""
    return 1.0 if model.network == "jit" else 1000.0


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


def make_sampler(config: Config, network: Network):
    """Build `sample(params, x, noise, labels=None, start=None)` -> x0 by `config.sampling`; see `diffusion.samplers`.

    Raises:
      ConfigError: the method is not for the process, or guidance hides nothing.
      SamplingError: raised by `sample` if `start` is given and the sampler does not support it.
    """
    settings, clip, process = config.sampling, make_representation(config).clip, make_process(config)
    sampler = SAMPLERS[settings.method]
    fitting = {name: other for name, other in SAMPLERS.items() if isinstance(process, other.process)}
    if settings.method not in fitting:
        of = f"{', '.join(fitting)} for the process {config.diffusion.process}"
        raise ConfigError(f"config.sampling.method is {settings.method!r}; it must be one of {of}")
    if settings.churn and config.diffusion.process != "edm":
        raise ConfigError(f"config.sampling.churn is {settings.churn:g}; only the process edm takes it, others take 0")
    if settings.guidance and settings.weak == "sparse" and all(plan.hides_nothing for plan in _weak_plans(config)):
        raise ConfigError(f"config.sampling.weak_rate is {settings.weak_rate:g}, which hides no patch; raise it")

    def sample(params, x, noise, labels=None, start=None):
        if start is not None and not sampler.starts_anywhere:
            able = " or ".join(name for name, other in fitting.items() if other.starts_anywhere)
            raise SamplingError(f"{settings.method} starts from pure noise only; use {able}")

        def predict(x, t):
            return network.apply(params, *process.network_inputs(x, t), labels, None)

        def weak(x, t):
            return network.apply(params, *process.network_inputs(x, t), *weak_inputs(config, labels, len(x)))

        if settings.guidance:
            predict = samplers.guided(predict, weak, _guidance(settings, process))
        options = {name: getattr(settings, name) for name in sampler.settings}
        options |= {} if start is None else dict(start=start)
        return sampler.run(predict, x, noise, process, clip=clip, **options)

    return sample


def weak_inputs(config: Config, labels, n: int):
    """Labels and positions of the weak prediction of guidance, by `config.sampling.weak`, for n images."""
    if config.sampling.weak == "unlabelled":  # classifier-free guidance (Ho & Salimans 2022)
        return None, None
    if config.sampling.weak == "shallow":  # neither inner blocks nor label: path-drop guidance (SPRINT)
        labels, visible = None, [jnp.zeros(0, "int32") for _ in grids(config)]
    else:  # sparse guidance: the same patches are hidden in all images and steps
        visible = [masking.sample_positions(plan, jax.random.key(i)) for i, plan in enumerate(_weak_plans(config))]
    positions = tuple(jnp.broadcast_to(at, (n, len(at))) for at in visible)
    return labels, positions if config.model.wavelet_scale else positions[0]


def _weak_plans(config: Config) -> list[masking.MaskPlan]:
    return [masking.make_plan("patch", grid, rate=config.sampling.weak_rate) for grid in grids(config)]


def _guidance(settings: Sampling, process: Process):
    """The weight of guidance: a number, or a function of the time if it acts in an interval."""
    low, high = settings.guidance_from, settings.guidance_to
    if (low, high) == (0, 1):
        return settings.guidance

    def weight(t):
        along = process.progress(t)
        return jnp.where(((along > low) | (low == 0)) & ((along < high) | (high == 1)), settings.guidance, 0.0)

    return weight
