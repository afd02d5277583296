import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maskdm_jax.diffusion import masking
from maskdm_jax.parallel.sharding import make_mesh


@pytest.mark.parametrize(
    ("side", "options", "visible"),
    [
        (64, dict(kind="block", block=4, rate=0.9), 416),
        (64, dict(kind="block", block=4, rate=0.5), 2048),
        *((16, dict(kind="patch", rate=r), v) for r, v in ((0.1, 231), (0.5, 128), (0.9, 26))),
        *((16, dict(kind="block", block=2, rate=r), v) for r, v in ((0.1, 232), (0.5, 128), (0.9, 28))),
        *((16, dict(kind="block", block=4, rate=r), v) for r, v in ((0.1, 240), (0.5, 128), (0.9, 32))),
        (16, dict(kind="block", block=8, rate=0.5), 128),
        *((16, dict(kind="crop", crop=c), c * c) for c in (15, 11, 5)),
        (32, dict(kind="block", block=4, rate=0.7), 320),
    ],
)
def test_visible_counts_of_the_reference(side, options, visible):
    plan = masking.make_plan(grid=(side, side), **options)
    assert plan.visible == visible
    positions = masking.sample_positions(plan, jax.random.key(0))
    assert positions.shape == (visible,)


@pytest.mark.parametrize(
    ("side", "options", "visible"),
    [
        (64, dict(kind="block", block=4, rate=0.9, extras=1), 496),  # 417 tokens pad to 512: 497 cost as much
        (64, dict(kind="block", block=4, rate=0.9, extras=0), 512),
        (64, dict(kind="block", block=4, rate=0.9, extras=128), 512),
        (64, dict(kind="patch", rate=0.9, extras=1), 511),
        (64, dict(kind="patch", rate=0.5, extras=2), 2174),
        (16, dict(kind="patch", rate=0.1, extras=1), 255),
        (16, dict(kind="block", block=2, rate=0.1, extras=1), 252),
        (8, dict(kind="patch", rate=0.5, extras=1), 64),  # all that there are
    ],
)
def test_a_mask_can_fill_tiles(side, options, visible):
    plan = masking.make_plan(grid=(side, side), tile=128, **options)
    assert plan.visible == visible
    plain = masking.make_plan(grid=(side, side), **options)
    tiles = lambda plan: -(-(plan.visible + options["extras"]) // 128)
    assert tiles(plan) == tiles(plain)
    assert str(plan).endswith(f"({visible / side**2:.1%}), filling tiles of 128 tokens")
    positions = masking.sample_positions(plan, jax.random.key(0))
    assert positions.shape == (visible,)
    assert len(np.unique(positions)) == visible


PLANS = [
    masking.make_plan("patch", (6, 4), rate=0.6),
    masking.make_plan("block", (6, 4), rate=0.6, block=2),
    masking.make_plan("crop", (6, 4), crop=3),
    masking.make_plan("strided", (6, 4), block=2),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_positions_are_what_the_plan_says(plan):
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: masking.sample_positions(plan, key)))(keys))
    assert drawn.shape == (4000, plan.visible)
    assert (np.diff(drawn, axis=1) > 0).all(), "ascending, so no patch twice"
    assert drawn.min() >= 0
    assert drawn.max() < plan.total
    rows, cols = drawn // 4, drawn % 4
    units, counts = np.unique(drawn, return_counts=True)
    if plan.kind == "crop":
        assert (rows.max(1) - rows.min(1) == 2).all()
        assert (cols.max(1) - cols.min(1) == 2).all()
        tops = np.bincount(rows[:, 0] * 2 + cols[:, 0])
        assert len(tops) == 8, "4 x 2 places for a window"
        assert np.abs(tops / 4000 - 1 / 8).max() < 0.03
    else:
        assert len(units) == plan.total
        assert np.abs(counts / 4000 - plan.visible / plan.total).max() < 0.04, "every patch is shown equally often"
    if plan.kind == "strided":
        assert (np.sort((rows // 2) * 2 + cols // 2, axis=1) == np.arange(6)).all(), "one of each group"
    if plan.kind == "block":
        blocks = np.sort((rows // 2) * 2 + cols // 2, axis=1).reshape(4000, -1, 4)
        assert (blocks == blocks[..., :1]).all(), "blocks are shown whole"
    assert len(np.unique(drawn, axis=0)) > 4, "a fresh mask per image"


@pytest.mark.parametrize("options", [dict(kind="none"), dict(kind="patch", rate=0.0), dict(kind="crop", crop=4)])
def test_a_plan_that_hides_nothing_says_so(options):
    plan = masking.make_plan(grid=(4, 4), **options)
    assert plan.hides_nothing
    np.testing.assert_array_equal(masking.sample_positions(plan, jax.random.key(0)), np.arange(16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="block", block=3, rate=0.5), r"block 3 does not divide the 8 x 8 grid.*\[1, 2, 4, 8\]"),
        (dict(kind="block", block=0, rate=0.5), "block 0 does not divide"),
        (dict(kind="crop", crop=9), "crop 9 does not fit.*use 1 to 8"),
        (dict(kind="crop", crop=0), "crop 0 does not fit"),
        (dict(kind="patch", rate=1.0), r"rate 1.0 is outside \[0, 1\)"),
        (dict(kind="patch", rate=-0.1), r"rate -0.1 is outside \[0, 1\)"),
        (dict(kind="block", block=2, rate=float("nan")), "rate nan"),
        (dict(kind="crop", crop=3, tile=128), "mask tile 128: masks of kind patch or block"),
        (dict(kind="patch", rate=0.5, tile=-1), "mask tile -1"),
        (dict(kind="strided", block=3), "block 3 does not divide"),
        (dict(kind="blob", rate=0.5), "'blob' is unknown; choose one of none, patch, block, crop"),
    ],
)
def test_plans_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        masking.make_plan(grid=(8, 8), **options)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_sharded_draws_need_no_collective_and_are_the_same(plan):
    draw = jax.vmap(lambda key: masking.sample_positions(plan, key))
    keys = jax.random.split(jax.random.key(1), 16)
    spread = NamedSharding(make_mesh(), PartitionSpec(("data", "fsdp")))
    compiled = jax.jit(draw, out_shardings=spread).lower(jax.device_put(keys, spread)).compile()
    assert not any(
        word in compiled.as_text() for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    )
    np.testing.assert_array_equal(compiled(jax.device_put(keys, spread)), jax.jit(draw)(keys))
    assert jnp.issubdtype(draw(keys).dtype, jnp.int32)
