"""From images as they are on disk to a prepared set: decoded, cropped and resized once, verified, with a data card."""

import collections
import concurrent.futures
import contextlib
import datetime
import hashlib
import io
import json
import os
import pathlib
import textwrap

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from maskdm_jax.config import differences
from maskdm_jax.data.base import CARD, hash_texts
from maskdm_jax.data.images import DECODER, Framing, decode, to_pil
from maskdm_jax.data.pipeline import check_unreadable
from maskdm_jax.data.prepared import FORMAT, LABELS, encode_record, image_digest, read_card, shard_hash, shard_name
from maskdm_jax.data.sources import read_patiently
from maskdm_jax.errors import DataError, first_line, prefixed
from maskdm_jax.storage import atomic_path, lock_dir, write_atomically

PER_SHARD = 2048  # images of the source; an interruption loses the work on at most one shard
_PLAN = "plan.json"  # what an unfinished set will hold
_SAME = ("source", "files_hash", "split", "image", "classes", "labels_hash")  # of the plan: the card has them too


def prepare(
    source, out, framing: Framing, *, name: str, split: str = "", threads: int = 0, per_shard=PER_SHARD, progress=None
) -> dict:
    """Write a prepared set of a source's images; see `data.prepared`. Call it again to resume after an interruption.

    Args:
      source: a `data.base.Source`. Its classes, if it was opened with labels, become the set's.
      out: folder; new, empty, or with an unfinished set of the same images and settings.
      framing: crop, size and filter. Images are stored losslessly, as PNG.
      name: of the source, for the card.
      split: of the source, for the card.
      threads: number of threads that decode and encode; 0 uses two per core.
      per_shard: images of the source per shard.
      progress: called with the number of source images done, after each.

    Returns:
      the data card.

    Raises:
      DataError: `out` holds something else, more than 1% of the images are unreadable, or verification failed.
      OSError: the disk refuses, or another process is writing to `out`.
    """
    if framing.channels not in (1, 3):
        raise DataError(f"a prepared set holds PNG images, of 1 or 3 channels, not {framing.channels}")
    out = pathlib.Path(out).expanduser().absolute()
    files_hash = source.files_hash or hash_texts(source.names)
    plan = dict(source=name, files_hash=files_hash, split=split, image=framing.describe())
    plan |= dict(classes=source.classes, labels_hash=source.labels_hash(), images=len(source), per_shard=per_shard)
    with lock_dir(out), concurrent.futures.ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1)) as pool:
        return _Preparation(source, out, framing, plan, pool, progress or (lambda done: None)).run()


