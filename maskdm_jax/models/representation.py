"""The network's input space: pixels in [-1, 1], or the two bands of Haar coefficients of a wavelet model."""

import dataclasses
import typing

import jax.numpy as jnp
import numpy as np

from maskdm_jax.config import Config
from maskdm_jax.models.layers import patchify
from maskdm_jax.models.wavelet_uvit import cut_bands


@dataclasses.dataclass(frozen=True)
class Representation:
    """Maps between images and the space in which diffusion runs."""

    shape: tuple[int, int, int]  # of an encoded image: (rows, columns, channels)
    encode: typing.Callable  # uint8 images [B, S, S, C] -> float32 [B, *shape]
    decode: typing.Callable  # inverse of encode: float32 [B, *shape] -> uint8, clipped and rounded
    clip: tuple  # bounds of encoded values: numbers, or arrays [1, 1, 1, channels]
    cut: typing.Callable  # [B, *shape] -> patches [B, N, d], or a tuple of them, one per band


def make_representation(config: Config) -> Representation:
    """Build the representation of a config: pixels, or Haar coefficients if `model.wavelet_scale` is not 0."""
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
    """Scale uint8 in 0..255 to float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x):
    """Invert `to_unit`: float32 to uint8, clipped to [-1, 1] and rounded."""
    return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def to_coefficients(image):
    """Haar coefficients of uint8 images [B, S, S, C] scaled to [0, 1]: float32 [B, S/2, S/2, 4C].

    As in the reference, only the approximation a is scaled further, to 2a - 1 in [-1, 3]. Details lie in [-1, 1].
    """
    x = haar(image.astype(jnp.float32) / 255.0)
    c = image.shape[-1]
    return jnp.concatenate([2.0 * x[..., :c] - 1.0, x[..., c:]], axis=-1)


def from_coefficients(x):
    """Invert `to_coefficients`: float32 [B, h, w, 4C] to uint8 [B, 2h, 2w, C], clipped to [0, 1] and rounded."""
    c = x.shape[-1] // 4
    image = inverse_haar(jnp.concatenate([(x[..., :c] + 1.0) / 2.0, x[..., c:]], axis=-1))
    return jnp.round(jnp.clip(image, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def haar(x):
    """One level of the Haar transform: [B, H, W, C] -> [B, H/2, W/2, 4C], in PyWavelets' convention for `haar`.

    The channels are approximation, horizontal, vertical and diagonal details, C each. A 2 x 2 block (a b / c d) gives
    (a+b+c+d)/2, (a+b-c-d)/2, (a-b+c-d)/2, (a-b-c+d)/2. The transform is orthogonal.
    """
    return _mix(x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2])


def inverse_haar(bands):
    """Invert `haar`: [B, h, w, 4C] -> [B, 2h, 2w, C]."""
    b, h, w, c = bands.shape
    pixels = _mix(*jnp.split(bands, 4, axis=-1)).reshape(b, h, w, 2, 2, c // 4)
    return pixels.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)


def _mix(a, b, c, d):
    """Apply the 4 x 4 matrix of the transform, which is its own inverse."""
    return jnp.concatenate([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], axis=-1) / 2
