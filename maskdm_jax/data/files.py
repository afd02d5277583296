"""Images as files: folders, zip and tar archives, object stores. See `sources` for what a source is."""

import bz2
import gzip
import itertools
import lzma
import os
import pathlib
import shutil
import tarfile
import zipfile
import zlib

import fsspec

from maskdm_jax.data import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class ImageFolder:
    """All images under a folder, nested or flat."""

    def __init__(self, path, labels: bool = False):
        self._root = pathlib.Path(path)
        self.names, self.labels, self.classes = index_names(path, list(_walk(str(self._root), "", set())), labels)

    def __len__(self):
        return len(self.names)

    def read(self, i: int):
        """Encoded bytes and label."""
        return (self._root / self.names[i]).read_bytes(), self.labels[i] if self.labels else 0


def _walk(folder: str, prefix: str, seen: set):
    """Names of the regular files under a folder; links are followed, but no folder is entered twice."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", seen)
            elif entry.is_file():  # a pipe would block whoever reads it
                yield prefix + entry.name


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
        except (zipfile.BadZipFile, NotImplementedError) as error:
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
    """All images in an uncompressed tar file, nested or flat, read without unpacking it."""

    def __init__(self, path, labels: bool = False):
        """Reads the headers.

        Raises:
          DataError: the file is damaged, or compressed, which leaves no way to an image but through all before it.
        """
        self._path = str(path)
        try:
            with tarfile.open(self._path, "r:") as archive:
                members = {m.name: m for m in archive if m.isreg() and not m.issparse()}
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(512) != bytes(512):  # Python takes a damaged header for the end
                    raise DataError(f"{path} is cut short or damaged at byte {archive.offset}; copy it again")
        except (tarfile.TarError, EOFError) as error:
            if is_compressed(path):
                raise DataError(
                    f"{path} is compressed; prepare the images once with launch/prepare_data.py, or unpack the file"
                ) from None
            raise DataError(f"{path} is not a readable tar file ({error}); copy it again") from None
        ends = max((m.offset_data + m.size for m in members.values()), default=0)
        if ends > os.path.getsize(path):
            raise DataError(f"{path} is cut short; copy it again")
        self.names, self.labels, self.classes = index_names(path, list(members), labels)
        self._places = [(members[name].offset_data, members[name].size) for name in self.names]

    def __len__(self):
        return len(self.names)

    def read(self, i: int):
        """Encoded bytes and label."""
        offset, size = self._places[i]
        with open(self._path, "rb") as file:  # opened anew each time, so that threads do not share a position
            file.seek(offset)
            return file.read(size), self.labels[i] if self.labels else 0


def is_tar(path) -> bool:
    """Whether a file is named like a tar archive, compressed or not."""
    name = pathlib.Path(path).name.lower()
    return name.endswith((".tar", ".tgz", ".tbz2", ".txz")) or ".tar." in name


_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


def is_compressed(path) -> bool:
    """Whether a file begins as gzip, bzip2 and xz files do."""
    with open(path, "rb") as file:
        return file.read(6).startswith(tuple(_OPENERS))


def decompressed(path, scratch) -> pathlib.Path:
    """A compressed file's content in the file `scratch`, made unless it is there; any other path as it is.

    Raises:
      DataError: the file is damaged.
    """
    path, scratch = pathlib.Path(path), pathlib.Path(scratch)
    if not path.is_file() or not is_compressed(path):
        return path
    if scratch.exists() and scratch.stat().st_mtime_ns >= path.stat().st_mtime_ns:  # of this archive, not of an earlier
        return scratch
    with open(path, "rb") as file:
        start = file.read(6)
    opener = next(opener for magic, opener in _OPENERS.items() if start.startswith(magic))
    temporary = scratch.with_name(f".{scratch.name}.tmp")
    try:
        with opener(path) as packed, open(temporary, "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
        os.replace(temporary, scratch)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again") from None
    finally:
        temporary.unlink(missing_ok=True)
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
            f"{path} has only one class folder, {'/'.join(folders[0])!r}; labels need two, or set "
            "--config.data.labels=False --config.model.num_classes=0"
        )
    if any(len(parts) <= shared for parts in folders):
        stray = next(name for name, parts in zip(names, folders, strict=True) if len(parts) <= shared)
        raise DataError(
            f"{path} has no class folder for {stray!r}; put every image into a folder per class, at least two of them, "
            "or set --config.data.labels=False --config.model.num_classes=0"
        )
    classes = sorted({parts[shared] for parts in folders})
    number = {name: i for i, name in enumerate(classes)}
    return names, [number[parts[shared]] for parts in folders], classes
