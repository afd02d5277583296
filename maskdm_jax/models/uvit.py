"""The masked U-ViT of MaskDM: a vision transformer with long skips that computes visible patches only."""

import jax.numpy as jnp
from flax import nnx

from maskdm_jax.models.backbone import Backbone, extra_tokens
from maskdm_jax.models.layers import Linear, PatchEmbed, normal_002, patchify, unpatchify


class UViT(nnx.Module):
    """U-ViT noise predictor (MaskDM, section 3.2; reference `MaskedUViT`).

    Tokens are `[label?, time, patches]`. A learned position embedding is added to all of them; hidden
    patches are never embedded. The rest is `Backbone`.

    Args:
      image_size: side of the square images, in pixels.
      patch_size: side p of a patch; must divide `image_size`.
      channels: C, channels of the images.
      width, depth, heads, mlp_ratio, qv_bias, num_classes, time_mlp, attention, remat: see `Backbone`.
      dtype: of the computation; parameters and the returned prediction are float32.
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
        attention: str = "auto",
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        if image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size}")
        self.patch_size, self.dtype = patch_size, dtype
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.extras = extra_tokens(num_classes)
        patch_dim = patch_size * patch_size * channels
        self.patch_embed = PatchEmbed(patch_dim, width, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(normal_002(rngs.params(), (self.extras + self.grid[0] * self.grid[1], width)))
        self.backbone = Backbone(
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            qv_bias=qv_bias,
            num_classes=num_classes,
            unconditional_token=True,
            time_mlp=time_mlp,
            dtype=dtype,
            attention=attention,
            remat=remat,
            rngs=rngs,
        )
        self.head = Linear(width, patch_dim, kernel_init=normal_002, dtype=dtype, rngs=rngs)

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
        tokens = self.patch_embed(patches, pos_grid, positions)  # [B, V, D]
        out = self.head(self.backbone(tokens, pos_extras, t, labels)).astype(jnp.float32)
        return unpatchify(out, self.patch_size, self.grid) if whole else out