class _Preparation:
    """The preparation of one set in a locked folder."""

    def __init__(self, source, out: pathlib.Path, framing: Framing, plan: dict, pool, progress):
        self._source, self._out, self._framing, self._plan = source, out, framing, plan
        self._pool, self._progress = pool, progress
        self._shards = -(-plan["images"] // plan["per_shard"])

    def run(self) -> dict:
        """Write the shards that are missing, verify all, write the card."""
        card = self._claim()
        if card is not None:
            return card
        notes = []
        for i in range(self._shards):
            notes.append(self._read_note(i) or self._write_shard(i))
            self._progress(self._numbers(i).stop)
            check_unreadable([entry for note in notes for entry in note["left_out"]], self._plan["images"])
        self._verify(notes)
        return self._finish(notes)

    def _claim(self) -> dict | None:
        """Write the plan, or check that the folder holds an unfinished set of it; the card if the set is finished."""
        out, plan = self._out, self._plan
        if (out / CARD).exists():
            card = read_card(out)
            before = plan | card  # older sets have no hash of their files or labels
            changed = _changes({key: before[key] for key in _SAME}, {key: plan[key] for key in _SAME})
            if changed:
                raise DataError(
                    f"{out} holds a finished set of {card['source']} at {card['image']['size']} px, which differs "
                    f"({changed}); give another folder or remove it"
                )
            return card
        if (out / _PLAN).exists():
            with prefixed(DataError, f"{out / _PLAN} is damaged (", ValueError, f"); remove {out} and start again"):
                found = json.loads((out / _PLAN).read_text())
            if changed := _changes(found, plan):
                raise DataError(
                    f"{out} holds an unfinished set of other images or settings ({changed}); remove it or give "
                    "another folder"
                )
        elif any(path.suffix != ".tmp" for path in out.iterdir()):  # of a process that was killed in `atomic_path`
            raise DataError(f"{out} is not empty and holds no prepared set; give a new or empty folder")
        else:
            write_atomically(out / _PLAN, json.dumps(plan, indent=2).encode())
        return None

    def _numbers(self, i: int) -> range:
        """Numbers of the source's images that shard i holds."""
        size = self._plan["per_shard"]
        return range(i * size, min((i + 1) * size, self._plan["images"]))

    def _path(self, i: int) -> pathlib.Path:
        return self._out / shard_name(i, self._shards)

    def _note_path(self, i: int) -> pathlib.Path:
        return self._out / f"shard-{i:05d}.json"

    def _read_note(self, i: int) -> dict | None:
        """The note of an earlier call that finished shard i, if no image was left out: it may be readable now."""
        with contextlib.suppress(OSError, ValueError):
            note = json.loads(self._note_path(i).read_text())
            return None if note["left_out"] else note
        return None

    def _write_shard(self, i: int) -> dict:
        """Write shard i and a note of its contents."""
        path, numbers = self._path(i), self._numbers(i)
        written, labels, digests, left_out = hashlib.sha256(), [], [], []
        failed = prefixed(OSError, f"{path} cannot be written: ", RuntimeError)  # mostly a full disk
        with (
            atomic_path(path) as temporary,
            failed,
            contextlib.closing(ArrayRecordWriter(str(temporary), "group_size:1")) as writer,
        ):
            for number, found in zip(numbers, self._pool.map(self._encode, numbers), strict=True):
                if isinstance(found, str):
                    left_out.append(found)
                else:
                    record, label, digest = found
                    writer.write(record)
                    written.update(record)
                    labels.append(label)
                    digests.append(digest.hex())
                self._progress(number + 1)
        note = dict(labels=labels, left_out=left_out, hash=written.hexdigest(), digests="".join(digests))
        write_atomically(self._note_path(i), json.dumps(note).encode())
        return note

    def _encode(self, number: int):
        """(record, label, digest) of an image of the source; its name and why it cannot be read, if so."""
        name = self._source.names[number]
        try:
            image, label = read_patiently(self._source, number)
            pixels, label = decode(image, self._framing), label if self._plan["classes"] else -1
            return encode_record(name, label, _png(pixels)), label, image_digest(label, pixels)
        except Exception as error:  # decoders raise any type on a damaged file
            return f"{name}: {first_line(error)}"

    def _verify(self, notes: list[dict]) -> None:
        """Read all shards back. Drop the notes of those that differ, so that the next call rewrites them."""
        damaged = [i for i, note in enumerate(notes) if shard_hash(self._path(i)) != note["hash"]]
        for i in damaged:
            self._note_path(i).unlink(missing_ok=True)
        if damaged:
            raise DataError(
                f"{self._path(damaged[0])} is not what was written ({len(damaged)} of {len(notes)} shards differ); run "
                "the same command again to write it anew"
            )

    def _finish(self, notes: list[dict]) -> dict:
        """Write labels and card, then remove what only an unfinished set needs."""
        out, classes = self._out, self._plan["classes"]
        labels = np.asarray([label for note in notes for label in note["labels"]], np.int32)
        if classes:
            buffer = io.BytesIO()
            np.save(buffer, labels)
            write_atomically(out / LABELS, buffer.getvalue())
        counts = collections.Counter(labels.tolist())
        card = dict(format=FORMAT) | {key: self._plan[key] for key in _SAME}
        card |= dict(
            decoder=DECODER,
            encoding="PNG",
            count=len(labels),
            count_by_class={name: counts[label] for label, name in enumerate(classes)},
            left_out=[entry for note in notes for entry in note["left_out"]],
            left_aside=self._source.left_aside,
            content_hash=hashlib.sha256(bytes.fromhex("".join(note["digests"] for note in notes))).hexdigest(),
            shards=self._shards,
            shard_hashes=[note["hash"] for note in notes],
            prepared=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        )
        try:
            text = json.dumps(card, indent=2, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # names that are not valid UTF-8 are kept as escapes
            text = json.dumps(card, indent=2).encode()
        write_atomically(out / CARD, text)
        for path in (*map(self._note_path, range(self._shards)), out / _PLAN, *out.glob(".*.tmp")):
            path.unlink(missing_ok=True)  # the .tmp files are of killed processes
        return card


def _changes(old: dict, new: dict) -> str:
    return "; ".join(textwrap.shorten(line, 80) for line in differences(old, new))


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return buffer.getvalue()
