import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from maskdm_jax.interop import pickles

PLAIN = {"text": ["a", b"b", 1, -(2**70), 2.5, None, True], 3: (), "nested": {"x": (1, (2, [3]))}}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_of_every_binary_protocol(protocol):
    stand_ins = {"_codecs.encode": lambda text, coding: text.encode(coding)}
    assert pickles.load(pickle.dumps(PLAIN, protocol), stand_ins) == PLAIN


def test_the_bytes_of_python_2_are_kept_on_demand():
    assert pickles.load(b"\x80\x02U\x02\xff\x00.", {}, encoding="bytes") == b"\xff\x00"


def test_only_stand_ins_are_called_and_only_their_state_is_set():
    class StandIn:
        def set_state(self, state):
            self.state = state

    whole = pickle.dumps(np.arange(3))
    names = {f"numpy{core}.multiarray._reconstruct": lambda *_: StandIn() for core in (".core", "._core")}
    names |= {"numpy.ndarray": None, "numpy.dtype": lambda *_: StandIn()}
    assert pickles.load(whole, names).state[1] == (3,)
    del names["numpy.dtype"]
    with pytest.raises(
        pickle.UnpicklingError, match="it names numpy.dtype, which is not an array or a plain container"
    ):
        pickles.load(whole, names)
    with pytest.raises(pickle.UnpicklingError, match="no attribute 'set_state'"):
        pickles.load(b"\x80\x02]}X\x01\x00\x00\x00aK\x01sb.", {})


class Object:
    """Pickled by a call with arguments, a state, items and keys."""

    def __init__(self, *new):
        self.new = new

    def __getnewargs__(self):
        return self.new

    def __reduce_ex__(self, protocol):
        make, args, state, *_ = super().__reduce_ex__(protocol)
        return make, args, state, iter([1, 2]), iter([("a", 1)])


def test_objects_without_a_stand_in_are_skipped_on_demand():
    value = [Object(), Object(1), {3}, frozenset([4]), {(5, (6,)): 7}, Object, 8]
    read = pickles.load(pickle.dumps(value, 2), {}, skip=True)
    assert read[6] == 8
    made = f"{__name__}.Object"
    kinds = [one.kind for one in (*read[:4], *read[4], read[5])]
    assert kinds == [made, made, "__builtin__.set", "__builtin__.frozenset", "tuple", made]
    with pytest.raises(pickle.UnpicklingError, match="Object"):
        pickles.load(pickle.dumps(value, 2), {})
    with pytest.raises(pickle.UnpicklingError, match="is not one that plain values need"):
        pickles.load(pickle.dumps({3}, 4), {}, skip=True)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N",  # a frame,
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # bytes,
        b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",  # and text of a claimed length
        b"\x80\x04T" + struct.pack("<i", 2**31 - 1) + b"x.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",  # a byte array
        b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b"0.",  # the memo's last entry
        b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"Ns.",  # a key whose hash needs a deep stack,
        b"\x80\x02})q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60)) + b"Ns.",  # or 2^60 steps
        b"\x80\x02" + b"(" * 1000 + b".",
    ],
)
def test_a_pickle_allocates_no_more_than_it_holds(bomb):
    tracemalloc.start()
    with pytest.raises(pickle.UnpicklingError):
        pickles.load(bomb, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 + 200 * len(bomb)


@pytest.mark.parametrize("cut", range(1, 120))
def test_a_pickle_cut_anywhere_is_refused(cut):
    whole = pickle.dumps(PLAIN, 4)
    with pytest.raises(pickle.UnpicklingError):
        pickles.load(whole[:-cut], {})
