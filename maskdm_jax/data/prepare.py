"""From images as they are on disk to a prepared set: decoded, cropped and resized once, verified, with a data card."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import logging
import os
import pathlib

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from maskdm_jax.data.images import DECODER, Framing, decode
from maskdm_jax.data.pipeline import UNREADABLE_LIMIT
from maskdm_jax.data.prepared import CARD, LABELS, encode_record, image_digest, read_card, shard_hash, shard_name
from maskdm_jax.data.sources import read_patiently
from maskdm_jax.errors import DataError
from maskdm_jax.storage import atomic_path, lock_dir, write_atomically

PER_SHARD = 2048  # images of the source; a stop loses the work on one shard at most
_PLAN = "plan.json"
_NOTE = dict(labels=list, left_out=list, hash=str, digests=str, stamps=str)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be prepared. A folder that holds an unfinished set of another plan is not touched."""

    source: str
    names_hash: str  # of the source's names in order
    split: str
    images: int
    image: dict  # the framing, described
    classes: list[str]
    per_shard: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.per_shard)

    def numbers(self, i: int) -> range:
        """Of the source's images that shard i holds."""
        return range(i * self.per_shard, min((i + 1) * self.per_shard, self.images))


def prepare(
    source, out, framing: Framing, *, name: str, split: str = "", threads: int = 0, per_shard=PER_SHARD, progress=None
):
    """Write a prepared set of a source's images; see `data.prepared`. Call it again to go on after a stop.

    Args:
      source: a source; see `data.sources`. Its classes, if it was opened with labels, become the set's.
      out: folder, new, empty or with an unfinished set of the same images and settings.
      framing: crop, size and filter. Images are stored losslessly, as PNG.
      name: of the source, for the card.
      split: of the source, for the card.
      threads: that decode and encode; 0 takes two per core.
      progress: called with the number of source images done, after each.

    Returns:
      the data card, a dict.

    Raises:
      DataError: `out` holds something else, more than 1% of the images are unreadable, or verification failed.
      OSError: the disk refused.
    """
    out = pathlib.Path(out).expanduser().absolute()
    plan = Plan(
        source=name,
        names_hash=_sha256("\0".join(source.names)),
        split=split,
        images=len(source),
        image=framing.describe(),
        classes=list(source.classes),
        per_shard=per_shard,
    )
    out.mkdir(parents=True, exist_ok=True)
    with lock_dir(out), concurrent.futures.ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1)) as pool:
        stamps = lambda: "".join(_stamps(source, plan.numbers(i), pool) for i in range(plan.shards))
        finished = _claim(out, plan, stamps)
        if finished is not None:
            return finished
        return _prepare(source, plan, framing, out, pool, progress or (lambda done: None))


