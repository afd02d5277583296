"""Prepared sets: images of one size in ArrayRecord files, with a data card. What they are; `prepare` makes them.

    DIR/card.json                              written last: a folder without it is unfinished
    DIR/images-00000-of-00012.arrayrecord      records, each an image with its label and its name

A record is `<i` label (-1 without), `<H` length of the name, the name in UTF-8, and the encoded image.
"""

import collections.abc
import hashlib
import json
import pathlib
import struct

from grain.sources import ArrayRecordDataSource

from maskdm_jax.data import DataError

CARD = "card.json"
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


def content_hash(shard_hashes: list[str]) -> str:
    """The set's hash, of the SHA-256 of each shard's records in order."""
    return hashlib.sha256("".join(shard_hashes).encode()).hexdigest()


def read_card(path) -> dict:
    """The data card of a prepared set.

    Raises:
      DataError: there is none, or it is damaged.
    """
    try:
        card = json.loads((pathlib.Path(path) / CARD).read_text())
    except FileNotFoundError:
        raise DataError(
            f"{path} has no {CARD}: it is not a prepared set, or its preparation was not finished"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}/{CARD} is damaged ({error}); prepare the set again") from None
    missing = [key for key in ("count", "shards", "classes", "content_hash") if key not in card]
    if missing:
        raise DataError(f"{path}/{CARD} lacks {', '.join(missing)}; prepare the set again")
    return card


class PreparedImages:
    """A prepared set as a source; see `sources`. Labels are those of the card's classes."""

    def __init__(self, path, labels: bool = False):
        """Opens all shards and compares their number of records with the card.

        Raises:
          DataError: a shard is missing or damaged, or labels are asked of a set without them.
        """
        self.card = read_card(path)
        if labels and not self.card["classes"]:
            raise DataError(
                f"{path} was prepared without labels; set --config.data.labels=False --config.model.num_classes=0, or "
                "prepare it with --labels"
            )
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

    def __len__(self):
        return self.card["count"]

    def read(self, i: int):
        """Encoded bytes and label (0 when labels were not asked for)."""
        _, label, image = decode_record(self._records[i])
        return image, label if self.classes else 0


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
