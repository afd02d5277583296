"""The masked U-ViT of MaskDM: a vision transformer with long skips that computes visible patches only."""

import jax
import jax.numpy as jnp
from flax import nnx

from maskdm_jax.models.layers import Block, LayerNorm, Mlp, normal_002, patchify, timestep_embedding, unpatchify


class UViT(nnx.Module):
    """U-ViT noise predictor (MaskDM, section 3.2; reference `MaskedUViT`).

    Tokens are `[label?, time, patches]`. A learned position embedding is added to all of them; hidden
    patches are never embedded. `depth // 2` blocks, one in the middle, `depth // 2` blocks with long skips.

    Args:
      image_size: side of the square images, in pixels.
      patch_size: side p of a patch; must divide `image_size`.
      channels: C, channels of the images.
      width, depth, heads: of the transformer; depths 2k and 2k + 1 are the same network.
      mlp_ratio: hidden width of an MLP over `width`.
      qv_bias: give q and v a bias.
      num_classes: 0 for an unconditional model.
      time_mlp: send the time embedding through a two-layer MLP before it becomes a token.
      dtype: of the computation; parameters and the returned prediction are float32.
      remat: recompute each block in the backward pass rather than keep its activations.
      rngs: parameter initialisation.
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
        qv_bias: bool = False,
        num_classes: int = 0,
        time_mlp: bool = False,
        dtype=jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        if image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size}")
        if width % 2:
            raise ValueError(f"width {width} is odd; the time embedding is half cosines, half sines")
        self.patch_size, self.num_classes, self.dtype, self.remat = patch_size, num_classes, dtype, remat
        self.width = width
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.extras = 2 if num_classes else 1  # tokens before the patches; never hidden
        patch_dim = patch_size * patch_size * channels

        # The reference's patch convolution keeps its framework's default start: uniform in
        # +-1/sqrt(fan_in), bias too. A convolution with stride p is a Linear on flattened patches.
        bound = patch_dim**-0.5
        uniform = nnx.initializers.uniform(2 * bound)
        centred = lambda key, shape, dtype: uniform(key, shape, dtype) - bound
        self.patch_embed = nnx.Linear(patch_dim, width, kernel_init=centred, bias_init=centred, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(normal_002(rngs.params(), (self.extras + self.grid[0] * self.grid[1], width)))
        self.time_mlp = Mlp(width, 4 * width, activation=jax.nn.silu, dtype=dtype, rngs=rngs) if time_mlp else None
        if num_classes:
            self.label_embed = nnx.Embed(num_classes, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
            self.uncond_embed = nnx.Param(normal_002(rngs.params(), (width,)))

        def block(skip):
            return Block(width, heads, int(width * mlp_ratio), qv_bias=qv_bias, skip=skip, dtype=dtype, rngs=rngs)

        self.in_blocks = nnx.List([block(skip=False) for _ in range(depth // 2)])
        self.mid_block = block(skip=False)
        self.out_blocks = nnx.List([block(skip=True) for _ in range(depth // 2)])
        self.norm = LayerNorm(width, out_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, patch_dim, kernel_init=normal_002, dtype=dtype, rngs=rngs)

    def __call__(self, x, t, labels=None, positions=None):
        """Predict the objective (noise, x0 or v) for a whole image or for its visible patches.

        Args:
          x: noisy image [B, H, W, C], or noisy visible patches [B, V, p*p*C].
          t: time step of each image, [B], 0..999, integer or fractional.
          labels: [B] int32 in 0..num_classes-1, -1 for "no label"; None is no label for all.
          positions: [B, V] int32, row-major index of each visible patch in the grid; only with patches,
            where None stands for the whole grid in order.

        Returns:
          float32 of x's shape.

        Raises:
          ValueError: labels for an unconditional model, positions for a whole image, patches without
            positions that are not the whole grid.
        """
        if labels is not None and not self.num_classes:
            raise ValueError("labels were given to an unconditional model (num_classes = 0)")
        whole = x.ndim == 4
        if whole and positions is not None:
            raise ValueError("positions go with patches [B, V, p*p*C]; a whole image [B, H, W, C] takes none")
        patches = patchify(x, self.patch_size) if whole else x
        pos_extras, pos_grid = self.pos_embed[: self.extras], self.pos_embed[self.extras :]
        if positions is None and patches.shape[1] != pos_grid.shape[0]:
            raise ValueError(
                f"got {patches.shape[1]} patches without positions, but the model's grid is "
                f"{self.grid[0]} x {self.grid[1]} = {pos_grid.shape[0]}"
            )

        # Sums are taken in float32 and rounded once, to the compute dtype.
        pos = pos_grid[None] if positions is None else pos_grid[positions]
        patch_tokens = (self.patch_embed(patches) + pos).astype(self.dtype)  # [B, V, D]
        extras = jnp.stack(self._extra_tokens(t, labels), axis=1) + pos_extras[None]
        h = jnp.concatenate([extras.astype(self.dtype), patch_tokens], axis=1)  # [B, extras + V, D]

        def run(block, *args):
            return jax.checkpoint(lambda *a: block(*a))(*args) if self.remat else block(*args)

        skips = []
        for block in self.in_blocks:
            h = run(block, h)
            skips.append(h)
        h = run(self.mid_block, h)
        for block in self.out_blocks:
            h = run(block, h, skips.pop())

        out = self.head(self.norm(h[:, self.extras :])).astype(jnp.float32)
        return unpatchify(out, self.patch_size, self.grid) if whole else out

    def _extra_tokens(self, t, labels):
        """The label token (of a conditional model) and the time token, each [B, D]."""
        time = timestep_embedding(t, self.width)
        if self.time_mlp is not None:
            time = self.time_mlp(time).astype(jnp.float32)
        if not self.num_classes:
            return [time]
        if labels is None:
            return [jnp.broadcast_to(self.uncond_embed[None], time.shape), time]
        known = self.label_embed(jnp.maximum(labels, 0))
        return [jnp.where(labels[:, None] >= 0, known, self.uncond_embed[None]), time]
