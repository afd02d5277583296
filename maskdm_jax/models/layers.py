"""The layers of a U-ViT: patch embedding, time embedding, Linear, LayerNorm, attention, MLP, transformer block.

Shapes use B images, T tokens, V visible of N patches, D width, p patch size, C channels. Parameters are float32; layers
compute and return `dtype`. LayerNorm, attention logits and softmax are computed in float32 whatever `dtype` is.
"""

import math

import jax.numpy as jnp
from flax import nnx

from maskdm_jax.models.ops.attention import attention
from maskdm_jax.models.ops.dense import gelu, layer_norm, matmul

normal_002 = nnx.initializers.normal(0.02)
zeros, ones = nnx.initializers.zeros, nnx.initializers.ones


def patchify(images, patch_size: int):
    """Cut images [B, H, W, C] into patches [B, N, p*p*C], in row-major order, each flattened as (row, column, channel).

    Raises:
      ValueError: the patch size does not divide both sides.
    """
    b, h, w, c = images.shape
    p = patch_size
    if h % p or w % p:
        raise ValueError(f"images of {h} x {w} do not divide into patches of {p} x {p}")
    x = images.reshape(b, h // p, p, w // p, p, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches, patch_size: int, grid: tuple[int, int]):
    """Invert `patchify`: patches [B, rows*cols, p*p*C] of a grid (rows, cols) to images [B, rows*p, cols*p, C]."""
    b, _, d = patches.shape
    p, (rows, cols) = patch_size, grid
    x = patches.reshape(b, rows, cols, p, p, d // (p * p))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * p, cols * p, d // (p * p))


def timestep_embedding(t, dim: int):
    """Sinusoidal embedding of times t [B], on the scale of 0..999: [B, dim] float32, cosines first.

    The frequencies are those of Vaswani et al. 2017, 10000^(-i / (dim / 2)).
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Linear(nnx.Module):
    """x W + b: [..., dim] -> [..., out_dim]."""

    def __init__(
        self, dim: int, out_dim: int, *, use_bias=True, kernel_init=normal_002, bias_init=zeros, dtype, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (dim, out_dim)))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_dim,))) if use_bias else None

    def __call__(self, x):
        y = matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...].astype(self.dtype), y.shape)


class PatchEmbed(Linear):
    """Embed flattened patches [B, V, patch_dim] as tokens [B, V, D] and add their position embeddings.

    It equals the reference's convolution with stride p. Kernel and bias have PyTorch's default initialisation, uniform
    in +-1/sqrt(patch_dim).
    """

    def __init__(self, patch_dim: int, width: int, *, dtype, rngs: nnx.Rngs):
        bound = patch_dim**-0.5
        uniform = nnx.initializers.uniform(2 * bound)
        centred = lambda *args: uniform(*args) - bound
        super().__init__(patch_dim, width, kernel_init=centred, bias_init=centred, dtype=dtype, rngs=rngs)

    def __call__(self, patches, pos_grid, positions=None):
        """pos_grid: [N, D] float32, of the whole grid; positions: [B, V] of the patches, None for all N in order."""
        pos = pos_grid[None] if positions is None else pos_grid[positions]
        # Add in float32, and round to the compute dtype once.
        return (super().__call__(patches) + pos).astype(self.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with the reference's epsilon, computed in float32: [..., dim] -> [..., dim] of x's dtype."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(ones(rngs.params(), (dim,)))
        self.bias = nnx.Param(zeros(rngs.params(), (dim,)))

    def __call__(self, x):
        return layer_norm(x, self.scale[...], self.bias[...], epsilon=1e-5)


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017): [B, T, D] -> [B, T, D].

    One projection gives q, k and v, its columns ordered (3, heads, head_dim). With `qv_bias`, q and v have a bias each;
    a bias on k would cancel in the softmax.
    """

    def __init__(self, dim: int, heads: int, *, qv_bias: bool, kernel: str, dtype, rngs: nnx.Rngs):
        self.heads, self.kernel = heads, kernel
        self.qkv = Linear(dim, 3 * dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.q_bias = nnx.Param(jnp.zeros((dim,), jnp.float32)) if qv_bias else None
        self.v_bias = nnx.Param(jnp.zeros((dim,), jnp.float32)) if qv_bias else None
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        b, t, d = x.shape
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        if self.q_bias is not None:
            q = q + self.q_bias[None, None].astype(q.dtype)
            v = v + self.v_bias[None, None].astype(v.dtype)
        q, k, v = (a.reshape(b, t, self.heads, d // self.heads) for a in (q, k, v))
        return self.proj(attention(q, k, v, self.kernel).reshape(b, t, d))


class Mlp(nnx.Module):
    """Two linear layers with an activation between them: [..., D] -> [..., D]."""

    def __init__(self, dim: int, hidden: int, *, activation=gelu, dtype, rngs: nnx.Rngs):
        self.activation = activation
        self.fc1 = Linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Block(nnx.Module):
    """Pre-norm transformer block, [B, T, D] -> [B, T, D].

    With `skip`, the block takes a long skip [B, T, D] as second argument, concatenates it to x, and applies
    Linear(2D -> D) first (U-ViT, Bao et al. 2023).
    """

    def __init__(
        self, dim: int, heads: int, mlp_hidden: int, *, qv_bias: bool, skip: bool, kernel: str, dtype, rngs: nnx.Rngs
    ):
        self.skip_linear = Linear(2 * dim, dim, dtype=dtype, rngs=rngs) if skip else None
        self.norm1 = LayerNorm(dim, rngs=rngs)
        self.attn = Attention(dim, heads, qv_bias=qv_bias, kernel=kernel, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(dim, rngs=rngs)
        self.mlp = Mlp(dim, mlp_hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(jnp.concatenate([x, skip], axis=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
