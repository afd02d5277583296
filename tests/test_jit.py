"""JiT against recorded outputs of the authors' code, and the properties of its masked form."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax.build import make_network, make_process
from maskdm_jax.diffusion.masking import gather
from maskdm_jax.diffusion.process import noisy
from maskdm_jax.interop.names import JIT
from maskdm_jax.models.jit import sine_cosine
from maskdm_jax.models.layers import patchify
from maskdm_jax.training.step import Inputs, make_loss


@pytest.fixture(scope="module")
def jit(jit_case):
    arrays, meta = golden.load(jit_case)
    config = golden.jit_config(meta["config"], noise_scale=meta["noise_scale"])
    return arrays, meta, config, make_network(config), golden.jit_params(meta["state_dict"])


def labels_of(arrays, config):
    """The authors' last row is "no label"."""
    return jnp.array(np.where(arrays["y"] == config.model.num_classes, -1, arrays["y"]), jnp.int32)


def inputs_of(arrays, config, masked: bool) -> Inputs:
    cut = lambda name: patchify(jnp.asarray(golden.nhwc(arrays[name])), config.model.patch_size)
    positions = golden.positions(arrays["mask"]) if masked else None
    pick = lambda x: x if positions is None else gather(x, positions)
    scale = config.diffusion.flow.noise_scale
    return Inputs(pick(cut("x0")), jnp.array(arrays["t"]), pick(cut("e")) / scale, positions, labels_of(arrays, config))


def test_every_parameter_has_its_shape(jit):
    _, _, _, network, params = jit
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, network.abstract_params())


def test_outputs_whole_and_visible(jit):
    arrays, _, config, network, params = jit
    z, t, labels = jnp.asarray(golden.nhwc(arrays["z"])), jnp.array(arrays["t"]), labels_of(arrays, config)
    run = jax.jit(network.apply)
    expected = golden.nhwc(arrays["out_full"])
    assert np.abs(run(params, z, t, labels) - expected).max() < 2e-5 * expected.std()
    positions = golden.positions(arrays["mask"])
    patches = patchify(z, config.model.patch_size)
    visible = run(params, gather(patches, positions), t, labels, positions)
    assert np.abs(visible - arrays["out_visible"]).max() < 2e-5 * arrays["out_visible"].std()
    everything = jnp.broadcast_to(jnp.arange(patches.shape[1]), patches.shape[:2])
    out = patchify(jnp.asarray(expected), config.model.patch_size)
    for all_visible in (run(params, patches, t, labels, everything), run(params, patches, t, labels)):
        assert np.abs(all_visible - out).max() < 2e-5 * expected.std()


def test_process_makes_the_authors_input(jit):
    arrays, _, config, _, _ = jit
    inputs = inputs_of(arrays, config, masked=False)
    z = noisy(make_process(config), inputs.x0, inputs.t, inputs.eps)
    expected = patchify(jnp.asarray(golden.nhwc(arrays["z"])), config.model.patch_size)
    np.testing.assert_allclose(z, expected, atol=1e-6 * float(np.abs(expected).max()))


@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_gradients(jit, masked):
    arrays, meta, config, network, params = jit
    of_loss, of_gradient = ("loss_visible", "grad_norm_visible") if masked else ("loss", "grad_norm")
    inputs = inputs_of(arrays, config, masked)
    total, grads = jax.jit(jax.value_and_grad(make_loss(config, network)))(params, inputs)
    assert float(total) == pytest.approx(arrays[of_loss].mean(), rel=2e-5)
    for name, norm in meta[of_gradient].items():
        ours = float(jnp.linalg.norm(golden.at_path(grads, JIT.our_path(name)).ravel()))
        assert ours == pytest.approx(norm, rel=2e-5, abs=1e-9), name


def test_position_embedding_is_the_authors():
    content = golden.jit_checkpoint()
    np.testing.assert_allclose(sine_cosine(32, 4), content["model"]["net.pos_embed"][0], atol=1e-6)
