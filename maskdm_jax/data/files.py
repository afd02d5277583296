"""Images as files: folders, zip archives, object stores."""

import collections
import os
import pathlib
import posixpath
import stat
import sys
import zipfile

import fsspec

from maskdm_jax.data.base import Source, counted, hash_texts
from maskdm_jax.data.images import SUFFIXES
from maskdm_jax.data.labels import SPLITS, differing_folders, find_labels
from maskdm_jax.errors import DataError, prefixed
from maskdm_jax.storage import STORES, is_remote

_BLOCK = 8 << 20  # bytes that are read ahead from a store


class Files(Source):
    """Images that are files, nested or flat: all that have a suffix that Pillow can decode. A subclass reads them."""

    def __init__(self, path, sizes: dict[str, int], labels: bool):
        """Sort images from other files and find their labels.

        Args:
          path: of the whole set, for messages.
          sizes: bytes of each file, by its name relative to `path`.
          labels: whether to find labels; see `labels.find_labels`.

        Raises:
          DataError: there is no image, or labels are wanted and not defined.
        """
        kinds = {name: kind_of(name) for name in sorted(sizes)}
        names = [name for name, kind in kinds.items() if kind in SUFFIXES]
        others = {name: kind for name, kind in kinds.items() if kind not in SUFFIXES}
        if not names:
            found = counted(collections.Counter(others.values())) or "no files"
            raise DataError(f"{path} holds no images that Pillow can decode; it holds {found}")
        numbers, classes, used, notes = [], [], [], []
        if labels:
            visible = [name for name, kind in others.items() if kind != "hidden"]
            numbers, classes, used, notes = self.find_labels(path, names, visible)
        left_aside = collections.Counter(kind for name, kind in others.items() if name not in used)
        files_hash = hash_texts(f"{name} {sizes[name]}" for name in names)
        super().__init__(names, numbers, classes, files_hash, left_aside)
        folders = set(differing_folders(names))
        if len(folders) > 1 and SPLITS.issuperset(map(str.lower, folders)):
            notes.append(f"the images of all splits are used: {', '.join(sorted(folders))}; for one, give its path")
        if left_aside:
            notes.append(f"left aside {counted(left_aside)}")
        self.note(path, notes)

    def find_labels(self, path, names: list[str], others: list[str]):
        """See `labels.find_labels`."""
        return find_labels(path, names, others, self.content)

    def content(self, name: str) -> bytes:
        """The content of a file."""
        raise NotImplementedError

    def image(self, i: int) -> bytes:
        """Encoded bytes."""
        return self.content(self.names[i])


def kind_of(name: str) -> str:
    """The suffix of a file in lower case, "without suffix", or "hidden" for the files of operating systems."""
    if any(part.startswith((".", "__MACOSX")) for part in name.split("/") if part not in (".", "..")):
        return "hidden"
    return posixpath.splitext(name)[1].lower() or "without suffix"


def list_folder(path: str, depth: int):
    """Yield the names of the files under a folder or address, to a depth, as they are found; none without a folder."""
    if is_remote(path):
        store, root = connect(path)
        for folder, _, names in store.walk(root, maxdepth=depth):
            yield from (f"{folder}/{name}".removeprefix(f"{root}/") for name in names)
    elif os.path.isdir(path):
        yield from (name for name, _ in _walk(path, depth))


class ImageFolder(Files):
    """All images under a folder."""

    def __init__(self, path, labels: bool = False):
        self._root = pathlib.Path(path)
        super().__init__(path, dict(_walk(str(self._root))), labels)

    def content(self, name: str) -> bytes:
        """The content of a file."""
        return (self._root / name).read_bytes()


