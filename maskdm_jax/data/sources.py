"""Where images are: prepared sets, folders, archives, shards, databases, object stores."""

import importlib.resources
import logging
import pathlib
import time

import numpy as np

from maskdm_jax.data import databases, files, parquet, prepared, shards, tars
from maskdm_jax.data.base import CARD, LazySequence, RowNames, Source, hash_texts
from maskdm_jax.data.images import Framing
from maskdm_jax.errors import DataError, first_line, prefixed
from maskdm_jax.storage import foreign_kind, is_remote

_PAUSES = (0.1, 1.0, 5.0)  # seconds before a failed read is tried again

log = logging.getLogger(__name__)


class Digits(Source):
    """The embedded set: 1,797 handwritten digits, 8 x 8 grey, ten classes (UCI, CC BY 4.0)."""

    def __init__(self, labels: bool = False):
        with importlib.resources.files("maskdm_jax.data").joinpath("digits.npz").open("rb") as file:
            stored = dict(np.load(file))
        self._images = stored["images"]
        names = RowNames(["digits"], [len(self._images)])
        numbers, classes = (stored["labels"].tolist(), map(str, range(10))) if labels else ([], [])
        super().__init__(names, numbers, classes, hash_texts(names))

    def image(self, i: int):
        """uint8 [8, 8, 1]."""
        return self._images[i]


class Selection(Source):
    """Some images of a source, by number, with the labels renumbered along `classes`."""

    def __init__(self, source, numbers, classes=()):
        self._source, self._numbers = source, np.asarray(numbers)
        old = {name: i for i, name in enumerate(source.classes)}
        new = {old[name]: i for i, name in enumerate(classes)}
        labels = [new.get(source.labels[i], -1) for i in self._numbers] if new else []  # -1: it has none
        files_hash = hash_texts([source.files_hash, *map(str, self._numbers)]) if source.files_hash else ""
        names = LazySequence(len(self._numbers), self._name)
        super().__init__(names, labels, classes, files_hash, source.left_aside)
        self.notes = source.notes
        if source.card:  # it holds for the selected images too, except for the content hash
            self.card = source.card | dict(source=f"part of {source.card['source']}", count=len(self), content_hash="")

    def _name(self, i: int) -> str:
        return self._source.names[int(self._numbers[i])]

    def image(self, i: int):
        """Image i as the source stores it."""
        return self._source.read(int(self._numbers[i]))[0]


def open_source(path: str, labels: bool = False, split: str = "") -> Source:
    """Open what a path names: `digits`, a prepared set, a TFDS data folder, a folder, .zip or .tar of images, an LMDB.

    Parquet files and shards of a WebDataset are given by their folder or a pattern; see `shards.find_shards`. Paths
    with a scheme (gs://, s3://, ...) are read through fsspec; a prepared set there is copied to a local cache.

    Args:
      path: as above; `~` is the home folder.
      labels: whether to read class labels.
      split: of a TFDS data folder, Parquet files or shards, `train` when empty; other sources have none.

    Raises:
      DataError: nothing is there, it is of another kind, it holds no image, or it has no labels.
    """
    with prefixed(DataError, f"{path!r} cannot be opened: ", RuntimeError):  # of an unknown user
        place = pathlib.Path(path).expanduser()
    if path == "digits":
        source = Digits(labels)
    elif is_remote(path):
        missing = prefixed(DataError, f"{path} cannot be opened, a file is missing: ", FileNotFoundError)
        with prefixed(DataError, f"{path} cannot be opened: ", Exception), missing:  # each store has types of its own
            source = _open_shards(path, labels, split) or _open_remote(path, labels)
    elif (place / "dataset_info.json").exists() and not (place / CARD).exists() and not any(place.glob("*.parquet")):
        source = databases.TfdsImages(place, labels, split)
    else:
        source = _open_shards(path, labels, split) or _open_local(place, labels)
    if split and not isinstance(source, databases.TfdsImages | parquet.ParquetImages | tars.TarImages):
        raise DataError(f"{path!r} has no splits; leave out split={split!r}")
    return source


def _open_shards(path: str, labels: bool, split: str) -> Source | None:
    """The images of the Parquet or tar files that a path means, at least one; None if it means no such files."""
    found = shards.find_shards(path)
    if not found:
        return None
    kind = parquet.ParquetImages if found[0].lower().endswith(".parquet") else tars.TarImages
    return kind(path, shards.of_split(path, found, split), labels)


