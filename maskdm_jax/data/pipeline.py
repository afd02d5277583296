"""From a source to batches: decode, resize, shuffle, batch, in an order that does not depend on restarts.

The epochs form one endless stream; the seed and the epoch's number determine its order. Batch k of a stage is elements
k * B .. k * B + B - 1 of the stream for any number of hosts, worker processes and threads; host h of H holds the h-th
B / H of them.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import pickle
import shutil
import tempfile
import threading
import time
import typing

import grain
import jax
import numpy as np
from absl import flags

from maskdm_jax.data.base import counted
from maskdm_jax.data.images import Framing, decode, surprises
from maskdm_jax.data.sources import card_of, open_source, read_patiently, select
from maskdm_jax.errors import DataError, first_line, prefixed

UNREADABLE_LIMIT = 0.01  # fraction of the images; more means that the data set is broken
KEPT_BYTES = 2**29  # a set that takes less, in all worker processes together, is decoded once and kept in memory
_STREAM_LENGTH = 2**40  # examples, more than any run takes
_MAX_NEIGHBOURS = 100  # tried in place of an unreadable image

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _ReadBatch:
    """Number of a host's batch -> its examples; picklable for worker processes.

    One call reads a batch into arrays of its own: for small images, Python's cost per image is as high as decoding.
    """

    source: object
    framing: Framing
    seed: int
    first: int  # element of the stream that batch 0 begins with
    size: int
    kept: dict | None  # results of `read_or_neighbour` by record; None to decode every image again

    def __call__(self, batch: int) -> dict:
        """Decode a batch; `unreadable` holds the records that a neighbour replaces, with the reasons."""
        start = self.first + int(batch) * self.size
        side, channels = self.framing.size, self.framing.channels
        out = dict(
            image=np.empty((self.size, side, side, channels), np.uint8),
            label=np.empty(self.size, np.int32),
            index=np.arange(start, start + self.size).astype(np.uint32),
            unreadable={},
        )
        for i, record in enumerate(self._records(start)):
            found = (self.kept or {}).get(record) or read_or_neighbour(self.source, record, self.framing)
            image, label, reason = found
            out["image"][i], out["label"][i] = image, label
            if reason:
                out["unreadable"][record] = reason
            elif self.kept is not None and record not in self.kept:
                self.kept[record] = np.array(image), label, ""
        return out

    def _records(self, start: int) -> list[int]:
        """Record numbers of a batch's elements of the stream."""
        records, n = [], len(self.source)
        while len(records) < self.size:
            epoch, position = divmod(start + len(records), n)
            records += _epoch_order(n, self.seed, epoch)[position : position + self.size - len(records)].tolist()
        return records


def read_or_neighbour(source, record: int, framing: Framing):
    """Read a record or, if it is unreadable, its next readable neighbour.

    Returns:
      pixels uint8 [S, S, C], label, and the reason why they are those of a neighbour, "" if they are not.

    Raises:
      DataError: the neighbours are unreadable, too.
    """
    n, reason = len(source), ""
    for step in range(min(n, _MAX_NEIGHBOURS)):
        number = (record + step) % n
        try:
            image, label = read_patiently(source, number)
            return decode(image, framing), label, reason
        except Exception as error:  # decoders raise any type on a damaged file
            reason = reason or first_line(error)
    raise DataError(f"{source.names[record]} ({reason}) and its {step} neighbours are all unreadable")


def check_unreadable(unreadable: list[str], images: int) -> None:
    """Raise DataError if there are too many unreadable images; each is given with its name and the reason."""
    if len(unreadable) > UNREADABLE_LIMIT * images:
        raise DataError(
            f"{len(unreadable)} of {images} images are unreadable, more than {UNREADABLE_LIMIT:.0%} "
            f"({'; '.join(unreadable[:3])}); repair or remove them"
        )


class Probe(typing.NamedTuple):
    """Some images of a source, read."""

    images: int  # number of images read
    seconds: float
    unreadable: list[str]  # names and reasons
    notes: list[str]  # about readable images, see `images.surprises`


def probe(source, framing: Framing, count: int) -> Probe:
    """Read and decode `count` images, evenly spread over the source."""
    numbers = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)).tolist()
    unreadable, found, start = [], collections.Counter(), time.perf_counter()
    for i in numbers:
        try:
            image, _ = read_patiently(source, i)
            decode(image, framing)
            found.update(surprises(image, framing))
        except Exception as error:  # decoders raise any type on a damaged file
            unreadable.append(f"{source.names[i]}: {first_line(error)}")
    notes = [f"{number} of {len(numbers)} images read are {text}" for text, number in found.items()]
    return Probe(len(numbers), time.perf_counter() - start, unreadable, notes)


