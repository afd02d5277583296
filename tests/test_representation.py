import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskdm_jax.models.representation import from_coefficients, make_representation, to_coefficients, to_uint8, to_unit


def test_to_uint8_inverts_to_unit():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_unit(values)), values)
    assert to_uint8(np.float32([-9, 9])).tolist() == [0, 255]


def images():
    return np.random.RandomState(0).randint(0, 256, (5, 8, 8, 3)).astype(np.uint8)


def test_coefficients_come_back_as_the_image():
    np.testing.assert_array_equal(from_coefficients(to_coefficients(images())), images())


def test_bounds_of_the_coefficients_are_reached_and_kept():
    """The clipping of the sampler must fit what `encode` can give: white, black, and the strongest of each detail."""
    space = make_representation(tiny.config(model__wavelet_scale=2, data__image_size=8))
    low, high = space.clip
    values = np.concatenate([np.zeros((2, 2)), np.full((2, 2), 255)]).reshape(2, 2, 2)
    stripes = np.array([[[0, 0], [255, 255]], [[0, 255], [0, 255]], [[0, 255], [255, 0]]])
    blocks = np.concatenate([values, stripes, 255 - stripes])  # [8, 2, 2]
    encoded = to_coefficients(np.tile(blocks.astype(np.uint8)[..., None], (1, 4, 4, 1)))
    np.testing.assert_allclose(encoded.max((0, 1, 2)), high[0, 0, 0])
    np.testing.assert_allclose(encoded.min((0, 1, 2)), low[0, 0, 0])
    assert space.shape == encoded.shape[1:]
    assert to_uint8(jnp.zeros(1)) == 128


@pytest.mark.parametrize("scale", [1, 2])
def test_bands_are_cut_into_patches_of_their_own_size(scale):
    space = make_representation(tiny.config(model__wavelet_scale=scale, data__image_size=16, data__channels=3))
    x = jnp.arange(2 * 8 * 8 * 12).reshape(2, 8, 8, 12)
    approx, detail = space.cut(x)
    assert approx.shape == (2, 16, 2 * 2 * 3)
    assert detail.shape == (2, 16 // scale**2, (2 * scale) ** 2 * 9)
    np.testing.assert_array_equal(approx[1, 5], x[1, 2:4, 2:4, :3].reshape(-1))
    np.testing.assert_array_equal(detail[1, 3], space_block(x, scale)[1].reshape(-1))


def space_block(x, scale):
    """Patch number 3 of the details."""
    side = 2 * scale
    row, column = divmod(3, 8 // side)
    return x[:, row * side : (row + 1) * side, column * side : (column + 1) * side, 3:]
