"""What a network sees of an image: its pixels, or the two bands of its Haar coefficients."""

import dataclasses
import typing

import jax.numpy as jnp
import numpy as np

from maskdm_jax.config import Config
from maskdm_jax.models.layers import patchify
from maskdm_jax.models.wavelet_uvit import cut_bands
from maskdm_jax.wavelet import haar, inverse_haar


@dataclasses.dataclass(frozen=True)
class Representation:
    """How images become what is noised, and come back."""

    shape: tuple[int, int, int]  # of an image in it, (rows, columns, channels)
    encode: typing.Callable  # uint8 images [B, S, S, C] -> float32 [B, *shape]
    decode: typing.Callable  # its inverse, rounded and clipped
    clip: tuple  # bounds of what `encode` gives, numbers or arrays [1, 1, 1, channels]
    cut: typing.Callable  # [B, *shape] -> patches [B, N, d], or a tuple of them, one per band


def make_representation(config: Config) -> Representation:
    """Pixels in [-1, 1], or Haar coefficients if the model is of the wavelet kind."""
    size, channels = config.data.image_size, config.data.channels
    patch_size, scale = config.model.patch_size, config.model.wavelet_scale
    if not scale:
        return Representation((size, size, channels), to_unit, to_uint8, (-1.0, 1.0), lambda x: patchify(x, patch_size))
    low, high = (np.full((1, 1, 1, 4 * channels), bound, np.float32) for bound in (-1, 1))
    high[..., :channels] = 3
    return Representation(
        (size // 2, size // 2, 4 * channels),
        to_coefficients,
        from_coefficients,
        (low, high),
        lambda x: cut_bands(x, channels, patch_size, scale),
    )


def to_unit(image):
    """uint8 0..255 -> float32 -1..1."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x):
    """float32 -1..1 -> uint8, rounded."""
    return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def to_coefficients(image):
    """uint8 [B, S, S, C] -> float32 [B, S/2, S/2, 4C], Haar coefficients of the image in [0, 1].

    As in the reference, only the approximation is scaled: 2a - 1, which lies in [-1, 3]. Details lie in [-1, 1].
    """
    x = haar(image.astype(jnp.float32) / 255.0)
    c = image.shape[-1]
    return jnp.concatenate([2.0 * x[..., :c] - 1.0, x[..., c:]], axis=-1)


def from_coefficients(x):
    """Inverse of `to_coefficients`; pixels are clipped to [0, 1] and rounded."""
    c = x.shape[-1] // 4
    image = inverse_haar(jnp.concatenate([(x[..., :c] + 1.0) / 2.0, x[..., c:]], axis=-1))
    return jnp.round(jnp.clip(image, 0.0, 1.0) * 255.0).astype(jnp.uint8)
