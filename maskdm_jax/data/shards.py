"""Sets that are divided into files: which files a path means, and the index of each, which is kept in the cache."""

import concurrent.futures
import contextlib
import glob
import json
import os
import pathlib
import posixpath
import re

import fsspec

from maskdm_jax.data.base import hash_texts
from maskdm_jax.data.files import connect, file_stamp, kind_of, list_folder
from maskdm_jax.data.images import SUFFIXES
from maskdm_jax.data.labels import SPLITS
from maskdm_jax.errors import DataError
from maskdm_jax.storage import cache_dir, is_remote, write_atomically

_KINDS = (".parquet", ".tar")
_REQUESTS = 16  # to a store, at the same time
_FORMAT = "2"  # of indexes


def find_shards(path: str) -> list[str]:
    """The files of a set of shards, in order: the paths or addresses of `.parquet` files or of `.tar` files.

    path: a `.parquet` or `.tar` file; a pattern such as `train-{000..012}.tar` or `data/train-*.parquet`; or a folder
      that holds files of one of these kinds and no images, itself or in subfolders. [] for anything else.

    Raises:
      DataError: a pattern fits no file, or a file of it is missing.
    """
    path = path if is_remote(path) else os.path.expanduser(path)
    if not path.lower().endswith(_KINDS) or os.path.isdir(path):
        return _in_folder(path)
    if os.path.exists(path):  # though its name may look like a pattern
        return [path]
    found = [file for part in _expand(path) for file in (_glob(part) if glob.has_magic(part) else [part])]
    if not found:
        raise DataError(f"{path!r} fits no file")
    with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
        lost = [file for file, there in zip(found, pool.map(_exists, found), strict=True) if not there]
    if lost:
        counted = f" ({len(lost)} of {len(found)} files of {path!r})" if len(found) > 1 else ""
        raise DataError(f"{lost[0]!r} does not exist{counted}")
    return found


def _in_folder(path: str) -> list[str]:
    """The shards under a folder; [] if it is none, or holds an image."""
    found = []
    for name in list_folder(path, depth=3):
        kind = kind_of(name)
        if kind in SUFFIXES:
            return []
        if kind in _KINDS and posixpath.basename(name) != "metadata.parquet":
            found.append(f"{path.rstrip('/')}/{name}")
    if len({kind_of(name) for name in found}) > 1:
        raise DataError(f"{path} holds both .parquet and .tar files; give a pattern, such as {path}/*.parquet")
    return sorted(found)


def _expand(pattern: str) -> list[str]:
    """The texts that a pattern with braces means, as in Bash: {00..12} and {a,b}."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    first, last, words = match.groups()
    parts = words.split(",") if words else [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    return [text for part in parts for text in _expand(pattern[: match.start()] + part + pattern[match.end() :])]


def _glob(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    store, name = connect(pattern)
    return [store.unstrip_protocol(found) for found in sorted(store.glob(name))]


def _exists(file: str) -> bool:
    if not is_remote(file):
        return os.path.exists(file)
    store, name = fsspec.core.url_to_fs(file)
    return store.exists(name)


def relative_names(files: list[str]) -> list[str]:
    """The names of files, relative to the folder that holds them all."""
    shared = posixpath.commonpath([posixpath.dirname(file) for file in files])
    return [posixpath.relpath(file, shared) for file in files]


def of_split(path: str, files: list[str], split: str) -> list[str]:
    """The files of a split: those that have its name as a word in theirs, as Hugging Face reads them.

    split: "" for the only one, or `train`, or all files if no name has such a word.

    Raises:
      DataError: there is no such split, or several and none is `train`.
    """
    words = [re.split(r"[^a-z]+", name.lower()) for name in relative_names(files)]
    splits = [next((word for word in found if word in SPLITS), "") for found in words]
    known = sorted(set(splits))
    if not split and len(known) == 1:
        return files
    wanted = split or "train"
    if wanted not in known:
        named = ", ".join(filter(None, known))
        raise DataError(
            f"{path} has the splits {named}, not {wanted!r}; set split (--config.data.split) to one of them"
            if named
            else f"{path} has no splits; leave out split={split!r}"
        )
    return [file for file, found in zip(files, splits, strict=True) if found == wanted]


def index_path(file: str, suffix: str) -> pathlib.Path:
    """Where the cache keeps what belongs to a file."""
    place = file if is_remote(file) else os.path.abspath(file)
    return cache_dir("shards") / f"{hash_texts([_FORMAT, place])[:32]}{suffix}"


def kept_indexes(files: list[str], build, at_once: int) -> list[dict]:
    """The index of each file, kept in the cache until the size or modification time of the file changes.

    Args:
      files: paths or addresses.
      build: makes the index of a file, a dict for JSON. Its entry `copied`, if there is one, is the size of another
        file that `build` writes, `index_path(file, ".images")`.
      at_once: number of files whose index is built at the same time.
    """
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda file: _kept_index(file, build), files))


def _kept_index(file: str, build) -> dict:
    stamp = file_stamp(file)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        found = json.loads(index_path(file, ".json").read_text())
        copied = "copied" not in found or index_path(file, ".images").stat().st_size == found["copied"]
        if found["stamp"] == stamp and copied:
            return found
    found = build(file) | {"stamp": stamp}
    with contextlib.suppress(OSError):  # without a cache, the index is built each time
        write_atomically(index_path(file, ".json"), json.dumps(found).encode())
    return found
