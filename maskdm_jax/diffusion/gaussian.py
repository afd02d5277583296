"""Gaussian diffusion with discrete time: schedules, forward process, objectives, loss weights.

`x` stands for images [B, H, W, C] or patches [B, V, d]: every formula is elementwise, so it holds for the visible
patches alone. The notation is that of DDPM (Ho et al. 2020): x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps.
"""

import dataclasses
import math
import typing

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Noise schedule: one value per time step, float64 [T]. Coefficients are rounded to float32 when they are used."""

    betas: np.ndarray
    alpha_bar: np.ndarray

    @property
    def timesteps(self) -> int:
        """T, the number of time steps."""
        return len(self.betas)

    @property
    def posterior(self) -> "Posterior":
        """The coefficients of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7)."""
        before, noise = np.append(1, self.alpha_bar[:-1]), 1 - self.alpha_bar
        return Posterior(
            x0=self.betas * np.sqrt(before) / noise,
            xt=(1 - before) * np.sqrt(1 - self.betas) / noise,
            variance=self.betas * (1 - before) / noise,
        )


class Posterior(typing.NamedTuple):
    """Coefficients of x0 and x_t in the mean of a step back, and its variance (0 at t = 0), float64 [T]."""

    x0: np.ndarray
    xt: np.ndarray
    variance: np.ndarray


def linear_betas(timesteps: int = 1000) -> np.ndarray:
    """Linear schedule, 1e-4 to 0.02 at 1000 steps (Ho et al. 2020), times 1000 / T for other T; float64 [T]."""
    scale = 1000 / timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=np.float64)


def cosine_betas(timesteps: int = 1000, *, size: int = 64) -> np.ndarray:
    """Cosine schedule (Nichol & Dhariwal 2021), s = 0.008, betas at most 0.999; float64 [T].

    `size` shifts the log-SNR by 2 log(64 / size), which adds noise for images larger than 64 pixels (simple diffusion,
    Hoogeboom et al. 2023).
    """
    s = 0.008
    steps = np.linspace(0, 1, timesteps + 1, dtype=np.float64)
    alpha_bar = np.cos((steps + s) / (1 + s) * math.pi / 2) ** 2
    # sigmoid(logit(alpha_bar) + 2 log(64 / size)), without the infinite logit of alpha_bar = 0. As in the reference,
    # normalisation comes after the shift.
    odds = (64 / size) ** 2
    alpha_bar = odds * alpha_bar / (1 + (odds - 1) * alpha_bar)
    alpha_bar /= alpha_bar[0]
    return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)


SCHEDULES = {  # name -> (T, image side) -> betas
    "linear": lambda timesteps, size: linear_betas(timesteps),
    "cosine": lambda timesteps, size: cosine_betas(timesteps),
    "shifted_cosine": lambda timesteps, size: cosine_betas(timesteps, size=size),
}


def make_schedule(name: str, timesteps: int = 1000, *, size: int = 64) -> Schedule:
    """Build a schedule.

    Args:
      name: one of `SCHEDULES`.
      timesteps: T.
      size: image side, in pixels, for which `shifted_cosine` is shifted; the others ignore it.
    """
    betas = SCHEDULES[name](timesteps, size)
    return Schedule(betas, np.cumprod(1 - betas))


def at(column, t, ndim: int):
    """Look up column [T] at t [B]; returns float32 [B, 1, ...] of `ndim` dimensions, to broadcast against a batch."""
    return jnp.asarray(column, jnp.float32)[t].reshape(t.shape + (1,) * (ndim - 1))


def velocity(schedule: Schedule, x0, t, eps):
    """The objective v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022)."""
    a = schedule.alpha_bar
    return at(np.sqrt(a), t, x0.ndim) * eps - at(np.sqrt(1 - a), t, x0.ndim) * x0


def x0_from_eps(schedule: Schedule, x, t, eps):
    """Solve the forward process for x0."""
    a = schedule.alpha_bar
    return at(np.sqrt(1 / a), t, x.ndim) * x - at(np.sqrt(1 / a - 1), t, x.ndim) * eps


def x0_from_v(schedule: Schedule, x, t, v):
    """Compute x0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
    a = schedule.alpha_bar
    return at(np.sqrt(a), t, x.ndim) * x - at(np.sqrt(1 - a), t, x.ndim) * v


def eps_from_x0(schedule: Schedule, x, t, x0):
    """Solve the forward process for eps."""
    a = schedule.alpha_bar
    return (at(np.sqrt(1 / a), t, x.ndim) * x - x0) / at(np.sqrt(1 / a - 1), t, x.ndim)


def q_posterior(schedule: Schedule, x0, x, t):
    """Mean [B, ...] and log variance [B, 1, ...] of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 6 and 7)."""
    posterior = schedule.posterior
    mean = at(posterior.x0, t, x.ndim) * x0 + at(posterior.xt, t, x.ndim) * x
    return mean, at(np.log(np.maximum(posterior.variance, 1e-20)), t, x.ndim)


OBJECTIVES = {  # the network's target, from (schedule, x0, t, eps)
    "noise": lambda schedule, x0, t, eps: eps,
    "x0": lambda schedule, x0, t, eps: x0,
    "v": velocity,
}


def predictions(schedule: Schedule, objective: str, output, x, t, *, clip: tuple[float, float] | None = (-1.0, 1.0)):
    """Convert a network's output at x [B, ...], t [B] into (x0, eps), each [B, ...].

    x0 is clipped to the bounds `clip`. With the noise objective, eps is the network's output, as in the reference; with
    the other objectives, eps is computed from the clipped x0.
    """
    bounded = (lambda a: a) if clip is None else (lambda a: jnp.clip(a, *clip))
    if objective == "noise":
        return bounded(x0_from_eps(schedule, x, t, output)), output
    x0 = bounded(x0_from_v(schedule, x, t, output) if objective == "v" else output)
    return x0, eps_from_x0(schedule, x, t, x0)


LOSS_WEIGHTS = {  # name -> signal-to-noise ratio -> base, see `loss_weights`
    "p2": lambda snr: 1 + snr,
    "min_snr": lambda snr: np.minimum(1, 5 / snr),
}


def loss_weights(schedule: Schedule, name: str, gamma: float) -> np.ndarray:
    """Weight of each time step in the loss, base^-gamma, float32 [T]; with gamma 0 all weights are 1.

    `p2`: (1 + snr)^-gamma (Choi et al. 2022). `min_snr`: min(1, 5 / snr)^-gamma; with the noise objective, gamma = -1
    is Min-SNR-5 (Hang et al. 2023).
    """
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    return (LOSS_WEIGHTS[name](snr) ** -gamma).astype(np.float32)
