"""JiT ("Just image Transformer", Li & He 2025): a plain transformer on large patches of pixels, here with masks."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskdm_jax.models.layers import Linear, normal_002, ones, patchify, timestep_embedding, unpatchify, zeros
from maskdm_jax.models.ops.attention import attention
from maskdm_jax.models.ops.dense import rms_norm, rotate, swiglu
from maskdm_jax.models.routing import split_positions, take, through_blocks

xavier = nnx.initializers.xavier_uniform()
TIME_WIDTH = 256  # of the sinusoidal embedding of the time
EPSILON = 1e-6  # of RMSNorm


class JiT(nnx.Module):
    """Denoising network on pixels, conditioned by adaptive norms (adaLN-zero) and by class tokens among the patches.

    A patch has a fixed sine-cosine position embedding, and rotary angles in attention. Hidden patches are never
    embedded, unless they skip only the inner blocks (`outer`); class tokens are never hidden.

    Args:
      image_size: side of the square images, in pixels.
      patch_size: side p of a patch; must divide `image_size`.
      channels: C, channels of the images.
      width: D, of a token.
      depth, heads: blocks, and attention heads of each; the width of a head is a multiple of 4.
      mlp_ratio: of an MLP; its hidden width is two thirds of width * mlp_ratio.
      bottleneck: width between the two linear layers that embed a patch.
      num_classes: classes, besides "no label"; 0 for an unconditional model.
      class_tokens: number of class tokens.
      class_tokens_from: the block before which they join the patches.
      dropout: rate after the attention and inside the MLP, in the middle half of the blocks.
      outer: blocks at either end that process all patches; hidden ones skip those between; see `models.routing`.
      mask_token: hidden patches re-enter as a learned token. A linear layer then joins all patches with their features
        from before the inner blocks (SPRINT).
      dtype: dtype of the computation; parameters are float32.
      attention: name of the kernel, see `ops.attention.attention`.
      remat: recompute each block in the backward pass instead of saving its activations.
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        channels: int = 3,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4,
        bottleneck: int = 128,
        num_classes: int = 0,
        class_tokens: int = 32,
        class_tokens_from: int = 4,
        dropout: float = 0.0,
        outer: int = 0,
        mask_token: bool = False,
        dtype=jnp.float32,
        attention: str = "auto",
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.patch_size, self.num_classes, self.class_tokens_from = patch_size, num_classes, class_tokens_from
        side, patch_dim = image_size // patch_size, patch_size**2 * channels
        self.grid, self.width, self.head_dim, self.dtype, self.remat = (side, side), width, width // heads, dtype, remat
        dense = dict(dtype=dtype, rngs=rngs)
        self.embed1 = Linear(patch_dim, bottleneck, use_bias=False, kernel_init=xavier, **dense)
        self.embed2 = Linear(bottleneck, width, kernel_init=xavier, **dense)
        self.time1 = Linear(TIME_WIDTH, width, **dense)
        self.time2 = Linear(width, width, **dense)
        self.label_table = nnx.Embed(num_classes + 1, width, embedding_init=normal_002, rngs=rngs)
        shape = (class_tokens, width)
        self.class_positions = nnx.Param(normal_002(rngs.params(), shape)) if class_tokens else None
        middle = range(depth // 4, depth // 4 * 3)
        self.blocks = nnx.List(
            Block(width, heads, int(width * mlp_ratio), dropout * (i in middle), kernel=attention, **dense)
            for i in range(depth)
        )
        self.outer = outer
        self.mask_token = nnx.Param(normal_002(rngs.params(), (width,))) if mask_token else None
        self.join = Linear(2 * width, width, kernel_init=xavier, **dense) if mask_token else None
        self.norm = RMSNorm(width, rngs=rngs)
        self.modulation = Linear(width, 2 * width, kernel_init=zeros, **dense)
        self.head = Linear(width, patch_dim, kernel_init=zeros, **dense)

    def __call__(self, x, t, labels=None, positions=None, dropout=None, shallow=None):
        """Predict for a whole image or for its visible patches.

        Args:
          x: noisy image [B, H, W, C], or noisy visible patches [B, V, p*p*C].
          t: [B] float32, the time input of `Process.network_inputs`; for flow matching 0..1, as in the JiT paper.
          labels: [B] int32 in 0..num_classes-1, -1 for "no label"; None is no label for all.
          positions: [B, V] int32, row-major index of each visible patch in the grid; only with patches. None with
            patches means that they are the whole grid in order. With `outer` blocks as in `UViT`.
          dropout: [B] keys for dropout; None is none.
          shallow: as in `UViT`.

        Returns:
          The prediction, float32 of x's shape.

        Raises:
          ValueError: as `UViT.__call__`.
        """
        if labels is not None and not self.num_classes:
            raise ValueError("labels were given to an unconditional model (num_classes = 0)")
        whole, n = x.ndim == 4, self.grid[0] * self.grid[1]
        patches = patchify(x, self.patch_size) if whole else x
        positions, visible = split_positions(positions, [patches.shape[1]], [n], whole=whole, outer=self.outer)
        at = lambda table: jnp.asarray(table)[None] if positions is None else jnp.asarray(table)[positions]
        h = (self.embed2(self.embed1(patches)) + at(sine_cosine(self.width, self.grid[0]))).astype(self.dtype)
        angles = at(rotary_angles(self.head_dim, self.grid[0]))  # [B or 1, V, head_dim / 2]
        inner_angles = angles if visible is None else take(angles, visible)
        label = self._label(labels, len(h))
        c = jax.nn.silu(self._time(t) + label).astype(self.dtype)

        blocks, joins_at = len(self.blocks), -1 if self.class_positions is None else self.class_tokens_from

        def with_classes(h):
            classes = label[:, None] + self.class_positions[None]
            return jnp.concatenate([classes.astype(h.dtype), h], axis=1)

        def run(i, h, inner):
            h = with_classes(h) if i == joins_at else h
            keys = None if dropout is None else jax.vmap(jax.random.fold_in, (0, None))(dropout, i)
            block = jax.checkpoint(lambda *a: self.blocks[i](*a)) if self.remat else self.blocks[i]
            return block(h, c, inner_angles if inner else angles, keys)

        join_inside = self.outer <= joins_at < blocks - self.outer
        options = dict(patches=h.shape[1], token=self.mask_token, join=self.join)
        options |= dict(add_extras=with_classes if join_inside else None)
        h = through_blocks(run, h, blocks, self.outer, visible, shallow, **options)[:, -h.shape[1] :]
        shift, scale = jnp.split(self.modulation(c)[:, None], 2, axis=-1)
        out = self.head(modulate(self.norm(h), shift, scale)).astype(jnp.float32)
        return unpatchify(out, self.patch_size, self.grid) if whole else out

    def _time(self, t):
        embedded = timestep_embedding(t, TIME_WIDTH)
        return self.time2(jax.nn.silu(self.time1(embedded))).astype(jnp.float32)

    def _label(self, labels, n: int):
        labels = jnp.full(n, self.num_classes) if labels is None else jnp.where(labels < 0, self.num_classes, labels)
        return self.label_table(labels)


class Block(nnx.Module):
    """Transformer block with adaLN-zero, [B, T, D] -> [B, T, D]: attention with normalised q and k, and SwiGLU."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int, dropout: float, *, kernel: str, dtype, rngs: nnx.Rngs):
        dense, hidden = dict(kernel_init=xavier, dtype=dtype, rngs=rngs), int(mlp_hidden * 2 / 3)
        self.heads, self.kernel, self.dropout = heads, kernel, dropout
        self.norm1, self.norm2 = RMSNorm(dim, rngs=rngs), RMSNorm(dim, rngs=rngs)
        self.q_norm, self.k_norm = RMSNorm(dim // heads, rngs=rngs), RMSNorm(dim // heads, rngs=rngs)
        self.qkv = Linear(dim, 3 * dim, **dense)
        self.proj = Linear(dim, dim, **dense)
        self.w12 = Linear(dim, 2 * hidden, **dense)
        self.w3 = Linear(hidden, dim, **dense)
        self.modulation = Linear(dim, 6 * dim, **dense | dict(kernel_init=zeros))

    def __call__(self, x, c, angles, keys=None):
        """c: condition [B, D]; angles: [B or 1, V, head_dim / 2], of the last V tokens; keys: [B], for dropout."""
        parts = jnp.split(self.modulation(c)[:, None], 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        drop = lambda y, i: _drop(y, self.dropout, keys, i)
        x = x + gate1 * drop(self._attend(modulate(self.norm1(x), shift1, scale1), angles), 0)
        hidden = swiglu(self.w12(modulate(self.norm2(x), shift2, scale2)))
        return x + gate2 * self.w3(drop(hidden, 1))

    def _attend(self, x, angles):
        b, t, d = x.shape
        angles = jnp.pad(angles, ((0, 0), (t - angles.shape[1], 0), (0, 0)))  # class tokens, first, are not rotated
        q, k, v = (a.reshape(b, t, self.heads, -1) for a in jnp.split(self.qkv(x), 3, axis=-1))
        q, k = (rotate(norm(a), angles) for norm, a in ((self.q_norm, q), (self.k_norm, k)))
        return self.proj(attention(q, k, v, self.kernel).reshape(b, t, d))


class RMSNorm(nnx.Module):
    """Divide x [..., dim] by the root of its mean square, and scale; in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(ones(rngs.params(), (dim,)))

    def __call__(self, x):
        return rms_norm(x, self.scale[...], EPSILON)


def modulate(x, shift, scale):
    """Scale x by 1 + scale and add shift, both [B, 1, D]."""
    return x * (1 + scale) + shift


def rotary_angles(head_dim: int, side: int) -> np.ndarray:
    """Angles [side * side, head_dim / 2] of a grid of patches: the first half by row, the second by column."""
    frequencies = 10_000.0 ** -(np.arange(0, head_dim // 2, 2) / (head_dim // 2))
    rows, columns = np.divmod(np.arange(side * side), side)
    return np.concatenate([place[:, None] * frequencies for place in (rows, columns)], axis=1).astype(np.float32)


def sine_cosine(width: int, side: int) -> np.ndarray:
    """Position embedding [side * side, width] of a grid of patches: the first half by column, the second by row."""
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width / 4))
    rows, columns = np.divmod(np.arange(side * side), side)
    parts = [f(place[:, None] * frequencies) for place in (columns, rows) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _drop(x, rate: float, keys, number: int):
    """The dropout of this number in its block, drawn per image: it does not depend on the other images of the batch."""
    if keys is None or not rate:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)
