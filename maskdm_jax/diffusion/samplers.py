"""Samplers: generate images from noise with a trained network, in one `lax.scan` over the trajectory.

A sampler has the signature

    sampler(predict, x, noise, process, *, clip, start, ...) -> x0

    predict: (x [B, ...], t [B]) -> output of the network, of x's shape; t is the process's time.
    x: starting noise [B, ...], standard normal, or a noisy image.
    noise: step number i (0, 1, ... traced int32) -> standard normal noise of x's shape, used in step i.
    clip: bounds of the predicted x0, or None.
    start: where a noisy image is: its time step, or in continuous time its progress; None means pure noise.

and returns x0 [B, ...] float32. Noise is a function of the step, so that the caller can choose its source.
`image_noise` draws it by image number, which makes an image independent of its batch and device; tests pass recorded
noise.

To add a sampler, write such a function and add it to `SAMPLERS`, with the processes that it is for and the names of the
settings of `config.sampling` that it takes. To export runs that use it to PyTorch, add it to
`interop/torch_folder/sample.py`, too.
"""

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.diffusion.gaussian import Schedule, predictions, q_posterior
from maskdm_jax.diffusion.process import Continuous, Discrete


def image_noise(key, index, shape: tuple[int, ...]):
    """Noise for the images with numbers `index` [B], each of `shape`: (x_T [B, *shape] float32, noise function).

    The noise depends only on the key, the number of the image and the step.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)

    def draw(i):
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), shape))(keys)

    return draw(0), lambda i: draw(i + 1)


def ddim_times(timesteps: int, steps: int) -> np.ndarray:
    """Times of 1 to `timesteps` steps of DDIM, descending int32 [steps + 1]; the last one, -1, means x0."""
    # linspace(-1, T - 1, steps + 1), truncated, in float32 and from both ends as PyTorch computes it: float64 would
    # change one of the times by 1 for 139 of the 1,000 step counts.
    i = np.arange(steps + 1)
    width = np.float32(timesteps) / np.float32(steps)
    rising = np.float32(-1) + width * i.astype(np.float32)
    falling = np.float32(timesteps - 1) - width * (steps - i).astype(np.float32)
    return np.where(i < (steps + 1) // 2, rising, falling).astype(np.int32)[::-1]


def ddim(predict, x, noise, process: Discrete, *, clip=(-1.0, 1.0), start=None, steps=250, eta=1.0):
    """DDIM (Song et al. 2021, eq. 12): eta 0 is deterministic; eta 1 over all time steps is DDPM in distribution.

    As in the reference, the predicted noise is not recomputed from the clipped x0 (noise objective).
    """
    schedule = process.schedule
    last = schedule.timesteps - 1 if start is None else start
    steps = min(steps, last + 1)
    times = ddim_times(last + 1, steps)
    # float32 throughout, as in the reference: differences lose digits, so float64 would give other coefficients.
    alpha_bar, one = schedule.alpha_bar.astype(np.float32), np.float32(1)
    a, a_next = alpha_bar[times[:-1]], np.append(alpha_bar[times[1:-1]], one)
    sigma = np.float32(eta) * np.sqrt((one - a / a_next) * (one - a_next) / (one - a))
    columns = dict(
        i=np.arange(steps, dtype=np.int32),
        t=times[:-1],
        x0_scale=np.sqrt(a_next),
        eps_scale=np.sqrt(np.maximum(one - a_next - sigma**2, 0)),
        sigma=sigma,
    )

    def step(x, c):
        t = jnp.full((x.shape[0],), c["t"])
        x0, eps = predictions(schedule, process.objective, predict(x, t), x, t, clip=clip)
        # In the last step the coefficients are 1, 0 and 0: it returns x0.
        return c["x0_scale"] * x0 + c["eps_scale"] * eps + c["sigma"] * noise(c["i"]), None

    return jax.lax.scan(step, x, {name: jnp.asarray(column) for name, column in columns.items()})[0]


def ddpm(predict, x, noise, process: Discrete, *, clip=(-1.0, 1.0), start=None):
    """DDPM: ancestral sampling over all time steps from the posterior with x0 clipped (Ho et al. 2020, algorithm 2)."""
    schedule = process.schedule
    last = schedule.timesteps - 1 if start is None else start

    def step(x, t):
        ts = jnp.full((x.shape[0],), t)
        x0, _ = predictions(schedule, process.objective, predict(x, ts), x, ts, clip=clip)
        mean, log_variance = q_posterior(schedule, x0, x, ts)
        return mean + jnp.where(t > 0, jnp.exp(0.5 * log_variance), 0.0) * noise(last - t), None

    return jax.lax.scan(step, x, jnp.arange(last, -1, -1, dtype=jnp.int32))[0]


def dpm_solver_times(schedule: Schedule, steps: int, spacing: str) -> tuple[np.ndarray, np.ndarray]:
    """Continuous times, 1 - 1/n down to 0, and log(alpha) at them, both float64 [steps + 1].

    The n time steps whose log-SNR is high enough have times (i + 1)/n; between them, log(alpha) is interpolated
    linearly. The returned times are smaller by 1/n, so that T times them are the network's time steps. This is exact
    only if n = T. With the cosine schedule, n is 996 of 1,000, and the network's time steps are 0.4% too large, as in
    the reference.

    Args:
      steps: calls of the network.
      spacing: one of `DPM_SPACINGS`.
    """
    known_log_alpha = 0.5 * np.log(schedule.alpha_bar.astype(np.float32).astype(np.float64))  # as in the reference
    known_log_alpha = known_log_alpha[_half_log_snr(known_log_alpha) > MIN_HALF_LOG_SNR]
    n = len(known_log_alpha)
    known_t = np.arange(1, n + 1) / n
    t = DPM_SPACINGS[spacing](steps, n, known_t, known_log_alpha)
    return t - 1 / n, np.interp(t, known_t, known_log_alpha)


MIN_HALF_LOG_SNR = -5.1  # noisier time steps are left out: they hardly determine x0


def _log_snr_spacing(steps, n, known_t, known_log_alpha):
    ends = _half_log_snr(known_log_alpha[[-1, 0]])
    wanted = -0.5 * np.logaddexp(0, -2 * np.linspace(*ends, steps + 1))  # log(alpha) at those half log-SNRs
    return np.interp(wanted, known_log_alpha[::-1], known_t[::-1])


DPM_SPACINGS = {  # (steps, n, times [n], log(alpha) at them [n]) -> times [steps + 1], descending
    "time_uniform": lambda steps, n, *_: np.linspace(1, 1 / n, steps + 1),
    "log_snr": _log_snr_spacing,
    "time_quadratic": lambda steps, n, *_: np.linspace(1, n**-0.5, steps + 1) ** 2,
}


def _half_log_snr(log_alpha):
    """log(alpha / sigma), the paper's lambda."""
    return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))


