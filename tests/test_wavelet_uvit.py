import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from maskdm_jax import config as config_lib
from maskdm_jax import sampling
from maskdm_jax.build import make_network, mask_plans
from maskdm_jax.errors import ConfigError
from maskdm_jax.models.representation import make_representation
from maskdm_jax.models.routing import take
from maskdm_jax.models.wavelet_uvit import WaveletUViT
from maskdm_jax.run import train
from maskdm_jax.training.loop import make_run_mesh
from maskdm_jax.training.start import abstract_state, fresh_state
from maskdm_jax.training.step import compile_step, draw_inputs

CHANGES = dict(model__wavelet_scale=2, model__patch_size=1, model__depth=1, data__image_size=16, data__channels=3)


def wavelet(**changes):
    """A tiny run on two bands: 8 x 8 approximation patches, 4 x 4 detail patches."""
    return tiny.config(**(CHANGES | changes))


def test_parameter_count_of_the_paper():
    fields = dict(image_size=256, patch_size=4, width=1024, depth=16, heads=16, qv_bias=True)
    model = nnx.eval_shape(lambda: WaveletUViT(rngs=nnx.Rngs(0), **fields))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 233_399_488


@pytest.fixture(scope="module")
def net():
    config = wavelet()
    network = make_network(config)
    params = jax.jit(network.init)(jax.random.key(0))
    x = np.random.RandomState(1).standard_normal((3, 8, 8, 12)).astype(np.float32)
    return config, network, params, x, jnp.array([0, 500, 999]), jnp.array([3, 0, 9])


def test_patches_equal_the_whole(net):
    """All patches of both bands, in any order, give the prediction for the whole."""
    config, network, params, x, t, labels = net
    cut = make_representation(config).cut
    whole = cut(jax.jit(network.apply)(params, x, t, labels))
    orders = [np.random.RandomState(i).permutation(band.shape[1]) for i, band in enumerate(whole)]
    shuffled = tuple(band[:, order] for band, order in zip(cut(x), orders, strict=True))
    positions = tuple(jnp.tile(order, (3, 1)) for order in orders)
    out = jax.jit(network.apply)(params, shuffled, t, labels, positions)
    for ours, band, order in zip(out, whole, orders, strict=True):
        np.testing.assert_allclose(ours, band[:, order], atol=1e-5)


def test_hidden_patches_of_either_band_have_no_influence(net):
    config, network, params, x, t, labels = net
    cut = make_representation(config).cut
    positions = (jnp.tile(jnp.arange(5), (3, 1)), jnp.tile(jnp.arange(3, 6), (3, 1)))

    def total(x):
        out = network.apply(params, jax.tree.map(take, cut(x), positions), t, labels, positions)
        return sum(jnp.sum(band**2) for band in out)

    for gradient, at in zip(cut(jax.jit(jax.grad(total))(x)), positions, strict=True):
        used = jnp.abs(gradient).max((0, 2)) > 0
        np.testing.assert_array_equal(used, np.isin(np.arange(gradient.shape[1]), at[0]))


