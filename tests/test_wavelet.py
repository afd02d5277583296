import golden
import jax
import numpy as np
import pytest
import pywt
from golden import nhwc

from maskdm_jax.models.representation import haar, inverse_haar


@pytest.fixture(scope="module")
def images():
    return np.random.RandomState(0).rand(3, 8, 12, 3).astype(np.float32)


def test_haar_is_that_of_pywavelets(images):
    bands = jax.jit(haar)(images)
    approximation, details = pywt.dwt2(images, "haar", axes=(1, 2))
    np.testing.assert_allclose(bands, np.concatenate([approximation, *details], axis=-1), atol=1e-6)


def test_inverse(images):
    np.testing.assert_allclose(jax.jit(inverse_haar)(haar(images)), images, atol=1e-6)


def test_the_official_coefficients(root):
    arrays, _ = golden.load(root / "tests" / "golden" / "dwt_scale1.npz")
    np.testing.assert_allclose(haar(nhwc(arrays["image"])), nhwc(arrays["coeffs"]), atol=1e-6)
    np.testing.assert_allclose(inverse_haar(nhwc(arrays["coeffs"])), nhwc(arrays["image"]), atol=1e-6)


def test_odd_sides_and_missing_bands_are_refused():
    with pytest.raises(ValueError, match="images of 8 x 7 have an odd side"):
        haar(np.zeros((1, 8, 7, 3), np.float32))
    with pytest.raises(ValueError, match="6 channels are not four bands"):
        inverse_haar(np.zeros((1, 8, 8, 6), np.float32))
