"""What every source of images has; the kinds of sources build on it."""

import collections.abc

CARD = "card.json"  # the data card, which a prepared set has; see `data.prepared`
WITHOUT_LABELS = (
    "do without labels (training: --config.data.labels=False --config.model.num_classes=0; preparing: no --labels)"
)


class Source:
    """Images by number: random access, thread-safe, picklable for worker processes.

    Attributes:
      names: one per image.
      labels: class numbers, one per image; empty without labels.
      classes: class names; empty without labels.
    """

    def __init__(self, names, labels=(), classes=()):
        self.names, self.labels, self.classes = names, labels, list(classes)

    def __len__(self):
        return len(self.names)

    def read(self, i: int):
        """Image i as it is stored, encoded bytes or uint8 [H, W, C], and its label, 0 without labels."""
        return self.image(i), int(self.labels[i]) if len(self.labels) else 0

    def image(self, i: int):
        """Image i as it is stored."""
        raise NotImplementedError

    def stamp(self, i: int) -> str:
        """Text that changes when image i changes, from metadata alone; empty for images that never change."""
        return ""


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
