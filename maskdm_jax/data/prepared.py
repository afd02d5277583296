"""Prepared sets: images of one size in ArrayRecord files, with a data card. What they are; `prepare` makes them.

    DIR/card.json                              written last: a folder without it is unfinished
    DIR/images-00000-of-00012.arrayrecord      records, each an image with its label and its name
    DIR/labels.npy                             int32, the label of each image, if there are classes

A record is `<i` label (-1 without), `<H` length of the name, the name in UTF-8, and the encoded image.
"""

import collections.abc
import contextlib
import hashlib
import json
import pathlib
import re
import struct

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from grain.sources import ArrayRecordDataSource

from maskdm_jax.data import WITHOUT_LABELS
from maskdm_jax.errors import DataError
from maskdm_jax.storage import atomic_path, cache_dir

CARD = "card.json"
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
    """SHA-256 of an image as it will be seen: label, shape and uint8 pixels, whatever the encoding."""
    head = np.asarray([label, *pixels.shape], "<i4").tobytes()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).digest()


def shard_hash(path) -> str:
    """SHA-256 of a shard's records, one after the other.

    Raises:
      RuntimeError, OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    try:
        count = reader.num_records()
        for start in range(0, count, 64):  # bounded in memory, unlike read_all
            for record in reader.read(start, min(start + 64, count)):
                digest.update(record)
    finally:
        reader.close()
    return digest.hexdigest()


def fetch(files, root: str) -> pathlib.Path:
    """Copy a prepared set from an object store to the cache, unless it is there, and verify it.

    files, root: fsspec file system and path of the set.

    Raises:
      DataError: a shard arrived damaged.
    """
    card = _parse_card(files.cat_file(f"{root}/{CARD}"), root)
    target = cache_dir("sets") / card["content_hash"]
    if (target / CARD).exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    for i, expected in enumerate(card["shard_hashes"]):
        path = target / shard_name(i, card["shards"])
        if path.exists():
            continue
        with atomic_path(path) as temporary:
            files.get_file(f"{root}/{path.name}", str(temporary))
            found = None
            with contextlib.suppress(RuntimeError):
                found = shard_hash(temporary)
            if found != expected:
                raise DataError(f"{root}/{path.name} is not what its card says; copy the set there again")
    for name in ([LABELS] if card["classes"] else []) + [CARD]:
        with atomic_path(target / name) as temporary:
            files.get_file(f"{root}/{name}", str(temporary))
    return target


def read_card(path) -> dict:
    """The data card of a prepared set.

    Raises:
      DataError: there is none, or it is damaged.
    """
    try:
        text = (pathlib.Path(path) / CARD).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path} has no {CARD}: it is not a prepared set, or its preparation was not finished"
        ) from None
    except OSError as error:
        raise DataError(f"{path}/{CARD} cannot be read ({error})") from None
    return _parse_card(text, path)


_CARD_TYPES = dict(source=str, names_hash=str, source_stamp=str, split=str, image=dict, count=int, classes=list)
_CARD_TYPES |= dict(left_out=list, shards=int, shard_hashes=list)


def _parse_card(text: bytes, path) -> dict:
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}/{CARD} is damaged ({error}); prepare the set again") from None
    wrong = [key for key, kind in _CARD_TYPES.items() if not isinstance(card, dict) or type(card.get(key)) is not kind]
    # The content hash becomes the name of a folder in the cache.
    if not wrong and not re.fullmatch(r"[0-9a-f]{64}", str(card.get("content_hash"))):
        wrong = ["content_hash"]
    if not wrong and len(card["shard_hashes"]) != card["shards"]:
        wrong = ["shards"]
    if not wrong and not _is_framing(card["image"]):
        wrong = ["image"]
    if wrong:
        raise DataError(f"{path}/{CARD} lacks or garbles {', '.join(wrong)}; prepare the set again")
    return card


def _is_framing(image: dict) -> bool:
    """Whether it has what `Framing.describe` gives."""
    kinds = dict(size=int, channels=int, crop=str, resize=str, colour=str)
    good = all(type(image.get(key)) is kind for key, kind in kinds.items())
    return good and image["size"] > 0 and image["channels"] in (1, 3)


class PreparedImages:
    """A prepared set as a source; see `sources`. Labels are those of the card's classes."""

    def __init__(self, path, labels: bool = False):
        """Opens all shards and compares their number of records with the card.

        Raises:
          DataError: a shard is missing or damaged, or labels are asked of a set without them.
        """
        self.card = read_card(path)
        if labels and not self.card["classes"]:
            raise DataError(f"{path} was prepared without labels; prepare it with --labels, or {WITHOUT_LABELS}")
        self.classes = list(self.card["classes"]) if labels else []
        shards = self.card["shards"]
        paths = [pathlib.Path(path) / shard_name(i, shards) for i in range(shards)]
        lost = [p.name for p in paths if not p.is_file()]
        if lost:
            raise DataError(f"{path} lacks {', '.join(lost[:3])}; copy the set again")
        try:
            self._records = ArrayRecordDataSource([str(p) for p in paths])
            count = len(self._records)
        except (RuntimeError, ValueError, OSError) as error:
            raise DataError(f"{path} has a damaged shard ({str(error)[:200]}); copy or prepare it again") from None
        if count != self.card["count"]:
            raise DataError(f"{path} has {count} images, its card says {self.card['count']}; copy or prepare it again")
        self.names = _Names(self._records)
        self.labels = _read_labels(pathlib.Path(path) / LABELS, count, len(self.classes)) if labels else []

    def __len__(self):
        return self.card["count"]

    def read(self, i: int):
        """Encoded bytes and label (0 when labels were not asked for)."""
        _, label, image = decode_record(self._records[i])
        if not self.classes:
            return image, 0
        if label != self.labels[i]:
            raise DataError(f"its label is {label}, but {LABELS} says {self.labels[i]}; copy the set again")
        return image, label

    def stamp(self, i: int) -> str:
        """The hash of the whole set."""
        return self.card["content_hash"]


def _read_labels(path: pathlib.Path, count: int, classes: int) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            labels = np.load(file, allow_pickle=False)
        if labels.dtype != np.int32 or labels.shape != (count,):
            raise ValueError(f"it holds {labels.dtype} {labels.shape}, not a label for each of {count} images")
        if not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"labels {labels.min()} to {labels.max()} are not {classes} classes")
    except Exception as error:  # whatever a damaged file makes of its reader
        raise DataError(f"{path} is missing or damaged ({error}); copy or prepare the set again") from None
    return labels


class _Names(collections.abc.Sequence):
    """Names, read when they are asked for: a large set's would not be worth their memory."""

    def __init__(self, records):
        self._records = records

    def __len__(self):
        return len(self._records)

    def __getitem__(self, i):
        if not 0 <= i < len(self._records):
            raise IndexError(i)
        return decode_record(self._records[i])[0]
