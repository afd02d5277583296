import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax.diffusion import gaussian as diffusion
from maskdm_jax.diffusion import samplers
from maskdm_jax.diffusion.process import ddpm, noisy

MEAN, STD = 0.3, 0.2  # of the data that the analytic predictor knows


@pytest.fixture(scope="module")
def schedule():
    return diffusion.make_schedule("cosine")


def gaussian(schedule, x, t):
    """The best possible noise prediction for data N(MEAN, STD^2)."""
    a = diffusion.at(schedule.alpha_bar, t, x.ndim)
    return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)


def draw(sampler, schedule, shape=(1, 20_000), seed=0, **options):
    x, noise = samplers.image_noise(jax.random.key(seed), jnp.arange(shape[0]), shape[1:])
    predict = functools.partial(gaussian, schedule)
    return np.asarray(jax.jit(lambda x: sampler(predict, x, noise, ddpm(schedule), clip=None, **options))(x))


@pytest.mark.parametrize(
    ("sampler", "options", "tolerance"),
    [
        (samplers.ddim, dict(steps=200, eta=0.0), 0.01),
        (samplers.ddim, dict(steps=200, eta=1.0), 0.01),
        (samplers.ddim, dict(steps=1000, eta=0.5), 0.01),
        (samplers.ddpm, {}, 0.01),
    ],
)
def test_an_analytic_gaussian_is_recovered(schedule, sampler, options, tolerance):
    x = draw(sampler, schedule, **options)
    assert abs(x.mean() - MEAN) < tolerance
    assert abs(x.std() - STD) < tolerance


def test_ddim_with_eta_1_over_all_steps_is_ddpm(schedule):
    # The same noise in the same order: equal in law would do, they are equal sample by sample.
    np.testing.assert_allclose(
        draw(samplers.ddim, schedule, shape=(4, 50), steps=1000, eta=1.0),
        draw(samplers.ddpm, schedule, shape=(4, 50)),
        atol=2e-3,
    )


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", samplers.DPM_SPACINGS)
def test_dpm_solver_recovers_a_gaussian(schedule, order, spacing):
    x = jax.random.normal(jax.random.key(0), (1, 20_000))
    predict = lambda x, t: gaussian_at(schedule, x, t)
    options = dict(order=order, steps=200, spacing=spacing)
    run = jax.jit(lambda x: samplers.dpm_solver(predict, x, None, ddpm(schedule), **options))
    x = np.asarray(run(x))
    assert abs(x.mean() - MEAN) < 0.01
    assert abs(x.std() - STD) < 0.01


def gaussian_at(schedule, x, t):
    """`gaussian` at fractional times."""
    log_alpha_bar = jnp.interp(t, jnp.arange(1000.0), jnp.log(schedule.alpha_bar))
    a = jnp.exp(log_alpha_bar)[:, None]
    return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)


def test_higher_orders_of_dpm_solver_come_nearer_with_few_steps(schedule):
    x = jax.random.normal(jax.random.key(0), (1, 500))
    predict = lambda x, t: gaussian_at(schedule, x, t)
    options = dict(process=ddpm(schedule), spacing="log_snr")
    run = lambda order, steps: samplers.dpm_solver(predict, x, None, order=order, steps=steps, **options)
    exact = run(1, 900)
    errors = [float(jnp.abs(run(order, 15) - exact).max()) for order in (1, 2)]
    assert errors[1] < errors[0] / 2


def test_objectives_agree_in_dpm_solver():
    schedule = diffusion.make_schedule("linear")  # of which no step is left out: see `dpm_solver_times`
    x = jax.random.normal(jax.random.key(0), (2, 30))
    eps = lambda x, t: gaussian_at(schedule, x, t)

    def told(objective):
        def predict(x, t):
            a = jnp.exp(jnp.interp(t, jnp.arange(1000.0), jnp.log(schedule.alpha_bar)))[:, None]
            x0 = (x - jnp.sqrt(1 - a) * eps(x, t)) / jnp.sqrt(a)
            return {"x0": x0, "v": jnp.sqrt(a) * eps(x, t) - jnp.sqrt(1 - a) * x0, "noise": eps(x, t)}[objective]

        return samplers.dpm_solver(predict, x, None, ddpm(schedule, objective=objective), steps=12)

    for objective in ("x0", "v"):
        np.testing.assert_allclose(told(objective), told("noise"), atol=2e-3)


