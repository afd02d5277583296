"""PyTorch's checkpoint files, read and written without PyTorch.

Reading never executes anything: a small interpreter of its own builds containers, numbers, strings and
tensors, and refuses all else by name. Both formats are read, the zip archive (PyTorch 1.6 and later)
and the older stream; the zip archive is written, such that `torch.load(weights_only=True)` accepts it.

Memory stays within a small multiple of the file's size: no opcode allocates more than it was given bytes
for, tensors are views of their storages, and entries of the archive may not overlap or be compressed.
"""

import collections
import dataclasses
import io
import math
import pathlib
import struct
import zipfile

import ml_dtypes
import numpy as np

from maskdm_jax.errors import TorchFileError
from maskdm_jax.storage import atomic_path

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
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ALIGNMENT = 64
MAX_DEPTH = 64  # of nested containers; checkpoints have 4 or 5


def read(path):
    """Read a `.pt` file: nested dicts, lists, tuples, numbers, strings, None and NumPy arrays.

    Arrays are read-only views of the file's content; bfloat16 comes as `ml_dtypes.bfloat16`.

    Raises:
      TorchFileError: the message names the file and what is wrong with it.
      OSError: the file cannot be opened.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
            value = _read_zip(path) if start == b"PK\x03\x04" else _read_stream(path)
        return _plain(value, 0)
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from None
    except _DAMAGE as error:
        raise TorchFileError(f"{path} is damaged or not a PyTorch checkpoint ({error})") from None


# What bytes at random provoke in the readers; UnicodeError is a ValueError, RuntimeError comes from odd zip entries.
_DAMAGE = (zipfile.BadZipFile, EOFError, LookupError, TypeError, ValueError, struct.error, OverflowError, RuntimeError)


# --- Reading: what the pickles may hold ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name that a pickle refers to; never looked up."""

    name: str


@dataclasses.dataclass
class _Storage:
    """Numbers that tensors are views of. The old format brings them after the pickle that refers to them."""

    dtype: np.dtype
    size: int
    data: np.ndarray | None = None
    offset: int = 0  # of a view into a larger storage, old format only


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple
    strides: tuple


class _Mark:
    pass


_MARK = _Mark()
_BUILDERS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_NAMES = {*_BUILDERS, "torch._utils._rebuild_parameter", "collections.OrderedDict", "torch.Size"}
_NAMES |= {f"torch.{name}" for name in STORAGES}


