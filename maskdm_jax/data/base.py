"""The base class of all image sources."""

import bisect
import collections.abc
import hashlib
import itertools
import logging

CARD = "card.json"  # the data card, which a prepared set has; see `data.prepared`
WITHOUT_LABELS = (
    "do without labels (training: --config.data.labels=False --config.model.num_classes=0; preparing: no --labels)"
)

log = logging.getLogger(__name__)


class Source:
    """Images by number: random access, thread-safe, picklable for worker processes.

    Attributes:
      names: one per image.
      labels: class numbers, one per image; empty without labels.
      classes: class names; empty without labels.
      files_hash: SHA-256 of the files' names and sizes, in hex, which copies of a set share. Computing it reads no
        images. It is empty if nothing is known.
      left_aside: number of files that are not images, by suffix.
      notes: lines about what a user may not expect, which were logged.
      card: the data card of a prepared set; None for other sources.
    """

    notes, card = (), None

    def __init__(self, names, labels=(), classes=(), files_hash: str = "", left_aside=()):
        self.names, self.labels, self.classes = names, labels, list(classes)
        self.files_hash, self.left_aside = files_hash, dict(left_aside)

    def note(self, path, lines) -> None:
        """Log lines about the images at a path, and keep them in `notes`."""
        lines = [f"{path}: {line}" for line in lines]
        self.notes = (*self.notes, *lines)
        for line in lines:
            log.warning("%s", line)

    def empty_classes(self) -> list[str]:
        """Names of the classes that have no image."""
        found = set(map(int, self.labels))
        return [name for i, name in enumerate(self.classes) if i not in found]

    def labels_hash(self) -> str:
        """SHA-256 of the labels, in hex; empty if there are none."""
        return hash_texts(map(str, self.labels)) if len(self.labels) else ""

    def __len__(self):
        return len(self.names)

    def read(self, i: int):
        """Image i as it is stored, encoded bytes or uint8 [H, W, C], and its label, 0 without labels."""
        return self.image(i), int(self.labels[i]) if len(self.labels) else 0

    def image(self, i: int):
        """Image i as it is stored."""
        raise NotImplementedError


def hash_texts(texts) -> str:
    """SHA-256 of texts in their order, in hex."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def counted(numbers: dict[str, int]) -> str:
    """Format numbers by name, the largest first, such as "3 .txt, 1 .heic"."""
    return ", ".join(f"{number} {name}" for name, number in sorted(numbers.items(), key=lambda item: -item[1]))


class LazySequence(collections.abc.Sequence):
    """A sequence whose elements are computed when they are asked for, such as names that would fill memory."""

    def __init__(self, length: int, element):
        self._length, self._element = length, element

    def __len__(self):
        return self._length

    def __getitem__(self, i):
        if not 0 <= i < self._length:
            raise IndexError(i)
        return self._element(i)


class RowNames(LazySequence):
    """Names FILE[ROW] of images that are rows of files."""

    def __init__(self, files: list[str], counts):
        """counts: number of rows of each file."""
        self._files, self._starts = files, [0, *itertools.accumulate(counts)]
        super().__init__(self._starts[-1], self._name)

    def locate(self, i: int) -> tuple[int, int]:
        """(number of the file, row in it) of image i."""
        file = bisect.bisect(self._starts, i) - 1
        return file, i - self._starts[file]

    def _name(self, i: int) -> str:
        file, row = self.locate(i)
        return f"{self._files[file]}[{row}]"
