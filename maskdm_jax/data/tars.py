"""Images in tar archives: one archive with any layout, or the shards of a WebDataset."""

import logging
import posixpath
import tarfile

import numpy as np

from maskdm_jax.data.base import WITHOUT_LABELS
from maskdm_jax.data.files import Files, open_file, read_range
from maskdm_jax.data.labels import number_labels, read_label
from maskdm_jax.data.shards import kept_indexes, relative_names
from maskdm_jax.errors import DataError, prefixed
from maskdm_jax.storage import foreign_kind

_READERS = 16  # archives of a store that are read at the same time, for their index
_LABEL_BYTES = 1 << 20  # a larger .cls or .json holds no label

log = logging.getLogger(__name__)


class TarImages(Files):
    """All images in tar files, read in place. Links among the members of an archive are followed.

    Labels come from a `.cls` or `.json` with the name of each image, as in a WebDataset; a single archive without them
    may have label files or class folders, as other sources do.
    """

    def __init__(self, path, tars: list[str], labels: bool = False):
        """Read the headers, or their index of an earlier call.

        Args:
          path: of the whole set, for messages.
          tars: paths or addresses of the archives. The names of several archives precede those of their members.
          labels: whether to find labels.

        Raises:
          DataError: a file is damaged or compressed: a compressed archive can only be read from its start.
        """
        self._tars, self._many = tars, len(tars) > 1
        indexes = kept_indexes(tars, _read_headers, _READERS)
        self._members, self._labels = {}, {}
        for number, (name, index) in enumerate(zip(relative_names(tars), indexes, strict=True)):
            prefix = f"{name}/" if self._many else ""
            self._members |= {prefix + member: (number, *place) for member, place in index["members"].items()}
            self._labels |= {prefix + stem: label for stem, label in index["labels"].items()}
        super().__init__(path, {name: size for name, (_, _, size) in self._members.items()}, labels)
        self._places = np.array([self._members[name] for name in self.names])  # [n, 3]: archive, offset, size
        self._members, self._labels = {}, {}  # millions of texts, which worker processes do not need

    def find_labels(self, path, names: list[str], others: list[str]):
        """As `labels.find_labels`, from the files beside the images if there are any."""
        labels = [self._labels.get(_stem(name)) or self._labels.get(_key(name)) for name in names]
        bare = [name for name, label in zip(names, labels, strict=True) if label is None]
        if len(bare) == len(names) and not self._many:
            return super().find_labels(path, names, others)
        if bare:
            raise DataError(
                f"{path}: {bare[0]!r} has no label in a .cls or .json beside it ({len(bare)} of "
                f"{len(names)} images); add it, or {WITHOUT_LABELS}"
            )
        lost = len(self._labels.keys() - {stem for name in names for stem in (_stem(name), _key(name))})
        return *number_labels(labels), [], [f"{lost} labels belong to no image"] if lost else []

    def content(self, name: str) -> bytes:
        """The content of a file that is no image, while labels are looked for."""
        return self._read(*self._members[name])

    def image(self, i: int) -> bytes:
        """Encoded bytes."""
        return self._read(*map(int, self._places[i]))

    def _read(self, number: int, offset: int, size: int) -> bytes:
        if offset < 0:
            raise DataError("a link to no file of the archive")
        return read_range(self._tars[number], offset, size)


def _stem(name: str) -> str:
    """A name without its last suffix."""
    return posixpath.splitext(name)[0]


def _key(name: str) -> str:
    """The part of a name that all files of a WebDataset's sample share: up to the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    return posixpath.join(folder, file.split(".", 1)[0])


def _read_headers(tar: str) -> dict:
    """The index of an archive.

    Returns:
      `labels`: texts by the stems of the `.cls` and `.json` files that hold them; `members`: offset and size of the
      content of each other file by its name, the offset -1 for a broken link.
    """
    log.info("reading the headers of %s", tar)
    members, labels = {}, {}
    causes = (tarfile.TarError, EOFError, UnicodeDecodeError)
    broken = prefixed(DataError, f"{tar} is not a readable tar file (", causes, "); copy it again")
    with open_file(tar) as file, broken:
        if kind := foreign_kind(file.read(64)):
            raise DataError(f"{tar} is {kind}")
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                members[member.name] = member  # of members with one name, the last counts
                stem, suffix = posixpath.splitext(member.name)
                if suffix in (".cls", ".json") and member.isreg() and member.size <= _LABEL_BYTES:
                    label = read_label(suffix, archive.extractfile(member).read())
                    if label is not None:
                        labels[stem] = label if suffix == ".cls" else labels.get(stem, label)
                        del members[member.name]
            file.seek(archive.offset)
            if file.read(512) != bytes(512):  # tarfile takes a damaged header for the end
                raise DataError(f"{tar} is cut short or damaged at byte {archive.offset}; copy it again")
    found = {name: m for name, m in members.items() if (m.isreg() and not m.issparse()) or m.issym() or m.islnk()}
    return dict(members={name: _place(members, member) for name, member in found.items()}, labels=labels)


def _place(members: dict[str, tarfile.TarInfo], member) -> tuple[int, int]:
    """(offset, size) of a member's content, through links; offset -1 if it is not in the archive."""
    for _ in range(len(members)):
        if member is None:
            break
        if member.isreg():
            return member.offset_data, member.size
        target = member.linkname
        if member.issym():  # relative to the link; a hard link's target is relative to the root of the archive
            target = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), target))
        member = members.get(target) or members.get(f"./{target}")
    return -1, 0
