"""Diffusion processes: how data becomes noise, and what a network learns about it. DDPM, flow matching, EDM.

`x` stands for images [B, H, W, C] or patches [B, V, d]: every formula is elementwise, so it holds for the visible
patches alone. All processes mix data and noise as x_t = alpha(t) x0 + sigma(t) eps. Times t [B] are in the unit of the
process: 0..T-1 for DDPM (int32), 0 (noise) to 1 (data) for flow matching, and the noise level sigma for EDM.

To add a process, write a function that returns a `Discrete` or `Continuous` process, and add it to `PROCESSES`.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.diffusion import gaussian

LOSSES = {"l2": jnp.square, "l1": jnp.abs}
CLAMP = 0.05  # of 1 - t in flow matching with x0-prediction, as in JiT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """A process as functions of arrays. `output` is what the network returns, of x's shape."""

    draw: typing.Callable  # key -> time of one image in training, a scalar
    alpha_sigma: typing.Callable  # t [B] -> alpha [B], sigma [B]
    network_inputs: typing.Callable  # (x, t) -> input of x's shape, time input [B] float32 or int32
    # (output, x0, eps, x, t) -> elementwise residual; the loss is the mean of its square (l2) or absolute value (l1)
    error: typing.Callable
    x0: typing.Callable  # (output, x, t) -> prediction of x0
    progress: typing.Callable  # t -> 0 (pure noise) to 1 (data), for the interval of guidance
    weight: typing.Callable | None = None  # t [B] -> weight of an image's loss [B]; None: 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discrete(Process):
    """A process of time steps, DDPM."""

    schedule: gaussian.Schedule
    objective: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuous(Process):
    """A process in continuous time, with a probability flow ODE."""

    slope: typing.Callable  # (output, x, t) -> dx/dt
    times: typing.Callable  # (steps, progress of the start) -> times of the ODE, float64 [steps + 1]
    levels: typing.Callable  # steps -> times at equal steps of log(alpha / sigma), float64 [steps + 1]


def ddpm(schedule: gaussian.Schedule, *, objective: str = "noise", weights: np.ndarray | None = None) -> Discrete:
    """Discrete diffusion (Ho et al. 2020), as in the reference.

    Args:
      schedule: from `gaussian.make_schedule`.
      objective: what the network predicts, one of `gaussian.OBJECTIVES`.
      weights: [T] from `gaussian.loss_weights`, or None for 1.
    """
    last = max(schedule.timesteps - 1, 1)
    return Discrete(
        draw=lambda key: jax.random.randint(key, (), 0, schedule.timesteps),
        alpha_sigma=lambda t: (
            gaussian.at(np.sqrt(schedule.alpha_bar), t, 1),
            gaussian.at(np.sqrt(1 - schedule.alpha_bar), t, 1),
        ),
        network_inputs=lambda x, t: (x, t),
        error=lambda output, x0, eps, x, t: output - gaussian.OBJECTIVES[objective](schedule, x0, t, eps),
        x0=lambda output, x, t: gaussian.predictions(schedule, objective, output, x, t, clip=None)[0],
        progress=lambda t: 1 - t / last,
        weight=None if weights is None else lambda t: jnp.asarray(weights)[t],
        schedule=schedule,
        objective=objective,
    )


def flow(
    *,
    objective: str = "x0",
    times: str = "logit_normal",
    mean: float = -0.8,
    std: float = 0.8,
    noise_scale: float = 1.0,
    time_scale: float = 1.0,
) -> Continuous:
    """Flow matching on straight lines: x_t = t x0 + (1 - t) noise_scale eps, and a loss on the velocity dx/dt.

    Args:
      objective: what the network predicts: `x0` (JiT, Li & He 2025) or `v`, the velocity (rectified flow, Liu et al.
        2023; SiT). The velocity of predicted data is (x0 - x) / max(1 - t, 0.05).
      times: in training; `logit_normal`, sigmoid of a Gaussian with `mean` and `std`, or `uniform` in 0..1.
      noise_scale: standard deviation of the noise; JiT takes image side / 256.
      time_scale: the network's time input is time_scale * t.

    Raises:
      ValueError: an option is unknown.
    """
    draws = {
        "logit_normal": lambda key: jax.nn.sigmoid(mean + std * jax.random.normal(key)),
        "uniform": lambda key: jax.random.uniform(key),
    }
    _one_of("objective", objective, ("x0", "v"))
    _one_of("flow.times", times, draws)
    remaining = lambda t, x: _wide(jnp.maximum(1 - t, CLAMP), x)
    if objective == "x0":
        formulas = dict(
            error=lambda output, x0, eps, x, t: (output - x0) / remaining(t, x),
            x0=lambda output, x, t: output,
            slope=lambda output, x, t: (output - x) / remaining(t, x),
        )
    else:
        formulas = dict(
            error=lambda output, x0, eps, x, t: output - (x0 - noise_scale * eps),
            x0=lambda output, x, t: x + _wide(1 - t, x) * output,
            slope=lambda output, x, t: output,
        )
    return Continuous(
        draw=draws[times],
        alpha_sigma=lambda t: (t, (1 - t) * noise_scale),
        network_inputs=lambda x, t: (x, time_scale * t),
        progress=lambda t: t,
        times=lambda steps, start: np.linspace(start, 1, steps + 1),
        # From -5 to 7: 0.7% of data at the start, 0.1% of noise at the end.
        levels=lambda steps: 1 / (1 + np.exp(-np.linspace(-5, 7, steps + 1)) / noise_scale),
        **formulas,
    )


