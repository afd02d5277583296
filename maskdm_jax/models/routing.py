"""Token routing (TREAD, SPRINT): hidden patches skip the inner blocks of a network.

Tokens are [B, extras + N, D]: the extras (label, time, class tokens), which are never hidden, and N patches.
"""

import jax
import jax.numpy as jnp


def drop_hidden(tokens, visible, extras: int):
    """Keep the extras and the patches `visible` [B, V], row-major indices: [B, extras + V, D]."""
    return jnp.concatenate([tokens[:, :extras], take(tokens[:, extras:], visible)], axis=1)


def restore_hidden(tokens, before, visible, extras: int, token=None):
    """Insert the patches `visible` of `tokens` [B, extras + V, D] into all patches, `before` [B, N, D].

    Hidden patches keep their features from before, or get the learned `token` [D]. Returns [B, extras + N, D].
    """
    others = before if token is None else jnp.broadcast_to(token.astype(before.dtype), before.shape)
    put = jax.vmap(lambda all_patches, at, values: all_patches.at[at].set(values))
    return jnp.concatenate([tokens[:, :extras], put(others, visible, tokens[:, extras:])], axis=1)


def take(patches, visible):
    """The patches `visible` [B, V] of [B or 1, N, D]."""
    patches = jnp.broadcast_to(patches, (len(visible), *patches.shape[1:]))
    return jnp.take_along_axis(patches, visible[..., None], axis=1)
