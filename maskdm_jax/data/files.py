"""Images as files: folders, zip and tar archives, object stores. See `sources` for what a source is."""

import bz2
import gzip
import itertools
import lzma
import os
import pathlib
import posixpath
import shutil
import tarfile
import zipfile
import zlib

import fsspec

from maskdm_jax.data import WITHOUT_LABELS
from maskdm_jax.errors import DataError
from maskdm_jax.storage import atomic_path

_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_ZSTD = b"\x28\xb5\x2f\xfd"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class ImageFolder:
    """All images under a folder, nested or flat."""

    def __init__(self, path, labels: bool = False):
        self._root = pathlib.Path(path)
        self.names, self.labels, self.classes = index_names(path, list(_walk(str(self._root), "", ())), labels)

    def __len__(self):
        return len(self.names)

    def read(self, i: int):
        """Encoded bytes and label."""
        return (self._root / self.names[i]).read_bytes(), self.labels[i] if self.labels else 0

    def stamp(self, i: int) -> str:
        """Size and time of the image's file."""
        return file_stamp(self._root / self.names[i])


def _walk(folder: str, prefix: str, above: tuple):
    """Names of the files under a folder. Links are followed, but not back to a folder that they lie in.

    Links to nothing are files, which cannot be read: so they are named and not lost.
    """
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in above:
        return
    above = (*above, (status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if os.path.isdir(entry.path):
                yield from _walk(entry.path, f"{prefix}{entry.name}/", above)
            elif os.path.isfile(entry.path) or not os.path.exists(entry.path):  # a pipe would block whoever reads it
                yield prefix + entry.name


def file_stamp(path) -> str:
    """Size and time of a file, which change with its content; empty if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


class RemoteFolder:
    """All images under an address of an object store, such as gs://bucket/images, nested or flat."""

    def __init__(self, url: str, labels: bool = False):
        self._files, self._root = connect(url)
        found = [name.removeprefix(self._root).lstrip("/") for name in self._files.find(self._root)]
        if not found:
            raise DataError(f"{url} does not exist or is empty; give a folder of images or a prepared set")
        self.names, self.labels, self.classes = index_names(url, found, labels)

    def __len__(self):
        return len(self.names)

    def read(self, i: int):
        """Encoded bytes and label."""
        return self._files.cat_file(f"{self._root}/{self.names[i]}"), self.labels[i] if self.labels else 0

    def stamp(self, i: int) -> str:
        """What the store says of the image's file, which changes with its content."""
        return self._files.ukey(f"{self._root}/{self.names[i]}")


def connect(url: str):
    """File system and path of an address.

    Raises:
      DataError: the package for this kind of store is missing, or the store refused.
    """
    try:
        files, root = fsspec.core.url_to_fs(url)
        files.exists(root)
    except ImportError as error:
        raise DataError(f"{url} needs a package: {error}") from None
    except Exception as error:  # whatever the store's package throws
        raise DataError(f"{url} cannot be reached: {str(error).strip() or type(error).__name__}") from error
    return files, root.rstrip("/")


class ZipImages:
    """All images in a zip file, nested or flat, read without unpacking it. The file may be on an object store."""

    def __init__(self, path, labels: bool = False):
        self._path = str(path)
        self._archive = None
        try:
            entries = [info for info in self._open().infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not a readable zip file ({error}); give a .zip or a folder of images") from None
        locked = [info.filename for info in entries if info.flag_bits & 1]
        if locked:
            raise DataError(f"{path} is encrypted ({locked[0]!r} needs a password); unpack it and give the folder")
        found = list(dict.fromkeys(info.filename for info in entries))  # of one name, the last entry counts
        self.names, self.labels, self.classes = index_names(path, found, labels)

    def __len__(self):
        return len(self.names)

    def read(self, i: int):
        """Encoded bytes and label."""
        return self._open().read(self.names[i]), self.labels[i] if self.labels else 0

    def stamp(self, i: int) -> str:
        """The checksum of the image's file."""
        return f"{self._open().getinfo(self.names[i]).CRC:08x}"

    def _open(self):
        if self._archive is None:  # opened once per process; ZipFile locks its own reads among threads
            if "://" in self._path:
                files, path = connect(self._path)
                self._archive = zipfile.ZipFile(files.open(path))
            else:
                self._archive = zipfile.ZipFile(self._path)
        return self._archive

    def __getstate__(self):
        return self.__dict__ | {"_archive": None}


class TarImages:
    """All images in a tar file, nested or flat, read without unpacking it. Links among its members are followed."""

    def __init__(self, path, labels: bool = False, scratch=None):
        """Reads the headers.

        scratch: path of a file to decompress a compressed archive into; it is left there, for the next time.

        Raises:
          DataError: the file is damaged; or compressed, which leaves no way to an image but through all before it, and
            there is no scratch.
        """
        self._path = str(_decompressed(path, scratch))
        try:
            with tarfile.open(self._path, "r:") as archive:
                members = {member.name: member for member in archive}  # of one name, the last counts
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(512) != bytes(512):  # Python takes a damaged header for the end
                    raise DataError(f"{path} is cut short or damaged at byte {archive.offset}; copy it again")
        except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not a readable tar file ({error}); copy it again") from None
        ends = max((member.offset_data + member.size for member in members.values() if member.isreg()), default=0)
        if ends > os.path.getsize(self._path):
            raise DataError(f"{path} is cut short; copy it again")
        found = [name for name, m in members.items() if (m.isreg() and not m.issparse()) or m.issym() or m.islnk()]
        self.names, self.labels, self.classes = index_names(path, found, labels)
        self._places = [_place(members, members[name]) for name in self.names]
        self._stamp = file_stamp(path)

    def __len__(self):
        return len(self.names)

    def read(self, i: int):
        """Encoded bytes and label."""
        if self._places[i] is None:
            raise DataError("a link to no file of the archive")
        offset, size = self._places[i]
        with open(self._path, "rb") as file:  # opened anew each time, so that threads do not share a position
            file.seek(offset)
            return file.read(size), self.labels[i] if self.labels else 0

    def stamp(self, i: int) -> str:
        """Size and time of the archive, as it was opened."""
        return self._stamp


def _place(members: dict[str, tarfile.TarInfo], member) -> tuple[int, int] | None:
    """(offset, size) of a member's content, through links; None if it is not in the archive."""
    for _ in range(len(members)):
        if member is None or member.isreg():
            return member and (member.offset_data, member.size)
        target = member.linkname
        if member.issym():  # as seen from the link; of a hard link, from the archive's top
            target = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), target))
        member = members.get(target) or members.get(f"./{target}")
    return None