def _walk(root: str, depth: int = sys.maxsize):
    """Yield the names and sizes of the files under a folder and its subfolders, to a depth.

    Links are followed, but not to a folder that contains them. Broken links are listed too, so that reading them
    fails and they are reported.
    """
    pending = [(root, "", ())]
    while pending:
        folder, prefix, above = pending.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in above:
            continue
        above = (*above, (status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except OSError:
                    yield prefix + entry.name, 0
                    continue
                if stat.S_ISDIR(status.st_mode):
                    if len(above) < depth:
                        pending.append((entry.path, f"{prefix}{entry.name}/", above))
                elif stat.S_ISREG(status.st_mode):  # not a pipe: reading one would block
                    yield prefix + entry.name, status.st_size


def file_stamp(path) -> str:
    """Size and modification time of a file, or a store's key for this version of it; empty if there is none."""
    if is_remote(path):
        store, name = fsspec.core.url_to_fs(path)
        return str(store.ukey(name))
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def open_file(path: str):
    """Open a file, on a disk or at an address, to be read from its start to its end."""
    if not is_remote(path):
        return open(path, "rb")
    store, name = fsspec.core.url_to_fs(path)
    return store.open(name, "rb", block_size=_BLOCK, cache_type="readahead")


def read_range(path: str, start: int, size: int) -> bytes:
    """Bytes of a file on a disk or at an address.

    Raises:
      DataError: the file ends earlier.
    """
    if is_remote(path):
        store, name = fsspec.core.url_to_fs(path)
        found = store.cat_file(name, start=start, end=start + size) if size else b""
    else:
        with open(path, "rb") as file:  # for each read: a set may have more files than a process may open
            file.seek(start)
            found = file.read(size)
    if len(found) < size:
        raise DataError(f"{path} ends before byte {start + size}; copy it again")
    return found


class RemoteFolder(Files):
    """All images under an address of an object store, such as gs://bucket/images."""

    def __init__(self, url: str, labels: bool = False):
        self._store, self._root = connect(url)
        found = self._store.find(self._root, detail=True)
        if found.keys() <= {self._root}:
            raise DataError(f"{url} is no folder or is empty; give a folder of images or a prepared set")
        sizes = {name.removeprefix(self._root).lstrip("/"): entry.get("size") for name, entry in found.items()}
        super().__init__(url, sizes, labels)

    def content(self, name: str) -> bytes:
        """The content of a file."""
        return self._store.cat_file(f"{self._root}/{name}")


def connect(url: str):
    """The fsspec file system of an address, and the path in it.

    Raises:
      DataError: the package for this kind of store is missing, or the store cannot be reached.
    """
    _, extra = STORES.get(url.split("://")[0], ("", ""))
    hint = f": pip install -e '.[{extra}]'" if extra else ""
    with prefixed(DataError, f"{url} cannot be reached: ", Exception):  # each store's package raises its own types
        with prefixed(DataError, f"{url} needs a package that is missing{hint} (", ImportError, ")"):
            store, root = fsspec.core.url_to_fs(url)
        store.exists(root)
    return store, root.rstrip("/")


class ZipImages(Files):
    """All images in a zip file, read in place. The file may be on an object store."""

    def __init__(self, path, labels: bool = False):
        self._path, self._archive = str(path), None
        causes = (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError)
        hint = "); give a .zip or a folder of images"
        with prefixed(DataError, f"{path} is not a readable zip file (", causes, hint):
            entries = self._open().infolist()
        # Of entries with one name, the last one counts, as in unpacking.
        super().__init__(path, {entry.filename: entry.file_size for entry in entries if not entry.is_dir()}, labels)

    def content(self, name: str) -> bytes:
        """The content of a file."""
        return self._open().read(name)

    def _open(self):
        if self._archive is None:  # opened once per process; ZipFile serializes reads among threads
            store, path = connect(self._path) if is_remote(self._path) else (None, self._path)
            archive = zipfile.ZipFile(store.open(path) if store else path)
            for entry in archive.infolist():
                if entry.create_system == 0:  # of Windows, where PowerShell separates folders by backslashes
                    entry.filename = entry.filename.replace("\\", "/")
                    archive.NameToInfo[entry.filename] = entry
            self._archive = archive
        return self._archive

    def __getstate__(self):
        return self.__dict__ | {"_archive": None}
