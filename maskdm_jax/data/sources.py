"""Where images are: prepared sets, folders, zip files, the embedded set. Random access, safe to pickle into workers.

A source has `names` (one per image), `classes` (names, or [] without labels), `len()` and `read(i)` ->
(image, label): the image as it is stored, encoded bytes or a uint8 array [H, W, C].
"""

import importlib.resources
import io
import itertools
import os
import pathlib
import zipfile

import numpy as np

from maskdm_jax.data import DataError
from maskdm_jax.data.prepared import CARD, PreparedImages

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class Digits:
    """The embedded set: 1,797 handwritten digits, 8 x 8 grey, ten classes (UCI, CC BY 4.0)."""

    def __init__(self, labels: bool = False):
        with importlib.resources.files("maskdm_jax.data").joinpath("digits.npz").open("rb") as file:
            stored = np.load(io.BytesIO(file.read()))
        self._images, self._labels = stored["images"], stored["labels"]
        self.names = [f"digits[{i}]" for i in range(len(self._images))]
        self.classes = [str(digit) for digit in range(10)] if labels else []

    def __len__(self):
        return len(self.names)

    def read(self, i: int):
        """Image (uint8 [8, 8, 1]) and label."""
        return self._images[i], int(self._labels[i])


class ImageFolder:
    """All images under a folder, nested or flat."""

    def __init__(self, path, labels: bool = False):
        self._root = pathlib.Path(path)
        self.names, self._labels, self.classes = _index(path, list(_walk(str(self._root), "", set())), labels)

    def __len__(self):
        return len(self.names)

    def read(self, i: int):
        """Encoded bytes and label."""
        return (self._root / self.names[i]).read_bytes(), self._labels[i]


def _walk(folder: str, prefix: str, seen: set):
    """Names of the regular files under a folder; links are followed, but no folder is entered twice."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", seen)
            elif entry.is_file():  # a pipe would block whoever reads it
                yield prefix + entry.name


class ZipImages:
    """All images in a zip file, nested or flat, read without unpacking it."""

    def __init__(self, path, labels: bool = False):
        self._path = pathlib.Path(path)
        self._archive = None
        try:
            entries = [info for info in self._open().infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f"{path} is not a readable zip file ({error}); give a .zip or a folder of images") from None
        locked = [info.filename for info in entries if info.flag_bits & 1]
        if locked:
            raise DataError(f"{path} is encrypted ({locked[0]!r} needs a password); unpack it and give the folder")
        found = [info.filename for info in entries]
        self.names, self._labels, self.classes = _index(path, found, labels)

    def __len__(self):
        return len(self.names)

    def read(self, i: int):
        """Encoded bytes and label."""
        return self._open().read(self.names[i]), self._labels[i]

    def _open(self):
        if self._archive is None:  # opened once per process; ZipFile locks its own reads among threads
            self._archive = zipfile.ZipFile(self._path)
        return self._archive

    def __getstate__(self):
        return self.__dict__ | {"_archive": None}


def open_source(path: str, labels: bool = False):
    """Open `digits`, a prepared set, a folder or a .zip.

    Raises:
      DataError: nothing is there, it is of another kind, it holds no image, or labels are asked of a flat set.
    """
    if path == "digits":
        return Digits(labels)
    place = pathlib.Path(os.path.expanduser(path))
    if (place / CARD).exists():
        return PreparedImages(place, labels)
    if place.is_dir():
        return ImageFolder(place, labels)
    if place.is_file() and place.suffix.lower() == ".zip":
        return ZipImages(place, labels)
    if place.exists():
        raise DataError(f"{path!r} is neither a folder nor a .zip of images")
    raise DataError(f"{path!r} does not exist; give a folder or .zip of images, a prepared set, or 'digits'")


def _index(path, found: list[str], labels: bool):
    """Sorted image names, the label of each, and the class names."""
    names = sorted(
        name
        for name in found
        if pathlib.PurePosixPath(name).suffix.lower() in SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in pathlib.PurePosixPath(name).parts if part != "..")
    )
    if not names:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(f"{path} holds no images; looked through {len(found)} files for {kinds}")
    if not labels:
        return names, [0] * len(names), []
    # A wrapping folder that all images share is not a class: the first level that differs is.
    folders = [pathlib.PurePosixPath(name).parts[:-1] for name in names]
    shared = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False)))
    if len(set(folders)) == 1 and folders[0]:
        raise DataError(
            f"{path} has only one class folder, {'/'.join(folders[0])!r}; labels need two, or set "
            "--config.data.labels=False --config.model.num_classes=0"
        )
    if any(len(parts) <= shared for parts in folders):
        stray = next(name for name, parts in zip(names, folders, strict=True) if len(parts) <= shared)
        raise DataError(
            f"{path} has no class folder for {stray!r}; put every image into a folder per class, at least two of them, "
            "or set --config.data.labels=False --config.model.num_classes=0"
        )
    classes = sorted({parts[shared] for parts in folders})
    number = {name: i for i, name in enumerate(classes)}
    return names, [number[parts[shared]] for parts in folders], classes
