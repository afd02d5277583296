"""Making images from weights: image number i of a seed is the same image in any batch, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np

from maskdm_jax import samplers, sharding
from maskdm_jax.config import Config
from maskdm_jax.diffusion import make_schedule
from maskdm_jax.network import Network


def to_unit(image):
    """uint8 0..255 -> float32 -1..1."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x):
    """float32 -1..1 -> uint8, rounded."""
    return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def make_generator(config: Config, network: Network, mesh, batch_size: int):
    """Build `generate(params, seed, index, labels=None)` -> uint8 [n, S, S, C] for up to `batch_size` images.

    index: int32 [n], the images' numbers, which decide their noise; labels: int32 [n] for a conditional
    model. One compiled program runs the whole trajectory; the batch is split over the mesh.
    """
    devices = mesh.size
    padded = -(-batch_size // devices) * devices
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.timesteps, size=config.diffusion.shift_size)
    size, sampling = config.data.image_size, config.sampling
    place = sharding.batch_sharding(mesh)

    def run(params, key, index, labels):
        def predict(x, t):
            return network.apply(params, x, t, labels)

        x, noise = samplers.image_noise(key, index, (size, size, config.data.channels))
        options = dict(objective=config.diffusion.objective)
        if sampling.method == "ddim":
            x0 = samplers.ddim(predict, x, noise, schedule, steps=sampling.steps, eta=sampling.eta, **options)
        else:
            x0 = samplers.ddpm(predict, x, noise, schedule, **options)
        return to_uint8(x0)

    compiled = jax.jit(run, out_shardings=place)

    def generate(params, seed: int, index, labels=None) -> np.ndarray:
        n = len(index)
        if n > batch_size:
            raise ValueError(f"{n} images asked of a generator for {batch_size}")
        fill = lambda a: jax.device_put(np.resize(np.asarray(a, np.int32), padded), place)
        labels = None if labels is None else fill(labels)
        return np.asarray(compiled(params, jax.random.key(seed), fill(index), labels))[:n]

    return generate
