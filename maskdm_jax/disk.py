"""Files written whole or not at all, and folders that one process writes at a time."""

import contextlib
import errno
import fcntl
import os
import pathlib


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path beside `path`, which takes its place if all went well and else is removed.

    Raises:
      OSError: the path is a folder or a device, which must not be replaced; or what the disk says.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path, content: bytes) -> None:
    """Write a file whole or not at all; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def alone_in(folder):
    """Holds a lock on a folder, which ends with the process at the latest. Where the disk knows no locks, none is held.

    Raises:
      BlockingIOError: another process holds it.
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
