"""Images as files: folders, zip and tar archives, object stores."""

import bz2
import collections
import gzip
import lzma
import os
import pathlib
import posixpath
import shutil
import stat
import tarfile
import zipfile
import zlib

import fsspec

from maskdm_jax.data.base import Source, counted, hash_texts
from maskdm_jax.data.images import MAX_PIXELS, SUFFIXES
from maskdm_jax.data.labels import SPLITS, find_labels, level_of_difference, note_of_imagenet
from maskdm_jax.errors import DataError, prefixed
from maskdm_jax.storage import atomic_path

_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_ZSTD = b"\x28\xb5\x2f\xfd"
_BOMB_BYTES, _BOMB_RATIO = 8 * MAX_PIXELS, 100  # 8 bytes: 16 bits of red, green, blue and alpha
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}  # that Python reads


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
        kinds = {name: _kind(name) for name in sorted(sizes)}
        names = [name for name, kind in kinds.items() if kind in SUFFIXES]
        others = [name for name, kind in kinds.items() if kind not in SUFFIXES and kind != "hidden"]
        found = find_labels(path, names, others, self.content) if labels and names else ([], [], [], [])
        numbers, classes, used, notes = found
        left_aside = collections.Counter(
            kinds[name] for name in kinds if kinds[name] not in SUFFIXES and name not in used
        )
        if not names:
            raise DataError(
                f"{path} holds no images that Pillow can decode; it holds {counted(left_aside) or 'no files'}"
            )
        files_hash = hash_texts(f"{name} {sizes[name]}" for name in names)
        super().__init__(names, numbers, classes, files_hash, left_aside)
        shared, folders = level_of_difference(names)
        first = {parts[shared] if len(parts) > shared else "" for parts in folders}
        if len(first) > 1 and SPLITS.issuperset(map(str.lower, first)):
            notes.append(f"the images of all splits are used: {', '.join(sorted(first))}; for one, give its path")
        if left_aside:
            notes.append(f"left aside {counted(left_aside)}")
        self.note(path, notes + note_of_imagenet(classes))

    def content(self, name: str) -> bytes:
        """The content of a file."""
        raise NotImplementedError

    def image(self, i: int) -> bytes:
        """Encoded bytes."""
        return self.content(self.names[i])


def _kind(name: str) -> str:
    """The suffix of a file in lower case, "without suffix", or "hidden" for the files of operating systems."""
    if any(part.startswith((".", "__MACOSX")) for part in name.split("/") if part not in (".", "..")):
        return "hidden"
    return posixpath.splitext(name)[1].lower() or "without suffix"


class ImageFolder(Files):
    """All images under a folder."""

    def __init__(self, path, labels: bool = False):
        self._root = pathlib.Path(path)
        super().__init__(path, dict(_walk(str(self._root))), labels)

    def content(self, name: str) -> bytes:
        """The content of a file."""
        return (self._root / name).read_bytes()

    def stamp(self, i: int) -> str:
        """Size and modification time of the file."""
        return file_stamp(self._root / self.names[i])


def _walk(root: str):
    """Yield the names and sizes of the files under a folder.

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
                    pending.append((entry.path, f"{prefix}{entry.name}/", above))
                elif stat.S_ISREG(status.st_mode):  # not a pipe: reading one would block
                    yield prefix + entry.name, status.st_size


def file_stamp(path) -> str:
    """Size and modification time of a file; empty if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


class RemoteFolder(Files):
    """All images under an address of an object store, such as gs://bucket/images."""

    def __init__(self, url: str, labels: bool = False):
        self._store, self._root = connect(url)
        found = self._store.find(self._root, detail=True)
        if not found:
            raise DataError(f"{url} does not exist or is empty; give a folder of images or a prepared set")
        sizes = {name.removeprefix(self._root).lstrip("/"): entry.get("size") for name, entry in found.items()}
        super().__init__(url, sizes, labels)

    def content(self, name: str) -> bytes:
        """The content of a file."""
        return self._store.cat_file(f"{self._root}/{name}")

    def stamp(self, i: int) -> str:
        """The store's key for this version of the file."""
        return self._store.ukey(f"{self._root}/{self.names[i]}")


def connect(url: str):
    """The fsspec file system of an address, and the path in it.

    Raises:
      DataError: the package for this kind of store is missing, or the store cannot be reached.
    """
    with prefixed(DataError, f"{url} cannot be reached: ", Exception):  # each store's package raises its own types
        store, root = fsspec.core.url_to_fs(url)
        store.exists(root)
    return store, root.rstrip("/")