class _Pickle:
    """Interpreter of the pickle opcodes that PyTorch's files consist of."""

    def __init__(self, content, load_storage):
        self._content, self._load_storage = memoryview(content), load_storage
        self._at = 0
        self._stack, self._memo = [], {}

    def load(self, at: int = 0):
        """Interpret from byte `at` to STOP; returns the value and the position after it."""
        self._at, self._stack, self._memo = at, [], {}
        while True:
            code = self._take(1)[0]
            if code == 0x2E:  # STOP
                value = self._pop()
                return value, self._at
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise TorchFileError(f"pickle opcode {bytes([code])!r} is not one that checkpoints need; refused")
            operation(self)

    def _take(self, n: int):
        if n < 0 or self._at + n > len(self._content):
            raise TorchFileError("the file ends in the middle of a value; it is truncated")
        self._at += n
        return self._content[self._at - n : self._at]

    def _int(self, n: int, signed=False) -> int:
        return int.from_bytes(self._take(n), "little", signed=signed)

    def _text(self, n: int) -> str:
        return str(self._take(n), "utf-8", "strict")

    def _line(self) -> str:
        window = bytes(self._content[self._at : self._at + 512])
        end = window.find(b"\n")
        if end < 0:
            raise TorchFileError("a name in the pickle does not end")
        return str(self._take(end + 1)[:-1], "utf-8")

    def _pop(self):
        value = self._stack.pop()
        if value is _MARK:
            raise TorchFileError("the pickle is damaged: a value is missing")
        return value

    def _pop_mark(self) -> list:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise TorchFileError("the pickle is damaged: a mark is missing")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def _top(self, kind):
        if not isinstance(self._stack[-1], kind):
            raise TorchFileError(f"the pickle adds items to a {type(self._stack[-1]).__name__}")
        return self._stack[-1]

    def _set_items(self, items: list) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise TorchFileError(f"a dict key is a {type(key).__name__}; only strings and numbers are read")
            target[key] = value

    def _reduce(self) -> None:
        args, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(args, tuple):
            raise TorchFileError("the pickle calls something that is not a known name; refused")
        self._stack.append(self._call(function.name, args))

    def _call(self, name: str, args: tuple):
        if name == "collections.OrderedDict" and args == ():
            return {}
        if name == "torch._utils._rebuild_parameter" and isinstance(args[0], _Tensor):
            return args[0]
        if name == "torch.Size" and len(args) == 1 and isinstance(args[0], tuple):
            return args[0]
        if name in _BUILDERS and len(args) >= 4:
            storage, offset, shape, strides = args[:4]
            sound = isinstance(storage, _Storage) and isinstance(offset, int)
            sound = sound and all(isinstance(s, tuple) and all(type(n) is int for n in s) for s in (shape, strides))
            if not sound or len(shape) != len(strides) or len(shape) > 32:
                raise TorchFileError("a tensor's description is damaged")
            if offset < 0 or any(n < 0 for n in (*shape, *strides)):
                raise TorchFileError("a tensor has a negative size, stride or offset")
            span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            if storage.offset + offset + span > storage.size or math.prod(shape) > storage.size:
                raise TorchFileError(f"a tensor of shape {shape} reaches beyond its storage of {storage.size} numbers")
            return _Tensor(storage, offset, shape, strides)
        raise TorchFileError(f"{name!r} is called with arguments that are not its own")

    def _build(self) -> None:
        self._pop()  # attributes of an OrderedDict (`_metadata` of a state dict): not needed
        self._top(dict)

    def _persistent(self) -> None:
        entry = self._pop()
        if not isinstance(entry, tuple) or len(entry) < 5 or entry[0] != "storage" or not isinstance(entry[1], _Global):
            raise TorchFileError("the pickle refers to something outside it that is not a storage")
        name, key, size = entry[1].name.removeprefix("torch."), entry[2], entry[4]
        if name not in STORAGES:
            raise TorchFileError(f"{entry[1].name!r} is not a type of storage")
        if not isinstance(key, str) or type(size) is not int or size < 0:
            raise TorchFileError("a storage's description is damaged")
        self._stack.append(self._load_storage(STORAGES[name], key, size, entry[5] if len(entry) > 5 else None))

    def _name(self, module, name) -> None:
        name = f"{module}.{name}"
        if name not in _NAMES:
            raise TorchFileError(f"it holds {name[:100]!r}, which is not a tensor or a plain container; refused")
        self._push(_Global(name))

    def _push(self, value) -> None:
        self._stack.append(value)

    def _tuple(self, n: int) -> None:
        values = [self._pop() for _ in range(n)][::-1]
        self._push(tuple(values))

    def _append(self, values: list) -> None:
        self._top(list).extend(values)


def _setitem(p):
    value, key = p._pop(), p._pop()
    p._set_items([key, value])


_OPERATIONS = {
    0x80: lambda p: p._take(1),  # PROTO
    0x95: lambda p: p._take(8),  # FRAME
    ord("("): lambda p: p._push(_MARK),
    ord("}"): lambda p: p._push({}),
    ord("]"): lambda p: p._push([]),
    ord(")"): lambda p: p._push(()),
    ord("N"): lambda p: p._push(None),
    0x88: lambda p: p._push(True),
    0x89: lambda p: p._push(False),
    ord("K"): lambda p: p._push(p._int(1)),
    ord("M"): lambda p: p._push(p._int(2)),
    ord("J"): lambda p: p._push(p._int(4, signed=True)),
    0x8A: lambda p: p._push(p._int(p._int(1), signed=True)),  # LONG1
    ord("G"): lambda p: p._push(struct.unpack(">d", p._take(8))[0]),
    ord("X"): lambda p: p._push(p._text(p._int(4))),
    0x8C: lambda p: p._push(p._text(p._int(1))),  # SHORT_BINUNICODE
    ord("c"): lambda p: p._name(p._line(), p._line()),
    0x93: lambda p: p._name(*[p._pop(), p._pop()][::-1]),  # STACK_GLOBAL
    ord("q"): lambda p: p._memo.__setitem__(p._int(1), p._stack[-1]),
    ord("r"): lambda p: p._memo.__setitem__(p._int(4), p._stack[-1]),
    0x94: lambda p: p._memo.__setitem__(len(p._memo), p._stack[-1]),  # MEMOIZE
    ord("h"): lambda p: p._push(p._memo[p._int(1)]),
    ord("j"): lambda p: p._push(p._memo[p._int(4)]),
    0x85: lambda p: p._tuple(1),
    0x86: lambda p: p._tuple(2),
    0x87: lambda p: p._tuple(3),
    ord("t"): lambda p: p._push(tuple(p._pop_mark())),
    ord("a"): lambda p: p._append([p._pop()]),
    ord("e"): lambda p: p._append(p._pop_mark()),
    ord("s"): _setitem,
    ord("u"): lambda p: p._set_items(p._pop_mark()),
    ord("R"): lambda p: p._reduce(),
    ord("b"): lambda p: p._build(),
    ord("Q"): lambda p: p._persistent(),
}