def dpm_solver(predict, x, noise, process: Discrete | Continuous, *, clip=None, steps=20, order=2, spacing="log_snr"):
    """DPM-Solver++ (`multistep`), at fractional time steps of DDPM, or at the `levels` of a continuous process."""
    if isinstance(process, Continuous):
        t = process.levels(steps)
        alpha, sigma = (np.asarray(values, np.float64) for values in process.alpha_sigma(t))
        x, x0 = sigma[0] * x, lambda out, x, now, c: process.x0(out, x, now)
    else:
        t, log_alpha = dpm_solver_times(process.schedule, steps, spacing)
        t, alpha, sigma = process.schedule.timesteps * t, np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
        formulas = {  # by objective
            "noise": lambda out, x, now, c: (x - c["sigma"] * out) / c["alpha"],
            "v": lambda out, x, now, c: c["alpha"] * x - c["sigma"] * out,
            "x0": lambda out, x, now, c: out,
        }
        x0 = formulas[process.objective]

    def denoise(x, column):
        now = jnp.full((x.shape[0],), column["t"])
        return x0(predict(x, now), x, now, column)

    return multistep(denoise, x, t, alpha, sigma, order, clip)


def multistep(denoise, x, t, alpha, sigma, order: int, clip):
    """DPM-Solver++ multistep (Lu et al. 2022, algorithm 2 and its third-order form), deterministic.

    The first steps have lower order, because there are no earlier predictions.

    Args:
      denoise: (x, {"t", "alpha", "sigma"}: scalars) -> prediction of x0.
      x: [B, ...] at time t[0].
      t, alpha, sigma: float64 [steps + 1], with alpha / sigma ascending.
      order: 1, 2 or 3.
      clip: bounds of the predicted x0, or None.
    """
    steps, half_log_snr = len(t) - 1, np.log(alpha / sigma)
    # Each step is x' = scale * x + c0 * m0 + c1 * m1 + c2 * m2, where m0, m1, m2 are predictions of x0, newest first.
    table = np.zeros((steps, 4))
    for i in range(steps):
        h = half_log_snr[i + 1] - half_log_snr[i]
        phi1 = np.expm1(-h)
        c = np.array([-phi1, 0.0, 0.0])
        step_order = min(order, i + 1)
        if step_order > 1:
            r0 = (half_log_snr[i] - half_log_snr[i - 1]) / h
            first = np.array([1.0, -1.0, 0.0]) / r0  # first difference of the predictions
        if step_order == 2:
            c -= 0.5 * phi1 * first
        if step_order == 3:
            r1 = (half_log_snr[i - 1] - half_log_snr[i - 2]) / h
            before = np.array([0.0, 1.0, -1.0]) / r1
            phi2 = phi1 / h + 1
            phi3 = phi2 / h - 0.5
            second = (first - before) / (r0 + r1)
            c += phi2 * (first + r0 * second) - phi3 * second
        table[i] = sigma[i + 1] / sigma[i], *(alpha[i + 1] * c)
    columns = dict(t=t[:-1], alpha=alpha[:-1], sigma=sigma[:-1], scale=table[:, 0], c=table[:, 1:])

    def step(carry, column):
        x, m1, m2 = carry
        m0 = denoise(x, column)
        m0 = m0 if clip is None else jnp.clip(m0, *clip)
        c = column["c"]
        return (column["scale"] * x + c[0] * m0 + c[1] * m1 + c[2] * m2, m0, m1), None

    columns = {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()}
    zeros = jnp.zeros_like(x)
    return jax.lax.scan(step, (x, zeros, zeros), columns)[0][0]


