"""PyTorch's checkpoint files, read and written without PyTorch.

Both formats are read: the zip archive of PyTorch 1.6 and later, and the stream before it. The zip archive is written,
in the form that `torch.load(weights_only=True)` accepts. Reading executes nothing: a `Skipped` takes the place of
everything that is not a tensor, a number, a text or a plain container; that of a namespace keeps its settings.

Memory stays within a small multiple of the file's size: see `interop.pickles`; tensors are views of their storages, and
entries of an archive may neither overlap nor be compressed.
"""

import argparse
import collections
import dataclasses
import io
import math
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np

from maskdm_jax.errors import TorchFileError, prefixed
from maskdm_jax.interop import pickles
from maskdm_jax.interop.pickles import Skipped
from maskdm_jax.storage import atomic_path, foreign_kind, location

STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_STREAM_MAGIC, _STREAM_VERSION = 0x1950A86A20F9469CFC6C, 1001
_ALIGNMENT = 64  # bytes
# What random bytes make `zipfile` and NumPy raise.
_DAMAGE = (zipfile.BadZipFile, EOFError, LookupError, TypeError, ValueError, struct.error, OverflowError, RuntimeError)


def read(path):
    """Read a `.pt` file: nested dicts, lists, tuples, numbers, strings, None, NumPy arrays, and `Skipped` for the rest.

    Arrays are read-only views of the file's content; bfloat16 comes as `ml_dtypes.bfloat16`. NumPy's numbers come as
    Python's. Containers can be nested deeply, or contain themselves.

    Raises:
      TorchFileError: the message names the file and what is wrong with it.
      OSError: the file cannot be opened.
    """
    path = pathlib.Path(path)
    damaged = prefixed(TorchFileError, f"{path} is damaged or not a PyTorch checkpoint (", _DAMAGE, ")")
    with damaged, prefixed(TorchFileError, f"{path}: ", pickle.UnpicklingError):
        is_zip = check_head(path).startswith(b"PK\x03\x04")
        return _read_zip(path) if is_zip else _read_stream(path.read_bytes())


def check_head(path: pathlib.Path) -> bytes:
    """Return the first bytes of a file of weights.

    Raises:
      TorchFileError: they show what it is instead: what a failed download leaves, or a compressed file.
      OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if instead := foreign_kind(head):
        raise TorchFileError(f"{path} is {instead}")
    return head


def _need(ok, message: str) -> None:
    if not ok:
        raise pickle.UnpicklingError(message)


# --- Reading ------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Storage:
    """Numbers that tensors are views of."""

    dtype: np.dtype
    size: int
    numbers: np.ndarray | None = None  # [size]


def _tensor(storage, offset, shape, strides, *_) -> np.ndarray:
    """The stand-in for PyTorch's `_rebuild_tensor_v2`; offset and strides count numbers."""
    if isinstance(storage, Skipped):
        return storage
    sound = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    sound = sound and all(type(n) is int for n in (offset, *shape, *strides))
    _need(sound and len(shape) == len(strides) <= 32, "a tensor's description is damaged")
    _need(min(offset, *shape, *strides, 0) >= 0, "a tensor has a negative size, stride or offset")
    span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    inside = offset + span <= storage.size and math.prod(shape) <= storage.size
    _need(inside, f"a tensor of shape {shape} reaches beyond its storage of {storage.size} numbers")
    strides = tuple(n * storage.dtype.itemsize for n in strides)
    return np.lib.stride_tricks.as_strided(storage.numbers[offset:], shape, strides, writeable=False)


# What follows is bounded: a pickle can ask again and again for the same conversion of the same long text.


def _encoded(text, _):
    """The stand-in for `_codecs.encode`, by which pickles of protocol 2 keep bytes; long ones are not needed here."""
    return text.encode("latin1") if len(text) <= 16 else Skipped("bytes")


class _NumpyType:
    """The stand-in for NumPy's `dtype`; `code` is such as "f8"."""

    def __init__(self, code, *_):
        self.code = code

    def set_state(self, state) -> None:
        """Refuse numbers of big-endian machines, which would be read wrongly."""
        _need(isinstance(state, tuple) and ">" not in state, "it holds a number of a big-endian machine")


def _numpy_number(dtype, content=b""):
    """The stand-in for NumPy's `scalar`."""
    known = isinstance(dtype, _NumpyType) and dtype.code in _NUMBERS
    return np.frombuffer(content, dtype.code)[0].item() if known else Skipped("numpy.scalar")