def edm(
    *,
    mean: float = -1.2,
    std: float = 1.2,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    time_scale: float = 1.0,
) -> Continuous:
    """EDM (Karras et al. 2022): x = x0 + sigma eps, a preconditioned network, t = sigma.

    The prediction of x0 is c_skip x + c_out output; the network's inputs are c_in x and time_scale * log(sigma) / 4.
    The loss is the squared error of x0 divided by c_out^2, which is the paper's weight.

    Args:
      mean, std: of the Gaussian log(sigma) in training.
      sigma_data: standard deviation of the data.
      sigma_min, sigma_max, rho: noise levels of sampling (eq. 5).
    """
    total = lambda s: jnp.sqrt(s**2 + sigma_data**2)
    c_out = lambda s: s * sigma_data / total(s)

    def x0(output, x, s):
        return _wide(sigma_data**2 / total(s) ** 2, x) * x + _wide(c_out(s), x) * output

    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)

    def times(steps, start):
        first = ends[0] + start * (ends[1] - ends[0])
        return np.append(np.linspace(first, ends[1], steps) ** rho, 0.0)

    return Continuous(
        draw=lambda key: jnp.exp(mean + std * jax.random.normal(key)),
        alpha_sigma=lambda s: (s**0, s),
        network_inputs=lambda x, s: (x / _wide(total(s), x), time_scale * jnp.log(s) / 4),
        error=lambda output, clean, eps, x, s: (x0(output, x, s) - clean) / _wide(c_out(s), x),
        x0=x0,
        progress=lambda s: (ends[0] - s ** (1 / rho)) / (ends[0] - ends[1]),
        slope=lambda output, x, s: (x - x0(output, x, s)) / _wide(s, x),
        times=times,
        levels=lambda steps: np.geomspace(sigma_max, sigma_min, steps + 1),
    )


def _ddpm(settings, time_scale):
    schedule = gaussian.make_schedule(settings.schedule, settings.timesteps, size=settings.shift_size)
    weights = gaussian.loss_weights(schedule, settings.loss_weight, settings.loss_weight_gamma)
    return ddpm(schedule, objective=settings.objective, weights=weights if settings.loss_weight_gamma else None)


def _flow(settings, time_scale):
    return flow(objective=settings.objective, time_scale=time_scale, **dataclasses.asdict(settings.flow))


def _edm(settings, time_scale):
    _one_of("objective", settings.objective, ("x0",))
    return edm(time_scale=time_scale, **dataclasses.asdict(settings.edm))


# By `config.diffusion.process`: (`config.diffusion`, `build.time_scale`) -> `Process`.
PROCESSES = {"ddpm": _ddpm, "flow": _flow, "edm": _edm}


def noisy(process: Process, x0, t, eps):
    """Mix data and noise [B, ...] at times t [B]: alpha x0 + sigma eps."""
    alpha, sigma = process.alpha_sigma(t)
    return _wide(alpha, x0) * x0 + _wide(sigma, x0) * eps


def denoising_loss(predict, process: Process, x0, t, eps, *, loss: str = "l2") -> jax.Array:
    """Loss of each image, [B] float32: weight(t) times the mean error over its (visible) elements.

    Args:
      predict: (input, time), as `Process.network_inputs` makes them -> output, of the input's shape.
      x0, eps: clean data and noise, [B, ...] float32; in masked training the visible patches [B, V, d]. For a wavelet
        model tuples of such arrays, one per band; the mean errors of the bands are added.
      t: [B], from `Process.draw`.
      loss: one of `LOSSES`.
    """
    bands, structure = jax.tree.flatten(x0)
    noise = jax.tree.leaves(eps)
    x = [noisy(process, band, t, e) for band, e in zip(bands, noise, strict=True)]
    inputs = [process.network_inputs(band, t) for band in x]
    outputs = jax.tree.leaves(predict(jax.tree.unflatten(structure, [band for band, _ in inputs]), inputs[0][1]))

    def error(*args):
        e = LOSSES[loss](process.error(*args, t))
        return e.reshape(e.shape[0], -1).mean(axis=1)

    per_image = sum(map(error, outputs, bands, noise, x))
    return per_image if process.weight is None else per_image * process.weight(t)


def _wide(values, x):
    """[B] as [B, 1, ...], to broadcast against x [B, ...]."""
    return values.reshape(values.shape + (1,) * (x.ndim - 1))


def _one_of(name: str, value: str, table) -> None:
    if value not in table:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(table)}")
