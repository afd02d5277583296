"""The masked U-ViT of MaskDM: a vision transformer with long skips that processes only visible patches."""

import jax.numpy as jnp
from flax import nnx

from maskdm_jax.models.backbone import Backbone, extra_tokens
from maskdm_jax.models.layers import Linear, PatchEmbed, normal_002, patchify, unpatchify
from maskdm_jax.models.routing import split_positions


class UViT(nnx.Module):
    """Denoising network on pixels (MaskDM, section 3.2; reference `MaskedUViT`).

    Tokens are `[label?, time, patches]`, each with a learned position embedding. Hidden patches are not embedded,
    unless `outer` blocks process them.

    Args:
      image_size: side of the square images, in pixels.
      patch_size: side p of a patch; must divide `image_size`.
      channels: C, channels of the images.
      width, num_classes, dtype, rngs, **options: see `Backbone`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        channels: int = 3,
        width: int,
        num_classes: int = 0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **options,
    ):
        self.patch_size = patch_size
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.extras = extra_tokens(num_classes)
        tokens, patch_dim = self.extras + self.grid[0] * self.grid[1], patch_size**2 * channels
        self.patch_embed = PatchEmbed(patch_dim, width, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(normal_002(rngs.params(), (tokens, width)))
        self.backbone = Backbone(width=width, num_classes=num_classes, dtype=dtype, rngs=rngs, **options)
        self.head = Linear(width, patch_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x, t, labels=None, positions=None, shallow=None):
        """Predict the objective (noise, x0 or v) for a whole image or for its visible patches.

        Args:
          x: noisy image [B, H, W, C], or noisy visible patches [B, V, p*p*C].
          t: time input, [B], integer or fractional: 0..T-1 for DDPM, 0..1000 for flow matching, 250 log(sigma) for
            EDM.
          labels: [B] int32 in 0..num_classes-1, -1 for "no label"; None is no label for all.
          positions: [B, V] int32, row-major index of each visible patch in the grid; only with patches. None with
            patches means that they are the whole grid in order. With `outer` blocks, x is of all patches or the whole
            image, and these are the patches that are visible in the inner blocks.
          shallow: [B] bool, with `outer` blocks: the images of which all tokens skip the inner blocks; None for none.

        Returns:
          The prediction, float32 of x's shape.

        Raises:
          ValueError: labels are given to an unconditional model, positions are given for a whole image, or patches
            without positions are not the whole grid.
        """
        whole = x.ndim == 4
        patches = patchify(x, self.patch_size) if whole else x
        pos_extras, pos_grid = self.pos_embed[: self.extras], self.pos_embed[self.extras :]
        given, outer = [patches.shape[1]], self.backbone.outer
        positions, visible = split_positions(positions, given, [len(pos_grid)], whole=whole, outer=outer)
        tokens = self.patch_embed(patches, pos_grid, positions)  # [B, V, D]
        out = self.head(self.backbone(tokens, pos_extras, t, labels, visible, shallow)).astype(jnp.float32)
        return unpatchify(out, self.patch_size, self.grid) if whole else out