def test_guidance_is_linear_and_off_at_0():
    labelled, unlabelled = (lambda x, t: x + 1), (lambda x, t: x - 1)
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(samplers.guided(labelled, unlabelled, 0.0)(x, None), x + 1)
    np.testing.assert_array_equal(samplers.guided(labelled, unlabelled, 2.0)(x, None), 3 * (x + 1) - 2 * (x - 1))


def test_ddim_with_eta_0_ignores_the_noise(schedule):
    x = jax.random.normal(jax.random.key(0), (2, 30))
    run = lambda scale: samplers.ddim(
        functools.partial(gaussian, schedule), x, lambda i: scale * jnp.ones_like(x), ddpm(schedule), steps=10, eta=0.0
    )
    np.testing.assert_array_equal(run(0.0), run(5.0))


@pytest.mark.parametrize("objective", ["x0", "v"])
def test_objectives_agree(schedule, objective):
    """The same knowledge, told as x0 or v instead of noise, gives the same samples."""
    x, noise = samplers.image_noise(jax.random.key(0), jnp.arange(2), (40,))

    def told(x, t):
        x0 = diffusion.x0_from_eps(schedule, x, t, gaussian(schedule, x, t))
        return diffusion.OBJECTIVES[objective](schedule, x0, t, gaussian(schedule, x, t))

    ours = samplers.ddim(told, x, noise, ddpm(schedule, objective=objective), clip=None, steps=20)
    expected = samplers.ddim(functools.partial(gaussian, schedule), x, noise, ddpm(schedule), clip=None, steps=20)
    np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_noise_belongs_to_the_image_not_to_its_batch():
    key = jax.random.key(7)
    x, noise = samplers.image_noise(key, jnp.array([4, 9, 2]), (5,))
    alone, noise_alone = samplers.image_noise(key, jnp.array([9]), (5,))
    np.testing.assert_array_equal(x[1], alone[0])
    np.testing.assert_array_equal(noise(3)[1], noise_alone(3)[0])
    assert np.abs(noise(3) - noise(4)).max() > 0.1
    assert np.abs(noise(0) - x).max() > 0.1


def test_ddim_times():
    np.testing.assert_array_equal(samplers.ddim_times(1000, 10), np.arange(999, -2, -100))
    times = samplers.ddim_times(1000, 1000)
    np.testing.assert_array_equal(times, np.arange(999, -2, -1))
    # As PyTorch's float32 linspace has it; float64 would truncate to 38 at the second place from the end.
    assert samplers.ddim_times(1000, 26)[-2] == 37
    assert len(samplers.ddim_times(1000, 26)) == 27


@pytest.mark.parametrize(
    ("sampler", "options", "power"),
    [(samplers.ddim, dict(steps=100, eta=0.0), 0.5), (samplers.ddim, dict(steps=101), 1), (samplers.ddpm, {}, 1)],
)
def test_a_sampler_can_start_in_the_middle(schedule, sampler, options, power):
    """From data noised to step 100 they come back to the data's law, as near to where it was as Bayes says."""
    keys = jax.random.split(jax.random.key(5), 2)
    x0 = MEAN + STD * jax.random.normal(keys[0], (1, 20_000))
    x_t = noisy(ddpm(schedule), x0, jnp.array([100]), jax.random.normal(keys[1], x0.shape))
    noise = samplers.image_noise(jax.random.key(6), jnp.arange(1), x0.shape[1:])[1]
    predict = functools.partial(gaussian, schedule)
    run = jax.jit(lambda x: sampler(predict, x, noise, ddpm(schedule), clip=None, start=100, **options))
    x = np.asarray(run(x_t))
    assert abs(x.mean() - MEAN) < 0.01
    assert abs(x.std() - STD) < 0.01
    a = schedule.alpha_bar[100]
    known = a * STD**2 / (a * STD**2 + 1 - a)
    assert np.corrcoef(x, x0)[0, 1] == pytest.approx(known**power, abs=0.02)
