import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from maskdm_jax.build import make_network
from maskdm_jax.parallel.sharding import make_mesh
from maskdm_jax.training.start import abstract_state
from maskdm_jax.training.state import ema_step_size, learning_rate, make_optimizer


@pytest.mark.parametrize(("decay", "every"), [(0.999, 1), (0.9, 10), (0.995, 7)])
def test_ema_law_of_the_reference(decay, every):
    """Written out as a loop; `test_golden` compares the law with recorded runs of the reference."""
    expected = []
    for s in range(400):
        size = 0.0
        if s % every == 0:
            size = 1.0 if s <= 100 else 1 - min(decay, 1 - (1 + s - 100) ** (-2 / 3))
        expected.append(size)
    ours = jax.vmap(lambda s: ema_step_size(s, decay=decay, every=every))(jnp.arange(400))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_plain_ema_law():
    sizes = [float(ema_step_size(s, decay=0.9, every=2, law="plain")) for s in range(4)]
    assert sizes == pytest.approx([0.1, 0, 0.1, 0])


def test_warm_up_starts_from_zero():
    rate = learning_rate(tiny.config(pretrain__warmup_steps=4, pretrain__learning_rate=0.1).stage["pretrain"])
    np.testing.assert_allclose([rate(s) for s in range(7)], [0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-6)


def test_decay_acts_on_every_tensor_and_clipping_bounds_the_gradient():
    stage = tiny.config(pretrain__warmup_steps=0, pretrain__weight_decay=0.5, pretrain__learning_rate=0.1).stage[
        "pretrain"
    ]
    params = {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}
    optimizer = make_optimizer(stage)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    jax.tree.map(lambda u: np.testing.assert_allclose(u, -0.05, rtol=1e-5), updates)
    huge = jax.tree.map(lambda p: 1e6 * p, params)
    _, state = optimizer.update(huge, optimizer.init(params), params)
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if "mu" in jax.tree_util.keystr(path)]
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(m)) for m in moments)) / (1 - stage.b1)
    assert float(norm) == pytest.approx(stage.clip_norm, rel=1e-4)


def test_label_tensors_rest_in_steps_that_do_not_use_them():
    """A zero gradient leaves value, moments and count alone; the others go on."""
    stage = tiny.config(pretrain__warmup_steps=0, pretrain__weight_decay=0.5).stage["pretrain"]
    params = {
        "backbone": {"label_embed": {"embedding": jnp.ones((2, 3))}, "uncond_embed": jnp.ones(3)},
        "x": jnp.ones(2),
    }
    optimizer = make_optimizer(stage)
    state = optimizer.init(params)
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, state = optimizer.update(gradient, state, params)
    assert all((u != 0).all() for u in jax.tree.leaves(updates))
    gradient["backbone"]["uncond_embed"] = jnp.zeros(3)
    updates, state = optimizer.update(gradient, state, params)
    assert not updates["backbone"]["uncond_embed"].any()
    assert (updates["backbone"]["label_embed"]["embedding"] != 0).all()
    assert (updates["x"] != 0).all()
    adam = [n for n in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(n)]
    assert sorted(int(a.count) for a in adam) == [1, 2, 2]


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


STATES = {
    "uvit": dict(),
    "wavelet": tiny.WAVELET,
    "routed jit": tiny.JIT
    | dict(
        model__outer_blocks=1,
        model__returning="token",
        pretrain__more_ema_decays=(0.5,),
        pretrain__weight_decay=0.0,
        pretrain__clip_norm=0.0,
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_stored_runs_can_be_resumed(root, name):
    """Names, dtypes and shapes in a checkpoint are those of recorded ones: Orbax restores no other structure."""
    config = tiny.config(**STATES[name])
    state = abstract_state(config, 0, make_network(config), make_mesh(devices=jax.devices()[:1]))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    found = {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
    assert found == json.loads((root / "tests" / "stored_states.json").read_text())[name]
