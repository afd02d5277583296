"""Token routing (TREAD, SPRINT): hidden patches skip the inner blocks of a network.

Tokens are [B, extras + N, D]: the extras (label, time, class tokens), which are never hidden, and N patches.
"""

import jax
import jax.numpy as jnp


def drop_hidden(tokens, visible, extras: int):
    """Keep the extras and the patches `visible` [B, V], row-major indices: [B, extras + V, D]."""
    return jnp.concatenate([tokens[:, :extras], take(tokens[:, extras:], visible)], axis=1)


def restore_hidden(tokens, before, visible, extras: int, token=None, shallow=None):
    """Insert the patches `visible` of `tokens` [B, extras + V, D] into all tokens, `before` [B, extras + N, D].

    Hidden patches keep their features from before, or get the learned `token` [D]. With `visible` None, nothing is
    hidden. In images for which `shallow` [B] is True, all tokens count as hidden.
    """
    hidden = before if token is None else before.at[:, extras:].set(token.astype(before.dtype))
    if visible is not None:
        put = jax.vmap(lambda patches, at, values: patches.at[at].set(values))
        patches = put(hidden[:, extras:], visible, tokens[:, extras:])
        tokens = jnp.concatenate([tokens[:, :extras], patches], axis=1)
    return tokens if shallow is None else jnp.where(shallow[:, None, None], hidden, tokens)


def take(patches, visible):
    """The patches `visible` [B, V] of [B or 1, N, D]."""
    patches = jnp.broadcast_to(patches, (len(visible), *patches.shape[1:]))
    return jnp.take_along_axis(patches, visible[..., None], axis=1)
