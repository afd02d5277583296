"""From a source to batches: decode, resize, shuffle, batch, in an order that survives any restart.

Epoch after epoch the images form one endless stream, shuffled anew each epoch by the seed. Batch k of a
stage is elements k*B .. k*B + B - 1 of the stream, whatever the number of hosts, worker processes or
threads; host h of H holds the h-th B / H of them.
"""

import dataclasses
import logging

import grain
import numpy as np
from absl import flags

from maskdm_jax.data import DataError
from maskdm_jax.data.images import Framing, decode
from maskdm_jax.data.sources import open_source, read_patiently, select

UNREADABLE_LIMIT = 0.01  # share of the images; more than that is a broken data set, not bad luck
_STREAM_LENGTH = 2**40  # examples: more than any run takes, while grain's endless stream overflows in batches of 1
_MAX_NEIGHBOURS = 100  # tried in place of an unreadable image before giving up

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Decode:
    """Stream element (index, record number) -> example; a picklable function for worker processes."""

    source: object
    framing: Framing

    def __call__(self, index: int, record: int) -> dict:
        """Decode a record, or its next readable neighbour; `unreadable` holds the record's number then, else -1."""
        n = len(self.source)
        for step in range(min(n, _MAX_NEIGHBOURS)):
            try:
                image, label = read_patiently(self.source, (record + step) % n)
                image = decode(image, self.framing)
            except Exception as error:  # whatever a decoder throws at a damaged file
                cause = error
                continue
            return {
                "image": image,
                "label": np.int32(label),
                "index": np.uint32(index),
                "unreadable": np.int64(record if step else -1),
            }
        raise DataError(f"{self.source.names[record]} and its {step} neighbours are all unreadable; the last: {cause}")


def open_data(data):
    """The source that a run trains on.

    data: `config.Data`.

    Raises:
      DataError: it cannot be opened, or a class is not in it.
    """
    source = open_source(data.path, data.labels or bool(data.classes), data.split)
    return select(source, data.classes, data.fraction, data.fraction_seed, data.labels)


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
        self.source = open_data(data) if source is None else source
        self._stream = (
            grain.MapDataset.range(len(self.source))
            .seed(seed)
            .shuffle()
            .repeat(max(1, _STREAM_LENGTH // len(self.source)))
            .map_with_index(_Decode(self.source, Framing(data.image_size, data.channels)))
        )
        self._data, self._batch_size, self._host, self._hosts = data, batch_size, host, hosts
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
        batches = self._stream[self._next :].batch(local)[self._host :: self._hosts]
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
