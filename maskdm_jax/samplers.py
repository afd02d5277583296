"""Samplers: from noise to images with a trained predictor, the whole trajectory in one `lax.scan`.

All share one signature:

    sampler(predict, x, noise, schedule, *, objective, clip, ...) -> x0

    predict: (x [B, ...], t [B] float32 or int32) -> the objective ("noise", "x0" or "v"), of x's shape.
    x: starting noise x_T [B, ...], float32.
    noise: step number i (0, 1, ... traced int32) -> standard normal of x's shape, used by step i.
    schedule: `diffusion.Schedule`.
    clip: bounds of the predicted x0, or None.

Noise comes as a function of the step so that the caller decides where it is from: keyed by image
index (`image_noise`), so that an image does not depend on its batch or device, or a recorded list in tests.
"""

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.diffusion import Schedule, predictions, q_posterior


def image_noise(key, index, shape: tuple[int, ...]):
    """Noise that belongs to an image: (x_T, noise function) for images numbered `index` [B], each of `shape`.

    The draw depends on the key, the image's number and the step alone.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)

    def draw(i):
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), shape))(keys)

    return draw(0), lambda i: draw(i + 1)


def ddim_times(timesteps: int, steps: int) -> np.ndarray:
    """Time steps that DDIM visits, descending int32 [steps + 1], the last one -1 (meaning: x0)."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"DDIM can take 1 to {timesteps} steps, not {steps}")
    # linspace(-1, T - 1, steps + 1) truncated, in float32 and from both ends as PyTorch computes it: in float64
    # one of the times differs by 1 for 139 of the 1,000 step counts.
    i = np.arange(steps + 1)
    width = np.float32(timesteps) / np.float32(steps)
    rising = np.float32(-1) + width * i.astype(np.float32)
    falling = np.float32(timesteps - 1) - width * (steps - i).astype(np.float32)
    return np.where(i < (steps + 1) // 2, rising, falling).astype(np.int32)[::-1]


def ddim(predict, x, noise, schedule: Schedule, *, objective="noise", clip=(-1.0, 1.0), steps=250, eta=1.0):
    """DDIM (Song et al. 2021, eq. 12). eta 0 is deterministic; 1 over all steps is DDPM in distribution.

    With the noise objective the noise is not recomputed after x0 was clipped, as in the reference.
    """
    times = ddim_times(schedule.timesteps, steps)
    # float32 throughout, like the reference: these differences cancel, so float64 would give other coefficients.
    one = np.float32(1)
    a, a_next = schedule.alpha_bar[times[:-1]], np.append(schedule.alpha_bar[times[1:-1]], one)
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
        x0, eps = predictions(schedule, objective, predict(x, t), x, t, clip=clip)
        # The last step has scales 1, 0, 0: it returns x0.
        return c["x0_scale"] * x0 + c["eps_scale"] * eps + c["sigma"] * noise(c["i"]), None

    return jax.lax.scan(step, x, {name: jnp.asarray(column) for name, column in columns.items()})[0]


def ddpm(predict, x, noise, schedule: Schedule, *, objective="noise", clip=(-1.0, 1.0)):
    """Ancestral sampling over all T steps (Ho et al. 2020, algorithm 2), from the posterior with x0 clipped."""
    last = schedule.timesteps - 1

    def step(x, t):
        ts = jnp.full((x.shape[0],), t)
        x0, _ = predictions(schedule, objective, predict(x, ts), x, ts, clip=clip)
        mean, log_variance = q_posterior(schedule, x0, x, ts)
        return mean + jnp.where(t > 0, jnp.exp(0.5 * log_variance), 0.0) * noise(last - t), None

    return jax.lax.scan(step, x, jnp.arange(last, -1, -1, dtype=jnp.int32))[0]
