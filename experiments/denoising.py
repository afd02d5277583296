"""Denoising error of a network on held-out images, by noise level."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax.build import make_process
from maskdm_jax.diffusion.process import Continuous, denoising_loss
from maskdm_jax.models.representation import make_representation
from maskdm_jax.sampling import TrainedModel


def denoising_by_level(
    loaded: TrainedModel, images, *, levels: int = 10, seed: int = 0, batch_size: int = 64
) -> np.ndarray:
    """Mean of the process's squared error on unmasked images, without its weight, float64 [levels].

    Level k is the middle of the k-th of `levels` equal parts of the way from image to noise; level 0 has the least
    noise. The noise of image i at a level depends only on the seed, i and the level, so that all networks see the same
    inputs.

    Args:
      loaded: an unconditional network, from `sampling.load`.
      images: uint8 [n, S, S, C].
      batch_size: images per call, on one device.
    """
    config, network = loaded.config, loaded.network
    space, key = make_representation(config), jax.random.key(seed)
    process = dataclasses.replace(make_process(config), weight=None)

    @jax.jit
    def errors(params, images, index, level, time):
        t = jnp.full(len(images), time)
        x0 = space.encode(images)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), level))(index)
        eps = jax.vmap(lambda key: jax.random.normal(key, space.shape))(keys)
        predict = lambda x_t, t: network.apply(params, x_t, t)
        return denoising_loss(predict, process, x0, t, eps)

    def time_of(level):
        part = (level + 0.5) / levels
        if isinstance(process, Continuous):
            return np.float32(process.times(1, 1 - part)[0])
        return int(part * config.diffusion.timesteps)

    params, n = network.cast(loaded.params), len(images)
    sums, batch_size = np.zeros(levels), min(batch_size, n)
    for start in range(0, n, batch_size):
        index = np.arange(start, start + batch_size)  # the last batch wraps around, so that all have one shape
        rows = np.asarray(images)[index % n]
        for level in range(levels):
            found = np.asarray(errors(params, rows, index, level, time_of(level)), np.float64)
            sums[level] += found[: n - start].sum()
    return sums / n
