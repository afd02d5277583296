"""Mask plans: which patches of an image stay visible (MaskDM, section 3.3).

A plan is made once, in Python. It determines the number of visible patches, a static shape of the training step. The
visible patches themselves are drawn on device, per image, from a key.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("none", "patch", "block", "crop")


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
        unit = {"block": f" {self.unit} x {self.unit}", "crop": f" {self.unit} x {self.unit}"}.get(self.kind, "")
        filling = f", filling tiles of {self.tile} tokens" if self.tile else ""
        share = f"{self.visible} of {self.total} patches visible ({self.visible / self.total:.1%})"
        return f"mask {self.kind}{unit}: {share}{filling}"


def make_plan(
    kind: str,
    grid: tuple[int, int],
    *,
    rate: float = 0.0,
    block: int = 1,
    crop: int = 0,
    tile: int = 0,
    extras: int = 0,
) -> MaskPlan:
    """Compute the number of visible patches. Numbers of hidden patches are rounded down, as in the reference.

    Args:
      kind: `none` hides nothing; `patch` hides int(rate * N) single patches; `block` hides
        int(rate * N) // block**2 blocks of block x block patches; `crop` shows one crop x crop window.
      grid: rows and columns of patches, N = rows * columns.
      rate: hidden share in [0, 1), for `patch` and `block`.
      block: side of a block, for `block`; must divide both sides of the grid.
      crop: side of the window, for `crop`.
      tile: tokens per tile of the hardware, such as 128, for `patch` and `block`. A partly filled tile costs as
        much as a full one, so the plan makes more patches visible, up to the end of the last tile. 0 does not round.
      extras: tokens besides the patches; they take room in the tiles, too.

    Raises:
      ValueError: a value does not fit the grid or the kind; the message says which values do.
    """
    rows, cols = grid
    n = rows * cols
    if kind not in KINDS:
        raise ValueError(f"mask kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if kind in ("patch", "block") and not 0 <= rate < 1:
        raise ValueError(f"mask rate {rate} is outside [0, 1); 0.9 hides 90% of the patches, 0 hides none")
    if tile < 0 or (tile and kind in ("none", "crop")):
        raise ValueError(f"mask tile {tile}: masks of kind patch or block take 1, 2, ... tokens, others only 0")
    if kind == "none":
        return MaskPlan("none", grid, n)
    if kind == "patch":
        plan = MaskPlan("patch", grid, n - int(rate * n))
    elif kind == "block":
        sides = [b for b in range(1, min(grid) + 1) if rows % b == 0 and cols % b == 0]
        if block not in sides:
            raise ValueError(
                f"mask block {block} does not divide the {rows} x {cols} grid of patches; use one of {sides}"
            )
        plan = MaskPlan("block", grid, n - int(rate * n) // block**2 * block**2, block)
    else:
        if not 1 <= crop <= min(grid):
            raise ValueError(f"mask crop {crop} does not fit the {rows} x {cols} grid of patches; use 1 to {min(grid)}")
        plan = MaskPlan("crop", grid, crop * crop, crop)
    if plan.visible < 1:
        raise ValueError(f"{plan}: no patch is visible; lower the rate {rate}")
    if tile:
        room = -(-(plan.visible + extras) // tile) * tile - extras
        plan = dataclasses.replace(plan, visible=min(room // plan.unit**2 * plan.unit**2, n), tile=tile)
    return plan


def sample_positions(plan: MaskPlan, key) -> jax.Array:
    """Draw the visible patches of one image: int32 [visible], row-major indices in ascending order.

    Every set of units (patches, blocks, or windows) is equally likely. For a batch, use `jax.vmap` over keys; a sharded
    batch needs no collective.
    """
    rows, cols = plan.grid
    if plan.hides_nothing:
        return jnp.arange(plan.total, dtype=jnp.int32)
    if plan.kind == "crop":
        top_key, left_key = jax.random.split(key)
        top = jax.random.randint(top_key, (), 0, rows - plan.unit + 1)
        left = jax.random.randint(left_key, (), 0, cols - plan.unit + 1)
        return (top * cols + left + _window(plan)).astype(jnp.int32)
    members = _units(plan)  # [units, patches per unit]
    order = jnp.argsort(jax.random.bits(key, (len(members),)))  # a random permutation by a single sort
    return jnp.sort(jnp.asarray(members)[order[: plan.visible // members.shape[1]]].reshape(-1))


def gather(patches, positions):
    """Pick the visible patches: [B, N, d] and positions [B, V] give [B, V, d]."""
    return jnp.take_along_axis(patches, positions[..., None], axis=1)


def hidden_mask(plan: MaskPlan, positions):
    """Boolean [B, N], True where a patch is hidden, from positions [B, V]."""
    mask = jnp.ones((positions.shape[0], plan.total), bool)
    return jax.vmap(lambda m, p: m.at[p].set(False))(mask, positions)


def _units(plan: MaskPlan) -> np.ndarray:
    """Row-major patch indices of each block, or of each single patch: int32 [units, unit * unit]."""
    rows, cols = plan.grid
    u = plan.unit
    index = np.arange(rows * cols, dtype=np.int32).reshape(rows // u, u, cols // u, u)
    return index.transpose(0, 2, 1, 3).reshape(-1, u * u)


def _window(plan: MaskPlan) -> np.ndarray:
    """Row-major offsets of the window's patches from its top left patch: int32 [crop * crop], ascending."""
    side = np.arange(plan.unit, dtype=np.int32)
    return (side[:, None] * plan.grid[1] + side).reshape(-1)
