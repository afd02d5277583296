"""What devices tell each other in a step, read off the compiled program."""

import collections
import re
import types

import jax
import numpy as np
import pytest
import roofline
import tiny

from maskdm_jax.build import make_network
from maskdm_jax.parallel import sharding
from maskdm_jax.training.loop import make_run_mesh
from maskdm_jax.training.start import abstract_state
from maskdm_jax.training.step import abstract_batch, jit_step


def compiled(data, fsdp, parts):
    """The program of a step over 8 devices, as text, and the parameters that are split."""
    config = tiny.config(
        mesh__data=data, mesh__fsdp=fsdp, pretrain__micro_batches=parts, pretrain__batch_size=16, model__width=128
    )
    mesh, network = make_run_mesh(config), make_network(config)
    state = abstract_state(config, 0, network, mesh)
    batch = abstract_batch(config, "pretrain", mesh)
    split = [leaf for leaf in jax.tree.leaves(state.params) if "fsdp" in leaf.sharding.spec]
    return jit_step(config, "pretrain", mesh, state).lower(state, batch).compile().as_text(), split


@pytest.mark.parametrize(("data", "fsdp", "parts"), [(8, 1, 2), (4, 2, 2), (1, 8, 1)])
def test_a_step_has_the_expected_collectives_and_no_other(data, fsdp, parts):
    """A split parameter is gathered once and its gradient scattered once; all else is added up once, outside loops."""
    text, split = compiled(data, fsdp, parts)
    found = collections.Counter()
    for computation in re.split(r"\n\n", text):
        kinds = {kind: number for kind, (number, _) in roofline.collectives(computation).items()}
        assert not kinds or computation.lstrip().startswith("ENTRY"), f"within a loop: {kinds}"
        found.update(kinds)
    assert found["all-gather"] == found["reduce-scatter"] == len(split)
    assert bool(split) == (fsdp > 1)
    # Over all devices (whole gradients and the loss), over "data" (parts of gradients), and the gradient's norm.
    assert found["all-reduce"] <= 1 + (fsdp > 1) * (1 + (data > 1))
    assert not found.keys() - {"all-gather", "reduce-scatter", "all-reduce"}


def test_copies_of_the_state_stay_within_a_slice(monkeypatch):
    """Of a TPU's slices, which a slower network joins."""
    asked = []

    def hybrid(within, across, devices, **_):
        asked.append((within, across))
        return np.asarray(jax.devices()).reshape(np.multiply(within, across))

    monkeypatch.setattr(sharding.mesh_utils, "create_hybrid_device_mesh", hybrid)
    chips = [types.SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
    assert dict(sharding.make_mesh(fsdp=2, devices=chips).shape) == dict(data=4, fsdp=2)
    assert asked == [((2, 2), (2, 1))]
    with pytest.raises(ValueError, match="mesh fsdp=8 reaches beyond one of 2 TPU slices of 4 chips"):
        sharding.make_mesh(fsdp=8, devices=chips)


def test_parts_of_the_state_lie_where_the_rule_says():
    mesh = sharding.make_mesh(2, 4)
    leaves = dict(wide=np.zeros((64, 512)), tall=np.zeros((512, 64)), small=np.zeros((8, 8)), odd=np.zeros((181, 91)))
    specs = {name: tuple(place.spec) for name, place in sharding.state_sharding(mesh, leaves).items()}
    assert specs == dict(wide=(None, "fsdp"), tall=("fsdp",), small=(), odd=())
