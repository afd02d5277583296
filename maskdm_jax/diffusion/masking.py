"""Mask plans: which patches of an image stay visible (MaskDM, section 3.3).

A plan is made once, in Python. It determines the number of visible patches, a static shape of the training step. The
visible patches themselves are drawn on device, per image, from a key. To add a kind of mask, add it to `KINDS`.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class MaskPlan:
    """The number of visible patches of an image, and the units in which they are drawn; made by `make_plan`."""

    kind: str  # one of `KINDS`
    grid: tuple[int, int]  # rows and columns of patches
    visible: int  # V, patches per image
    unit: int = 1  # side of a block or of the crop window, in patches
    tile: int = 0  # `visible` is rounded up to fill tiles of this many tokens; 0: not rounded

    @property
    def total(self) -> int:
        """N, patches per image."""
        return self.grid[0] * self.grid[1]

    @property
    def hides_nothing(self) -> bool:
        """Whether all patches are visible, so that no gather is needed."""
        return self.visible == self.total

    def __str__(self):
        unit = f" {self.unit} x {self.unit}" if self.unit > 1 else ""
        filling = f", filling tiles of {self.tile} tokens" if self.tile else ""
        share = f"{self.visible} of {self.total} patches visible ({self.visible / self.total:.1%})"
        return f"mask {self.kind}{unit}: {share}{filling}"


@dataclasses.dataclass(frozen=True)
class Kind:
    """An entry of `KINDS`."""

    count: typing.Callable  # (grid, settings as keywords) -> visible patches, side of a unit
    draw: typing.Callable  # (plan, key) -> visible patches of an image, see `sample_positions`
    settings: tuple[str, ...] = ()  # names of the arguments of `make_plan` that it takes


def make_plan(kind: str, grid: tuple[int, int], *, tile: int = 0, extras: int = 0, **settings) -> MaskPlan:
    """Compute the number of visible patches. Numbers of hidden patches are rounded down, as in the reference.

    Args:
      kind: `none` hides nothing; `patch` hides int(rate * N) single patches; `block` hides
        int(rate * N) // block**2 blocks of block x block patches; `crop` shows one crop x crop window; `strided` shows
        one patch of each group of block x block.
      grid: rows and columns of patches, N = rows * columns.
      tile: for `patch` and `block`, make more patches visible, up to a multiple of this many tokens. 128 is what fused
        attention on TPUs pads to. 0 does not round.
      extras: tokens besides the patches; they take room in the tiles, too.
      settings: those of the kind; others are ignored. `rate`: hidden share in [0, 1). `block`: side of a block, which
        must divide both sides of the grid. `crop`: side of the window.

    Raises:
      ValueError: a value does not fit the grid or the kind; the message says which values do.
    """
    if kind not in KINDS:
        raise ValueError(f"mask kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    used, rate = KINDS[kind].settings, settings.get("rate", 0)
    if "rate" in used and not 0 <= rate < 1:
        raise ValueError(f"mask rate {rate} is outside [0, 1); 0.9 hides 90% of the patches, 0 hides none")
    if tile < 0 or (tile and "tile" not in used):
        takers = " or ".join(name for name, other in KINDS.items() if "tile" in other.settings)
        raise ValueError(f"mask tile {tile}: masks of kind {takers} take 1, 2, ... tokens, others only 0")
    visible, unit = KINDS[kind].count(grid, **{name: value for name, value in settings.items() if name in used})
    plan = MaskPlan(kind, grid, visible, unit)
    if plan.visible < 1:
        raise ValueError(f"{plan}: no patch is visible; lower the rate {rate}")
    if tile:
        room = -(-(plan.visible + extras) // tile) * tile - extras
        plan = dataclasses.replace(plan, visible=min(room // unit**2 * unit**2, plan.total), tile=tile)
    return plan


def sample_positions(plan: MaskPlan, key) -> jax.Array:
    """Draw the visible patches of one image: int32 [visible], row-major indices in ascending order.

    Every mask of the plan's kind is equally likely. For a batch, use `jax.vmap` over keys; a sharded
    batch needs no collective.
    """
    if plan.hides_nothing:
        return jnp.arange(plan.total, dtype=jnp.int32)
    return KINDS[plan.kind].draw(plan, key)


def _all_patches(grid):
    return grid[0] * grid[1], 1


def _patches(grid, rate=0.0):
    n = grid[0] * grid[1]
    return n - int(rate * n), 1


def _blocks(grid, rate=0.0, block=1):
    rows, cols = grid
    sides = [b for b in range(1, min(grid) + 1) if rows % b == 0 and cols % b == 0]
    if block not in sides:
        raise ValueError(f"mask block {block} does not divide the {rows} x {cols} grid of patches; use one of {sides}")
    n = rows * cols
    return n - int(rate * n) // block**2 * block**2, block


def _one_of_each(grid, block=2):
    _blocks(grid, block=block)  # checks the side
    if block == 1:
        raise ValueError("mask block 1 hides nothing with the kind strided; 2 hides 3 of 4 patches")
    return grid[0] * grid[1] // block**2, block


def _window(grid, crop=1):
    if not 1 <= crop <= min(grid):
        text = f"mask crop {crop} does not fit the {grid[0]} x {grid[1]} grid of patches; use 1 to {min(grid)}"
        raise ValueError(text)
    return crop * crop, crop


def _draw_units(plan: MaskPlan, key):
    """Blocks, or single patches."""
    members = _members(plan)
    order = jnp.argsort(jax.random.bits(key, (len(members),)))  # a random permutation by a single sort
    return jnp.sort(jnp.asarray(members)[order[: plan.visible // members.shape[1]]].reshape(-1))


def _draw_one_of_each(plan: MaskPlan, key):
    members = _members(plan)
    chosen = jax.random.randint(key, (len(members), 1), 0, members.shape[1])
    return jnp.sort(jnp.take_along_axis(jnp.asarray(members), chosen, axis=1)[:, 0])


def _members(plan: MaskPlan) -> np.ndarray:
    """Row-major patch indices of each block: int32 [blocks, unit * unit]."""
    (rows, cols), u = plan.grid, plan.unit
    index = np.arange(rows * cols, dtype=np.int32).reshape(rows // u, u, cols // u, u)
    return index.transpose(0, 2, 1, 3).reshape(-1, u * u)


def _draw_window(plan: MaskPlan, key):
    (rows, cols), side = plan.grid, np.arange(plan.unit, dtype=np.int32)
    top_key, left_key = jax.random.split(key)
    top = jax.random.randint(top_key, (), 0, rows - plan.unit + 1)
    left = jax.random.randint(left_key, (), 0, cols - plan.unit + 1)
    window = (side[:, None] * cols + side).reshape(-1)  # its patches, from the top left one
    return (top * cols + left + window).astype(jnp.int32)


KINDS = {  # by `kind` of a mask
    "none": Kind(_all_patches, _draw_units),
    "patch": Kind(_patches, _draw_units, ("rate", "tile")),
    "block": Kind(_blocks, _draw_units, ("rate", "block", "tile")),
    "crop": Kind(_window, _draw_window, ("crop",)),
    "strided": Kind(_one_of_each, _draw_one_of_each, ("block",)),
}