def ode(predict, x, noise, process: Continuous, *, clip=None, start=None, steps=50, heun=True, **churn):
    """Solve the probability flow ODE by Euler's method, or by Heun's with a last step of Euler's.

    Heun's method calls the network twice per step, but for the last. Predictions are not clipped. For EDM, `churn` is
    noise added before each step (Karras et al. 2022, algorithm 2): S_churn, `churn_low` S_min, `churn_high` S_max,
    `churn_scale` S_noise.
    """
    times = process.times(steps, 0.0 if start is None else start)
    if start is None:
        x = x * process.alpha_sigma(times[0])[1]
    noisier, extra = _churned(times[:-1], steps, **churn)
    columns = dict(t=noisier, after=times[1:], extra=extra)
    columns = {name: jnp.asarray(column, jnp.float32) for name, column in columns.items()} | dict(i=jnp.arange(steps))

    def slope(x, t):
        t = jnp.full((x.shape[0],), t)
        return process.slope(predict(x, t), x, t)

    def step(x, c, heun=heun):
        x = x + c["extra"] * noise(c["i"]) if extra.any() else x
        width, first = c["after"] - c["t"], slope(x, c["t"])
        euler = x + width * first
        return x + width * (first + slope(euler, c["after"])) / 2 if heun else euler, None

    x, _ = jax.lax.scan(step, x, {name: column[:-1] for name, column in columns.items()})
    return step(x, {name: column[-1] for name, column in columns.items()}, heun=False)[0]


def _churned(t, steps: int, churn=0.0, churn_low=0.0, churn_high=math.inf, churn_scale=1.0):
    """Noise levels after churn, and the standard deviation of the noise that it adds."""
    raised = t * (1 + (churn_low <= t) * (t <= churn_high) * min(churn / steps, math.sqrt(2) - 1))
    return raised, churn_scale * np.sqrt(raised**2 - t**2)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """An entry of `SAMPLERS`."""

    run: typing.Callable  # see the module
    process: type  # kind of process: `Discrete`, `Continuous`, or both
    settings: tuple[str, ...] = ()  # names of the settings of `config.sampling` that `run` takes
    calls: typing.Callable = lambda steps, timesteps: steps  # -> how often it calls the network
    starts_anywhere: bool = True  # whether `start` may be given, to denoise a noisy image


CHURN = ("churn", "churn_low", "churn_high", "churn_scale")
SAMPLERS = {  # by `config.sampling.method`
    "ddim": Sampler(ddim, Discrete, ("steps", "eta")),
    "ddpm": Sampler(ddpm, Discrete, calls=lambda steps, timesteps: timesteps),
    "dpm_solver": Sampler(dpm_solver, Discrete | Continuous, ("steps", "order", "spacing"), starts_anywhere=False),
    "heun": Sampler(ode, Continuous, ("steps", *CHURN), calls=lambda steps, timesteps: 2 * steps - 1),
    "euler": Sampler(functools.partial(ode, heun=False), Continuous, ("steps", *CHURN)),
}


def guided(predict, predict_weak, weight):
    """Guidance for any sampler: (1 + weight) * prediction - weight * weak prediction.

    With the prediction without a label as the weak one, this is classifier-free guidance (Ho & Salimans 2022). Takes
    two functions `predict` and returns their combination. Because it is linear, it is the same for predictions of
    noise, velocity and (unclipped) x0. `weight` is a number, or a function of t [B] whose values [B] are weights.
    """

    def combined(x, t):
        w = weight(t).reshape((-1,) + (1,) * (x.ndim - 1)) if callable(weight) else weight
        return (1 + w) * predict(x, t) - w * predict_weak(x, t)

    return combined
