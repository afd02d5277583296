"""Gaussian diffusion with discrete time: schedules, forward process, objectives, loss weights.

`x` stands for images [B, H, W, C] or patches [B, V, d]: every formula is elementwise, so it holds for the visible
patches alone. The notation is that of DDPM (Ho et al. 2020): x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Noise schedule: one value per time step, computed in float64 and stored as float32 NumPy arrays [T]."""

    betas: np.ndarray
    alpha: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray
    sqrt_alpha_bar: np.ndarray
    sqrt_one_minus_alpha_bar: np.ndarray
    log_one_minus_alpha_bar: np.ndarray
    sqrt_recip_alpha_bar: np.ndarray
    sqrt_recipm1_alpha_bar: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance: np.ndarray  # the variance, 0 at t = 0, is clipped to at least 1e-20
    posterior_mean_x0: np.ndarray  # coefficient of x0 in the posterior mean
    posterior_mean_xt: np.ndarray  # coefficient of x_t

    @property
    def timesteps(self) -> int:
        """T, the number of time steps."""
        return len(self.betas)


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
    alpha_bar = np.cumprod(1 - betas)
    prev = np.append(1.0, alpha_bar[:-1])
    variance = betas * (1 - prev) / (1 - alpha_bar)
    columns = dict(
        betas=betas,
        alpha=1 - betas,
        alpha_bar=alpha_bar,
        alpha_bar_prev=prev,
        sqrt_alpha_bar=np.sqrt(alpha_bar),
        sqrt_one_minus_alpha_bar=np.sqrt(1 - alpha_bar),
        log_one_minus_alpha_bar=np.log(1 - alpha_bar),
        sqrt_recip_alpha_bar=np.sqrt(1 / alpha_bar),
        sqrt_recipm1_alpha_bar=np.sqrt(1 / alpha_bar - 1),
        posterior_variance=variance,
        posterior_log_variance=np.log(np.maximum(variance, 1e-20)),
        posterior_mean_x0=betas * np.sqrt(prev) / (1 - alpha_bar),
        posterior_mean_xt=(1 - prev) * np.sqrt(1 - betas) / (1 - alpha_bar),
    )
    return Schedule(**{name: column.astype(np.float32) for name, column in columns.items()})


def at(column, t, ndim: int):
    """Look up column [T] at t [B]; returns [B, 1, ...] of `ndim` dimensions, to broadcast against a batch."""
    return jnp.asarray(column)[t].reshape(t.shape + (1,) * (ndim - 1))


def velocity(schedule: Schedule, x0, t, eps):
    """The objective v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022)."""
    return at(schedule.sqrt_alpha_bar, t, x0.ndim) * eps - at(schedule.sqrt_one_minus_alpha_bar, t, x0.ndim) * x0


def x0_from_eps(schedule: Schedule, x, t, eps):
    """Solve the forward process for x0."""
    return at(schedule.sqrt_recip_alpha_bar, t, x.ndim) * x - at(schedule.sqrt_recipm1_alpha_bar, t, x.ndim) * eps


def x0_from_v(schedule: Schedule, x, t, v):
    """Compute x0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
    return at(schedule.sqrt_alpha_bar, t, x.ndim) * x - at(schedule.sqrt_one_minus_alpha_bar, t, x.ndim) * v


def eps_from_x0(schedule: Schedule, x, t, x0):
    """Solve the forward process for eps."""
    return (at(schedule.sqrt_recip_alpha_bar, t, x.ndim) * x - x0) / at(schedule.sqrt_recipm1_alpha_bar, t, x.ndim)


def q_posterior(schedule: Schedule, x0, x, t):
    """Mean [B, ...] and log variance [B, 1, ...] of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 6 and 7)."""
    mean = at(schedule.posterior_mean_x0, t, x.ndim) * x0 + at(schedule.posterior_mean_xt, t, x.ndim) * x
    return mean, at(schedule.posterior_log_variance, t, x.ndim)


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
    # Recompute alpha_bar in float64: at small t, 1 - alpha_bar in float32 loses its digits.
    alpha_bar = np.cumprod(1 - schedule.betas.astype(np.float64))
    snr = alpha_bar / (1 - alpha_bar)
    return (LOSS_WEIGHTS[name](snr) ** -gamma).astype(np.float32)
