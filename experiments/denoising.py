"""Denoising error of a network on held-out images, by noise level."""

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.build import noise_schedule
from maskdm_jax.diffusion.gaussian import denoising_loss
from maskdm_jax.models.representation import make_representation
from maskdm_jax.sampling import Loaded


def denoising_by_level(loaded: Loaded, images, *, levels: int = 10, seed: int = 0, batch_size: int = 64) -> np.ndarray:
    """Mean squared error of the predicted objective on unmasked images, float64 [levels].

    Level k is the middle of the k-th of `levels` equal parts of the time steps; level 0 has the least noise. The noise
    of image i at a level depends only on the seed, i and the level, so that all networks see the same inputs.

    Args:
      loaded: an unconditional network, from `sampling.load`.
      images: uint8 [n, S, S, C].
      batch_size: images per call, on one device.
    """
    config, network = loaded.config, loaded.network
    space, schedule, key = make_representation(config), noise_schedule(config), jax.random.key(seed)
    diffusion = config.diffusion

    @jax.jit
    def errors(params, images, index, level):
        t = jnp.full(len(images), ((level + 0.5) * diffusion.timesteps / levels).astype(int))
        x0 = space.encode(images)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), level))(index)
        eps = jax.vmap(lambda key: jax.random.normal(key, space.shape))(keys)
        predict = lambda x_t, t: network.apply(params, x_t, t)
        return denoising_loss(predict, schedule, x0, t, eps, objective=diffusion.objective)

    params, n = network.cast(loaded.params), len(images)
    sums, batch_size = np.zeros(levels), min(batch_size, n)
    for start in range(0, n, batch_size):
        index = np.arange(start, start + batch_size)  # the last batch wraps around, so that all have one shape
        rows = np.asarray(images)[index % n]
        for level in range(levels):
            found = np.asarray(errors(params, rows, index, level), np.float64)
            sums[level] += found[: n - start].sum()
    return sums / n
