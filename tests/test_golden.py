"""Against recorded outputs of the official implementation. Other cases: pytest tests/test_golden.py --golden=DIR."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import nhwc

from maskdm_jax.build import make_network, mask_plans
from maskdm_jax.diffusion import gaussian, samplers
from maskdm_jax.diffusion.process import ddpm, noisy
from maskdm_jax.interop.names import UVIT
from maskdm_jax.interop.uvit_file import BUFFERS, schedule_buffers
from maskdm_jax.models.layers import patchify
from maskdm_jax.models.representation import haar, inverse_haar, make_representation
from maskdm_jax.models.routing import take
from maskdm_jax.parallel.sharding import make_mesh
from maskdm_jax.training.state import new_state
from maskdm_jax.training.step import Inputs, make_loss, train_step


def at_path(tree, path):
    return functools.reduce(lambda node, key: node[key], path, tree)


@pytest.fixture(scope="module")
def uvit(uvit_case):
    arrays, meta = golden.load(uvit_case)
    config = golden.config(meta["config"])
    network, params = make_network(config), golden.params(meta["state_dict"])
    labels = None if meta["labels"] is None else jnp.array(meta["labels"])
    return arrays, meta, config, network, params, labels


def test_uvit_has_the_reference_parameters(uvit):
    _, meta, _, network, params, _ = uvit
    abstract = network.abstract_params()
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, abstract)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == meta["n_params"]


def test_uvit_whole_image(uvit):
    arrays, _, _, network, params, labels = uvit
    out = jax.jit(network.apply)(params, nhwc(arrays["x"]), jnp.array(arrays["t"]), labels)
    expected = nhwc(arrays["out_full"])
    assert np.abs(out - expected).max() < 2e-5 * expected.std()


def test_uvit_visible_patches_and_gradients(uvit):
    arrays, meta, config, network, params, labels = uvit
    positions = golden.positions(arrays["mask"])

    def visible(images):
        return take(patchify(jnp.asarray(nhwc(images)), config.model.patch_size), positions)

    @jax.jit
    def run(params):
        def loss(params):
            out = network.apply(params, visible(arrays["x"]), jnp.array(arrays["t"]), labels, positions)
            return jnp.mean(jnp.square(out - visible(arrays["target"]))), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, out), grads = run(params)
    expected = arrays["out_visible"]
    assert np.abs(out - expected).max() < 2e-5 * expected.std()
    assert float(loss) == pytest.approx(float(arrays["loss"]), rel=1e-5)
    for name, norm in meta["grad_norm"].items():
        ours = float(jnp.linalg.norm(at_path(grads, UVIT.our_path(name)).ravel()))
        assert ours == pytest.approx(norm, rel=2e-5, abs=1e-9), name
    for key in (key for key in arrays if key.startswith("grad:")):
        name = key.removeprefix("grad:")
        expected = UVIT.our_layout(name, arrays[key])
        assert np.abs(at_path(grads, UVIT.our_path(name)) - expected).max() < 2e-5 * np.abs(expected).max(), name


@pytest.fixture(scope="module")
def wavelet(wavelet_case):
    arrays, meta = golden.load(wavelet_case)
    config = golden.config(meta["config"], mask=meta["mask"])
    return arrays, meta, config, make_network(config), golden.params(meta["state_dict"])


def test_wavelet_transform_and_its_inverse(wavelet):
    arrays, _, config, _, _ = wavelet
    coefficients = haar(jnp.asarray(nhwc(arrays["image"])))
    np.testing.assert_allclose(coefficients, nhwc(arrays["coeffs"]), atol=1e-6)
    np.testing.assert_allclose(inverse_haar(coefficients), nhwc(arrays["image_back"]), atol=1e-6)
    shape = make_representation(config).shape
    assert shape == coefficients.shape[1:]


def test_wavelet_network_whole(wavelet):
    arrays, meta, _, network, params = wavelet
    abstract = network.abstract_params()
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, abstract)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == meta["n_params"]
    out = jax.jit(network.apply)(params, nhwc(arrays["x_t"]), jnp.array(arrays["t"]))
    expected = nhwc(arrays["out_full"])
    assert np.abs(out - expected).max() < 2e-5 * expected.std()


def test_wavelet_losses_and_gradients(wavelet):
    """Image, noise and mask in; both bands' outputs, the two losses and every gradient out."""
    arrays, meta, config, network, params = wavelet
    space, plans = make_representation(config), mask_plans(config, "stage")
    split = plans[0].total
    positions = (golden.positions(arrays["mask"][:, :split]), golden.positions(arrays["mask"][:, split:]))
    assert [p.shape[1] for p in positions] == [plan.visible for plan in plans]
    x0 = jnp.asarray(nhwc(arrays["coeffs"]))
    x0 = x0.at[..., : config.data.channels].set(2 * x0[..., : config.data.channels] - 1)
    visible = lambda x: jax.tree.map(take, space.cut(jnp.asarray(x)), positions)
    t = jnp.array(arrays["t"])
    schedule = gaussian.make_schedule("cosine")
    np.testing.assert_allclose(noisy(ddpm(schedule), x0, t, nhwc(arrays["noise"])), nhwc(arrays["x_t"]), atol=1e-5)
    inputs = Inputs(visible(x0), t, visible(nhwc(arrays["noise"])), positions, None)
    out = jax.jit(network.apply)(params, visible(nhwc(arrays["x_t"])), t, None, positions)
    for ours, name, eps in zip(out, ("approx", "detail"), inputs.eps, strict=True):
        expected = arrays[f"out_visible_{name}"]
        assert np.abs(ours - expected).max() < 2e-5 * expected.std()
        assert float(jnp.mean(jnp.square(ours - eps))) == pytest.approx(float(arrays[f"loss_{name}"]), rel=1e-5)
    loss, grads = jax.jit(jax.value_and_grad(make_loss(config, network)))(params, inputs)
    assert float(loss) == pytest.approx(float(arrays["loss"]), rel=1e-5)
    for name, norm in meta["grad_norm"].items():
        ours = float(jnp.linalg.norm(at_path(grads, UVIT.our_path(name)).ravel()))
        assert ours == pytest.approx(norm, rel=2e-5, abs=1e-9), name


