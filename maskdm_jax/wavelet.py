"""One level of the two-dimensional Haar transform, on device, in PyWavelets' convention for `haar`."""

import jax.numpy as jnp


def haar(x):
    """Split images [B, H, W, C] into [B, H/2, W/2, 4C]: approximation, horizontal, vertical, diagonal, C each.

    Of a 2 x 2 block (a b / c d): (a+b+c+d)/2, (a+b-c-d)/2, (a-b+c-d)/2, (a-b-c+d)/2. The transform is
    orthogonal: it keeps the sum of squares.

    Raises:
      ValueError: a side is odd.
    """
    if x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(f"images of {x.shape[1]} x {x.shape[2]} have an odd side; the Haar transform halves both")
    return _mix(x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2])


def inverse_haar(bands):
    """Inverse of `haar`: [B, h, w, 4C] gives [B, 2h, 2w, C]."""
    b, h, w, c = bands.shape
    if c % 4:
        raise ValueError(f"{c} channels are not four bands of equal depth")
    pixels = _mix(*jnp.split(bands, 4, axis=-1)).reshape(b, h, w, 2, 2, c // 4)
    return pixels.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)


def _mix(a, b, c, d):
    """The 4 x 4 matrix of the transform, which is its own inverse."""
    return jnp.concatenate([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], axis=-1) / 2
