"""JiT against recorded outputs of the authors' code, and the properties of its masked form."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskdm_jax import sampling
from maskdm_jax.build import make_network, make_process
from maskdm_jax.diffusion.process import noisy
from maskdm_jax.errors import SamplingError
from maskdm_jax.interop.names import JIT
from maskdm_jax.models.jit import sine_cosine
from maskdm_jax.models.layers import patchify, unpatchify
from maskdm_jax.models.routing import take
from maskdm_jax.parallel import sharding
from maskdm_jax.run import train
from maskdm_jax.training.state import new_state
from maskdm_jax.training.step import Inputs, draw_inputs, make_loss, train_step


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
    pick = lambda x: x if positions is None else take(x, positions)
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
    visible = run(params, take(patches, positions), t, labels, positions)
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


# --- A run with everything that only a JiT has: dropout, class tokens, flow matching, two EMAs ----------------------

JIT_RUN = dict(
    model__network="jit",
    model__jit=dict(bottleneck=6, class_tokens=3, class_tokens_from=1, dropout=0.2),
    model__depth=4,
    diffusion__process="flow",
    diffusion__objective="x0",
    sampling__method="heun",
    data__label_dropout=0.3,
    stages=("pretrain",),
    pretrain__ema_law="plain",
    pretrain__more_ema_decays=(0.5,),
)
SETS = ("params", "ema", "ema2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("jit")
    train(tiny.config(**JIT_RUN), workdir, devices=jax.devices()[:1])
    return workdir


def weights_of(run, name):
    return jax.tree.map(np.asarray, sampling.load(run, weights=name).params)


def test_a_run_resumes_bit_for_bit_with_two_emas(run, tmp_path, monkeypatch):
    real, count = sharding.to_global, 0

    def dies(*args):
        nonlocal count
        count += 1
        if count > 3:
            raise KeyError("stop")
        return real(*args)

    monkeypatch.setattr(sharding, "to_global", dies)
    with pytest.raises(KeyError):
        train(tiny.config(**JIT_RUN), tmp_path, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "to_global", real)
    train(tiny.config(**JIT_RUN), tmp_path, devices=jax.devices()[:1])
    for name in SETS:
        jax.tree.map(np.testing.assert_array_equal, weights_of(tmp_path, name), weights_of(run, name))


def test_each_set_of_weights_is_sampled_by_its_name(run):
    draw = lambda name: next(
        sampling.generate_batches(
            sampling.load(run, weights=name), np.arange(2), np.array([1, 2]), seed=0, batch_size=2
        )
    )[1]
    first, second, third = map(draw, SETS)
    assert (first != second).any()
    assert (second != third).any()
    lag = [
        sum(np.square(p - e).sum() for p, e in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in ((weights_of(run, "params"), weights_of(run, name)) for name in ("ema", "ema2"))
    ]
    assert lag[0] > 2 * lag[1] > 0, "the decays are 0.9 and 0.5"
    with pytest.raises(SamplingError, match="has no weights 'ema3'; it has params, ema, ema2"):
        sampling.load(run, weights="ema3")


def test_hidden_patches_have_no_gradient_and_dropout_belongs_to_the_image():
    config = tiny.config(**JIT_RUN)
    network = make_network(config)
    params = jax.jit(network.init)(jax.random.key(0))
    # The output layers begin at zero, which would hide everything.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    loss, draw = make_loss(config, network), lambda rows: draw_inputs(config, "pretrain", jax.random.key(1), rows)
    batch = dict(
        image=jax.random.uniform(jax.random.key(2), (4, 8, 8, 1), maxval=255.0),
        label=jnp.arange(4),
        index=jnp.arange(7, 11, dtype=jnp.uint32),
    )
    positions = draw(batch).positions
    gradient = jax.jit(jax.grad(lambda image: loss(params, draw(batch | dict(image=image)))))(batch["image"])
    energy = np.square(patchify(gradient, config.model.patch_size)).sum(-1)
    shown = np.zeros(energy.shape, bool)
    np.put_along_axis(shown, np.asarray(positions), True, axis=1)
    flipped = np.stack([row.reshape(4, 4)[:, ::-1].ravel() for row in shown])  # half of the images are flipped
    assert all(((e > 0) == s).all() or ((e > 0) == f).all() for e, s, f in zip(energy, shown, flipped, strict=True))
    each = jax.jit(lambda rows: loss(params, draw(rows)))
    alone = [float(each(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch))) for i in range(4)]
    assert float(each(batch)) == pytest.approx(np.mean(alone), rel=1e-5)
    without = loss(params, draw(batch)._replace(dropout=None))
    assert abs(float(without) - np.mean(alone)) > 1e-4


def test_samples_are_the_same_bits_on_any_number_of_devices(run):
    config, params = tiny.config(**JIT_RUN), weights_of(run, "ema")
    labels = np.arange(4)
    one, two = (
        sampling.make_generator(config, sharding.make_mesh(devices=jax.devices()[:n]), 4 * n)(
            params, 0, range(4), labels
        )
        for n in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


def test_ten_steps_are_those_of_pytorch(torch):
    """Weights, gradients, AdamW and both EMAs of masked flow matching; dropout is off."""
    import torch_jit

    changes = JIT_RUN | dict(model__jit=JIT_RUN["model__jit"] | dict(dropout=0.0), pretrain__weight_decay=0.1)
    config = tiny.config(**changes, pretrain__clip_norm=0.0, diffusion__flow=dict(noise_scale=0.5))
    stage, network = config.stage["pretrain"], make_network(config)
    params = jax.jit(network.init)(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    twin = torch_jit.of_config(config)
    tensors = JIT.state_dict(jax.tree.map(np.asarray, params), config.model.patch_size)
    tensors |= {"pos_embed": sine_cosine(config.model.width, twin.side)[None]}
    twin.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()})
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=stage.learning_rate, betas=(stage.b1, stage.b2), weight_decay=stage.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(i / stage.warmup_steps, 1))
    decays = (stage.ema_decay, *stage.more_ema_decays)
    averages = [[p.detach().clone() for p in trained] for _ in decays]
    state = new_state(params, stage, jax.random.key(1))
    drawn = jax.jit(lambda key, rows: draw_inputs(config, "pretrain", key, rows))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    given = lambda key, inputs: inputs  # drawn already
    step = jax.jit(functools.partial(train_step, draw=given, loss=make_loss(config, network), stage=stage, mesh=mesh))
    rng = np.random.RandomState(0)
    for i in range(10):
        rows = dict(
            image=rng.randint(0, 256, (8, 8, 8, 1), np.uint8), label=np.arange(8), index=np.arange(8, dtype=np.uint32)
        )
        inputs = drawn(jax.random.key(i), rows)
        # The twin computes the embedding of whole images, so the hidden patches are filled with anything.
        whole = [np.zeros((8, 16, 4), np.float32) for _ in range(2)]
        for full, part in zip(whole, (inputs.x0, inputs.eps), strict=True):
            np.put_along_axis(full, np.asarray(inputs.positions)[..., None], np.asarray(part), axis=1)
        x0, eps = (torch.tensor(np.array(unpatchify(full, 2, (4, 4))).transpose(0, 3, 1, 2)) for full in whole)
        labels = torch.tensor(np.where(np.asarray(inputs.labels) < 0, config.model.num_classes, inputs.labels))
        optimizer.zero_grad()
        value = torch_jit.loss(
            twin,
            x0,
            torch.tensor(np.array(inputs.t)),
            labels,
            0.5 * eps,
            torch.tensor(np.array(inputs.positions)).long(),
        ).mean()
        value.backward()
        optimizer.step()
        schedule.step()
        for decay, average in zip(decays, averages, strict=True):
            for a, p in zip(average, trained, strict=True):
                a.mul_(decay).add_(p.detach(), alpha=1 - decay)
        state, metrics = step(state, inputs)
        assert float(metrics["loss"]) == pytest.approx(value.item(), rel=1e-5), i
    names = [name for name, p in twin.named_parameters() if p.requires_grad]
    for tree, theirs in zip((state.params, *state.emas), (trained, *averages), strict=True):
        ours = JIT.state_dict(jax.tree.map(np.asarray, tree), config.model.patch_size)
        assert list(ours) == names
        for name, tensor in zip(names, theirs, strict=True):
            expected = tensor.detach().numpy()
            assert np.abs(ours[name] - expected).max() < 2e-5 * np.abs(expected).max(), name
