import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt
import tiny

from maskdm_jax.models import representation
from maskdm_jax.models.representation import haar, inverse_haar, make_representation, to_uint8, to_unit

to_coefficients, from_coefficients = map(jax.jit, (representation.to_coefficients, representation.from_coefficients))


def test_to_uint8_inverts_to_unit():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_unit(values)), values)
    assert to_uint8(np.float32([-9, 9])).tolist() == [0, 255]
    assert to_uint8(jnp.zeros(1)) == 128


@pytest.fixture(scope="module")
def images():
    return np.random.RandomState(0).rand(3, 8, 12, 3).astype(np.float32)


def test_haar_is_that_of_pywavelets(images):
    approximation, details = pywt.dwt2(images, "haar", axes=(1, 2))
    np.testing.assert_allclose(haar(images), np.concatenate([approximation, *details], axis=-1), atol=1e-6)


def test_inverse_haar(images):
    np.testing.assert_allclose(inverse_haar(haar(images)), images, atol=1e-6)


def test_from_coefficients_inverts_to_coefficients(images):
    pixels = (images * 255).astype(np.uint8)
    np.testing.assert_array_equal(from_coefficients(to_coefficients(pixels)), pixels)


def test_bounds_of_the_coefficients_are_reached_and_kept():
    """The sampler's clipping must fit the range of `encode`: white, black, and the strongest of each detail."""
    space = make_representation(tiny.config(model__wavelet_scale=2, data__image_size=8))
    low, high = space.clip
    values = np.concatenate([np.zeros((2, 2)), np.full((2, 2), 255)]).reshape(2, 2, 2)
    stripes = np.array([[[0, 0], [255, 255]], [[0, 255], [0, 255]], [[0, 255], [255, 0]]])
    blocks = np.concatenate([values, stripes, 255 - stripes])  # [8, 2, 2]
    encoded = np.asarray(to_coefficients(np.tile(blocks.astype(np.uint8)[..., None], (1, 4, 4, 1))))
    np.testing.assert_allclose(encoded.max((0, 1, 2)), high[0, 0, 0])
    np.testing.assert_allclose(encoded.min((0, 1, 2)), low[0, 0, 0])
    assert space.shape == encoded.shape[1:]


@pytest.mark.parametrize("scale", [1, 2])
def test_bands_are_cut_into_patches_of_their_own_size(scale):
    space = make_representation(tiny.config(model__wavelet_scale=scale, data__image_size=16, data__channels=3))
    x = np.arange(2 * 8 * 8 * 12).reshape(2, 8, 8, 12)
    approx, detail = space.cut(x)
    side = 2 * scale
    assert approx.shape == (2, 16, 2 * 2 * 3)
    assert detail.shape == (2, 16 // scale**2, side**2 * 9)
    np.testing.assert_array_equal(approx[1, 5], x[1, 2:4, 2:4, :3].reshape(-1))
    row, column = (side * i for i in divmod(3, 8 // side))  # of detail patch 3
    np.testing.assert_array_equal(detail[1, 3], x[1, row : row + side, column : column + side, 3:].reshape(-1))
