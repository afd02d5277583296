"""Atomic writes of files, locks of folders, and the cache folder."""

import contextlib
import errno
import fcntl
import os
import pathlib

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
    found = [kind for head, kind in _HEADS.items() if start.lstrip().startswith(head)]
    return "".join(found) if start else "an empty file"


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; it replaces `path` on success and is removed on failure.

    Raises:
      OSError: `path` is a folder or a device, which must not be replaced, or writing fails.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
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


@contextlib.contextmanager
def lock_dir(folder):
    """Hold an exclusive lock on a folder. Does nothing on a file system without locks.

    Raises:
      BlockingIOError: another process holds the lock.
    """
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