def _plain(value, depth: int, seen: dict | None = None):
    """Replace tensor descriptions by arrays; refuse what is nested too deeply, as a loop is."""
    seen = {} if seen is None else seen
    if depth > MAX_DEPTH:
        raise TorchFileError(f"containers are nested more than {MAX_DEPTH} deep")
    if isinstance(value, _Tensor):
        if value.storage.data is None:
            raise TorchFileError("a tensor's storage is missing")
        data, size = value.storage.data, value.storage.dtype.itemsize
        start = value.storage.offset + value.offset
        strides = tuple(s * size for s in value.strides)
        return np.lib.stride_tricks.as_strided(data[start:], value.shape, strides, writeable=False)
    if isinstance(value, (dict, list, tuple)):
        # Shared containers are converted once, or a few nested references would unfold without end.
        if id(value) in seen:
            if seen[id(value)] is None:
                raise TorchFileError("a container contains itself")
            return seen[id(value)]
        seen[id(value)] = None
        if isinstance(value, dict):
            done = {key: _plain(item, depth + 1, seen) for key, item in value.items()}
        else:
            done = type(value)(_plain(item, depth + 1, seen) for item in value)
        seen[id(value)] = done
        return done
    if isinstance(value, (_Global, _Storage, _Mark)):
        name = value.name if isinstance(value, _Global) else "a bare storage"
        raise TorchFileError(f"it holds {name!r}, which is not a tensor or a plain container; refused")
    return value