class _Namespace(Skipped):
    """The stand-in for `argparse.Namespace`, in which programs keep settings; their values are of any kind."""

    __slots__ = ("settings",)

    def __init__(self, *_):
        super().__init__("argparse.Namespace")
        self.settings = {}

    def set_state(self, state) -> None:
        """Take the attributes."""
        self.settings = state if isinstance(state, dict) else {}


_NUMBERS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")
_STAND_INS = {
    "argparse.Namespace": _Namespace,
    "collections.OrderedDict": lambda: {},
    "collections.defaultdict": lambda *_: {},
    "_codecs.encode": _encoded,
    "numpy.dtype": _NumpyType,
    "numpy.core.multiarray.scalar": _numpy_number,
    "numpy._core.multiarray.scalar": _numpy_number,
    "torch.Size": lambda sizes: sizes,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
} | {f"torch.{name}": dtype for name, dtype in STORAGES.items()}


def _load(content, find_storage, make_tensor=_tensor):
    """Read a pickle of containers and tensors; `find_storage(dtype, key, size)` gives a `_Storage`."""
    tensors = {f"torch._utils._rebuild_tensor{version}": make_tensor for version in ("", "_v2")}
    # Of types that NumPy lacks, such as 8-bit floating point.
    tensors["torch._utils._rebuild_tensor_v3"] = lambda *args: Skipped(f"{getattr(args[6], 'kind', '')} tensor")

    def persistent_load(entry):
        sound = isinstance(entry, tuple) and len(entry) >= 5 and entry[0] == "storage"
        _need(sound, "the pickle refers to something outside it that is not a storage")
        _, dtype, key, _, size, *view = entry
        if isinstance(dtype, Skipped):
            return dtype
        sound = isinstance(dtype, np.dtype) and isinstance(key, str) and type(size) is int and size >= 0
        _need(sound, "a storage's description is damaged")
        _need(not any(view), "a storage is a view of another one, which is not supported")
        return find_storage(dtype, key, size)

    return pickles.load(content, _STAND_INS | tensors, persistent_load=persistent_load, skip=True)


def _read_zip(path: pathlib.Path):
    with zipfile.ZipFile(path) as archive:
        length, infos = path.stat().st_size, archive.infolist()
        for info in infos:
            _need(0 <= info.header_offset < length, f"entry {info.filename!r} lies outside the file")
            stored = info.compress_type == zipfile.ZIP_STORED
            _need(stored, f"entry {info.filename!r} is compressed; PyTorch never does that; refused")
        _need(
            sum(info.file_size for info in infos) <= length, "its entries claim more bytes than the file has; refused"
        )
        entries = {info.filename: info for info in infos}
        found = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        _need(len(found) == 1, "it is a zip file, but no PyTorch checkpoint: there is no data.pkl in it")
        prefix = found[0][: -len("data.pkl")]
        order = entries.get(f"{prefix}byteorder")
        little = order is None or archive.read(order) == b"little"
        _need(little, "it was written on a big-endian machine, which is not supported")
        storages = {}

        def find_storage(dtype, key, size):
            if key not in storages:
                name = f"{prefix}data/{key}"
                _need(name in entries, f"entry {name!r} is missing")
                content = archive.read(entries[name])
                whole = len(content) == size * dtype.itemsize
                _need(whole, f"entry {name!r} has {len(content)} bytes, not {size} numbers of {dtype}")
                storages[key] = _Storage(dtype, size, np.frombuffer(content, dtype))
            return _same(storages[key], key, dtype, size)

        return _load(archive.read(entries[found[0]]), find_storage)


def _same(storage: _Storage, key: str, dtype, size: int) -> _Storage:
    _need((storage.dtype, storage.size) == (dtype, size), f"storage {key!r} is described in two ways")
    return storage