class ZipImages(Files):
    """All images in a zip file, read in place. The file may be on an object store."""

    def __init__(self, path, labels: bool = False):
        self._path, self._archive = str(path), None
        broken = (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError)
        with prefixed(
            DataError, f"{path} is not a readable zip file (", broken, "); give a .zip or a folder of images"
        ):
            entries = {_zip_name(info): info for info in self._open().infolist()}  # of one name, the last
        entries = {name: info for name, info in entries.items() if not name.endswith("/")}
        locked = [name for name, info in entries.items() if info.flag_bits & 1]
        if locked:
            raise DataError(f"{path} is encrypted ({locked[0]!r} needs a password); unpack it and give the folder")
        strange = [name for name, info in entries.items() if info.compress_type not in _METHODS]
        if strange:
            raise DataError(f"{path} is compressed by a method that Python cannot read ({strange[0]!r}); unpack it")
        self._stored = {name: info.filename for name, info in entries.items() if name != info.filename}
        super().__init__(path, {name: info.file_size for name, info in entries.items()}, labels)

    def content(self, name: str) -> bytes:
        """The content of a file."""
        info = self._info(name)
        if info.file_size > _BOMB_BYTES and info.file_size > _BOMB_RATIO * info.compress_size:
            raise DataError(
                f"it unpacks from {info.compress_size:,} to {info.file_size:,} bytes, like a decompression bomb; if it "
                "is none, unpack the archive and give the folder"
            )
        return self._open().read(info)

    def stamp(self, i: int) -> str:
        """Checksum of the file."""
        return f"{self._info(self.names[i]).CRC:08x}"

    def _info(self, name: str) -> zipfile.ZipInfo:
        return self._open().getinfo(self._stored.get(name, name))

    def _open(self):
        if self._archive is None:  # opened once per process; ZipFile serializes reads among threads
            store, path = connect(self._path) if "://" in self._path else (None, self._path)
            self._archive = zipfile.ZipFile(store.open(path) if store else path)
        return self._archive

    def __getstate__(self):
        return self.__dict__ | {"_archive": None}


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Name of an entry. Some programs on Windows write backslashes, which no file name contains there."""
    return info.filename.replace("\\", "/") if info.create_system == 0 else info.filename


class TarImages(Files):
    """All images in a tar file, read in place. Links among its members are followed."""

    def __init__(self, path, labels: bool = False, scratch=None):
        """Read the headers.

        scratch: path of a file to decompress a compressed archive into; it is left there and used the next time.

        Raises:
          DataError: the file is damaged, or compressed and there is no scratch: a compressed archive can only be read
            from its start.
        """
        self._path = str(_decompressed(path, scratch))
        causes = (tarfile.TarError, EOFError, UnicodeDecodeError)
        broken = prefixed(DataError, f"{path} is not a readable tar file (", causes, "); copy it again")
        with broken, tarfile.open(self._path, "r:") as archive:
            members = {member.name: member for member in archive}  # of members with one name, the last counts
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(512) != bytes(512):  # tarfile takes a damaged header for the end
                raise DataError(f"{path} is cut short or damaged at byte {archive.offset}; copy it again")
        found = [name for name, m in members.items() if (m.isreg() and not m.issparse()) or m.issym() or m.islnk()]
        self._places, self._stamp = {name: _place(members, members[name]) for name in found}, file_stamp(path)
        super().__init__(path, {name: members[name].size for name in found}, labels)

    def content(self, name: str) -> bytes:
        """The content of a file."""
        if self._places[name] is None:
            raise DataError("a link to no file of the archive")
        offset, size = self._places[name]
        with open(self._path, "rb") as file:  # opened for each read, because threads would share the position
            file.seek(offset)
            return file.read(size)

    def stamp(self, i: int) -> str:
        """Size and modification time of the archive when it was opened."""
        return self._stamp


def _place(members: dict[str, tarfile.TarInfo], member) -> tuple[int, int] | None:
    """(offset, size) of a member's content, through links; None if it is not in the archive."""
    for _ in range(len(members)):
        if member is None or member.isreg():
            return member and (member.offset_data, member.size)
        target = member.linkname
        if member.issym():  # relative to the link; a hard link's target is relative to the root of the archive
            target = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), target))
        member = members.get(target) or members.get(f"./{target}")
    return None


def is_tar(path) -> bool:
    """Whether a file is named like a tar archive, compressed or not."""
    name = pathlib.Path(path).name.lower()
    return name.endswith((".tar", ".tgz", ".tbz2", ".txz")) or ".tar." in name


def _decompressed(path, scratch) -> pathlib.Path:
    """`path` itself if it is not compressed; else `scratch`, a file with its content, which is written if needed."""
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
    if scratch.exists() and scratch.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        return scratch
    causes = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
    broken = prefixed(DataError, f"{path} is damaged (", causes, "); copy it again")
    with broken, atomic_path(scratch) as temporary, opener(path) as packed, open(temporary, "wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    return scratch