def is_tar(path) -> bool:
    """Whether a file is named like a tar archive, compressed or not."""
    name = pathlib.Path(path).name.lower()
    return name.endswith((".tar", ".tgz", ".tbz2", ".txz")) or ".tar." in name


def _decompressed(path, scratch) -> pathlib.Path:
    """A compressed file's content in the file `scratch`, made unless it is there; any other path as it is."""
    path = pathlib.Path(path)
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(_ZSTD):
        raise DataError(f"{path} is compressed by zstd; decompress it first: zstd -d {path.name}")
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
    if opener is None:
        return path
    if scratch is None:
        raise DataError(
            f"{path} is compressed; prepare the images once with launch/prepare_data.py, or unpack the file"
        )
    scratch = pathlib.Path(scratch)
    if scratch.exists() and scratch.stat().st_mtime_ns >= path.stat().st_mtime_ns:  # of this archive, not of an earlier
        return scratch
    try:
        with atomic_path(scratch) as temporary, opener(path) as packed, open(temporary, "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again") from None
    return scratch


def index_names(path, found: list[str], labels: bool):
    """Sorted image names, the label of each, and the class names.

    Raises:
      DataError: there is no image, or labels are wanted and the folders do not tell them.
    """
    names = sorted(
        name
        for name in found
        if pathlib.PurePosixPath(name).suffix.lower() in SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in pathlib.PurePosixPath(name).parts if part != "..")
    )
    if not names:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(f"{path} holds no images; looked through {len(found)} files for {kinds}")
    if not labels:
        return names, [], []
    # A wrapping folder that all images share is not a class: the first level that differs is.
    folders = [pathlib.PurePosixPath(name).parts[:-1] for name in names]
    shared = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False)))
    if len(set(folders)) == 1 and folders[0]:
        raise DataError(
            f"{path} has only one class folder, {'/'.join(folders[0])!r}; labels need two, or {WITHOUT_LABELS}"
        )
    if any(len(parts) <= shared for parts in folders):
        stray = next(name for name, parts in zip(names, folders, strict=True) if len(parts) <= shared)
        raise DataError(
            f"{path} has no class folder for {stray!r}; put every image into a folder per class, at least two of them, "
            f"or {WITHOUT_LABELS}"
        )
    classes = sorted({parts[shared] for parts in folders})
    number = {name: i for i, name in enumerate(classes)}
    return names, [number[parts[shared]] for parts in folders], classes
