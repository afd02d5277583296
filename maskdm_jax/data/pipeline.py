"""From a source to batches: decode, resize, shuffle, batch, in an order that survives any restart.

Epoch after epoch the images form one endless stream, shuffled anew each epoch by the seed. Batch k of a
stage is elements k*B .. k*B + B - 1 of the stream, whatever the number of hosts, worker processes or
threads; host h of H holds the h-th B / H of them.
"""

import dataclasses
import functools
import logging

import grain
import jax
import numpy as np
from absl import flags

from maskdm_jax.data.images import Framing, decode
from maskdm_jax.data.sources import card_of, open_source, read_patiently, select
from maskdm_jax.errors import DataError

UNREADABLE_LIMIT = 0.01  # share of the images; more than that is a broken data set, not bad luck
_STREAM_LENGTH = 2**40  # examples: more than any run takes
_MAX_NEIGHBOURS = 100  # tried in place of an unreadable image before giving up

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _ReadBatch:
    """Number of a host's batch -> its examples; a picklable function for worker processes.

    A batch is read by one call into arrays of its own: for small images, what is done once per image in Python costs
    as much as decoding it.
    """

    source: object
    framing: Framing
    seed: int
    first: int  # element of the stream that batch 0 begins with
    size: int

    def __call__(self, batch: int) -> dict:
        """Decode a batch; `unreadable` holds the number of each record that a neighbour stands in for, else -1."""
        start = self.first + int(batch) * self.size
        side, channels = self.framing.size, self.framing.channels
        out = dict(
            image=np.empty((self.size, side, side, channels), np.uint8),
            label=np.empty(self.size, np.int32),
            index=np.arange(start, start + self.size).astype(np.uint32),
            unreadable=np.full(self.size, -1),
        )
        for i, record in enumerate(self._records(start)):
            out["image"][i], out["label"][i], replaced = self._readable(record)
            if replaced:
                out["unreadable"][i] = record
        return out

    def _records(self, start: int) -> list[int]:
        """Record numbers of a batch's elements of the stream."""
        records, n = [], len(self.source)
        while len(records) < self.size:
            epoch, position = divmod(start + len(records), n)
            records += _epoch_order(n, self.seed, epoch)[position : position + self.size - len(records)].tolist()
        return records

    def _readable(self, record: int):
        """Pixels and label of a record, or of its next readable neighbour, and whether it is that."""
        n = len(self.source)
        for step in range(min(n, _MAX_NEIGHBOURS)):
            try:
                image, label = read_patiently(self.source, (record + step) % n)
                return decode(image, self.framing), label, step > 0
            except Exception as error:  # whatever a decoder throws at a damaged file
                cause = error
        raise DataError(f"{self.source.names[record]} and its {step} neighbours are all unreadable; the last: {cause}")


@functools.lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Record numbers in an epoch's order. RandomState, unlike NumPy's newer generators, never changes its streams."""
    return np.random.RandomState(np.random.SeedSequence([seed, epoch]).generate_state(4)).permutation(n)


class TrainingData:
    """The images of a run: their number, classes and card, and batches of them for each stage."""

    def __init__(self, settings):
        """Open the images. settings: `config.Data`.

        Raises:
          DataError: they cannot be opened, or a class is not among them.
        """
        source = open_source(settings.path, settings.labels or bool(settings.classes), settings.split)
        chosen = settings.classes, settings.fraction, settings.fraction_seed, settings.labels
        self.source = select(source, *chosen)
        self.classes = self.source.classes
        self.card = card_of(self.source, Framing.of(settings))
        self._settings, self._unreadable = settings, set()  # records found unreadable so far, over all stages

    def __len__(self):
        return len(self.source)

    def batches(self, *, batch_size: int, seed: int) -> "Batches":
        """This process's part of global batches of `batch_size`, shuffled by `seed`."""
        shared = dict(source=self.source, unreadable=self._unreadable)
        place = dict(host=jax.process_index(), hosts=jax.process_count())
        return Batches(self._settings, batch_size=batch_size, seed=seed, **shared, **place)


class Batches:
    """Endless iterator of a host's batches: dicts of NumPy arrays.

    `image` uint8 [B/H, S, S, C], `label` int32 [B/H], `index` uint32 [B/H], the element's number in the stream.
    `state()` and `seek(state)` save and restore the position; a state fits any number of hosts and workers.
    """

    def __init__(
        self,
        data,
        *,
        batch_size: int,
        seed: int,
        source=None,
        unreadable: set | None = None,
        host: int = 0,
        hosts: int = 1,
    ):
        """Args:
        data: `config.Data`.
        batch_size: global.
        seed: of the shuffling.
        source: an opened source, to be shared by the stages of a run; opened from data.path when None.
        unreadable: numbers of the records found unreadable so far, shared likewise.
        host, hosts: this process and how many there are.
        """
        if batch_size % hosts:
            raise DataError(f"batch_size {batch_size} does not divide among {hosts} hosts")
        self.source = TrainingData(data).source if source is None else source
        self._data, self._seed, self._batch_size, self._host, self._hosts = data, seed, batch_size, host, hosts
        self._next = 0
        self._iterator = None
        self.unreadable = set() if unreadable is None else unreadable

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        if self._iterator is None:
            self._iterator = self._start()
        batch = dict(next(self._iterator))
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

    def _start(self):
        # Batched before it is split among hosts and workers, so neither changes what is in a batch. (grain's
        # ElasticIterator splits first: with worker processes it cannot resume between two of their rounds.)
        local = self._batch_size // self._hosts
        read = _ReadBatch(self.source, Framing.of(self._data), self._seed, self._next, local)
        batches = grain.MapDataset.range(self._host, _STREAM_LENGTH // local, self._hosts).map(read)
        ahead = grain.ReadOptions(num_threads=self._data.threads, prefetch_buffer_size=2 * self._data.threads)
        stream = batches.to_iter_dataset(ahead)
        if self._data.workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which only absl.app parses
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._data.workers))
        return iter(stream)

    def _report(self, records) -> None:
        for record in sorted(set(records[records >= 0].tolist()) - self.unreadable):
            self.unreadable.add(record)
            log.warning(
                "unreadable image %s: replaced by its neighbour (%d so far)",
                self.source.names[record],
                len(self.unreadable),
            )
        if len(self.unreadable) > UNREADABLE_LIMIT * len(self.source):
            names = ", ".join(self.source.names[record] for record in sorted(self.unreadable)[:5])
            raise DataError(
                f"{len(self.unreadable)} of {len(self.source)} images are unreadable, more than {UNREADABLE_LIMIT:.0%} "
                f"({names}, ...); repair or remove them"
            )
