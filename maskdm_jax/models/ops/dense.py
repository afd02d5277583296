"""Matrix product, norms and activations with hand-written derivatives, each beside its plain version.

The `plain_` versions are the definitions. The others have the same values and gradients up to rounding and compile to
faster programs, mainly on CPU.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

# --- Matrix product -------------------------------------------------------------------------------


def plain_matmul(x, w):
    """The product of x [..., D] and w [D, E], of equal dtype: [..., E]."""
    return x @ w


@jax.custom_vjp
def matmul(x, w):
    """`plain_matmul` whose gradient of w is, on CPU, one product of two matrices."""
    return _product(x, w)


def _product(a, b):
    if a.dtype == jnp.float32:
        return a @ b
    # XLA:CPU uses bfloat16 instructions only for products with float32 results.
    wide = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)
    return jax.lax.platform_dependent(a, b, cpu=wide, default=jnp.matmul)


def _transposed(a):
    """a.T, of a matrix."""
    if a.dtype == jnp.float32 or a.shape[1] % 2:
        return a.T
    # XLA:CPU would fuse a plain transpose into the bfloat16 product, which then cannot use bfloat16 instructions.
    halves = lambda a: jax.lax.optimization_barrier(a).reshape(len(a), 2, -1).transpose(1, 2, 0).reshape(-1, len(a))
    return jax.lax.platform_dependent(a, cpu=halves, default=jnp.transpose)


def _matmul_backward(saved, g):
    x, w = saved
    # With an x of three axes, XLA:CPU would fuse the transpose and recompute x's producers. On other platforms,
    # flattening costs more: the T tokens of an image are padded to whole tiles, which differ from those of B x T rows.
    flat = lambda a: a.reshape(-1, a.shape[-1])
    as_matrices = lambda x, g: _product(_transposed(flat(x)), flat(g))
    rows = tuple(range(x.ndim - 1))
    as_given = lambda x, g: jax.lax.dot_general(x, g, ((rows, rows), ((), ())))
    return _product(g, _transposed(w)), jax.lax.platform_dependent(x, g, cpu=as_matrices, default=as_given)


matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), _matmul_backward)


# --- LayerNorm ------------------------------------------------------------------------------------


def plain_layer_norm(x, scale, bias, epsilon: float):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, over the last axis of x [..., D] (Ba et al. 2016).

    Computed in float32 and returned in x's dtype; scale and bias are float32 [D].
    """
    wide = x.astype(jnp.float32)
    mean, variance = wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True)
    return _scale_and_shift((wide - mean) / jnp.sqrt(variance + epsilon), scale, bias).astype(x.dtype)


def _scale_and_shift(x, scale, bias):
    return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, epsilon: float):
    """`plain_layer_norm` whose backward pass needs only x and reads it once."""
    return _scale_and_shift(_standardize(x, epsilon)[0], scale, bias).astype(x.dtype)


def _standardize(x, epsilon):
    """Standardized x and 1 / sqrt(variance + epsilon), float32."""
    # The variance needs a second pass: E[x^2] - E[x]^2 cancels and misses the tolerance of the golden files.
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
    return x * inverse, inverse


def _layer_norm_backward(epsilon, saved, g):
    x, scale = saved
    g = g.astype(jnp.float32)
    standardized, inverse = _standardize(x, epsilon)
    d_standardized = g * jnp.broadcast_to(scale, x.shape)
    mean = lambda a: a.mean(-1, keepdims=True)
    dx = inverse * (d_standardized - mean(d_standardized) - standardized * mean(d_standardized * standardized))
    rows = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (g * standardized).sum(rows), g.sum(rows)


layer_norm.defvjp(
    lambda x, scale, bias, epsilon: (layer_norm(x, scale, bias, epsilon), (x, scale)), _layer_norm_backward
)


# --- RMSNorm --------------------------------------------------------------------------------------


def plain_rms_norm(x, scale, epsilon: float):
    """Compute x / sqrt(mean(x^2) + epsilon) * scale, over the last axis of x [..., D] (Zhang & Sennrich 2019).

    Computed in float32 and returned in x's dtype; scale is float32 [D].
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)
    return (wide * inverse * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x, scale, epsilon: float):
    """`plain_rms_norm` whose backward pass needs only x and reads it once."""
    return plain_rms_norm(x, scale, epsilon)


def _rms_norm_backward(epsilon, saved, g):
    x, scale = saved
    # The barrier prevents XLA from saving x as float32 in the forward pass.
    wide, g = jax.lax.optimization_barrier(x).astype(jnp.float32), g.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)
    normed, d_normed = wide * inverse, g * jnp.broadcast_to(scale, x.shape)
    dx = inverse * (d_normed - normed * (d_normed * normed).mean(-1, keepdims=True))
    return dx.astype(x.dtype), (g * normed).sum(tuple(range(x.ndim - 1)))


rms_norm.defvjp(lambda x, scale, epsilon: (rms_norm(x, scale, epsilon), (x, scale)), _rms_norm_backward)


# --- Rotary position embedding --------------------------------------------------------------------


def plain_rotate(x, angles):
    """Rotate neighbouring pairs of x [B, T, H, d] by angles [B or 1, T, d / 2] (RoPE, Su et al. 2021), in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def rotate(x, angles):
    """`plain_rotate`, on TPU by `rotate_by_product`. The angles have no gradient."""
    return jax.lax.platform_dependent(x, angles, tpu=rotate_by_product, default=plain_rotate)


def rotate_by_product(x, angles):
    """`plain_rotate` by a product with a matrix of 0, 1 and -1: TPUs handle arrays of pairs slowly."""
    turn = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]])  # (a, b) -> (-b, a)
    turned = jnp.matmul(x, turn.astype(x.dtype), precision="highest")  # exact, in float32, too
    cos, sin = (jnp.repeat(f(angles), 2, axis=-1)[:, :, None] for f in (jnp.cos, jnp.sin))
    return (x * cos + turned * sin).astype(x.dtype)


rotate.defvjp(lambda x, angles: (rotate(x, angles), angles), lambda angles, g: (rotate(g, -angles), None))


# --- SwiGLU ---------------------------------------------------------------------------------------


def plain_swiglu(x):
    """silu(a) b of the halves a, b of x [..., 2 D] (Shazeer 2020): [..., D]."""
    a, b = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(a) * b


@jax.custom_vjp
def swiglu(x):
    """`plain_swiglu` whose backward pass needs only x and reads it once."""
    return plain_swiglu(x)


def _swiglu_backward(x, g):
    a, b = jnp.split(jax.lax.optimization_barrier(x), 2, axis=-1)
    sigmoid = jax.nn.sigmoid(a)
    return (jnp.concatenate([g * b * sigmoid * (1 + a * (1 - sigmoid)), g * a * sigmoid], axis=-1),)


swiglu.defvjp(lambda x: (swiglu(x), x), _swiglu_backward)


# --- GELU -----------------------------------------------------------------------------------------


def plain_gelu(x):
    """Multiply x by its standard normal CDF, elementwise (Hendrycks & Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=False)


@jax.custom_vjp
def gelu(x):
    """`plain_gelu` by erf, which is faster than JAX's erfc. The backward pass needs only x and reads it once."""
    return x * _normal_cdf(x)


def _normal_cdf(x):
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x, g):
    # The barrier prevents XLA from computing parts of this in the forward pass and saving them.
    x = jax.lax.optimization_barrier(x)
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return (g * (_normal_cdf(x) + x * density),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)
