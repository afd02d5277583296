"""Paths on disks and in object stores, atomic writes, folders that one process owns, and the cache folder.

An object store has no append, no rename and no locks. Files that grow are therefore written to this machine and
uploaded whole (`mirrored`), and an object with a heartbeat replaces the lock of a folder (`lock_dir`).
"""

import contextlib
import errno
import fcntl
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
import uuid

import fsspec
from etils import epath

from maskdm_jax.errors import ConfigError, first_line

log = logging.getLogger(__name__)

STORES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> its package, our extra that installs it
UPLOAD_EVERY = 10.0  # seconds between uploads of a mirrored file, ...
UPLOAD_RATE = 1e6  # ... and at most so many bytes per second of each
HEARTBEAT, PATIENCE = 10.0, 30.0  # seconds between the signs of life of an owner, and until it counts as dead
REQUEST_LIMIT = 300  # seconds that a request to a store may take, which else could wait for its answer for ever
STALLED = "60"  # seconds without a byte after which TensorStore, which moves the checkpoints, repeats a request
for _name in ("gcs", "gs"):  # for images too, which are read without `location`; s3fs has limits of its own
    fsspec.config.conf.setdefault(_name, {}).setdefault("requests_timeout", REQUEST_LIMIT)

_HEADS = {
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` fetches the file itself",
    b"<": "a page of HTML or XML, as a download that failed leaves it",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; unpack it first",
}


def foreign_kind(start: bytes) -> str:
    """What a file is that should hold weights or images, if its first bytes show it; "" if they do not."""
    if not start:
        return "an empty file"
    return next((kind for head, kind in _HEADS.items() if start.lstrip().startswith(head)), "")


def is_remote(path) -> bool:
    """Whether a path is an address, such as gs://bucket/run."""
    return "://" in os.fspath(path)


def location(path):
    """The absolute path of a file or folder, or its address in an object store; both have the methods of a Path.

    Raises:
      ConfigError: an address of an unknown kind, without a bucket, or of a store whose package is not installed.
    """
    if not is_remote(path):
        return pathlib.Path(os.path.expanduser(path)).absolute()
    scheme, _, rest = os.fspath(path).partition("://")
    if scheme not in STORES or not rest.strip("/"):
        raise ConfigError(f"{path}: give a path on a disk or an address gs://BUCKET/... or s3://BUCKET/...")
    package, extra = STORES[scheme]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{path}: reading and writing {scheme}:// needs {package}; pip install 'maskdm-jax[{extra}]'")
    for name in ("gcs", *STORES):  # with that cache, what another process writes is not seen
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    os.environ.setdefault("EPATH_USE_TF", "0")  # where TensorFlow is installed, it does not know s3://
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", STALLED)
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    return epath.Path(f"{scheme}://{rest.rstrip('/')}")


def _store(path):
    """The fsspec file system of an address."""
    return fsspec.url_to_fs(os.fspath(path))[0]


@contextlib.contextmanager
def local_copy(path):
    """Yield a path on this machine with the content of `path`, a file or folder: itself, if it is on a disk.

    Raises:
      ConfigError: the copy does not fit on the disk of temporary files.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="maskdm-") as scratch:
        target = os.path.join(scratch, path.name)
        try:
            _store(path).get(os.fspath(path), target, recursive=path.is_dir())
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(f"{path} does not fit on the disk of {scratch}; set TMPDIR to a larger one") from error
        yield pathlib.Path(target)


def read(path) -> bytes:
    """The content of a file, which another process may replace meanwhile."""
    if not is_remote(path):
        return location(path).read_bytes()
    return _store(path).cat_file(os.fspath(path))  # open() at s3:// fails on a new version


def remove_tree(folder) -> None:
    """Delete a folder with all that it holds, if it exists."""
    epath.Path(folder).rmtree(missing_ok=True)


def move(folder, target) -> None:
    """Rename a folder; in an object store, copy it and delete the original."""
    if not is_remote(folder):
        os.replace(folder, target)
        return
    _store(folder).copy(os.fspath(folder), os.fspath(target), recursive=True)
    remove_tree(folder)


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path; its file replaces `path` on success and is removed on failure. The folder is created.

    Raises:
      OSError: `path` is a folder or a device, which must not be replaced, or writing fails.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as scratch:
            temporary = pathlib.Path(scratch) / location(path).name
            yield temporary
            _upload(temporary, path)
        return
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several hosts, which may have the same number, write into a shared cache.
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename is None:  # of a write to a full disk
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path, content: bytes) -> None:
    """Write a file completely or not at all; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def upload(folder: pathlib.Path, target) -> None:
    """Write the files of a folder to an object store, in alphabetical order; see `_upload`."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        _upload(file, target / str(file.relative_to(folder)))


def _upload(file: pathlib.Path, target) -> None:
    """Write a file to an object store, where it appears when it is complete.

    Raises:
      OSError: the store refuses it, or does not answer after the retries of its package.
    """
    try:
        _store(target).put_file(os.fspath(file), os.fspath(target))
    except Exception as error:  # each package has types of its own
        raise OSError(f"{target} cannot be written ({first_line(error)})") from error


@contextlib.contextmanager
def mirrored(folder, *, restore=(), active: bool = True):
    """Yield a folder on this machine whose files appear in `folder`: that one itself, if it is on a disk.

    For an object store, it is a temporary one. A thread uploads files that changed, whole, every `UPLOAD_EVERY`
    seconds, and large ones less often; what remains is uploaded at the end.

    Args:
      folder: from `location`.
      restore: names of files to download first, if they exist.
      active: whether this process writes; one of several does.

    Yields:
      (local folder, function that uploads what has changed).

    Raises:
      OSError: an upload at the end or by the function fails; between, it is a warning, and repeated.
    """
    if not is_remote(folder):
        yield folder, lambda: None
        return
    with tempfile.TemporaryDirectory(prefix="maskdm-") as scratch:
        local = pathlib.Path(scratch)
        if not active:
            yield local, lambda: None
            return
        for name in restore:
            with contextlib.suppress(FileNotFoundError):
                (local / name).write_bytes((folder / name).read_bytes())
        mirror = _Mirror(local, folder)
        try:
            yield local, mirror.upload
        except BaseException:
            try:
                mirror.close()
            except OSError as error:  # what ended the run is more important
                log.warning("%s", error)
            raise
        mirror.close()


class _Mirror:
    """Uploads the files of a folder that have changed since their last upload."""

    def __init__(self, local: pathlib.Path, remote):
        self._local, self._remote, self._failed = local, remote, False
        self._seen = {file: _version(file) for file in local.iterdir()}  # -> size and time of change
        self._due, self._lock, self._stop = {}, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def upload(self, *, all_files: bool = True) -> None:
        """Upload what has changed; not `all_files`: except large ones that were uploaded recently."""
        with self._lock:
            # A temporary file may be gone before its turn comes.
            for file in sorted(path for path in self._local.rglob("*") if path.suffix != ".tmp" and path.is_file()):
                version = _version(file)
                if self._seen.get(file) != version and (all_files or time.monotonic() >= self._due.get(file, 0)):
                    _upload(file, self._remote / str(file.relative_to(self._local)))
                    self._seen[file] = version
                    self._due[file] = time.monotonic() + version[0] / UPLOAD_RATE

    def _run(self) -> None:
        while not self._stop.wait(UPLOAD_EVERY):
            try:
                self.upload(all_files=False)
                self._failed = False
            except OSError as error:
                if not self._failed:  # said once until it works again
                    log.warning("%s; trying again", error)
                self._failed = True

    def close(self) -> None:
        """Upload the rest."""
        self._stop.set()
        self._thread.join()
        self.upload()


def _version(file: pathlib.Path) -> tuple[int, int]:
    return file.stat().st_size, file.stat().st_mtime_ns


@contextlib.contextmanager
def _lease(folder):
    """Own a folder of an object store: write an object with a new number again and again, and delete it at the end.

    The clocks of two machines need not agree: an owner is dead if its object does not change for `PATIENCE` seconds.

    Raises:
      BlockingIOError: the owner lives.
    """
    path, owner = folder / "owner.json", f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex[:8]}"
    before = _read(path)
    if before:
        log.warning("%s was owned by %s; waiting %.0f s for a sign of life", folder, before["owner"], PATIENCE)
        time.sleep(PATIENCE)
        now = _read(path)
        if now and now != before:
            message = f"{now['owner']} is writing there; wait for it"
            raise BlockingIOError(errno.EWOULDBLOCK, message, str(folder))
    done = threading.Event()
    beat = lambda count: write_atomically(path, json.dumps(dict(owner=owner, beat=count)).encode())

    def live():
        for count in itertools.count(1):
            if done.wait(HEARTBEAT):
                return
            with contextlib.suppress(Exception):  # of any type: a store that refuses now may answer at the next beat
                other = _read(path)
                if other and other["owner"] != owner:  # this process was taken for dead: it must not write any more
                    print(f"error: {folder} was taken over by {other['owner']}", file=sys.stderr, flush=True)
                    os._exit(1)
                beat(count)

    beat(0)
    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink()


def _read(path) -> dict | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(read(path))
    return None


@contextlib.contextmanager
def lock_dir(folder):
    """Be the one process that writes to a folder, which is created. Does nothing on a file system without locks.

    Raises:
      BlockingIOError: another process writes there.
    """
    if is_remote(folder):
        with _lease(folder):
            yield
        return
    os.makedirs(folder, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = "another process is writing there; wait for it"
            raise BlockingIOError(errno.EWOULDBLOCK, message, str(folder)) from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def cache_dir(kind: str) -> pathlib.Path:
    """Folder `kind` of the cache: $MASKDM_CACHE, else maskdm_jax in $XDG_CACHE_HOME or ~/.cache.

    Raises:
      OSError: this user has no home folder.
    """
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "maskdm_jax"
    try:
        return pathlib.Path(os.environ.get("MASKDM_CACHE") or default).expanduser().absolute() / kind
    except RuntimeError:
        raise OSError("there is no home folder for the cache; set MASKDM_CACHE to a folder") from None
