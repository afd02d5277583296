import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax.diffusion import gaussian
from maskdm_jax.diffusion.process import ddpm, denoising_loss, noisy


@pytest.mark.parametrize("name", ["linear", "cosine", "shifted_cosine"])
def test_schedules_go_from_image_to_noise(name):
    s = gaussian.make_schedule(name, size=256)
    assert s.timesteps == 1000
    assert (np.diff(s.alpha_bar) < 0).all()
    assert s.alpha_bar[0] > 0.999
    assert s.alpha_bar[-1] < 1e-4


def test_shift_moves_log_snr_by_the_same_amount_everywhere():
    plain, shifted = (gaussian.make_schedule(n, size=128) for n in ("cosine", "shifted_cosine"))
    logit = lambda a: np.log(a / (1 - a))
    move = logit(shifted.alpha_bar.astype(float)) - logit(plain.alpha_bar.astype(float))
    np.testing.assert_allclose(move[100:990], 2 * np.log(64 / 128), atol=0.01)


def test_linear_betas_scale_with_the_number_of_steps():
    few, many = gaussian.make_schedule("linear", 100), gaussian.make_schedule("linear", 1000)
    assert np.log(few.alpha_bar[-1]) == pytest.approx(np.log(many.alpha_bar[-1]), rel=0.1)


@pytest.mark.parametrize("objective", ["noise", "x0", "v"])
def test_a_perfect_prediction_gives_x0_and_noise_back(objective):
    s = gaussian.make_schedule("cosine")
    keys = jax.random.split(jax.random.key(0), 2)
    x0, eps = jnp.clip(jax.random.normal(keys[0], (3, 5, 4)), -1, 1), jax.random.normal(keys[1], (3, 5, 4))
    t = jnp.array([10, 400, 800])
    x = noisy(ddpm(s), x0, t, eps)
    target = gaussian.OBJECTIVES[objective](s, x0, t, eps)
    found_x0, found_eps = gaussian.predictions(s, objective, target, x, t)
    np.testing.assert_allclose(found_x0, x0, atol=1e-4)
    np.testing.assert_allclose(found_eps, eps, atol=1e-3)


def test_clipping_bounds_x0_but_leaves_predicted_noise_alone():
    s, t = gaussian.make_schedule("cosine"), jnp.array([900])
    x, out = jnp.full((1, 4), 3.0), jnp.full((1, 4), -1.0)
    x0, eps = gaussian.predictions(s, "noise", out, x, t)
    assert (x0 == 1).all()
    np.testing.assert_array_equal(eps, out)
    x0, _ = gaussian.predictions(s, "noise", out, x, t, clip=None)
    assert (x0 > 1).all()


def test_forward_process_keeps_unit_variance():
    s = gaussian.make_schedule("linear")
    keys = jax.random.split(jax.random.key(0), 2)
    x0, eps = (jax.random.normal(key, (4, 20_000)) for key in keys)
    x = noisy(ddpm(s), x0, jnp.array([0, 300, 600, 999]), eps)
    np.testing.assert_allclose(x.std(axis=1), 1.0, rtol=0.02)


def test_loss_is_a_mean_per_image_times_its_weight():
    s = gaussian.make_schedule("cosine")
    x0, eps, t = jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4)), jnp.array([5, 700])
    zero = lambda x, t: jnp.zeros_like(x)
    weights = gaussian.loss_weights(s, "p2", 1.0)
    plain, weighted = ddpm(s), ddpm(s, weights=weights)
    np.testing.assert_allclose(denoising_loss(zero, plain, x0, t, eps), [1, 1], rtol=1e-6)
    np.testing.assert_allclose(denoising_loss(zero, plain, x0, t, 3 * eps, loss="l1"), [3, 3], rtol=1e-6)
    np.testing.assert_allclose(denoising_loss(zero, weighted, x0, t, eps), weights[np.array([5, 700])], rtol=1e-6)
    np.testing.assert_allclose(weights, 1 / (1 + s.alpha_bar / (1 - s.alpha_bar)), rtol=1e-6)