@functools.lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Record numbers in an epoch's order. RandomState, unlike NumPy's newer generators, never changes its streams."""
    return np.random.RandomState(np.random.SeedSequence([seed, epoch]).generate_state(4)).permutation(n)


class TrainingData:
    """The images of a run: the opened `source`, its `classes` and data `card`, and batches for each stage."""

    def __init__(self, settings):
        """Open the images. settings: `config.Data`.

        Raises:
          DataError: they cannot be opened, or a class is not among them.
        """
        source = open_source(settings.path, settings.labels or bool(settings.classes), settings.split)
        chosen = settings.classes, settings.fraction, settings.fraction_seed, settings.labels
        self.settings, self.source = settings, select(source, *chosen)
        self.classes, self.card = self.source.classes, card_of(self.source, Framing.of(settings))
        if empty := self.source.empty_classes():
            self.source.note(settings.path, [f"no image has the class {', '.join(empty[:8])} ({len(empty)} classes)"])
        each = settings.image_size**2 * settings.channels + 400  # bytes, of pixels and of Python's objects
        fits = len(self) * each * max(1, settings.workers) <= KEPT_BYTES
        self.kept = {} if fits else None  # pixels and labels that were read, by record
        self.unreadable = {}  # records found unreadable so far, over all stages: their names and the reasons

    def __len__(self):
        return len(self.source)

    def __str__(self):
        names = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
        parts = [f"{len(self)} images from {self.settings.path}"]
        parts += [f"{len(self.classes)} classes ({names})"] if names else []
        parts += [f"left aside: {counted(self.source.left_aside)}"] if self.source.left_aside else []
        return ", ".join(parts)

    def batches(self, *, batch_size: int, seed: int, host: int | None = None, hosts: int | None = None) -> "Batches":
        """A host's part of global batches of `batch_size`, shuffled by `seed`; of this process and all by default."""
        host, hosts = jax.process_index() if host is None else host, hosts or jax.process_count()
        return Batches(self, batch_size, seed, host, hosts)


def check_shared_memory(settings, batch_size: int) -> None:
    """Check that worker processes can hand over their batches of `batch_size` images; settings: `config.Data`.

    Raises:
      DataError: /dev/shm is too small.
    """
    needed = 3 * settings.workers * batch_size * settings.image_size**2 * settings.channels  # of each worker: 3 batches
    with contextlib.suppress(OSError):  # without a /dev/shm, another place is used
        free = shutil.disk_usage("/dev/shm").free
        if needed > free:
            raise DataError(
                f"/dev/shm has {free / 2**20:,.1f} MiB free, but batches of {settings.workers} worker processes "
                f"need {needed / 2**20:,.1f}; enlarge it (docker run --shm-size) or pass --config.data.workers=0"
            )


class _FromFile:
    """A function that worker processes read from a file.

    Python starts a process by writing its arguments into a pipe. If the process dies early and they are larger than the
    pipe, such as the names of many images, this never ends.
    """

    def __init__(self, function, path: str):
        self._function, self._path = function, path
        with open(path, "wb") as file:
            pickle.dump(function, file)

    def __call__(self, batch: int):
        return self._function(batch)

    def __reduce__(self):
        return _unpickle, (self._path,)


def _unpickle(path: str):
    """Read a function in a worker process, and let the process end when the one that started it is killed."""
    threading.Thread(target=_exit_after, args=[multiprocessing.parent_process()], daemon=True).start()
    with open(path, "rb") as file:
        return pickle.load(file)


def _exit_after(process) -> None:
    process.join()
    os._exit(1)


class Batches:
    """Endless iterator over a host's batches: dicts of NumPy arrays.

    `image` uint8 [B/H, S, S, C], `label` int32 [B/H], `index` uint32 [B/H], the element's number in the stream.
    `state()` and `seek(state)` save and restore the position; a state fits any number of hosts and workers.
    """

    def __init__(self, data: TrainingData, batch_size: int, seed: int, host: int, hosts: int):
        if batch_size % hosts:
            raise DataError(f"batch_size {batch_size} does not divide among {hosts} hosts")
        self._data, self._batch_size, self._seed, self._host, self._hosts = data, batch_size, seed, host, hosts
        self._next, self._iterator, self._open = 0, None, contextlib.ExitStack()

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self._iterator is None:
            self._iterator = self._start()
        hint = " If memory is short, lower --config.data.workers or --config.data.threads"
        with prefixed(DataError, "reading the images failed: ", RuntimeError, hint):  # such as a killed worker process
            try:
                batch = dict(next(self._iterator))
            except RuntimeError as error:
                if "exit code -15" not in str(error):
                    raise
                self.close()  # SLURM and systemd send SIGTERM to workers, too; the run goes on until it has saved
                return next(self)
        self._next += self._batch_size
        self._report(batch.pop("unreadable"))
        return batch

    def state(self) -> dict:
        """Position in the stream, for JSON."""
        return {"global_next_index": self._next}

    def seek(self, state: dict) -> None:
        """Continue at a position from `state()`."""
        self.close()
        self._next = state["global_next_index"]

    def close(self) -> None:
        """Stop the readers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        self._open.close()

    def _start(self):
        # Batches are formed before hosts and workers share them, so their number does not change what is in a batch.
        # (grain's ElasticIterator shares first: with worker processes it cannot resume between two of their rounds.)
        settings, local = self._data.settings, self._batch_size // self._hosts
        data, framing = self._data, Framing.of(settings)
        read = _ReadBatch(data.source, framing, self._seed, self._next, local, data.kept)
        if settings.workers:
            check_shared_memory(settings, local)
            folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            read = _FromFile(read, f"{self._open.enter_context(folder)}/read")
        batches = grain.MapDataset.range(self._host, _STREAM_LENGTH // local, self._hosts).map(read)
        ahead = grain.ReadOptions(num_threads=settings.threads, prefetch_buffer_size=2 * settings.threads)
        stream = batches.to_iter_dataset(ahead)
        if settings.workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which only absl.app parses
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=settings.workers))
        return iter(stream)

    def _report(self, records: dict[int, str]) -> None:
        """Log records that were found unreadable for the first time; stop if there are too many."""
        source, known = self._data.source, self._data.unreadable
        for record in sorted(records.keys() - known.keys()):
            known[record] = f"{source.names[record]}: {records[record]}"
            log.warning("unreadable image %s; replaced by its neighbour (%d so far)", known[record], len(known))
        check_unreadable([known[record] for record in sorted(known)], len(source))
