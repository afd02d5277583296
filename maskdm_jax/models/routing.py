"""Patches that sleep through the inner blocks of a network: they leave the sequence, and come back (TREAD, SPRINT).

Tokens are [B, extras + N, D]: the extras (label, time, class tokens), which are always awake, and N patches. Sleeping
patches cost nothing, and the outer blocks see all patches.
"""

import jax
import jax.numpy as jnp


def leave(tokens, awake, extras: int):
    """Keep the extras and the patches `awake` [B, V], row-major indices: [B, extras + V, D]."""
    return jnp.concatenate([tokens[:, :extras], take(tokens[:, extras:], awake)], axis=1)


def come_back(tokens, before, awake, extras: int, token=None):
    """Put the patches `awake` of `tokens` [B, extras + V, D] back among all patches `before` [B, N, D].

    Sleeping patches are as they were before, or the learned `token` [D]. Returns [B, extras + N, D].
    """
    others = before if token is None else jnp.broadcast_to(token.astype(before.dtype), before.shape)
    put = jax.vmap(lambda all_patches, at, values: all_patches.at[at].set(values))
    return jnp.concatenate([tokens[:, :extras], put(others, awake, tokens[:, extras:])], axis=1)


def take(patches, awake):
    """The patches `awake` [B, V] of [B or 1, N, D]."""
    patches = jnp.broadcast_to(patches, (len(awake), *patches.shape[1:]))
    return jnp.take_along_axis(patches, awake[..., None], axis=1)
