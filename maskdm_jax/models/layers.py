"""The parts of a U-ViT: patches and their embedding, attention, MLP, block, time embedding.

Shapes use B images, T tokens, N patches, D width, H heads, p patch size, C channels.
Every module keeps float32 parameters and computes in `dtype`; LayerNorm, attention
logits and softmax stay in float32 whatever `dtype` is.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from maskdm_jax.models.ops.attention import attention

LAYER_NORM_EPS = 1e-5
normal_002 = nnx.initializers.normal(0.02)


def patchify(images, patch_size: int):
    """Cut images [B, H, W, C] into patches [B, N, p*p*C], row-major, each flattened as (row, column, channel)."""
    b, h, w, c = images.shape
    p = patch_size
    if h % p or w % p:
        raise ValueError(f"images of {h} x {w} do not divide into patches of {p} x {p}")
    x = images.reshape(b, h // p, p, w // p, p, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches, patch_size: int, grid: tuple[int, int]):
    """Inverse of `patchify`: [B, rows*cols, p*p*C] and grid (rows, cols) give [B, rows*p, cols*p, C]."""
    b, n, d = patches.shape
    p, (rows, cols) = patch_size, grid
    if n != rows * cols or d % (p * p):
        raise ValueError(f"patches {patches.shape} do not form a {rows} x {cols} grid of {p} x {p} patches")
    x = patches.reshape(b, rows, cols, p, p, d // (p * p))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * p, cols * p, d // (p * p))


def timestep_embedding(t, dim: int):
    """Sinusoid of the raw time step: t [B] (0..999, may be fractional) gives [B, dim] float32, cosines first."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


@jax.custom_vjp
def matmul(x, w):
    """The product of x [..., D] and w [D, E]: [..., E]."""
    return _product(x, w)


def _product(a, b):
    if a.dtype == jnp.float32:
        return a @ b
    # CPUs that multiply bfloat16 in hardware are asked to only for results in float32.
    wide = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)
    return jax.lax.platform_dependent(a, b, cpu=wide, default=jnp.matmul)


def _turned(a):
    """a.T; for bfloat16 on CPU in a way that XLA does not take into the product, where the hardware could not do it."""
    if a.dtype == jnp.float32 or a.shape[1] % 2:
        return a.T
    halves = lambda a: jax.lax.optimization_barrier(a).reshape(len(a), 2, -1).transpose(1, 2, 0).reshape(-1, len(a))
    return jax.lax.platform_dependent(a, cpu=halves, default=jnp.transpose)


def _matmul_backward(saved, g):
    x, w = saved
    # On CPU, XLA would turn an x of more than two axes round in a loop that computes the sums that x is made of anew.
    # Elsewhere it is the matrix that costs: T tokens are padded to whole tiles, B x T rows to others.
    flat = lambda a: a.reshape(-1, a.shape[-1])
    as_matrices = lambda x, g: _product(_turned(flat(x)), flat(g))
    rows = tuple(range(x.ndim - 1))
    as_they_are = lambda x, g: jax.lax.dot_general(x, g, ((rows, rows), ((), ())))
    return _product(g, _turned(w)), jax.lax.platform_dependent(x, g, cpu=as_matrices, default=as_they_are)


matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), _matmul_backward)


class Linear(nnx.Linear):
    """nnx.Linear by `matmul`."""

    def __init__(self, dim: int, out_dim: int, **options):
        super().__init__(dim, out_dim, dot_general=lambda x, w, *_, **__: matmul(x, w), **options)


class PatchEmbed(Linear):
    """Flattened patches [B, V, d] to tokens [B, V, D] with their position embeddings added.

    The reference's convolution with stride p is a Linear on flattened patches. It keeps its framework's default
    start: uniform in +-1/sqrt(fan_in), bias too.
    """

    def __init__(self, patch_dim: int, width: int, *, dtype, rngs: nnx.Rngs):
        bound = patch_dim**-0.5
        uniform = nnx.initializers.uniform(2 * bound)
        centred = lambda key, shape, dtype: uniform(key, shape, dtype) - bound
        super().__init__(patch_dim, width, kernel_init=centred, bias_init=centred, dtype=dtype, rngs=rngs)

    def __call__(self, patches, pos_grid, positions=None):
        """pos_grid: [N, D] of the whole grid; positions: [B, V] of the visible patches, None for all in order."""
        pos = pos_grid[None] if positions is None else pos_grid[positions]
        # The sum is taken in float32 and rounded once, to the compute dtype.
        return (super().__call__(patches) + pos).astype(self.dtype)


