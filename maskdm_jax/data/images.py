"""From encoded bytes to pixels: colour, rotation, crop and resize."""

import dataclasses
import io
import pathlib
import re

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from maskdm_jax.storage import atomic_path

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


@dataclasses.dataclass(frozen=True)
class Framing:
    """What becomes of an image: its square `crop`, resized to `size`.

    crop: `centre`, all of the short side: resized first, cropped after, as torchvision's Resize and CenterCrop do.
      `centre:N`, the centred N x N pixels, or `LEFT,TOP,SIDE` in pixels: cropped first, resized after, so that
      nothing outside counts.
    filter: of `FILTERS`, with antialiasing. Images of the right size pass through untouched.
    """

    size: int
    channels: int = 3  # 3 colour, 1 grey
    crop: str = "centre"
    filter: str = "bicubic"

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size {self.size} must be at least 1")
        if self.channels not in (1, 3):
            raise ValueError(f"channels are {self.channels}; they must be 3 (colour) or 1 (grey)")
        if self.filter not in FILTERS:
            raise ValueError(f"filter {self.filter!r} is unknown; choose from {', '.join(FILTERS)}")
        self._wanted()

    @classmethod
    def of(cls, settings) -> "Framing":
        """The framing that a `config.Data` asks for."""
        return cls(settings.image_size, settings.channels)

    def _wanted(self) -> tuple[int, int, int] | int:
        """(left, top, side), or the side of a crop in the middle; 0 for all of the short side."""
        match = re.fullmatch(r"centre(?::([1-9]\d*))?|(\d+),(\d+),([1-9]\d*)", self.crop.replace(" ", ""))
        if not match:
            raise ValueError(f"crop {self.crop!r} is not understood; give centre, centre:SIDE or LEFT,TOP,SIDE")
        middle, *corner_and_side = match.groups()
        return int(middle or 0) if corner_and_side[0] is None else tuple(map(int, corner_and_side))

    def box(self, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The crop of an image of (width, height), as (left, top, right, bottom).

        Raises:
          ValueError: the crop reaches beyond the image.
        """
        width, height = image_size
        wanted = self._wanted()
        if isinstance(wanted, int):
            side = wanted or min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
        else:
            left, top, side = wanted
        if min(left, top) < 0 or left + side > width or top + side > height:
            raise ValueError(f"crop {self.crop!r} does not fit into {width} x {height} pixels")
        return left, top, left + side, top + side

    def describe(self) -> dict:
        """For data cards: what must be equal for two sets to be comparable."""
        return dict(
            size=self.size,
            channels=self.channels,
            crop=self.crop,
            resize=f"Pillow {self.filter} with antialiasing, none if the size is right",
            colour="EXIF rotation applied, transparency on white, converted to " + ("RGB", "grey")[self.channels == 1],
        )


DECODER = f"Pillow {PIL.__version__}"


def open_image(image, channels: int) -> Image.Image:
    """Encoded bytes or uint8 [H, W, C] -> 8-bit image in colour (3 channels) or grey (1), in its own size.

    Rotated as EXIF says, transparency laid on white.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    else:
        try:
            opened = Image.open(io.BytesIO(image))
        except UnidentifiedImageError:  # Pillow would name the memory that it was read from
            raise ValueError("not an image of a known kind") from None
        image = ImageOps.exif_transpose(opened)
        if image.mode == "F" or (image.mode == "I" and opened.format not in ("PPM", "PNG")):
            raise ValueError("images of floating-point or 32-bit numbers have no agreed range")
    if image.mode.startswith("I"):  # 16 bit grey; convert() would clip at 255
        pixels = np.asarray(image)
        clear = pixels == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(clear, 255, pixels >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def is_image(content: bytes) -> bool:
    """Whether bytes begin as those of an image file do."""
    try:
        Image.open(io.BytesIO(content)).close()
    except Exception:  # whatever a decoder throws at something else
        return False
    return True


def decode(image, framing: Framing) -> np.ndarray:
    """Encoded bytes or uint8 [H, W, C] -> uint8 [size, size, channels], opened as `open_image` does."""
    image, size = open_image(image, framing.channels), framing.size
    box = framing.box(image.size)
    if framing.crop != "centre" or box[2] - box[0] == size:
        image, box = image.crop(box), None
    if image.size != (size, size):
        # With a box, only the middle is computed: all of a very long image, enlarged, would not fit into memory.
        image = image.resize((size, size), FILTERS[framing.filter], box=box)
    return np.asarray(image).reshape(size, size, framing.channels)


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 [H, W, 3 or 1] -> image in colour or grey; of other numbers of channels the first is shown."""
    return Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])


def save_png(path, image: Image.Image) -> None:
    """Write a PNG whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def sample_grid(images: np.ndarray, columns: int, row_names=None) -> Image.Image:
    """Lay out uint8 images [n, S, S, C], row by row; small ones are enlarged to at least 64 pixels.

    row_names: text for the left of each row, such as class names.
    """
    n, size = images.shape[:2]
    rows, scale, gap = -(-n // columns), -(-64 // size), 4
    cell = size * scale + gap
    font = ImageFont.load_default(size=18)
    margin = 0
    if row_names:
        row_names = [name.encode("utf-8", "replace").decode() for name in row_names]  # file names may be no UTF-8
        row_names = [name if len(name) <= 20 else name[:19] + "…" for name in row_names]
        margin = int(max(font.getlength(name) for name in row_names)) + 16
    page = Image.new("RGB", (margin + columns * cell + gap, rows * cell + gap), "white")
    draw = ImageDraw.Draw(page)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        # Smooth enlargement: large square pixels hide the shapes of an 8 x 8 image.
        tile = to_pil(image).resize((size * scale, size * scale), Image.Resampling.BICUBIC)
        page.paste(tile, (margin + gap + column * cell, gap + row * cell))
    for row, name in enumerate((row_names or [])[:rows]):
        draw.text((margin - 8, gap + row * cell + cell // 2), name, fill="black", font=font, anchor="rm")
    return page
