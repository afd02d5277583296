"""The wavelet U-ViT (MaskDM-L): a U-ViT on the Haar coefficients of an image, in two bands of patches."""

import jax.numpy as jnp
from flax import nnx

from maskdm_jax.models.backbone import Backbone, extra_tokens
from maskdm_jax.models.layers import Linear, PatchEmbed, normal_002, patchify, unpatchify


def cut_bands(x, channels: int, patch_size: int, scale: int):
    """Cut Haar coefficients [B, h, w, 4C] into patches: (approximation [B, N, p*p*C], details [B, M, ps*ps*3C]).

    p is `patch_size`, ps = p * scale; N = (h / p) * (w / p) and M = N / scale^2.
    """
    return patchify(x[..., :channels], patch_size), patchify(x[..., channels:], patch_size * scale)


class WaveletUViT(nnx.Module):
    """Noise predictor on Haar coefficients (reference `MaskedDWTUViT`, 2023-06).

    Tokens are `[label?, time, approximation patches, detail patches]`, with one position embedding for all
    and a patch embedding and a head for each band. The rest is `Backbone`. As in the reference, a conditional
    model has no token for "no label", so it can be neither trained with label dropout nor guided.

    Args:
      image_size: side of the square images, in pixels; the coefficients' side is half of it.
      patch_size: side p of an approximation patch, in coefficients.
      channels: C, channels of the images.
      scale: s, detail patches have side p * s; p * s must divide image_size / 2.
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
        scale: int = 1,
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
        if image_size % (2 * patch_size * scale):
            raise ValueError(
                f"2 * patch_size * scale = {2 * patch_size * scale} does not divide image_size {image_size}"
            )
        self.patch_size, self.channels, self.scale, self.dtype = patch_size, channels, scale, dtype
        side = image_size // 2 // patch_size
        self.grids = ((side, side), (side // scale, side // scale))
        self.extras = extra_tokens(num_classes)
        approx_dim, detail_dim = patch_size**2 * channels, (patch_size * scale) ** 2 * 3 * channels
        tokens = self.extras + sum(rows * cols for rows, cols in self.grids)
        self.approx_patch_embed = PatchEmbed(approx_dim, width, dtype=dtype, rngs=rngs)
        self.detail_patch_embed = PatchEmbed(detail_dim, width, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(normal_002(rngs.params(), (tokens, width)))
        self.backbone = Backbone(
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            qv_bias=qv_bias,
            num_classes=num_classes,
            unconditional_token=False,
            time_mlp=time_mlp,
            dtype=dtype,
            attention=attention,
            remat=remat,
            rngs=rngs,
        )
        self.approx_head = Linear(width, approx_dim, kernel_init=normal_002, dtype=dtype, rngs=rngs)
        self.detail_head = Linear(width, detail_dim, kernel_init=normal_002, dtype=dtype, rngs=rngs)

    def __call__(self, x, t, labels=None, positions=None):
        """Predict the objective for all coefficients of an image or for the visible patches of both bands.

        Args:
          x: noisy coefficients [B, h, w, 4C] as `wavelet.haar` orders them, or the visible patches of both
            bands, (approximation [B, V, p*p*C], details [B, W, ps*ps*3C]).
          t: time step of each image, [B], 0..999, integer or fractional.
          labels: [B] int32 in 0..num_classes-1, needed by a conditional model.
          positions: ([B, V], [B, W]) int32, row-major index of each visible patch in its band's grid; only with
            patches, where None stands for both whole grids in order.

        Returns:
          float32, like x.

        Raises:
          ValueError: labels are missing or out of place, positions for whole coefficients, patches without
            positions that are not the whole grids.
        """
        whole = not isinstance(x, tuple)
        if whole and positions is not None:
            raise ValueError("positions go with patches of both bands; coefficients [B, h, w, 4C] take none")
        approx, detail = cut_bands(x, self.channels, self.patch_size, self.scale) if whole else x
        at_approx, at_detail = (None, None) if positions is None else positions
        sizes = [rows * cols for rows, cols in self.grids]
        if positions is None and [approx.shape[1], detail.shape[1]] != sizes:
            raise ValueError(
                f"got {approx.shape[1]} and {detail.shape[1]} patches without positions, but the model's grids have "
                f"{sizes[0]} and {sizes[1]}"
            )
        pos_extras = self.pos_embed[: self.extras]
        pos_approx = self.pos_embed[self.extras : self.extras + sizes[0]]
        pos_detail = self.pos_embed[self.extras + sizes[0] :]
        tokens = [
            self.approx_patch_embed(approx, pos_approx, at_approx),
            self.detail_patch_embed(detail, pos_detail, at_detail),
        ]
        h = self.backbone(jnp.concatenate(tokens, axis=1), pos_extras, t, labels)
        visible = approx.shape[1]
        approx = self.approx_head(h[:, :visible]).astype(jnp.float32)
        detail = self.detail_head(h[:, visible:]).astype(jnp.float32)
        if not whole:
            return approx, detail
        approx = unpatchify(approx, self.patch_size, self.grids[0])
        detail = unpatchify(detail, self.patch_size * self.scale, self.grids[1])
        return jnp.concatenate([approx, detail], axis=-1)