class LayerNorm(nnx.LayerNorm):
    """LayerNorm with the reference's epsilon, computed in float32 and returned in `out_dtype`."""

    def __init__(self, dim: int, *, out_dtype=jnp.float32, rngs: nnx.Rngs):
        super().__init__(dim, epsilon=LAYER_NORM_EPS, rngs=rngs)
        self.out_dtype = out_dtype

    def __call__(self, x):
        return layer_norm(x.astype(jnp.float32), self.scale[...], self.bias[...]).astype(self.out_dtype)


@jax.custom_vjp
def layer_norm(x, scale, bias):
    """Bring x [..., D] to mean 0 and variance 1 over its last axis, times scale [D], plus bias [D]; float32."""
    return _standardised(x)[0] * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


def _standardised(x):
    """(x - mean) / deviation, 1 / deviation."""
    # Two passes: the variance as E[x^2] - E[x]^2 cancels and misses the golden tolerance.
    x = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    return x * inverse, inverse


def _layer_norm_backward(saved, g):
    # From x alone: derived step by step, it would keep and pass over several arrays of x's size.
    x, scale = saved
    normal, inverse = _standardised(x)
    to_normal = g * jnp.broadcast_to(scale, x.shape)
    mean = lambda a: a.mean(-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    to_x = inverse * (to_normal - mean(to_normal) - normal * mean(to_normal * normal))
    return to_x, (g * normal).sum(rows), g.sum(rows)


layer_norm.defvjp(lambda x, scale, bias: (layer_norm(x, scale, bias), (x, scale)), _layer_norm_backward)


class Attention(nnx.Module):
    """Multi-head self-attention, [B, T, D] -> [B, T, D].

    One projection gives q, k and v, its columns ordered (3, heads, head_dim). With `qv_bias`,
    q and v have a bias each and k has none: softmax cancels a bias on k anyway.
    """

    def __init__(self, dim: int, heads: int, *, qv_bias: bool, kernel: str, dtype, rngs: nnx.Rngs):
        if dim % heads:
            raise ValueError(f"width {dim} does not divide into {heads} heads")
        self.heads, self.kernel = heads, kernel
        self.qkv = Linear(dim, 3 * dim, use_bias=False, kernel_init=normal_002, dtype=dtype, rngs=rngs)
        self.q_bias = nnx.Param(jnp.zeros((dim,), jnp.float32)) if qv_bias else None
        self.v_bias = nnx.Param(jnp.zeros((dim,), jnp.float32)) if qv_bias else None
        self.proj = Linear(dim, dim, kernel_init=normal_002, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        b, t, d = x.shape
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        if self.q_bias is not None:
            q = q + self.q_bias[None, None].astype(q.dtype)
            v = v + self.v_bias[None, None].astype(v.dtype)
        q, k, v = (a.reshape(b, t, self.heads, d // self.heads) for a in (q, k, v))
        return self.proj(attention(q, k, v, self.kernel).reshape(b, t, d))


class Mlp(nnx.Module):
    """Two linear layers around an activation, [..., D] -> [..., out_dim or D]."""

    def __init__(self, dim: int, hidden: int, *, activation, dtype, rngs: nnx.Rngs):
        self.activation = activation
        self.fc1 = Linear(dim, hidden, kernel_init=normal_002, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, dim, kernel_init=normal_002, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.fc2(self.activation(self.fc1(x)))


@jax.custom_vjp
def exact_gelu(x):
    """GELU by the error function, as the reference has it (`jax.nn.gelu` goes by tanh or, exactly, by slower erfc)."""
    return x * _normal_cdf(x)


def _normal_cdf(x):
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x, g):
    # By hand, to be one pass over x and g; the barrier keeps the forward pass from saving parts of it.
    x = jax.lax.optimization_barrier(x)
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return (g * (_normal_cdf(x) + x * density),)


exact_gelu.defvjp(lambda x: (exact_gelu(x), x), _gelu_backward)


class Block(nnx.Module):
    """Pre-norm transformer block, [B, T, D] -> [B, T, D].

    A block made with `skip=True` takes the long skip of its twin in the first half as second
    argument and merges it first thing: Linear(2D -> D) of the two side by side.
    """

    def __init__(
        self, dim: int, heads: int, mlp_hidden: int, *, qv_bias: bool, skip: bool, kernel: str, dtype, rngs: nnx.Rngs
    ):
        self.skip_linear = Linear(2 * dim, dim, kernel_init=normal_002, dtype=dtype, rngs=rngs) if skip else None
        self.norm1 = LayerNorm(dim, out_dtype=dtype, rngs=rngs)
        self.attn = Attention(dim, heads, qv_bias=qv_bias, kernel=kernel, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(dim, out_dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, mlp_hidden, activation=exact_gelu, dtype=dtype, rngs=rngs)

    def __call__(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(jnp.concatenate([x, skip], axis=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
