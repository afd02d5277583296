"""Token routing (TREAD, SPRINT): hidden patches skip the inner blocks of a network.

Tokens are [B, extras + N, D]: the extras (label, time, class tokens), which are never hidden, then N patches.
"""

import jax
import jax.numpy as jnp


def through_blocks(
    run, h, blocks: int, outer: int, visible, shallow, *, patches: int, token=None, join=None, add_extras=None
):
    """Run all blocks on h [B, extras + N, D]; hidden patches skip all but the first and last `outer` blocks.

    Args:
      run: (number of a block, tokens, whether it is an inner block) -> tokens, perhaps with more extras, which come
        first.
      blocks, outer: numbers of all blocks, and of those at either end that process all patches.
      visible: [B, V], row-major indices of the patches in the inner blocks; None for all. With V = 0, all tokens skip
        the inner blocks.
      shallow: [B] bool, the images of which all tokens skip the inner blocks; None for none.
      patches: N.
      token: [D], learned; hidden patches re-enter as this token instead of their own features.
      join: Linear 2 D -> D, which joins all patches with their features from before the inner blocks (SPRINT).
      add_extras: adds to tokens that skip the inner blocks the extras that these blocks would add; None if they add
        none.

    Returns:
      [B, extras + N, D].
    """
    inner = range(outer, max(outer, blocks - outer))
    if not inner:  # no block to skip
        visible = shallow = None
    for i in range(inner.start):
        h = run(i, h, False)
    before = h if add_extras is None else add_extras(h)
    extras = before.shape[1] - patches
    if visible is not None and not visible.shape[1]:  # the extras skip, too
        h = before[:, :extras]
    else:
        if visible is not None:
            h = jnp.concatenate([h[:, :-patches], take(h[:, -patches:], visible)], axis=1)
        for i in inner:
            h = run(i, h, True)
    skipped = before if token is None else before.at[:, extras:].set(token.astype(h.dtype))
    if visible is not None:
        put = jax.vmap(lambda features, at, values: features.at[at].set(values))
        h = jnp.concatenate([h[:, :extras], put(skipped[:, extras:], visible, h[:, extras:])], axis=1)
    if shallow is not None:
        h = jnp.where(shallow[:, None, None], skipped, h)
    if join is not None:
        joined = join(jnp.concatenate([h[:, extras:], before[:, extras:]], axis=-1))
        h = jnp.concatenate([h[:, :extras], joined], axis=1)
    for i in range(inner.stop, blocks):
        h = run(i, h, False)
    return h


def take(patches, visible):
    """The patches `visible` [B, V] of [B or 1, N, D]."""
    patches = jnp.broadcast_to(patches, (len(visible), *patches.shape[1:]))
    return jnp.take_along_axis(patches, visible[..., None], axis=1)


def split_positions(positions, given: list[int], grid: list[int], *, whole: bool, outer: int):
    """Positions of the patches of x, and of those that are visible in the inner blocks; None stands for all.

    Args:
      positions: as given to the network; with `outer` blocks, x is of all patches.
      given, grid: numbers of patches of x and of the whole grid, of each band.

    Raises:
      ValueError: positions are given for a whole image, or the numbers of patches `given` are not those of the grid.
    """
    if whole and positions is not None and not outer:
        raise ValueError("positions go with patches [B, V, p*p*C]; a whole image takes none")
    if given != grid and (outer or positions is None):
        numbers = [" and ".join(map(str, counts)) for counts in (given, grid)]
        raise ValueError(
            "got {} patches, but the model's grid has {}; give all, or, to a model without outer blocks, the positions "
            "of those".format(*numbers)
        )
    return (None, positions) if outer else (positions, None)
