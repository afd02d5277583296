"""Where images are: prepared sets, folders, archives, databases, object stores. Random access, safe to pickle.

A source has `names` (one per image), `classes` (names, or [] without labels), `labels` (numbers of classes, one per
image, or [] without), `len()`, `read(i)` -> (image, label): the image as it is stored, encoded bytes or a uint8 array
[H, W, C], and 0 for the label without labels; and `stamp(i)`: text that changes if the image does, cheaply had.
"""

import collections.abc
import importlib.resources
import io
import os
import pathlib
import time

import numpy as np

from maskdm_jax.data.databases import LmdbImages, TfdsImages
from maskdm_jax.data.files import ImageFolder, RemoteFolder, TarImages, ZipImages, connect, is_tar
from maskdm_jax.data.images import Framing
from maskdm_jax.data.prepared import CARD, PreparedImages, fetch
from maskdm_jax.errors import DataError

_PAUSES = (0.1, 1.0, 5.0)  # seconds before a failed read is tried again


class Digits:
    """The embedded set: 1,797 handwritten digits, 8 x 8 grey, ten classes (UCI, CC BY 4.0)."""

    def __init__(self, labels: bool = False):
        with importlib.resources.files("maskdm_jax.data").joinpath("digits.npz").open("rb") as file:
            stored = np.load(io.BytesIO(file.read()))
        self._images, self._labels = stored["images"], stored["labels"].tolist()
        self.names = [f"digits[{i}]" for i in range(len(self._images))]
        self.classes = [str(digit) for digit in range(10)] if labels else []
        self.labels = self._labels if labels else []

    def __len__(self):
        return len(self.names)

    def read(self, i: int):
        """Image (uint8 [8, 8, 1]) and label."""
        return self._images[i], self._labels[i]

    def stamp(self, i: int) -> str:
        """Nothing: they never change."""
        return ""


class Selection:
    """Some images of a source, by number; labels count along `classes`, a part of the source's."""

    def __init__(self, source, numbers, classes: list[str]):
        self._source, self._numbers, self.classes = source, np.asarray(numbers), list(classes)
        new = {source.classes.index(name): i for i, name in enumerate(self.classes)}
        self.labels = [new[source.labels[i]] for i in self._numbers] if self.classes else []
        self.names = _Picked(source.names, self._numbers)
        if hasattr(source, "card"):  # of the images chosen, all but their identity holds
            self.card = source.card | dict(source=f"part of {source.card['source']}", count=len(self), content_hash="")

    def __len__(self):
        return len(self._numbers)

    def read(self, i: int):
        """Image and label."""
        return self._source.read(int(self._numbers[i]))[0], self.labels[i] if self.labels else 0

    def stamp(self, i: int) -> str:
        """That of the image in the source."""
        return self._source.stamp(int(self._numbers[i]))


class _Picked(collections.abc.Sequence):
    """Elements of a sequence by number, looked up when they are asked for."""

    def __init__(self, sequence, numbers):
        self._sequence, self._numbers = sequence, numbers

    def __len__(self):
        return len(self._numbers)

    def __getitem__(self, i):
        return self._sequence[int(self._numbers[i])]


def open_source(path: str, labels: bool = False, split: str = "", scratch=None):
    """Open what a path names: `digits`, a prepared set, a TFDS data folder, a folder, .zip or .tar of images, an LMDB.

    Paths with a scheme (gs://, s3://, ...) are read through fsspec; a prepared set there is copied to a local cache.

    Args:
      path: as above; `~` is the home folder.
      labels: whether classes are wanted.
      split: of a TFDS data folder, `train` when empty; other sources have none.
      scratch: path of a file to decompress a compressed tar into; without, such a file is an error.

    Raises:
      DataError: nothing is there, it is of another kind, it holds no image, or labels are asked of a flat set.
    """

    def without_split(source):
        if split:
            raise DataError(f"{path!r} has no splits; leave split empty, it is {split!r}")
        return source

    if path == "digits":
        return without_split(Digits(labels))
    if "://" in path:
        if path.lower().endswith(".zip"):
            return without_split(ZipImages(path, labels))
        files, root = connect(path)
        if files.exists(f"{root}/{CARD}"):
            return without_split(PreparedImages(fetch(files, root), labels))
        return without_split(RemoteFolder(path, labels))
    place = pathlib.Path(os.path.expanduser(path))
    if (place / CARD).exists():
        return without_split(PreparedImages(place, labels))
    if (place / "dataset_info.json").exists():
        return TfdsImages(place, labels, split)
    if (place / "data.mdb").exists():
        return without_split(LmdbImages(place, labels))
    if place.is_dir():
        return without_split(ImageFolder(place, labels))
    if place.is_file() and place.suffix.lower() == ".zip":
        return without_split(ZipImages(place, labels))
    if place.is_file() and is_tar(place):
        return without_split(TarImages(place, labels, scratch))
    if place.exists():
        raise DataError(f"{path!r} is neither a folder nor a .zip or .tar of images")
    raise DataError(f"{path!r} does not exist; give a folder or .zip of images, a prepared set, or 'digits'")


def select(source, classes=(), fraction: float = 1.0, seed: int = 0, labels: bool = True, rest: bool = False):
    """The images of some classes, or a fixed random share of the images, or both.

    classes: names; all when empty. They are numbered in this order.
    fraction: in (0, 1], of the images of those classes, at least one. The same seed always gives the same images,
      and those of a smaller fraction are among those of a larger one.
    labels: whether the result has any; False leaves them out after choosing by them.
    rest: give the images of those classes that this leaves out instead, in a random order that the seed fixes.

    Raises:
      DataError: a class is unknown, the source was opened without labels, or there is no rest.
    """
    numbers = np.arange(len(source))
    if classes:
        unknown = [name for name in classes if name not in source.classes]
        if unknown:
            known = ", ".join(source.classes[:20]) + (", ..." if len(source.classes) > 20 else "")
            raise DataError(f"classes {unknown} are not in the data; it has {known or 'no labels'}")
        wanted = [source.classes.index(name) for name in classes]
        numbers = np.flatnonzero(np.isin(np.asarray(source.labels), wanted))
    if fraction < 1 or rest:
        keep = max(1, round(fraction * len(numbers)))
        drawn = numbers[np.random.RandomState(seed).permutation(len(numbers))]
        numbers = drawn[keep:] if rest else np.sort(drawn[:keep])
        if not len(numbers):
            raise DataError(f"a fraction of {fraction} leaves none of {len(drawn)} images out")
    if len(numbers) == len(source) and not classes:
        return source
    return Selection(source, numbers, (classes or source.classes) if labels else ())


def card_of(source, framing: Framing) -> dict:
    """What is known of images of a source as they come out of a framing, for runs and comparisons.

    `image` says how they were made (see `Framing.describe`); of a whole prepared set also `source`, `split`, `count`
    and, if the framing changes nothing, `content_hash`.
    """
    prepared, image = getattr(source, "card", None), framing.describe()
    if prepared is None:
        return dict(image=image)
    known = {key: prepared[key] for key in ("source", "split", "count")}
    if (prepared["image"]["size"], prepared["image"]["channels"]) == (framing.size, framing.channels):
        return known | dict(image=prepared["image"], content_hash=prepared["content_hash"])
    before = prepared["image"]
    return known | dict(image=image | dict(crop=f"{before['crop']} at {before['size']}, then {image['crop']}"))


def read_patiently(source, i: int):
    """`source.read(i)`, tried again a few times after an error of the disk or network, which are often busy."""
    for pause in _PAUSES:
        try:
            return source.read(i)
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError:
            time.sleep(pause)
    return source.read(i)