def schedule_of(name: str):
    """`linear`, `cosine`, `cosine_shift_d256`"""
    kind, _, size = name.partition("_shift_d")
    return gaussian.make_schedule("shifted_cosine", size=int(size)) if size else gaussian.make_schedule(kind)


def test_schedules(schedules_case):
    arrays, _ = golden.load(schedules_case)
    compared = 0
    for key, expected in arrays.items():
        name, _, buffer = key.partition("/")
        if name != "pieces" and buffer in BUFFERS:
            np.testing.assert_array_equal(schedule_buffers(schedule_of(name))[buffer], expected, err_msg=key)
            compared += 1
        elif buffer.startswith("loss_weight"):
            _, kind, gamma = buffer.split(":")
            weights = gaussian.loss_weights(schedule_of(name), {"p2": "p2", "min": "min_snr"}[kind], float(gamma))
            np.testing.assert_allclose(weights, expected, rtol=1e-6)
            compared += 1
    assert compared >= len(BUFFERS) - 1


def test_pieces_of_the_diffusion(schedules_case):
    arrays, _ = golden.load(schedules_case)
    piece = {key.removeprefix("pieces/"): value for key, value in arrays.items() if key.startswith("pieces/")}
    if not piece:
        pytest.skip("this case has schedules only")
    s, x0, eps, x = gaussian.make_schedule("cosine"), piece["x0"], piece["noise"], piece["x_t"]
    t = jnp.array(piece["t"])
    mean, log_variance = gaussian.q_posterior(s, x0, x, t)
    for name, ours in {
        "x_t": noisy(ddpm(s), x0, t, eps),
        "v": gaussian.velocity(s, x0, t, eps),
        "x0_from_noise": gaussian.x0_from_eps(s, x, t, eps),
        "x0_from_v": gaussian.x0_from_v(s, x, t, piece["v"]),
        "noise_from_x0": gaussian.eps_from_x0(s, x, t, x0),
        "posterior_mean": mean,
        "posterior_log_variance": log_variance.ravel(),
        "posterior_variance": s.posterior.variance[t],
    }.items():
        np.testing.assert_allclose(ours, piece[name], rtol=2e-5, atol=1e-5, err_msg=name)


def analytic_model(x, t, labels=None):
    s = t.astype(jnp.float32)[:, None, None, None] / 1000
    shift = 0.0 if labels is None else 0.1 * jnp.float32(labels)[:, None, None, None]
    return 0.8 * x * s + 0.15 * jnp.sin(3 * x + 5 * s) + shift


def test_samplers(samplers_case):
    arrays, meta = golden.load(samplers_case)
    compared = 0
    for key, case in meta.items():
        if key.startswith("dpmsolver"):
            continue
        rng = np.random.RandomState(case["seed"])
        draws = np.stack([rng.standard_normal(case["shape"]).astype(np.float32) for _ in range(case["draws"])])
        draws = jnp.array(np.append(draws, np.zeros_like(draws[:1]), 0))  # the last step's noise is multiplied by 0
        options = dict(clip=(-1.0, 1.0) if case.get("clip_denoised", True) else None)
        sampler, predict = samplers.ddpm, analytic_model
        if case.get("kw"):
            labelled = functools.partial(analytic_model, labels=case["kw"]["guidance_idx"])
            predict = samplers.guided(labelled, analytic_model, case["kw"]["guidance_weight"])
        if key.startswith("ddim"):
            sampler = samplers.ddim
            options |= dict(steps=case["sampling_timesteps"], eta=case["ddim_sampling_eta"])
        objective = golden.OBJECTIVES[case.get("objective", "pred_noise")]
        process = ddpm(gaussian.make_schedule(case.get("beta_schedule", "cosine")), objective=objective)
        run = functools.partial(sampler, predict, noise=lambda i, draws=draws: draws[i + 1], process=process, **options)
        ours = (jax.jit(run)(draws[0]) + 1) / 2
        np.testing.assert_allclose(ours, arrays[f"{key}/sample"], atol=1e-4, rtol=0, err_msg=key)
        compared += 1
    assert compared