def _read_zip(path: pathlib.Path):
    with zipfile.ZipFile(path) as archive:
        entries, length = {}, path.stat().st_size
        for info in archive.infolist():
            if not 0 <= info.header_offset < length:
                raise TorchFileError(f"entry {info.filename!r} lies outside the file")
            if info.compress_type != zipfile.ZIP_STORED:
                raise TorchFileError(f"entry {info.filename!r} is compressed; PyTorch never does that; refused")
            entries[info.filename] = info
        if sum(info.file_size for info in archive.infolist()) > length:
            raise TorchFileError("its entries claim more bytes than the file has; refused")
        pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise TorchFileError("it is a zip file, but no PyTorch checkpoint: there is no data.pkl in it")
        prefix = pickles[0][: -len("data.pkl")]
        order = entries.get(f"{prefix}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise TorchFileError("it was written on a big-endian machine, which is not supported")
        loaded = {}

        def load_storage(dtype, key, size, view):
            if key not in loaded:
                name = f"{prefix}data/{key}"
                if name not in entries:
                    raise TorchFileError(f"entry {name!r} is missing")
                content = archive.read(entries[name])
                if len(content) != size * dtype.itemsize:
                    raise TorchFileError(f"entry {name!r} has {len(content)} bytes, not {size} numbers of {dtype}")
                loaded[key] = _Storage(dtype, size, np.frombuffer(content, dtype))
            storage = loaded[key]
            if (storage.dtype, storage.size) != (dtype, size):
                raise TorchFileError(f"storage {key!r} is described in two ways")
            return storage

        value, _ = _Pickle(archive.read(entries[pickles[0]]), load_storage).load()
        return value


def _read_stream(path: pathlib.Path):
    """The format before PyTorch 1.6: pickles of a magic number, version, system, content, keys; then numbers."""
    content = path.read_bytes()
    storages = {}

    def load_storage(dtype, key, size, view):
        if key not in storages:
            storages[key] = _Storage(dtype, size)
        storage = storages[key]
        if (storage.dtype, storage.size) != (dtype, size):
            raise TorchFileError(f"storage {key!r} is described in two ways")
        if view is None:
            return storage
        _, offset, view_size = view
        if not all(type(n) is int and n >= 0 for n in (offset, view_size)) or offset + view_size > size:
            raise TorchFileError("a storage's description is damaged")
        return _View(storage, offset, view_size)

    pickle = _Pickle(content, load_storage)
    at, head = 0, []
    for _ in range(3):
        value, at = pickle.load(at)
        head.append(value)
        if len(head) == 1 and value != _LEGACY_MAGIC:
            raise TorchFileError("it is no PyTorch checkpoint: it starts neither as a zip nor as the older format")
    if head[1] != _LEGACY_PROTOCOL:
        raise TorchFileError(f"its format version is {head[1]!r}; {_LEGACY_PROTOCOL} is known")
    if isinstance(head[2], dict) and head[2].get("little_endian") is False:
        raise TorchFileError("it was written on a big-endian machine, which is not supported")
    value, at = pickle.load(at)
    keys, at = pickle.load(at)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise TorchFileError("its list of storages is damaged")
    for key in keys:
        storage = storages[key]
        if len(content) - at < 8:
            raise TorchFileError("the file ends before its last storage; it is truncated")
        (size,) = struct.unpack_from("<q", content, at)
        at += 8
        if size != storage.size or len(content) - at < size * storage.dtype.itemsize:
            raise TorchFileError("the file ends before its last storage, or a storage's size is wrong")
        storage.data = np.frombuffer(content, storage.dtype, size, at)
        at += size * storage.dtype.itemsize
    return value


class _View(_Storage):
    """A part of another storage (old format); its numbers arrive with the whole."""

    def __init__(self, whole: _Storage, offset: int, size: int):
        self._whole, self.dtype, self.size, self.offset = whole, whole.dtype, offset + size, offset

    @property
    def data(self):
        return self._whole.data


# --- Writing ------------------------------------------------------------------------------------


def write(path, value) -> None:
    """Write nested dicts, lists, tuples, numbers, strings, None and arrays as a `.pt` file, whole or not at all.

    Dicts become OrderedDicts where they are `collections.OrderedDict`; arrays become CPU tensors, shared
    where the very same array appears twice.

    Raises:
      TorchFileError: a value is of another kind.
    """
    path = pathlib.Path(path)
    arrays: list[np.ndarray] = []
    out = io.BytesIO()
    out.write(b"\x80\x02")
    _emit(out, value, arrays, {}, 0)
    out.write(b".")
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        prefix = path.stem or "archive"
        _add(archive, f"{prefix}/data.pkl", out.getvalue())
        _add(archive, f"{prefix}/byteorder", b"little")
        for i, array in enumerate(arrays):
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


def _emit(out, value, arrays: list, known: dict, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise TorchFileError(f"containers are nested more than {MAX_DEPTH} deep")
    if value is None:
        out.write(b"N")
    elif value is True or value is False:
        out.write(b"\x88" if value else b"\x89")
    elif isinstance(value, (np.ndarray, np.generic)):
        _emit_tensor(out, np.asarray(value), value, arrays, known)
    elif type(value) is int:
        if -(2**31) <= value < 2**31:
            out.write(b"J" + struct.pack("<i", value))
        else:
            size = value.bit_length() // 8 + 1
            out.write(b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True))
    elif type(value) is float:
        out.write(b"G" + struct.pack(">d", value))
    elif type(value) is str:
        _emit_text(out, value)
    elif isinstance(value, dict):
        out.write(b"ccollections\nOrderedDict\n)R" if isinstance(value, collections.OrderedDict) else b"}")
        out.write(b"(")
        for key, item in value.items():
            _emit(out, key, arrays, known, depth + 1)
            _emit(out, item, arrays, known, depth + 1)
        out.write(b"u")
    elif type(value) is list:
        out.write(b"](")
        for item in value:
            _emit(out, item, arrays, known, depth + 1)
        out.write(b"e")
    elif type(value) is tuple:
        out.write(b"(")
        for item in value:
            _emit(out, item, arrays, known, depth + 1)
        out.write(b"t")
    else:
        raise TorchFileError(f"a {type(value).__name__} cannot be written; only tensors and plain containers can")


def _emit_text(out, text: str) -> None:
    encoded = text.encode()
    out.write(b"X" + struct.pack("<I", len(encoded)) + encoded)


def _emit_tensor(out, array: np.ndarray, original, arrays: list, known: dict) -> None:
    dtype = array.dtype.newbyteorder("<") if array.dtype.kind in "fi" and array.dtype.isbuiltin == 1 else array.dtype
    if dtype not in _STORAGE_NAMES:
        raise TorchFileError(f"an array of {array.dtype} cannot be written; PyTorch's types are {list(STORAGES)}")
    if id(original) not in known:
        known[id(original)] = len(arrays)
        arrays.append(array.astype(dtype, copy=False))
    out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
    _emit_text(out, "storage")
    out.write(f"ctorch\n{_STORAGE_NAMES[dtype]}\n".encode())
    for part in (str(known[id(original)]), "cpu", int(array.size)):
        _emit(out, part, [], {}, 0)
    out.write(b"tQ")
    strides = tuple(math.prod(array.shape[i + 1 :]) for i in range(array.ndim))
    for part in (0, tuple(array.shape), strides, False, collections.OrderedDict()):
        _emit(out, part, [], {}, 0)
    out.write(b"tR")
