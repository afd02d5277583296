"""Images as arrays: decoding, colour, crop and resize; PNG files and grids."""

import contextlib
import dataclasses
import io
import re

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from maskdm_jax.storage import atomic_path, foreign_kind

Image.init()
# Pillow recognizes these formats, but decodes none of them without another program or handler.
_UNDECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_FORMATS = {*Image.OPEN, "MPO"} - _UNDECODED
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS}
MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs
Image.MAX_IMAGE_PIXELS = None  # `open_image` checks its own limit, which can be set
# A colour profile or text above 1 MiB would make a PNG unreadable; all text of a PNG together may have 64 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
DECODER = f"Pillow {PIL.__version__}"
FILTERS = {name: Image.Resampling[name.upper()] for name in ("bicubic", "bilinear", "lanczos", "box")}


@dataclasses.dataclass(frozen=True)
class Framing:
    """How an image becomes a square of `size` pixels with `channels` channels.

    channels: 3 (RGB) or 1 (grey) for encoded images; any number for arrays with exactly that many.
    crop: `centre` resizes the short side to `size`, then crops the centre, as torchvision's Resize and CenterCrop do.
      `centre:SIDE` (the centred square) and `LEFT,TOP,SIDE`, in pixels, crop first and resize after. `adm` is the crop
      of guided-diffusion, see `_fit_adm`.
    filter: one of `FILTERS`, with antialiasing; `adm` needs bicubic. A crop of the right size is not resampled.
    max_pixels: of an encoded image; larger ones are refused before they are decoded.
    """

    size: int
    channels: int = 3
    crop: str = "centre"
    filter: str = "bicubic"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        if self.size < 1 or self.channels < 1:
            raise ValueError(f"size {self.size} and channels {self.channels} must be at least 1")
        if self.filter not in FILTERS:
            raise ValueError(f"filter {self.filter!r} is unknown; choose from {', '.join(FILTERS)}")
        if self.crop == "adm" and self.filter != "bicubic":
            raise ValueError(f"crop 'adm' resizes by the filter bicubic, not {self.filter}")
        if not re.fullmatch(r"adm|centre(: *[1-9]\d*)?|\d+, *\d+, *[1-9]\d*", self.crop):
            raise ValueError(f"crop {self.crop!r} is not understood; give centre, centre:SIDE, LEFT,TOP,SIDE or adm")

    @classmethod
    def of(cls, settings) -> "Framing":
        """The framing that a `config.Data` asks for."""
        return cls(settings.image_size, settings.channels, max_pixels=settings.max_pixels)

    def square(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """The crop of an image of (width, height), as (left, top, side).

        Raises:
          ValueError: the crop exceeds the image.
        """
        width, height = image_size
        numbers = [int(number) for number in re.findall(r"\d+", self.crop)]
        side = numbers[-1] if numbers else min(image_size)
        left, top = numbers[:2] if len(numbers) == 3 else ((width - side) // 2, (height - side) // 2)
        if min(left, top) < 0 or left + side > width or top + side > height:
            raise ValueError(f"crop {self.crop!r} does not fit into {width} x {height} pixels")
        return left, top, side

    def describe(self) -> dict:
        """The `image` part of a data card: two sets are comparable if theirs are equal."""
        kinds = {1: "grey", 3: "RGB"}
        halved = "box to half sizes, then " if self.crop == "adm" else ""
        converted = f"EXIF rotation applied, transparency on white, converted to {kinds.get(self.channels)}"
        return dict(
            size=self.size,
            channels=self.channels,
            crop=self.crop,
            resize=f"Pillow {halved}{self.filter} with antialiasing, none if the size is right",
            colour=converted if self.channels in kinds else f"{self.channels} channels as stored",
        )


def open_image(image, channels: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open encoded bytes or uint8 [H, W, 1 or 3] as an 8-bit image, RGB (3 channels) or grey (1), in its own size.

    EXIF rotation is applied and transparency is composited on white.

    Raises:
      ValueError: the bytes are not an image, or one of floating-point or 32-bit numbers or of more than `max_pixels`;
        or the array has another number of channels than 1 or 3.
    """
    if isinstance(image, np.ndarray):
        _check_channels(image, channels)
        image = to_pil(image)
    else:
        image = _read_file(image, max_pixels)
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PPM", "PNG")):
            raise ValueError("images of floating-point or 32-bit numbers have no agreed range")
        with contextlib.suppress(Exception):  # damaged EXIF, of which Pillow raises many types, counts as none
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        pixels = np.asarray(image)
        clear = pixels == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(clear, 255, pixels >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def _read_file(content: bytes, max_pixels: int) -> Image.Image:
    """The first frame of an image file."""
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # its message names a memory address
        raise ValueError(foreign_kind(content[:64]) or "not an image of a known kind, or damaged") from None
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, more than data.max_pixels {max_pixels}, the limit "
            "against decompression bombs; raise --config.data.max_pixels, or prepare the images with --max_pixels"
        )
    image.load()
    return image


def is_image(content: bytes) -> bool:
    """Whether bytes start like an image file."""
    try:
        Image.open(io.BytesIO(content)).close()
    except Exception:  # decoders raise any type on other content
        return False
    return True


def surprises(image, framing: Framing) -> list[str]:
    """Describe what `decode` does to an image, encoded bytes or an array, that its owner may not expect."""
    found, opened = [], None if isinstance(image, np.ndarray) else Image.open(io.BytesIO(image))
    _, _, side = framing.square(opened.size if opened else image.shape[1::-1])
    if side < framing.size:
        found.append(f"smaller than {framing.size} x {framing.size} pixels, so they are enlarged")
    # The further frames of a photo in MPO format and of a PSD are previews and layers.
    if opened and opened.format not in ("MPO", "PSD") and getattr(opened, "is_animated", False):
        found.append("animated or of several pages, so the first alone is used")
    return found


def decode(image, framing: Framing) -> np.ndarray:
    """Encoded bytes or uint8 [H, W, C] -> uint8 [size, size, channels].

    For 1 or 3 channels the image is converted as in `open_image`. For other numbers it must be an array with exactly
    that many channels, each of which is cropped and resized.

    Raises:
      ValueError: the bytes are not an image, it has more than `framing.max_pixels` or another number of channels, or
        the crop exceeds it.
    """
    if framing.channels in (1, 3):
        fitted = np.asarray(_fit(open_image(image, framing.channels, framing.max_pixels), framing))
        return fitted.reshape(framing.size, framing.size, framing.channels)
    _check_channels(image, framing.channels)
    return np.stack([_fit(Image.fromarray(plane), framing) for plane in np.moveaxis(image, -1, 0)], axis=-1)


def _check_channels(image, channels: int) -> None:
    """Raise ValueError for an array that neither has `channels` channels nor converts, or for bytes."""
    if isinstance(image, np.ndarray):
        found = image.shape[-1]
        if found == channels or {found, channels} == {1, 3}:
            return
        kind, works = "an array", found
    else:
        found = len(Image.open(io.BytesIO(image)).getbands())
        kind, works = "an encoded image", "3 (RGB) or 1 (grey)"
    raise ValueError(f"it is {kind} of {found} channels, not an array of {channels}; set data.channels to {works}")


def _fit(image: Image.Image, framing: Framing) -> Image.Image:
    """Crop and resize."""
    if framing.crop == "adm":
        return _fit_adm(image, framing.size, framing.max_pixels)
    size, (left, top, side) = framing.size, framing.square(image.size)
    box = (left, top, left + side, top + side)
    if framing.crop != "centre" or side == size:
        image, box = image.crop(box), None
    if image.size != (size, size):
        # With a box Pillow computes the centre alone: a very long image, enlarged whole, would not fit into memory.
        image = image.resize((size, size), FILTERS[framing.filter], box=box)
    return image


def _fit_adm(image: Image.Image, size: int, max_pixels: int) -> Image.Image:
    """`center_crop_arr` of guided-diffusion (Dhariwal and Nichol 2021), which ImageNet results are reported with.

    The image is halved while its short side is at least twice `size`, then the short side is resized to `size`, then
    the centre is cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > max(max_pixels, size * size):
        raise ValueError(f"it would be enlarged to {width} x {height} pixels, more than data.max_pixels {max_pixels}")
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] -> RGB image for 3 channels, else a grey image of the first channel."""
    return Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])


def save_png(path, image: Image.Image) -> None:
    """Write a PNG file whole or not at all; its folder is created."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def sample_grid(images: np.ndarray, columns: int, row_names=None) -> Image.Image:
    """Arrange uint8 images [n, S, S, C] row by row; images below 64 pixels are enlarged to at least that.

    row_names: text to the left of each row, such as class names.
    """
    n, size = images.shape[:2]
    rows, scale, gap = -(-n // columns), -(-64 // size), 4
    cell = size * scale + gap
    font = ImageFont.load_default(size=18)
    margin = 0
    if row_names:
        row_names = [name.encode("utf-8", "replace").decode() for name in row_names]  # file names need not be UTF-8
        row_names = [name if len(name) <= 20 else name[:19] + "…" for name in row_names]
        margin = int(max(font.getlength(name) for name in row_names)) + 16
    page = Image.new("RGB", (margin + columns * cell + gap, rows * cell + gap), "white")
    draw = ImageDraw.Draw(page)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        # Bicubic enlargement: large square pixels hide the shapes of an 8 x 8 image.
        tile = to_pil(image).resize((size * scale, size * scale), Image.Resampling.BICUBIC)
        page.paste(tile, (margin + gap + column * cell, gap + row * cell))
    for row, name in enumerate((row_names or [])[:rows]):
        draw.text((margin - 8, gap + row * cell + cell // 2), name, fill="black", font=font, anchor="rm")
    return page