def test_bad_calls_are_refused(net):
    config, network, params, x, t, labels = net
    approx, detail = make_representation(config).cut(x)
    at = (jnp.zeros((3, 4), int), jnp.zeros((3, 4), int))
    for call, message in [
        ((x, t), "no token for 'no label'; give labels"),
        ((x, t, labels, at), "positions go with patches .*; a whole image takes none"),
        (((approx[:, :5], detail), t, labels), "got 5 and 16 patches, but the model.s grid has 64 and 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(network.apply, params, *call)


def batch(n=6):
    rng = np.random.RandomState(0)
    image = rng.randint(0, 256, (n, 16, 16, 3)).astype(np.uint8)
    return dict(image=image, label=np.arange(n, dtype=np.int32), index=np.arange(n, dtype=np.uint32))


def draw(config, stage, batch, part=lambda inputs: inputs):
    """`draw_inputs` of key 0, or a part of it, as NumPy arrays."""
    drawn = jax.jit(lambda batch: part(draw_inputs(config, stage, jax.random.key(0), batch)))(batch)
    return jax.tree.map(np.asarray, drawn)


def test_each_band_is_masked_by_its_own_settings_and_draw():
    mask = dict(kind="patch", rate=0.5, block=1, crop=1, tile=0)
    config = wavelet(pretrain__mask=mask, pretrain__detail_mask=mask | dict(rate=0.75), data__flip=0.0)
    inputs = draw(config, "pretrain", batch())
    assert [band.shape for band in inputs.x0] == [(6, 32, 3), (6, 4, 2 * 2 * 9)]
    assert [band.shape for band in inputs.eps] == [(6, 32, 3), (6, 4, 2 * 2 * 9)]
    space = make_representation(config)
    whole = space.cut(space.encode(batch()["image"]))
    for band, all_patches, at in zip(inputs.x0, whole, inputs.positions, strict=True):
        np.testing.assert_allclose(band, take(all_patches, at), atol=1e-6)
    positions_of = lambda config, stage: draw(config, stage, batch(), lambda inputs: inputs.positions)
    both = wavelet(pretrain__mask=mask, model__wavelet_scale=1)  # `mask` holds for the details too
    positions = positions_of(both, "pretrain")
    assert positions[0].shape == positions[1].shape
    assert (positions[0] != positions[1]).any()
    one_band = wavelet(pretrain__mask=mask, pretrain__detail_mask=mask | dict(kind="none"))
    positions = positions_of(one_band, "pretrain")
    np.testing.assert_array_equal(positions[1], np.tile(np.arange(16), (6, 1)))
    assert positions_of(config, "finetune") is None


def test_bands_of_the_noise_are_independent():
    eps = draw(wavelet(model__wavelet_scale=1), "finetune", batch(64), lambda inputs: inputs.eps)
    approx, detail = (band.reshape(64, -1)[:, :192] for band in eps)
    assert abs(np.corrcoef(approx.ravel(), detail.ravel())[0, 1]) < 0.03
    np.testing.assert_allclose([approx.std(), detail.std()], 1, atol=0.03)


def test_settings_that_cannot_work_are_named():
    mask = dict(kind="patch", rate=0.5, block=1, crop=1, tile=0)
    for changes, message in [
        (dict(data__label_dropout=0.1), "no token for 'no label'"),
        (dict(sampling__guidance=1.0), "no token for 'no label'"),
        (
            dict(model__wavelet_scale=3),
            r"image_size is 16; it must be a multiple of 2 \* patch_size \* wavelet_scale = 6",
        ),
        (dict(pretrain__detail_mask=mask | dict(kind="block", block=3)), "config.pretrain.detail_mask: mask block 3"),
        (dict(pretrain__detail_mask=mask, model__wavelet_scale=0), "detail_mask is for wavelet models"),
        (dict(pretrain__detail_mask=mask | dict(ratio=1)), "config.pretrain.detail_mask.ratio is not a setting"),
    ]:
        with pytest.raises(ConfigError, match=message):
            mask_plans(wavelet(**changes), "pretrain")
    config = wavelet(pretrain__detail_mask=mask)
    assert config_lib.parse(config_lib.to_dict(config)) == config


def test_it_trains_and_samples_colour_images(tmp_path):
    """Two stages and a stop between them; samples have the size and channels of the images."""
    from PIL import Image

    for i in range(16):
        Image.new("RGB", (16, 16), (15 * i, 200, 100)).save(tmp_path / f"{i}.png")
    changes = dict(model__num_classes=0, data__labels=False, data__path=str(tmp_path), data__threads=1)
    config = wavelet(**changes, diffusion__timesteps=100)
    last = train(config, tmp_path / "run")
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "approximation: mask patch: 32 of 64 patches visible (50.0%); details: mask patch: 8 of 16" in text
    assert "40 of 80 patches" in text
    loaded = sampling.load(last)
    folder = sampling.generate_to_folder(loaded, tmp_path / "out", 3, batch_size=1)
    shapes = [np.asarray(Image.open(folder / f"{i:06d}.png")).shape for i in range(3)]
    assert shapes == [(16, 16, 3)] * 3


def test_it_learns_one_image_by_heart():
    """Loss, clipping of each band and conversion to pixels, end to end: after training, the samples are the image."""
    config = wavelet(
        model__num_classes=0,
        data__labels=False,
        model__width=64,
        model__wavelet_scale=1,
        model__patch_size=2,
        stages=("finetune",),
        finetune__batch_size=16,
        finetune__learning_rate=2e-3,
        finetune__warmup_steps=0,
        finetune__ema_decay=0.95,
        finetune__steps=200,
        diffusion__objective="x0",
        data__flip=0.0,
        sampling__steps=25,
        sampling__eta=0.0,
    )
    rng = np.random.RandomState(3)
    image = np.kron(rng.randint(0, 256, (4, 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    mesh = make_run_mesh(config, jax.devices()[:1])
    network = make_network(config)
    state = fresh_state(config, network, abstract_state(config, 0, network, mesh))
    step = compile_step(config, "finetune", mesh, state)
    images, labels = np.tile(image, (16, 1, 1, 1)), np.zeros(16, np.int32)
    for i in range(200):
        index = np.arange(16 * i, 16 * i + 16, dtype=np.uint32)
        state, _ = step(state, dict(image=images, label=labels, index=index))
    samples = sampling.make_generator(config, mesh, 4)(state.ema, 0, range(4))
    assert np.abs(samples.astype(float) - image).mean() < 3