def _read_stream(content: bytes):
    """The format before PyTorch 1.6: pickles of a magic number, version, system, content and keys; then numbers."""
    file, storages = io.BytesIO(content), {}

    def find_storage(dtype, key, size):
        return _same(storages.setdefault(key, _Storage(dtype, size)), key, dtype, size)

    message = "it is no PyTorch checkpoint: it starts neither as a zip nor as the older format"
    _need(content.startswith(pickle.PROTO) and _load(file, None) == _STREAM_MAGIC, message)
    version, system = _load(file, None), _load(file, None)
    _need(version == _STREAM_VERSION, f"its format version is not {_STREAM_VERSION}")
    little = not isinstance(system, dict) or system.get("little_endian") is not False
    _need(little, "it was written on a big-endian machine, which is not supported")
    # The numbers come last, so the content is read twice: the first time for its storages alone.
    start = file.tell()
    _load(file, find_storage, make_tensor=lambda *_: None)
    keys = _load(file, None)
    sound = isinstance(keys, list) and all(isinstance(key, str) and key in storages for key in keys)
    _need(sound and len(keys) == len(storages), "its list of storages is damaged")
    at = file.tell()
    for storage in (storages[key] for key in keys):
        (size,) = struct.unpack_from("<q", content, at)
        end = at + 8 + size * storage.dtype.itemsize
        whole = size == storage.size and end <= len(content)
        _need(whole, "the file ends before its last storage, or a storage's size is wrong")
        storage.numbers = np.frombuffer(content, storage.dtype, size, at + 8)
        at = end
    return _load(io.BytesIO(content[start:]), find_storage)


# --- Writing ------------------------------------------------------------------------------------


def write(path, value) -> None:
    """Write nested dicts, lists, tuples, numbers, strings, None and arrays as a `.pt` file, whole or not at all.

    An `argparse.Namespace` of such values is written, too; `torch.load(weights_only=True)` wants it declared safe.

    Dicts become OrderedDicts where they are `collections.OrderedDict`; arrays become CPU tensors, which share their
    storage where the very same array appears twice.

    Raises:
      TorchFileError: a value is of another kind.
    """
    path = location(path)
    content = io.BytesIO()
    pickler = _Pickler(content)
    pickler.dump(value)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        prefix = path.stem or "archive"
        _add(archive, f"{prefix}/data.pkl", content.getvalue())
        _add(archive, f"{prefix}/byteorder", b"little")
        for i, array in enumerate(pickler.arrays):
            _add(archive, f"{prefix}/data/{i}", np.ascontiguousarray(array).tobytes())
        _add(archive, f"{prefix}/version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add an entry whose content starts at a multiple of 64 bytes, so that PyTorch can map it into memory."""
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    padding = -(archive.fp.tell() + 30 + len(name.encode())) % _ALIGNMENT
    if padding:
        if padding < 4:
            padding += _ALIGNMENT
        info.extra = struct.pack("<HH", 0x4246, padding - 4) + bytes(padding - 4)  # "FB", as PyTorch pads
    archive.writestr(info, content)


class _Global(str):
    """A name that the written pickle refers to, as "module name"."""


class _Pickler(pickle._Pickler):
    """Writes arrays as PyTorch writes tensors; `arrays` are their storages."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.arrays, self._numbers = [], {}  # numbers: of storages, by id of the array

    def save(self, value, *_):
        """Called by the standard library for every value."""
        plain = type(value) in (int, float, bool, str, dict, list, tuple, collections.OrderedDict)
        if isinstance(value, (np.ndarray, np.generic)):
            self._save_tensor(value)
        elif isinstance(value, _Global):
            self.write(pickle.GLOBAL + value.replace(" ", "\n").encode() + b"\n")
        elif type(value) is argparse.Namespace:
            self.save(_Global("argparse Namespace"))
            self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
            self.save(vars(value))
            self.write(pickle.BUILD)
        elif plain or value is None or value is collections.OrderedDict:
            super().save(value)
        else:
            kind = type(value).__name__
            raise TorchFileError(f"a {kind} cannot be written; only tensors and plain containers can")

    def _save_tensor(self, value) -> None:
        array = np.asarray(value)
        dtype = array.dtype.newbyteorder("<") if array.dtype.isbuiltin == 1 else array.dtype
        if dtype not in _STORAGE_NAMES:
            known = list(STORAGES)
            raise TorchFileError(f"an array of {array.dtype} cannot be written; PyTorch's types are {known}")
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.arrays)
            self.arrays.append(array.astype(dtype, copy=False))
        self.save(_Global("torch._utils _rebuild_tensor_v2"))
        self.write(pickle.MARK)
        storage = _Global(f"torch {_STORAGE_NAMES[dtype]}")
        self.save(("storage", storage, str(self._numbers[id(value)]), "cpu", int(array.size)))
        self.write(pickle.BINPERSID)
        strides = tuple(math.prod(array.shape[i + 1 :]) for i in range(array.ndim))
        for part in (0, array.shape, strides, False, collections.OrderedDict()):
            self.save(part)
        self.write(pickle.TUPLE + pickle.REDUCE)
