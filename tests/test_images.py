"""Crops and filters against Pillow by hand; colour modes and rotation are in test_data."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from maskdm_jax.config import Data
from maskdm_jax.data.images import FILTERS, Framing, decode, surprises

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


def halved(pixels):
    """Averages of two pixels, of rows and then of columns, rounded up each time; odd sides by Pillow's box filter."""
    height, width = pixels.shape[:2]
    if height % 2 or width % 2:
        return np.asarray(Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BOX))
    rows = (pixels[:, ::2].astype(int) + pixels[:, 1::2] + 1) // 2
    return ((rows[::2] + rows[1::2] + 1) // 2).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "size", "halvings", "resized"),
    [
        ((40, 30), 15, 1, (20, 15)),
        ((40, 30), 16, 0, (21, 16)),
        ((40, 30), 8, 1, (11, 8)),  # 15 is less than 2 * 8
        ((30, 41), 7, 2, (7, 10)),
        ((12, 14), 9, 0, (9, 10)),  # 10.5, rounded to even
        ((64, 96), 5, 3, (5, 8)),  # 7.5, rounded to even
        ((9, 9), 20, 0, (20, 20)),
        ((20, 20), 20, 0, (20, 20)),
        ((3, 400), 8, 0, (8, 1067)),
    ],
)
def test_the_crop_of_adm(shape, size, halvings, resized):
    """Pixel for pixel: halved by a box filter, the short side resized by bicubic, the centre cropped."""
    pixels = np.random.RandomState(1).randint(0, 256, (*shape, 3)).astype(np.uint8)
    expected = pixels
    for _ in range(halvings):
        expected = halved(expected)
    assert min(expected.shape[:2]) < 2 * size
    expected = np.asarray(Image.fromarray(expected).resize(resized[::-1], Image.Resampling.BICUBIC))
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    expected = expected[top : top + size, left : left + size]
    np.testing.assert_array_equal(decode(png(pixels), Framing(size, crop="adm")), expected)
    four = np.concatenate([pixels, pixels[..., :1]], -1)
    np.testing.assert_array_equal(decode(four, Framing(size, 4, crop="adm"))[..., :3], expected)


def test_the_crop_of_adm_does_not_enlarge_without_bound():
    line = np.zeros((1, 3000, 3), np.uint8)
    with pytest.raises(ValueError, match=r"it would be enlarged to 768000 x 256 pixels, more than data.max_pixels"):
        decode(png(line), Framing(256, crop="adm"))


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
    with pytest.raises(ValueError, match="crop 'adm' resizes by the filter bicubic, not box"):
        Framing(8, crop="adm", filter="box")
    with pytest.raises(ValueError, match="channels 0 must be at least 1"):
        Framing(8, channels=0)


def test_what_is_no_image_of_eight_bits_is_named():
    for mode, value in (("F", 0.5), ("I", 100)):
        buffer = io.BytesIO()
        Image.new(mode, (9, 9), value).save(buffer, "TIFF")
        with pytest.raises(ValueError, match="floating-point or 32-bit numbers have no agreed range"):
            decode(buffer.getvalue(), Framing(8))
    for content, kind in {
        b"": "an empty file",
        b"hello": "not an image of a known kind",
        b"\n<!doctype html>": "a page of HTML or XML",
        b"version https://git-lfs.github.com/spec/v1\noid": "a pointer of Git LFS",
    }.items():
        with pytest.raises(ValueError, match=f"^{kind}"):
            decode(content, Framing(8))


def chunk(kind, data) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_large_text_and_colour_profiles_do_not_matter(kind):
    exif, content, after_header = Image.Exif(), png(PIXELS[:30]), 8 + 25
    exif[0x0112] = 3  # stored upside down
    chunks = chunk(kind, b"a\0\0" + zlib.compress(bytes(3 << 20))) + chunk(b"eXIf", exif.tobytes()[6:])
    content = content[:after_header] + chunks + content[after_header:]
    np.testing.assert_array_equal(decode(content, Framing(30)), PIXELS[29::-1, ::-1])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_counts_as_none(kind):
    buffers = [io.BytesIO(), io.BytesIO()]
    for buffer, exif in zip(buffers, (b"", b"IIjunk"), strict=True):
        Image.fromarray(PIXELS[:30]).save(buffer, kind, exif=exif)
    np.testing.assert_array_equal(*(decode(buffer.getvalue(), Framing(30)) for buffer in buffers))


@pytest.mark.parametrize("orientation", range(10))
def test_every_rotation_is_that_of_pillow(orientation):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS[:30]).save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(decode(buffer.getvalue(), Framing(30)), ImageOps.exif_transpose(Image.open(buffer)))


def test_a_rotation_counts_beside_a_field_that_pillow_cannot_write_anew():
    fields = struct.pack(">HHIHH", 0x0112, 3, 1, 3, 0) + struct.pack(">HHII", 0x011A, 2, 1, 1)  # a resolution as text
    exif, buffer = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + fields + bytes(4), io.BytesIO()
    Image.fromarray(PIXELS[:30]).save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(decode(buffer.getvalue(), Framing(30)), PIXELS[29::-1, ::-1])


def test_the_limit_of_pixels_is_a_setting():
    framing = Framing.of(Data(image_size=30, max_pixels=30 * 40))
    np.testing.assert_array_equal(decode(png(PIXELS), framing), decode(png(PIXELS), Framing(30)))
    with pytest.raises(
        ValueError, match=r"30 x 40 pixels, more than data.max_pixels 1199, .* raise --config.data.max_p"
    ):
        decode(png(PIXELS), Framing.of(Data(image_size=30, max_pixels=30 * 40 - 1)))
    buffer = io.BytesIO()
    Image.new("1", (13_400, 13_400)).save(buffer, "PNG", compress_level=1)
    with pytest.raises(ValueError, match="13400 x 13400 pixels, more than data.max_pixels 178956970"):
        decode(buffer.getvalue(), Framing(8))
    assert decode(buffer.getvalue(), Framing(8, 1, max_pixels=2**30)).shape == (8, 8, 1)


def test_what_an_owner_may_not_expect_is_told():
    small, animated = "smaller than 31 x 31 pixels, so they are enlarged", "animated or of several pages, so the first"
    assert surprises(png(PIXELS), Framing(30)) == surprises(PIXELS, Framing(30)) == []
    assert surprises(png(PIXELS), Framing(31)) == surprises(PIXELS, Framing(31)) == [small]
    assert surprises(png(PIXELS), Framing(8, crop="centre:7")) == ["smaller than 8 x 8 pixels, so they are enlarged"]
    assert surprises(png(PIXELS), Framing(8, crop="9,9,9")) == surprises(png(PIXELS), Framing(30, crop="adm")) == []
    assert surprises(png(PIXELS), Framing(31, crop="adm")) == [small]
    for kind, expected in dict(GIF=True, TIFF=True, WEBP=True, PNG=True, MPO=False).items():
        frames, buffer = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)], io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        found = surprises(buffer.getvalue(), Framing(30))
        assert [text.startswith(animated) for text in found] == [True] * expected


def test_framings_are_told_apart():
    described = [
        Framing(8),
        Framing(9),
        Framing(8, 1),
        Framing(8, 4),
        Framing(8, crop="centre:5"),
        Framing(8, filter="box"),
        Framing(8, crop="adm"),
    ]
    assert len({str(framing.describe()) for framing in described}) == 7