def _open_remote(path: str, labels: bool) -> Source:
    if path.lower().endswith(".zip"):
        return files.ZipImages(path, labels)
    store, root = files.connect(path)
    if store.exists(f"{root}/{CARD}"):
        return prepared.PreparedImages(prepared.fetch(store, root), labels)
    return files.RemoteFolder(path, labels)


def _open_local(place: pathlib.Path, labels: bool) -> Source:
    if (place / CARD).exists():
        return prepared.PreparedImages(place, labels)
    if next(place.glob("images-*-of-*.arrayrecord"), None):
        raise DataError(
            f"{place} holds a part of a prepared set, without its {CARD}: give launch/prepare_data.py the same command "
            "again to finish it, or copy it again"
        )
    if (place / "data.mdb").exists():
        return databases.LmdbImages(place, labels)
    if place.is_dir():
        return files.ImageFolder(place, labels)
    if not place.exists():
        raise DataError(f"'{place}' does not exist; give a folder or .zip of images, a prepared set, or 'digits'")
    if place.is_file():
        with place.open("rb") as file:
            if kind := foreign_kind(file.read(64)):
                raise DataError(f"{place} is {kind}")
        if place.suffix.lower() == ".zip":
            return files.ZipImages(place, labels)
    raise DataError(f"'{place}' is neither a folder nor a .zip or .tar of images")


def select(source, classes=(), fraction: float = 1.0, seed: int = 0, labels: bool = True, rest: bool = False):
    """Select the images of some classes, or a fixed random fraction of the images, or both.

    Args:
      classes: names, which are numbered in this order; () for all.
      fraction: in (0, 1], of the images of those classes; at least one image remains. A seed always selects the same
        images, and those of a smaller fraction are among those of a larger one.
      labels: whether the result has labels; False drops them after the classes were selected.
      rest: return the images of those classes that are left out instead, in a random order that the seed fixes.

    Raises:
      DataError: a class is unknown, the source was opened without labels, or `rest` is empty.
    """
    numbers = np.arange(len(source))
    if classes:
        unknown = [name for name in classes if name not in source.classes]
        if unknown:
            known = ", ".join(source.classes[:20]) + (", ..." if len(source.classes) > 20 else "")
            raise DataError(f"classes {unknown} are not in the data; it has {known or 'no labels'}")
        wanted = [source.classes.index(name) for name in classes]
        numbers = np.flatnonzero(np.isin(np.asarray(source.labels), wanted))
        if not len(numbers):
            raise DataError(f"no image has one of the classes {', '.join(classes)}")
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
    """What is known of a source's images after a framing; runs and samples carry it, and evaluation compares it.

    Returns:
      `image`, how the images were made (see `Framing.describe`), `count`, `files_hash`, `labels_hash` and `left_aside`
      (see `Source`); for a prepared set also `source`, `split` and, if the framing does not change its images,
      `content_hash`.
    """
    image, prepared = framing.describe(), source.card
    known = dict(image=image, count=len(source), files_hash=source.files_hash, left_aside=source.left_aside)
    known |= dict(labels_hash=source.labels_hash())
    if prepared is None:
        return known
    before = prepared["image"]
    known |= dict(source=prepared["source"], split=prepared["split"])
    if (before["size"], before["channels"]) == (framing.size, framing.channels):
        return known | dict(image=before, content_hash=prepared["content_hash"])
    return known | dict(image=image | dict(crop=f"{before['crop']} at {before['size']}, then {image['crop']}"))


def read_patiently(source, i: int):
    """`source.read(i)`, repeated a few times after errors of the disk or network, which are often temporary.

    Raises:
      DataError: the label is none of the source's classes, such as -1 for an image without a label.
    """
    for pause in (*_PAUSES, None):
        try:
            image, label = source.read(i)
            break
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError as error:
            if pause is None:
                raise
            if pause >= 1:
                log.warning("%s: %s; trying again in %g s", source.names[i], first_line(error), pause)
            time.sleep(pause)
    if source.classes and not 0 <= label < len(source.classes):
        raise DataError(f"its label {label} is none of {len(source.classes)} classes")
    return image, label
