"""Images in databases: LMDB, TFDS data folders, and arrays in batch files."""

import contextlib
import functools
import math
import os
import pathlib
import tarfile
import threading
import weakref
import zipfile

import lmdb
import numpy as np

from maskdm_jax.data.base import WITHOUT_LABELS, RowNames, Source, hash_texts
from maskdm_jax.data.images import is_image
from maskdm_jax.errors import DataError, prefixed
from maskdm_jax.interop import pickles

_OPEN_DATABASES = weakref.WeakValueDictionary()  # by path
_LOCK = threading.Lock()  # of threads that open a database or load a file of arrays
_NOT_IMAGES = {"length", "__len__", "__keys__", "num-samples", "num_samples"}


class LmdbImages(Source):
    """All values of an LMDB as images: encoded files, as in LSUN, or raw pixels of square RGB images.

    The keys are the names and give the order.
    """

    def __init__(self, path, labels: bool = False):
        if labels:
            raise DataError(f"{path} is an LMDB, which has no labels; {WITHOUT_LABELS}")
        self._path, self._database = os.path.realpath(path), None
        with prefixed(DataError, f"{path} is not a readable LMDB (", lmdb.Error, "); copy it again"):
            database = self._open()
            needed = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
            there = os.path.getsize(os.path.join(self._path, "data.mdb"))
            if there < needed:  # reading what is missing would end the process
                raise lmdb.Error(f"{there} of {needed} bytes are there")
            with database.begin(buffers=True) as transaction:
                sizes = {str(key, "utf-8", "surrogateescape"): len(value) for key, value in transaction.cursor()}
        names = [key for key in sizes if key not in _NOT_IMAGES]
        super().__init__(names, files_hash=hash_texts(f"{name} {sizes[name]}" for name in names))
        if not self.names:
            raise DataError(f"{path} is empty; copy it again")
        first = self._value(0)
        self._raw = len(first) == 3 * math.isqrt(len(first) // 3) ** 2 and not is_image(first)

    def image(self, i: int):
        """Encoded bytes, or uint8 [S, S, 3]."""
        value = self._value(i)
        if not self._raw:
            return value
        side = math.isqrt(len(value) // 3)
        return np.frombuffer(value, np.uint8).reshape(side, side, 3)

    def _value(self, i: int) -> bytes:
        with self._open().begin() as transaction:
            return transaction.get(self.names[i].encode("utf-8", "surrogateescape"))

    def _open(self):
        if self._database is None:
            with _LOCK:  # a process must not open a database twice
                database = _OPEN_DATABASES.get(self._path)
                if database is None:  # without LMDB's own locks: the disk may be read-only
                    database = lmdb.open(self._path, readonly=True, lock=False, readahead=False, max_readers=1024)
                    _OPEN_DATABASES[self._path] = database
                self._database = database
        return self._database

    def __getstate__(self):
        return self.__dict__ | {"_database": None}


class TfdsImages(Source):
    """A split of a TFDS data folder (.../NAME/VERSION), read without TensorFlow."""

    def __init__(self, path, labels: bool = False, split: str = ""):
        """Open a split, `train` when empty.

        Raises:
          DataError: the folder was prepared as TFRecords, or has no such split, image or label.
        """
        import tensorflow_datasets as tfds  # seconds to import

        split = split or "train"
        with prefixed(DataError, f"{path}, split {split!r}: ", Exception):  # TFDS raises many types
            builder = tfds.builder_from_directory(os.fspath(path))
            features = builder.info.features
            images = [name for name in features if isinstance(features[name], tfds.features.Image)]
            if not images:
                raise DataError(f"{path} has no image; its features are {', '.join(features)}")
            again = "); prepare it again with tfds build --file_format=array_record"
            with prefixed(DataError, f"{path} was not prepared for random access (", NotImplementedError, again):
                self._records = builder.as_data_source(split, decoders={images[0]: tfds.decode.SkipDecoding()})
        kinds = [name for name in features if isinstance(features[name], tfds.features.ClassLabel)]
        if labels and len(kinds) != 1:
            raise DataError(f"{path} has {len(kinds)} class labels ({', '.join(kinds)}), not one; {WITHOUT_LABELS}")
        self._image, self._label = images[0], kinds[0] if labels else None
        known = builder.info.full_name, split, str(len(self._records)), str(int(builder.info.dataset_size))
        self.files_hash, self.left_aside = hash_texts(known), {}
        self.names = RowNames([f"{pathlib.Path(path).parent.name}/{split}"], [len(self._records)])
        self.classes = list(features[self._label].names) if labels else []

    @functools.cached_property
    def labels(self) -> list[int]:
        """Class numbers; computing them reads all records."""
        return [self.read(i)[1] for i in range(len(self))] if self._label else []

    def empty_classes(self) -> list[str]:
        """Unknown, because that would read all records."""
        return []

    def labels_hash(self) -> str:
        """Empty: the labels of a version of a TFDS set are fixed."""
        return ""

    def read(self, i: int):
        """Encoded bytes and label."""
        record = self._records[i]
        return record[self._image], int(record[self._label]) if self._label else 0


class ArrayBatches(Source):
    """Images in a few large files of arrays, as CIFAR-10 and the down-sampled ImageNet are published.

    A file holds `data`, uint8 [n, 3 * S * S] (one colour plane after the other), and `labels`. It is an .npz, a
    pickled dict (read without executing anything: arrays, numbers, text, lists and dicts), or CIFAR's binary records.
    """

    def __init__(self, files: list[tuple[str, str]], classes: list[str], *, first_label: int = 0):
        """Load every file once, for its labels; two files at a time stay in memory.

        Args:
          files: pairs of a path and "", or of an archive (zip, tar) and the name of a member, in order.
          classes: names; [] for no labels.
          first_label: number of the first class in the files.

        Raises:
          DataError: a file is damaged or of another kind.
        """
        self._files, self._kept = files, {}
        labels, counts, names = [], [], [pathlib.PurePosixPath(member or path).name for path, member in files]
        for number, name in enumerate(names):
            data, found = self._load(number)
            counts.append(len(data))
            labels += [int(label) - first_label for label in found]
            if len(data) != len(found):
                raise DataError(f"{name} has {len(data)} images and {len(found)} labels; copy it again")
        if classes and labels and not 0 <= min(labels) <= max(labels) < len(classes):
            raise DataError(f"{files[0][0]}: labels {min(labels)} to {max(labels)} are not {len(classes)} classes")
        files_hash = hash_texts(f"{name} {os.path.getsize(path)}" for name, (path, _) in zip(names, files, strict=True))
        super().__init__(RowNames(names, counts), labels if classes else [], classes, files_hash)

    def image(self, i: int):
        """uint8 [S, S, 3]."""
        number, row = self.names.locate(i)
        row = self._load(number)[0][row]
        side = math.isqrt(row.size // 3)
        return np.ascontiguousarray(row.reshape(3, side, side).transpose(1, 2, 0))

    def _load(self, number: int):
        with _LOCK:
            if number not in self._kept:
                while len(self._kept) > 1:
                    del self._kept[next(iter(self._kept))]
                self._kept[number] = _read_arrays(*self._files[number])
            return self._kept[number]


def _read_arrays(path: str, member: str):
    """(data, labels) of a file."""
    where = f"{path}:{member}" if member else path
    try:
        with contextlib.ExitStack() as stack:
            if not member:
                file = stack.enter_context(open(path, "rb"))
            elif zipfile.is_zipfile(path):
                file = stack.enter_context(stack.enter_context(zipfile.ZipFile(path)).open(member))
            else:
                file = stack.enter_context(tarfile.open(path)).extractfile(member)
            if where.endswith(".npz"):
                with np.load(file, allow_pickle=False) as stored:
                    found = {"data": stored["data"], "labels": stored["labels"]}
            elif where.endswith(".bin"):
                records = np.frombuffer(file.read(), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
                found = {"data": records[:, 1:], "labels": records[:, 0]}
            else:
                found = pickles.load(file.read(), _STAND_INS, encoding="bytes")
                found = {str(k, "ascii") if isinstance(k, bytes) else k: v for k, v in found.items()}
        data, labels = found["data"], found["labels"]
        data = data.array() if isinstance(data, _Array) else data
        labels = np.fromiter(labels, np.int64)
        side = math.isqrt(data.shape[1] // 3)
        if data.dtype != np.uint8 or data.ndim != 2 or side * side * 3 != data.shape[1]:
            raise ValueError(f"data is {data.dtype} {data.shape}, not uint8 [n, 3 * S * S]")
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # whatever a damaged file makes of its reader
        raise DataError(f"{where} is damaged or of another kind ({error}); copy it again") from None
    return data, labels


class _Array:
    """Stands in for an array of bytes. NumPy's own constructor would allocate as much as a pickle claims."""

    def __init__(self, *_):
        self._state = None

    def set_state(self, state) -> None:
        """Keep the array's shape and content."""
        self._state = state

    def array(self) -> np.ndarray:
        """The array, made of its bytes."""
        _, shape, _, fortran, content = self._state
        if fortran or math.prod(shape) != len(content):
            raise ValueError(f"an array of shape {shape} has {len(content)} bytes, not rows of one byte per number")
        return np.frombuffer(content, np.uint8).reshape(shape)


def _encode(text, coding) -> bytes:
    """Stands in for the function by which Python 3 writes bytes for Python 2."""
    if not isinstance(text, str) or coding not in ("latin1", b"latin1"):
        raise ValueError("it holds text of another coding than latin1")
    return text.encode("latin1")


_STAND_INS = {
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.ndarray": None,  # an argument of _reconstruct
    "numpy.dtype": pickles.Skipped("numpy.dtype"),
    "_codecs.encode": _encode,
}
