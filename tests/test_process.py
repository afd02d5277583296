"""Flow matching and EDM against recorded values of the authors' code, and what holds for every process."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskdm_jax.build import _guidance, make_network, make_sampler
from maskdm_jax.diffusion import gaussian, samplers
from maskdm_jax.diffusion.process import Process, ddpm, denoising_loss, edm, flow, noisy
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import train
from maskdm_jax.training.logs import read_metrics

MEAN, STD = 0.3, 0.5  # of the Gaussian data that the analytic network knows


def labelled(labels):
    """0.1 y, for images of four dimensions."""
    return 0.0 if labels is None else 0.1 * jnp.asarray(labels, jnp.float32)[:, None, None, None]


def wide(t):
    return t[:, None, None, None]


def test_flow_samplers(flow_case):
    arrays, meta = golden.load(flow_case)

    def network(labels, z, t):
        return 0.7 * z * wide(t) + 0.2 * jnp.sin(3 * z + 5 * wide(t)) + labelled(labels)

    for key, case in meta["cases"].items():
        process = flow(noise_scale=case.get("noise_scale", 1.0))
        expected = golden.nhwc(arrays[f"{key}/sample"])
        low, high = case["interval"]

        def weight(t, low=low, high=high, scale=case["cfg"]):
            return jnp.where(((t > low) | (low == 0)) & (t < high), scale - 1, 0.0)

        unlabelled = [case["null_label"]] * len(expected)
        predict = samplers.guided(*(functools.partial(network, y) for y in (case["labels"], unlabelled)), weight)
        eps = golden.nhwc(np.random.RandomState(case["seed"]).standard_normal(arrays[f"{key}/sample"].shape))
        options = dict(steps=case["steps"], heun=case["method"] == "heun")
        ours = samplers.ode(predict, jnp.asarray(eps, jnp.float32), None, process, **options)
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max(), rtol=0, err_msg=key)


def test_edm_samplers(edm_case):
    """In float32; the recorded values are of float64."""
    arrays, meta = golden.load(edm_case)

    def network(labels, process, x, sigma):
        x, c = process.network_inputs(x, sigma)
        return 0.6 * jnp.sin(2 * x + wide(c)) + 0.3 * x * jnp.cos(wide(c)) + labelled(labels)

    for key, case in meta["cases"].items():
        levels = {name: case[name] for name in ("sigma_min", "sigma_max", "rho") if name in case}
        process, rng = edm(**levels), np.random.RandomState(case["seed"])
        expected = golden.nhwc(arrays[f"{key}/sample"])
        shape, steps = arrays[f"{key}/sample"].shape, case["num_steps"]
        draws = jnp.stack([golden.nhwc(rng.standard_normal(shape).astype(np.float32)) for _ in range(steps + 1)])
        theirs = dict(churn="S_churn", churn_low="S_min", churn_high="S_max", churn_scale="S_noise")
        churn = {ours: case[name] for ours, name in theirs.items() if name in case}
        predict = functools.partial(network, case.get("labels"), process)
        noise = lambda i, draws=draws: draws[i + 1]
        ours = samplers.ode(predict, draws[0], noise, process, steps=steps, **churn)
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max(), rtol=0, err_msg=key)
    if "sigmas18" in arrays:
        np.testing.assert_allclose(edm().times(18, 0.0), arrays["sigmas18"], rtol=1e-6)


def test_edm_preconditioning_and_loss(edm_case):
    arrays, _ = golden.load(edm_case)
    if "precond/x" not in arrays:
        pytest.skip("this case has samplers only")
    process, part = edm(), lambda name: jnp.asarray(arrays[f"precond/{name}"], jnp.float32)
    sigma, x0 = part("sigma"), part("x0")
    network = lambda x, c: 0.6 * jnp.sin(2 * x + wide(c)) + 0.3 * x * jnp.cos(wide(c))
    x = part("x")
    found = process.x0(network(*process.network_inputs(x, sigma)), x, sigma)
    expected = arrays["precond/D"]
    np.testing.assert_allclose(found, expected, atol=2e-5 * expected.std())
    eps = x / jnp.sqrt(wide(sigma) ** 2 + 0.25)
    loss = denoising_loss(network, process, x0, sigma, eps)
    np.testing.assert_allclose(loss, arrays["precond/loss"], rtol=2e-5)


PROCESSES = {
    "ddpm": ddpm(gaussian.make_schedule("cosine"), objective="x0"),
    "flow": flow(),
    "flow, velocity": flow(objective="v", times="uniform", noise_scale=0.5),
    "edm": edm(sigma_data=STD),
}


def perfect(process: Process, x, t):
    """What a perfect network of the process outputs for data N(MEAN, STD^2): found from the posterior mean of x0."""
    alpha, sigma = (np.float32(1) * a[:, None] for a in process.alpha_sigma(t))
    mean = (STD**2 * alpha * x + sigma**2 * MEAN) / (alpha**2 * STD**2 + sigma**2)
    zero, one = (process.x0(jnp.full_like(x, value), x, t) for value in (0.0, 1.0))  # x0 is linear in the output
    return (mean - zero) / (one - zero)


@pytest.mark.parametrize("name", PROCESSES)
def test_error_is_that_of_a_perfect_prediction(name):
    """A network that knows the noise has no error, and its prediction of x0 is x0."""
    process, keys = PROCESSES[name], jax.random.split(jax.random.key(0), 12)
    t = jax.vmap(process.draw)(keys)
    x0, eps = (jax.random.normal(key, (12, 7)) for key in keys[:2])
    x = noisy(process, x0, t, eps)
    output = -process.error(jnp.zeros_like(x), x0, eps, x, t) / (
        process.error(jnp.ones_like(x), x0, eps, x, t) - process.error(jnp.zeros_like(x), x0, eps, x, t)
    )
    np.testing.assert_allclose(process.x0(output, x, t), x0, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [(name, sampler) for name in ("flow, velocity", "edm") for sampler in ("heun", "euler", "dpm_solver")]
    + [("flow", "heun"), ("flow", "dpm_solver"), ("ddpm", "ddim")],
)
def test_the_ode_of_a_gaussian_recovers_it(name, sampler):
    process = PROCESSES[name]
    x = jax.random.normal(jax.random.key(1), (1, 500))
    predict = functools.partial(perfect, process)
    runs = dict(
        # With 20 steps, the clamp of 1 - t in x0-prediction acts in the last step alone, where it is exact.
        heun=lambda x: samplers.ode(predict, x, None, process, steps=20 if name == "flow" else 60),
        euler=lambda x: samplers.ode(predict, x, None, process, steps=400, heun=False),
        dpm_solver=lambda x: samplers.dpm_solver(predict, x, None, process, steps=60),
        ddim=lambda x: samplers.ddim(predict, x, lambda i: 0.0, process, clip=None, steps=200, eta=0.0),
    )
    out = np.asarray(jax.jit(runs[sampler])(x))
    # The exact flow from one Gaussian to another is a shift and a scale.
    np.testing.assert_allclose(out, MEAN + STD * x, atol=0.025 if sampler != "euler" else 0.05)


def test_flow_and_edm_agree_for_one_score():
    """The same noise, in the unit of each, leads to the same image."""
    x = jax.random.normal(jax.random.key(2), (3, 50))
    flows, edms = (
        jax.jit(lambda x, p=PROCESSES[name]: samplers.ode(functools.partial(perfect, p), x, None, p, steps=200))(x)
        for name in ("flow, velocity", "edm")
    )
    np.testing.assert_allclose(flows, edms, atol=5e-3)


def test_churn_keeps_the_distribution_and_needs_noise():
    process, x = PROCESSES["edm"], jax.random.normal(jax.random.key(3), (1, 20_000))
    noise = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(4), i), x.shape)
    options = dict(steps=60, churn=40.0, churn_low=0.05, churn_high=50.0)
    run = lambda x: samplers.ode(functools.partial(perfect, process), x, noise, process, **options)
    out = np.asarray(jax.jit(run)(x))
    assert out.mean() == pytest.approx(MEAN, abs=0.015)
    assert out.std() == pytest.approx(STD, rel=0.03)
    assert np.corrcoef(out, x)[0, 1] < 0.9, "the noise that was added has replaced the first"


def test_times_in_training():
    keys = jax.random.split(jax.random.key(5), 4000)
    draw = lambda process: np.asarray(jax.vmap(process.draw)(keys))
    t = draw(flow(mean=-0.8, std=0.8))
    logits = np.log(t / (1 - t))
    assert logits.mean() == pytest.approx(-0.8, abs=0.05)
    assert logits.std() == pytest.approx(0.8, abs=0.04)
    assert draw(flow(times="uniform")).mean() == pytest.approx(0.5, abs=0.02)
    assert np.log(draw(edm())).mean() == pytest.approx(-1.2, abs=0.08)
    assert set(draw(ddpm(gaussian.make_schedule("linear", 25)))) == set(range(25))


def test_sampler_stops_guiding_outside_its_interval():
    base = dict(diffusion__process="flow", diffusion__objective="x0", sampling__method="euler", data__label_dropout=0.1)
    config = lambda guidance=2.0, **changes: tiny.config(sampling__guidance=guidance, **base, **changes)
    network = make_network(config())
    params = jax.jit(network.init)(jax.random.key(0))
    x, labels = jax.random.normal(jax.random.key(1), (2, 8, 8, 1)), jnp.array([1, 2])
    run = lambda c: np.asarray(jax.jit(lambda x: make_sampler(c, network)(params, x, None, labels))(x))
    always, never = run(config()), run(config(guidance=0.0))
    late = run(config(sampling__guidance_from=0.999))
    assert np.abs(always - never).max() > 1e-3
    np.testing.assert_allclose(late, never, atol=1e-6)
    np.testing.assert_allclose(run(config(sampling__guidance_to=0.999)), always, atol=1e-6)
    weight = _guidance(config(sampling__guidance_from=0.1).sampling, PROCESSES["edm"])
    np.testing.assert_array_equal(weight(jnp.array([80.0, 1.0, 0.002])), [0, 2, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(diffusion__process="flow"), "config.diffusion.objective is 'noise'; it must be one of x0, v"),
        (dict(diffusion__process="edm"), "config.diffusion.objective is 'noise'; it must be one of x0"),
        (
            dict(diffusion__process="flow", diffusion__objective="x0"),
            "config.sampling.method is 'ddim'; it must be one of dpm_solver, heun, euler for the process flow",
        ),
        (
            dict(diffusion__process="flow", diffusion__objective="x0", diffusion__flow__times="cosine"),
            "config.diffusion.flow.times is 'cosine'; it must be one of logit_normal, uniform",
        ),
        (dict(sampling__churn=3.0), "config.sampling.churn is 3; only the process edm takes it"),
        (dict(sampling__method="heun"), "must be one of ddim, ddpm, dpm_solver for the process ddpm"),
    ],
)
def test_settings_that_do_not_fit_the_process(changes, message):
    config = tiny.config(**changes)
    with pytest.raises(ConfigError, match=message):
        make_sampler(config, make_network(config))


@pytest.mark.parametrize(
    ("process", "changes"),
    [
        ("flow", dict(diffusion__objective="v", sampling__method="dpm_solver")),
        ("edm", dict(diffusion__objective="x0", sampling__method="heun", sampling__churn=5.0)),
    ],
)
def test_a_wavelet_network_trains_and_samples_with_any_process(tmp_path, process, changes):
    wavelet = dict(model__wavelet_scale=1, model__patch_size=1, data__image_size=8, preview__every=1)
    config = tiny.config(stages=("pretrain",), diffusion__process=process, pretrain__steps=2, **wavelet, **changes)
    train(config, tmp_path, devices=jax.devices()[:1])
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < 50 for loss in losses)
    assert (tmp_path / "samples" / "step_0000002.png").exists()