def _prepare(source, plan: Plan, framing: Framing, out: pathlib.Path, pool, progress) -> dict:
    notes = []
    for i in range(plan.shards):
        note = _note_of(out, i)
        if note is not None and note["stamps"] != _stamps(source, plan.numbers(i), pool):
            log.warning("%s is made anew: its images changed in the meantime", shard_name(i, plan.shards))
            note = None
        if note is None:
            note = _write_shard(source, plan, framing, out, i, pool, progress)
        notes.append(note)
        progress(plan.numbers(i).stop)
        _check_unreadable(plan, notes)
    for i, note in enumerate(notes):
        _verify(out / shard_name(i, plan.shards), note)
    labels = np.asarray([label for note in notes for label in note["labels"]], np.int32)
    counts = collections.Counter(labels.tolist())
    if plan.classes:
        buffer = io.BytesIO()
        np.save(buffer, labels)
        write_atomically(out / LABELS, buffer.getvalue())
    card = dict(
        format="maskdm-jax prepared images, version 1",
        source=plan.source,
        names_hash=plan.names_hash,
        source_stamp=_sha256("".join(note["stamps"] for note in notes)),
        split=plan.split,
        image=plan.image,
        decoder=DECODER,
        encoding="PNG",
        count=len(labels),
        classes=plan.classes,
        count_by_class={name: counts[label] for label, name in enumerate(plan.classes)},
        left_out=[entry for note in notes for entry in note["left_out"]],
        content_hash=hashlib.sha256(bytes.fromhex("".join(note["digests"] for note in notes))).hexdigest(),
        shards=plan.shards,
        shard_hashes=[note["hash"] for note in notes],
        prepared=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    )
    try:
        text = json.dumps(card, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # file names that are no UTF-8; escaped, they come back as they are
        text = json.dumps(card, indent=2).encode()
    write_atomically(out / CARD, text)
    for path in (*(_note_path(out, i) for i in range(plan.shards)), out / _PLAN, *out.glob(".*.tmp")):
        path.unlink(missing_ok=True)  # the last of them: of killed processes
    return card


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _stamps(source, numbers, pool) -> str:
    """Short hashes of images' stamps, one after the other."""
    return "".join(pool.map(lambda number: _sha256(source.stamp(number))[:16], numbers))


def _claim(out: pathlib.Path, plan: Plan, stamps) -> dict | None:
    """Make the folder this plan's, or find that it is; the card if all is done already."""
    wanted = json.loads(json.dumps(dataclasses.asdict(plan)))
    if (out / CARD).exists():
        card = read_card(out)
        changed = [key for key in ("source", "names_hash", "split", "image", "classes") if card.get(key) != wanted[key]]
        if not changed and card["source_stamp"] == _sha256(stamps()):
            return card
        raise DataError(
            f"{out} holds a finished set of {card['source']} at {card['image']['size']} px, which differs in "
            f"{', '.join(changed) or 'size or time of its files'}; give another folder or remove it"
        )
    if (out / _PLAN).exists():
        try:
            there = dict(json.loads((out / _PLAN).read_text()))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{out / _PLAN} is damaged ({error}); remove {out} and start again") from None
        changed = [f"{key}: {there.get(key)} -> {value}" for key, value in wanted.items() if there.get(key) != value]
        if changed:
            raise DataError(
                f"{out} holds an unfinished set of other settings ({'; '.join(changed)[:300]}); give another folder"
            )
        return None
    if any(out.iterdir()):
        raise DataError(f"{out} is not empty and holds no prepared set; give a new or empty folder")
    write_atomically(out / _PLAN, json.dumps(wanted, indent=2).encode())
    return None


def _note_path(out: pathlib.Path, i: int) -> pathlib.Path:
    return out / f"shard-{i:05d}.json"


def _note_of(out: pathlib.Path, i: int) -> dict | None:
    """What an earlier call noted of a shard that it finished."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        note = json.loads(_note_path(out, i).read_text())
        if isinstance(note, dict) and {key: type(value) for key, value in note.items()} == _NOTE:
            return note
    return None


def _write_shard(source, plan: Plan, framing: Framing, out: pathlib.Path, i: int, pool, progress) -> dict:
    """Write shard i and note what is in it."""
    path, numbers = out / shard_name(i, plan.shards), plan.numbers(i)
    stamps = _stamps(source, numbers, pool)  # taken before the images are read: a change in between will be seen

    def one(number):
        try:
            image, label = read_patiently(source, number)
            pixels, label = decode(image, framing), label if plan.classes else -1
            return _png(pixels), label, image_digest(label, pixels)
        except Exception as error:  # whatever a decoder throws at a damaged file
            return error, -1, b""

    written, labels, digests, left_out = hashlib.sha256(), [], [], []
    with atomic_path(path) as temporary:
        with _writing(path):
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for number, (image, label, digest) in zip(numbers, pool.map(one, numbers), strict=True):
                if isinstance(image, Exception):
                    reason = str(image).strip().splitlines() or [type(image).__name__]
                    left_out.append(f"{source.names[number]}: {reason[0][:200]}")
                else:
                    record = encode_record(source.names[number], label, image)
                    with _writing(path):
                        writer.write(record)
                    written.update(record)
                    labels.append(label)
                    digests.append(digest.hex())
                progress(number + 1)
        finally:
            with _writing(path):
                writer.close()
    note = dict(labels=labels, left_out=left_out, hash=written.hexdigest(), digests="".join(digests), stamps=stamps)
    write_atomically(_note_path(out, i), json.dumps(note).encode())
    return note


@contextlib.contextmanager
def _writing(path: pathlib.Path):
    """What the writer throws, as what it mostly is: a disk that is full."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0][:200]}") from error


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def _check_unreadable(plan: Plan, notes: list[dict]) -> None:
    left_out = [entry for note in notes for entry in note["left_out"]]
    if len(left_out) > UNREADABLE_LIMIT * plan.images:
        raise DataError(
            f"{len(left_out)} of {plan.images} images are unreadable, more than {UNREADABLE_LIMIT:.0%} "
            f"({'; '.join(left_out[:3])}); repair or remove them"
        )


def _verify(path: pathlib.Path, note: dict) -> None:
    """Read a shard back and compare its hash with what was written.

    Raises:
      DataError: they differ; the shard's note is removed, so that the next call writes it again.
    """
    found = None
    with contextlib.suppress(RuntimeError, OSError):
        found = shard_hash(path)
    if found != note["hash"]:
        _note_path(path.parent, int(path.name.split("-")[1])).unlink(missing_ok=True)
        raise DataError(f"{path} is not what was written; run the same command again to write it anew")
