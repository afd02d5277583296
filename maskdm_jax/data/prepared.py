"""The format of prepared sets: images of one size in ArrayRecord files, with a data card. `prepare` writes them.

    DIR/card.json                              written last: a folder without it is unfinished
    DIR/images-00000-of-00012.arrayrecord      records, each an image with its label and its name
    DIR/labels.npy                             int32, the label of each image, if there are classes

A record is `<i` label (-1 without), `<H` length of the name, the name in UTF-8, and the encoded image.
"""

import contextlib
import hashlib
import json
import pathlib
import struct

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from maskdm_jax.data.base import CARD, WITHOUT_LABELS, LazySequence, Source
from maskdm_jax.errors import DataError, prefixed
from maskdm_jax.storage import atomic_path, cache_dir, write_atomically

FORMAT = "maskdm-jax prepared images, version 1"
LABELS = "labels.npy"
_HEAD = struct.Struct("<iH")


def shard_name(i: int, shards: int) -> str:
    """File name of shard i."""
    return f"images-{i:05d}-of-{shards:05d}.arrayrecord"


def encode_record(name: str, label: int, image: bytes) -> bytes:
    """A record; see the module."""
    encoded = name.encode("utf-8", "surrogateescape")[:65535]
    return _HEAD.pack(label, len(encoded)) + encoded + image


def decode_record(record: bytes) -> tuple[str, int, bytes]:
    """(name, label, encoded image) of a record."""
    label, length = _HEAD.unpack_from(record)
    start = _HEAD.size
    name = record[start : start + length].decode("utf-8", "surrogateescape")
    return name, label, record[start + length :]


def image_digest(label: int, pixels: np.ndarray) -> bytes:
    """SHA-256 of label, shape and uint8 pixels: of the image as it will be seen, whatever its encoding."""
    head = np.asarray([label, *pixels.shape], "<i4").tobytes()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).digest()


def shard_hash(path) -> str | None:
    """SHA-256 of a shard's records, one after the other; None if they cannot be read."""
    digest = hashlib.sha256()
    with (
        contextlib.suppress(RuntimeError, OSError),
        contextlib.closing(ArrayRecordReader(str(path), "readahead_buffer_size:0")) as reader,
    ):
        count = reader.num_records()
        for start in range(0, count, 64):  # read_all would hold the whole shard in memory
            for record in reader.read(start, min(start + 64, count)):
                digest.update(record)
        return digest.hexdigest()
    return None


def fetch(store, root: str) -> pathlib.Path:
    """Copy the files of a prepared set that are not in the cache from an object store, and verify them.

    store, root: fsspec file system and the path of the set in it.

    Raises:
      DataError: a shard arrived damaged.
    """
    text = store.cat_file(f"{root}/{CARD}")
    card = _parse_card(text, root)
    target = cache_dir("sets") / hashlib.sha256(text).hexdigest()
    target.mkdir(parents=True, exist_ok=True)
    hashes = {shard_name(i, card["shards"]): expected for i, expected in enumerate(card["shard_hashes"])}
    hashes |= {LABELS: None} if card["classes"] else {}
    for name, expected in hashes.items():
        if not (target / name).exists():
            with atomic_path(target / name) as temporary:
                store.get_file(f"{root}/{name}", str(temporary))
                if expected and shard_hash(temporary) != expected:
                    raise DataError(f"{root}/{name} is not what its card says; copy the set there again")
    if not (target / CARD).exists():
        write_atomically(target / CARD, text)
    return target


def read_card(path) -> dict:
    """The data card of a prepared set.

    Raises:
      DataError: there is none, or it is damaged.
      OSError: it cannot be read.
    """
    try:
        return _parse_card((pathlib.Path(path) / CARD).read_bytes(), path)
    except FileNotFoundError:
        raise DataError(
            f"{path} has no {CARD}: it is not a prepared set, or its preparation was not finished"
        ) from None


def _parse_card(text: bytes, path) -> dict:
    causes = (ValueError, LookupError, TypeError, RecursionError)
    with prefixed(DataError, f"{path}/{CARD} is damaged or of another kind (", causes, "); prepare the set again"):
        card = json.loads(text)
        if card["format"] != FORMAT:
            raise ValueError(f"its format is {card['format']!r}, not {FORMAT!r}")
    return card


class PreparedImages(Source):
    """A prepared set. Its classes are those of its card."""

    def __init__(self, path, labels: bool = False):
        """Open all shards and compare their number of records with the card.

        Raises:
          DataError: a shard is missing or damaged, or labels are wanted of a set without them.
        """
        self.card = read_card(path)
        classes, count, shards = self.card["classes"], self.card["count"], self.card["shards"]
        if labels and not classes:
            raise DataError(f"{path} was prepared without labels; prepare it with --labels, or {WITHOUT_LABELS}")
        from grain.sources import ArrayRecordDataSource  # most of a second to import, with JAX

        paths = [pathlib.Path(path) / shard_name(i, shards) for i in range(shards)]
        lost = [p.name for p in paths if not p.is_file()]
        if lost:
            raise DataError(f"{path} lacks {', '.join(lost[:3])}; copy the set again")
        causes = (RuntimeError, ValueError, OSError)
        with prefixed(DataError, f"{path} has a damaged shard (", causes, "); copy or prepare it again"):
            self._records = ArrayRecordDataSource([str(p) for p in paths])
            found = len(self._records)
        if found != count:
            raise DataError(f"{path} has {found} images, its card says {count}; copy or prepare it again")
        names, classes = LazySequence(count, self._name), classes if labels else []
        numbers = _read_labels(pathlib.Path(path) / LABELS, count, len(classes)) if labels else []
        super().__init__(names, numbers, classes, self.card["content_hash"])

    def _name(self, i: int) -> str:
        try:
            return decode_record(self._records[i])[0]
        except (RuntimeError, OSError, struct.error):  # the name of a damaged record is wanted for messages
            return f"image {i}"

    def read(self, i: int):
        """Encoded bytes and label, 0 without labels."""
        _, label, image = decode_record(self._records[i])
        if not self.classes:
            return image, 0
        if label != self.labels[i]:
            raise DataError(f"its label is {label}, but {LABELS} says {self.labels[i]}; copy the set again")
        return image, label


def _read_labels(path: pathlib.Path, count: int, classes: int) -> np.ndarray:
    causes, hint = Exception, "); copy or prepare the set again"  # np.load raises many types
    with prefixed(DataError, f"{path} is missing or damaged (", causes, hint), open(path, "rb") as file:
        labels = np.load(file, allow_pickle=False)
        if labels.dtype != np.int32 or labels.shape != (count,):
            raise ValueError(f"it holds {labels.dtype} {labels.shape}, not a label for each of {count} images")
        if not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"labels {labels.min()} to {labels.max()} are not {classes} classes")
    return labels
