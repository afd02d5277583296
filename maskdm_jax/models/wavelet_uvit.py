"""The wavelet U-ViT (MaskDM-L): a U-ViT on the Haar coefficients of an image, in two bands of patches."""

import jax.numpy as jnp
from flax import nnx

from maskdm_jax.models.backbone import Backbone, extra_tokens
from maskdm_jax.models.layers import Linear, PatchEmbed, normal_002, patchify, unpatchify
from maskdm_jax.models.routing import split_positions


def cut_bands(x, channels: int, patch_size: int, scale: int):
    """Cut Haar coefficients [B, h, w, 4C] into patches: (approximation [B, N, p*p*C], details [B, M, ps*ps*3C]).

    p is `patch_size`, ps = p * scale; N = (h / p) * (w / p) and M = N / scale^2.

    Raises:
      ValueError: ps does not divide both sides.
    """
    return patchify(x[..., :channels], patch_size), patchify(x[..., channels:], patch_size * scale)


class WaveletUViT(nnx.Module):
    """Denoising network on Haar coefficients (reference `MaskedDWTUViT`, 2023-06).

    Tokens are `[label?, time, approximation patches, detail patches]`, each with a learned position embedding. Each
    band has its own patch embedding and head. As in the reference, a conditional model has no token for "no label", so
    it supports neither label dropout nor classifier-free guidance.

    Args:
      image_size: side of the square images, in pixels; the coefficients' side is half of it.
      patch_size: side p of an approximation patch, in coefficients.
      channels: C, channels of the images.
      scale: s, detail patches have side p * s; p * s must divide image_size / 2.
      width, num_classes, dtype, rngs, **options: see `Backbone`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        channels: int = 3,
        scale: int = 1,
        width: int,
        num_classes: int = 0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **options,
    ):
        self.patch_size, self.channels, self.scale = patch_size, channels, scale
        side = image_size // 2 // patch_size
        self.grids = ((side, side), (side // scale, side // scale))
        self.extras = extra_tokens(num_classes)
        tokens = self.extras + sum(rows * cols for rows, cols in self.grids)
        approx_dim, detail_dim = patch_size**2 * channels, (patch_size * scale) ** 2 * 3 * channels
        self.approx_patch_embed = PatchEmbed(approx_dim, width, dtype=dtype, rngs=rngs)
        self.detail_patch_embed = PatchEmbed(detail_dim, width, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(normal_002(rngs.params(), (tokens, width)))
        options |= dict(width=width, num_classes=num_classes, dtype=dtype, rngs=rngs)
        self.backbone = Backbone(unconditional_token=False, **options)
        self.approx_head = Linear(width, approx_dim, dtype=dtype, rngs=rngs)
        self.detail_head = Linear(width, detail_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x, t, labels=None, positions=None, shallow=None):
        """Predict the objective for all coefficients of an image or for the visible patches of both bands.

        Args:
          x: noisy coefficients [B, h, w, 4C] in the order of `representation.haar`, or the visible patches of both
            bands, (approximation [B, V, p*p*C], details [B, W, ps*ps*3C]).
          t: time input, [B], integer or fractional: 0..T-1 for DDPM, 0..1000 for flow matching, 250 log(sigma) for
            EDM.
          labels: [B] int32 in 0..num_classes-1, required by a conditional model.
          positions: ([B, V], [B, W]) int32, row-major index of each visible patch in its band's grid; only with
            patches. None with patches means that they are both whole grids in order. With `outer` blocks as in `UViT`.
          shallow: as in `UViT`.

        Returns:
          The prediction, float32 of x's shape or shapes.

        Raises:
          ValueError: labels are missing or given to an unconditional model, positions are given for whole coefficients,
            or patches without positions are not the whole grids.
        """
        whole, sizes = not isinstance(x, tuple), [rows * cols for rows, cols in self.grids]
        approx, detail = cut_bands(x, self.channels, self.patch_size, self.scale) if whole else x
        given, outer = [approx.shape[1], detail.shape[1]], self.backbone.outer
        positions, visible = split_positions(positions, given, sizes, whole=whole, outer=outer)
        at_approx, at_detail = (None, None) if positions is None else positions
        if visible is not None:
            visible = jnp.concatenate([visible[0], visible[1] + sizes[0]], axis=1)
        pos_extras, pos_approx, pos_detail = jnp.split(self.pos_embed[...], [self.extras, self.extras + sizes[0]])
        approx_tokens = self.approx_patch_embed(approx, pos_approx, at_approx)
        detail_tokens = self.detail_patch_embed(detail, pos_detail, at_detail)
        tokens = jnp.concatenate([approx_tokens, detail_tokens], axis=1)
        h = self.backbone(tokens, pos_extras, t, labels, visible, shallow)
        count = approx.shape[1]
        approx = self.approx_head(h[:, :count]).astype(jnp.float32)
        detail = self.detail_head(h[:, count:]).astype(jnp.float32)
        if not whole:
            return approx, detail
        approx = unpatchify(approx, self.patch_size, self.grids[0])
        detail = unpatchify(detail, self.patch_size * self.scale, self.grids[1])
        return jnp.concatenate([approx, detail], axis=-1)
