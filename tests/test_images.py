"""Crops and filters against Pillow by hand; colour modes and rotation are in test_data."""

import io

import numpy as np
import pytest
from PIL import Image

from maskdm_jax.data.images import FILTERS, Framing, decode

PIXELS = np.random.RandomState(0).randint(0, 256, (40, 30, 3)).astype(np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("crop", "cut"),
    [
        ("centre:20", PIXELS[10:30, 5:25]),
        ("3,7,16", PIXELS[7:23, 3:19]),
    ],
)
@pytest.mark.parametrize("kind", FILTERS)
def test_an_image_is_cropped_then_resized(crop, cut, kind):
    expected = np.asarray(Image.fromarray(cut).resize((8, 8), FILTERS[kind]))
    np.testing.assert_array_equal(decode(png(PIXELS), Framing(8, crop=crop, filter=kind)), expected)
    np.testing.assert_array_equal(decode(png(PIXELS), Framing(len(cut), crop=crop, filter=kind)), cut)


def test_without_numbers_an_image_is_resized_then_cropped():
    wide = PIXELS[:, :20]  # 40 x 20
    for kind in FILTERS:
        expected = np.asarray(Image.fromarray(wide).resize((10, 20), FILTERS[kind]))[5:15]
        # Pillow keeps the box in single precision: one grey level of rounding.
        np.testing.assert_allclose(decode(png(wide), Framing(10, filter=kind)).astype(int), expected, atol=1)
    np.testing.assert_array_equal(decode(png(wide), Framing(20)), wide[10:30])


def test_what_cannot_be_framed_is_named():
    with pytest.raises(ValueError, match="crop '20,0,16' does not fit into 30 x 40 pixels"):
        decode(png(PIXELS), Framing(8, crop="20,0,16"))
    with pytest.raises(ValueError, match="crop 'centre:31' does not fit"):
        decode(png(PIXELS), Framing(8, crop="centre:31"))
    for crop in ("middle", "1,2", "1,2,3,4", "centre:x", "centre:0", "1,2,0", "-1,2,3"):
        with pytest.raises(ValueError, match=f"crop '{crop}' is not understood; give centre"):
            Framing(8, crop=crop)
    with pytest.raises(ValueError, match="filter 'nearest' is unknown; choose from bicubic"):
        Framing(8, filter="nearest")
    with pytest.raises(ValueError, match="channels 0 must be at least 1"):
        Framing(8, channels=0)


def test_what_is_no_image_of_eight_bits_is_named():
    for mode, value in (("F", 0.5), ("I", 100)):
        buffer = io.BytesIO()
        Image.new(mode, (9, 9), value).save(buffer, "TIFF")
        with pytest.raises(ValueError, match="floating-point or 32-bit numbers have no agreed range"):
            decode(buffer.getvalue(), Framing(8))
    for content in (b"", b"hello"):
        with pytest.raises(ValueError, match="not an image of a known kind"):
            decode(content, Framing(8))


def test_framings_are_told_apart():
    described = [
        Framing(8),
        Framing(9),
        Framing(8, 1),
        Framing(8, 4),
        Framing(8, crop="centre:5"),
        Framing(8, filter="box"),
    ]
    assert len({str(framing.describe()) for framing in described}) == 6
