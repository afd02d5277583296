"""The transformer of the U-ViT and the wavelet U-ViT: label and time tokens, blocks with long skips, final norm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from maskdm_jax.models.layers import Block, LayerNorm, Mlp, normal_002, timestep_embedding
from maskdm_jax.models.routing import through_blocks


class Backbone(nnx.Module):
    """Transformer over the tokens `[label?, time, patches]` (U-ViT, Bao et al. 2023, as in the reference).

    It has `depth // 2` blocks, one middle block, and `depth // 2` blocks that each take a long skip from their
    counterpart in the first half. Depths 2k and 2k + 1 give the same network.

    Args:
      width: D, of a token; even, because the time embedding is half cosines, half sines.
      depth, heads: blocks, and attention heads of each; `heads` divides `width`.
      mlp_ratio: hidden width of an MLP, divided by `width`.
      qv_bias: give queries and values a bias.
      num_classes: 0 for an unconditional model.
      unconditional_token: give a conditional model a learned token for "no label".
      time_mlp: pass the time embedding through a two-layer MLP before it becomes a token.
      outer: blocks at either end that process all patches; hidden ones skip those between; see `models.routing`.
      mask_token: hidden patches re-enter after the inner blocks as a learned token instead of their own features.
      dtype: dtype of the computation; parameters are float32.
      attention: name of the kernel, see `ops.attention.attention`.
      remat: recompute each block in the backward pass instead of saving its activations.
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4,
        qv_bias: bool = False,
        num_classes: int = 0,
        unconditional_token: bool = True,
        time_mlp: bool = False,
        outer: int = 0,
        mask_token: bool = False,
        dtype=jnp.float32,
        attention: str = "auto",
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.width, self.num_classes, self.dtype, self.remat = width, num_classes, dtype, remat
        self.outer = outer
        self.mask_token = nnx.Param(normal_002(rngs.params(), (width,))) if mask_token else None
        self.extras = extra_tokens(num_classes)
        self.time_mlp = Mlp(width, 4 * width, activation=jax.nn.silu, dtype=dtype, rngs=rngs) if time_mlp else None
        if num_classes:
            self.label_embed = nnx.Embed(num_classes, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
            self.uncond_embed = nnx.Param(normal_002(rngs.params(), (width,))) if unconditional_token else None

        def block(skip):
            options = dict(qv_bias=qv_bias, skip=skip, kernel=attention, dtype=dtype, rngs=rngs)
            return Block(width, heads, int(width * mlp_ratio), **options)

        self.in_blocks = nnx.List([block(skip=False) for _ in range(depth // 2)])
        self.mid_block = block(skip=False)
        self.out_blocks = nnx.List([block(skip=True) for _ in range(depth // 2)])
        self.norm = LayerNorm(width, rngs=rngs)

    def __call__(self, patch_tokens, pos_extras, t, labels=None, visible=None, shallow=None):
        """Transform patch tokens [B, V, D], position embeddings included; returns [B, V, D] of the compute dtype.

        Args:
          visible: [B, W] numbers of the patches that take part in the inner blocks, None for all.
          shallow: [B] bool, the images of which all tokens skip the inner blocks; None for none.
          pos_extras: [extras, D], position embeddings of the label (if any) and time tokens.
          t: [B], the network's time, integer or fractional, about 0..1000; with EDM it can be negative.
          labels: [B] int32 in 0..num_classes-1, -1 for "no label"; None is no label for all.

        Raises:
          ValueError: labels are given to an unconditional model, or missing without an unconditional token.
        """
        extras = jnp.stack(self._extra_tokens(t, labels), axis=1) + pos_extras[None]
        h = jnp.concatenate([extras.astype(self.dtype), patch_tokens], axis=1)  # [B, extras + V, D]
        # Without this, XLA on GPU gives all tokens a layout whose fastest axis is the batch, and transposes them often.
        h = with_layout_constraint(h, Layout((0, 1, 2)))

        blocks, outputs, middle = [*self.in_blocks, self.mid_block, *self.out_blocks], {}, len(self.in_blocks)

        def run(i, h, inner):
            skip = [outputs[2 * middle - i]] if i > middle else []  # of its counterpart in the first half
            block = jax.checkpoint(lambda *a: blocks[i](*a)) if self.remat else blocks[i]
            outputs[i] = block(h, *skip)
            return outputs[i]

        options = dict(patches=patch_tokens.shape[1], token=self.mask_token)
        h = through_blocks(run, h, len(blocks), self.outer, visible, shallow, **options)
        return self.norm(h[:, self.extras :])

    def _extra_tokens(self, t, labels):
        """The label token (of a conditional model) and the time token, each [B, D] float32."""
        if labels is not None and not self.num_classes:
            raise ValueError("labels were given to an unconditional model (num_classes = 0)")
        time = timestep_embedding(t, self.width)
        if self.time_mlp is not None:
            time = self.time_mlp(time).astype(jnp.float32)
        if not self.num_classes:
            return [time]
        if self.uncond_embed is None:
            if labels is None:
                raise ValueError("this conditional model has no token for 'no label'; give labels")
            return [self.label_embed(labels), time]
        if labels is None:
            return [jnp.broadcast_to(self.uncond_embed[None], time.shape), time]
        known = self.label_embed(jnp.maximum(labels, 0))
        return [jnp.where(labels[:, None] >= 0, known, self.uncond_embed[None]), time]


def extra_tokens(num_classes: int) -> int:
    """Number of tokens before the patches, never hidden: time, and the label of a conditional model."""
    return 2 if num_classes else 1