def test_dpm_solver(samplers_case):
    arrays, meta = golden.load(samplers_case)
    keys = [key for key in meta if key.startswith("dpmsolver++")]
    if not keys:
        pytest.skip("this case has other samplers only")
    for key in keys:
        _, schedule, _, order, spacing, steps = key.split("/")
        x = np.random.RandomState(meta[key]["seed"]).standard_normal(meta[key]["shape"]).astype(np.float32)
        options = dict(order=int(order), steps=int(steps), spacing={"logSNR": "log_snr"}.get(spacing, spacing))
        process = ddpm(gaussian.make_schedule(schedule))
        ours = samplers.dpm_solver(analytic_model, jnp.array(x), None, process, **options)
        np.testing.assert_allclose(ours, arrays[f"{key}/sample"], atol=1e-4, rtol=0, err_msg=key)


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in jax.tree.leaves(tree))))


@pytest.mark.usefixtures("optimized")
def test_training_run(train_case):
    """Losses, gradients, rates and norms of every step; at the end some tensors, and how far the EMA lags behind.

    The EMA's own norm hardly shows its law, since it moves little in a hundred steps.
    """
    arrays, meta = golden.load(train_case)
    stage = dict(
        steps=meta["steps"],
        batch_size=meta["batch"] * meta["gradient_accumulate_every"],
        micro_batches=meta["gradient_accumulate_every"],
        learning_rate=meta["lr"],
        warmup_steps=meta["warmup_steps"],
        b1=meta["betas"][0],
        b2=meta["betas"][1],
        weight_decay=meta["weight_decay"],
        clip_norm=meta["clip_grad"] or 0.0,
        ema_decay=meta["ema_decay"],
        ema_every=meta["ema_update_every"],
    )
    objective = dict(
        schedule=meta["beta_schedule"], objective=golden.OBJECTIVES[meta["objective"]], loss=meta["loss_type"]
    )
    config = golden.config(meta["network"], stage, meta["mask"], objective)
    network, stage = make_network(config), config.stage["stage"]
    mesh = make_mesh(devices=jax.devices()[:1])
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), network.abstract_params())
    shapes = {name: t.shape for name, t in UVIT.state_dict(zeros, config.model.patch_size).items()}
    state = new_state(golden.params(shapes), stage, jax.random.key(0))

    def draw(key, batch):  # the recipe draws everything that a run draws
        cut = lambda x: take(patchify(x, config.model.patch_size), batch["positions"])
        return Inputs(cut(2 * batch["image"] - 1), batch["t"], cut(batch["noise"]), batch["positions"], None)

    step = jax.jit(functools.partial(train_step, draw=draw, loss=make_loss(config, network), stage=stage, mesh=mesh))
    for i, micro in enumerate(golden.training_batches(meta)):
        image, t, noise, mask = (np.concatenate(part) for part in zip(*micro, strict=True))
        batch = dict(image=nhwc(image), t=t, noise=nhwc(noise), positions=golden.positions(mask))
        state, metrics = step(state, batch)
        ours = dict(metrics, lr=metrics["learning_rate"], param_norm=norm(state.params), ema_norm=norm(state.ema))
        for name in ("loss", "grad_norm", "lr", "param_norm", "ema_norm"):
            assert float(ours[name]) == pytest.approx(arrays[name][i], rel=1e-5, abs=1e-12), f"{name} at step {i}"
        lag = arrays["param_norm"][i] - arrays["ema_norm"][i]
        precision = 2e-6 * arrays["param_norm"][i]
        assert ours["param_norm"] - ours["ema_norm"] == pytest.approx(lag, rel=0.01, abs=precision), f"step {i}"
    compare_tensors(arrays, state)


def compare_tensors(arrays, state):
    """Compare the recorded final tensors, and the distance of each from its average."""
    trees = {"param": state.params, "ema": state.ema}
    found = {"param": {}, "ema": {}}
    for key in arrays:
        which, _, name = key.partition(":")
        if name:
            expected, ours = UVIT.our_layout(name, arrays[key]), at_path(trees[which], UVIT.our_path(name))
            assert np.abs(ours - expected).max() < 2e-5 * np.abs(expected).max(), key
            found[which][name] = expected, np.asarray(ours)
    for name in found["param"].keys() & found["ema"].keys():
        expected, ours = (p - e for p, e in zip(found["param"][name], found["ema"][name], strict=True))
        assert np.linalg.norm(ours - expected) < 2e-3 * np.linalg.norm(expected), name
