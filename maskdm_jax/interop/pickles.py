"""Pickles from elsewhere, read without executing them.

A pickle is a program that can call any function. This reader lets it call only the stand-ins that its user names, and
build plain values: None, numbers, text, bytes, lists, tuples and dicts. Objects of other kinds are refused, or replaced
by a `Skipped`, which only remembers their kind.

It is the standard library's unpickler in its Python version, because its memory can be bounded: every opcode allocates
the bytes that it was given and at most one small object. The version in C allocates whatever length or memo index an
opcode claims, and it hashes dict keys of any depth by recursion, which can crash the process.
"""

import io
import pickle
import struct

from maskdm_jax.errors import prefixed

_OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING SHORT_BINSTRING "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST APPEND APPENDS EMPTY_DICT BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE "
    "BINPERSID"
)
# What random bytes make the standard library's methods raise.
_DAMAGE = (AttributeError, EOFError, LookupError, OverflowError, TypeError, ValueError, struct.error)


class Skipped:
    """Takes the place of a class or function that a pickle names, and of what it would return.

    kind: the name. A `Skipped` can be called and filled, which does nothing.
    """

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        self.kind = kind

    def __repr__(self):
        return f"<{self.kind}>"

    def __call__(self, *_):
        """Take the place of the result."""
        return Skipped(self.kind)

    def ignore(self, _) -> None:
        """Take an item or a state, and forget it."""

    append = extend = set_state = ignore


def load(content, stand_ins: dict, *, persistent_load=None, encoding: str = "ASCII", skip: bool = False):
    """Read one pickle.

    Args:
      content: bytes, or an `io.BytesIO` that is left after the pickle.
      stand_ins: {"module.name": the value that takes its place}. The pickle may call it and refer to it. If it is a
        class with a method `set_state(state)`, the pickle may set its instances' state; the state of a dict is ignored.
      persistent_load: makes objects of the pickle's persistent ids.
      encoding: of the byte strings of Python 2; "bytes" keeps them.
      skip: put a `Skipped` in the place of each name that has no stand-in, instead of refusing the pickle.

    Raises:
      pickle.UnpicklingError: it is damaged, or names or does something else; the message says what.
    """
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    with prefixed(pickle.UnpicklingError, "its pickle is damaged or truncated (", _DAMAGE, ")"):
        return _Unpickler(file, stand_ins, persistent_load, encoding, skip).load()


class _Dispatch(dict):
    """Methods by opcode."""

    def __missing__(self, code: int):
        raise pickle.UnpicklingError(f"pickle opcode {bytes([code])!r} is not one that plain values need; refused")


class _Unpickler(pickle._Unpickler):
    dispatch = _Dispatch(
        (getattr(pickle, op)[0], pickle._Unpickler.dispatch[getattr(pickle, op)[0]]) for op in _OPCODES.split()
    )

    def __init__(self, file, stand_ins: dict, persistent_load, encoding: str, skip: bool):
        super().__init__(file, encoding=encoding)
        self._stand_ins, self._skip = stand_ins, skip
        if persistent_load:
            self.persistent_load = persistent_load

    def find_class(self, module: str, name: str):
        name = f"{module[:100]}.{name[:100]}"
        if name in self._stand_ins:
            return self._stand_ins[name]
        if self._skip:
            return Skipped(name)
        raise pickle.UnpicklingError(f"it names {name}, which is not an array or a plain container; refused")

    def _set_item(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self):
        self._update(self.pop_mark())

    def _update(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, Skipped):
            return
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"its pickle adds keys to a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, bytes, int, float, type(None), Skipped)):
                if not self._skip:
                    kind = type(key).__name__
                    raise pickle.UnpicklingError(f"a dict key is a {kind}; only text and numbers are read")
                key = Skipped(type(key).__name__)  # whose hash takes no time
            target[key] = value

    def _set_state(self):
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, dict):
            target.set_state(state)

    dispatch |= {pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items, pickle.BUILD[0]: _set_state}
    dispatch |= {pickle.NEWOBJ[0]: pickle._Unpickler.load_reduce}  # an object is made as a function is called
