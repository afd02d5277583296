"""A network of your own, here in Linen, trained with masks and sampled by all programs:

    python launch/train.py --config=configs/demo.py --config.model.network=experiments/own_network.py:Transformer

`build.make_network` describes what a network takes and returns.
"""

import flax.linen as nn
import jax.numpy as jnp

from maskdm_jax import config
from maskdm_jax.models.layers import patchify, timestep_embedding, unpatchify


class Transformer(nn.Module):
    """A plain transformer on patches; its tokens know their places from an embedding of the positions."""

    model: config.Model
    image_size: int
    channels: int

    @nn.compact
    def __call__(self, x, t, labels=None, positions=None):
        model, side = self.model, self.image_size // self.model.patch_size
        tokens = patchify(x, model.patch_size) if x.ndim == 4 else x
        positions = jnp.arange(side**2)[None] if positions is None else positions
        h = nn.Dense(model.width)(tokens) + nn.Embed(side**2, model.width)(positions)
        h += nn.Dense(model.width)(timestep_embedding(t, model.width))[:, None]
        if model.num_classes:
            labels = jnp.full(len(x), -1) if labels is None else labels  # -1: no label
            h += nn.Embed(model.num_classes + 1, model.width)(labels + 1)[:, None]
        for _ in range(model.depth):
            h += nn.MultiHeadDotProductAttention(model.heads)(nn.LayerNorm()(h))
            h += nn.Dense(model.width)(nn.gelu(nn.Dense(4 * model.width)(nn.LayerNorm()(h))))
        out = nn.Dense(tokens.shape[-1])(nn.LayerNorm()(h))
        return unpatchify(out, model.patch_size, (side, side)) if x.ndim == 4 else out
