import argparse
import collections
import contextlib
import os
import pathlib
import pickle
import random
import re
import struct
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from maskdm_jax.errors import TorchFileError
from maskdm_jax.interop import official, torch_file
from maskdm_jax.interop.pickles import Skipped

torch = pytest.importorskip("torch", reason="compares with PyTorch, which requirements-test.txt installs on 3.11")


def same(ours, theirs):
    """Ours (NumPy) holds exactly what theirs (torch) does: structure, order, types, bits."""
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == tuple(theirs.shape)
        raw = theirs.detach().contiguous()
        assert ours.tobytes() == raw.view(torch.uint8).numpy().tobytes() if raw.ndim else ours == raw.item()
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs


def sample():
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "step": 130,
        "big": 2**40,
        "rate": 2e-4,
        "none": None,
        "flags": [True, False],
        "pair": (0.9, 0.99),
        "state": collections.OrderedDict(weight=base, again=base, row=base[1], turned=base.t(), empty=base[:0]),
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "types": [
            torch.tensor([1, 2]).to(t) for t in (torch.int64, torch.uint8, torch.float16, torch.float64, torch.bool)
        ],
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(7.0),
    }


@pytest.fixture(params=["zip", "stream"])
def stored(request, tmp_path):
    """`sample()` as torch writes it, in the new format and the old."""
    path = tmp_path / "sample.pt"
    torch.save(sample(), path, _use_new_zipfile_serialization=request.param == "zip")
    return path


def test_both_formats_are_read_exactly(stored):
    ours = torch_file.read(stored)
    theirs = torch.load(stored, weights_only=False)
    assert ours["half"].dtype == ml_dtypes.bfloat16
    same({k: v for k, v in ours.items() if k != "half"}, {k: v for k, v in theirs.items() if k != "half"})
    assert ours["half"].astype(np.float32).tolist() == [1.5, -2.0]
    assert not ours["state"]["weight"].flags.writeable


def test_an_official_checkpoint(root):
    path = root / "tests" / "golden" / "official_tiny.pt"
    same(torch_file.read(path), torch.load(path, weights_only=False))


def test_what_we_write_loads_with_weights_only(stored, tmp_path):
    value = torch_file.read(stored)
    value["state"] = collections.OrderedDict(value["state"])
    path = tmp_path / "out.pt"
    torch_file.write(path, value)
    for mmap in (False, True):
        theirs = torch.load(path, weights_only=True, mmap=mmap)
        assert type(theirs["state"]) is collections.OrderedDict
        assert theirs["half"].dtype == torch.bfloat16
        same({k: v for k, v in value.items() if k != "half"}, {k: v for k, v in theirs.items() if k != "half"})
    again = torch_file.read(path)
    again["state"] = collections.OrderedDict(again["state"])
    torch_file.write(tmp_path / "again.pt", again)
    same({k: v for k, v in torch_file.read(tmp_path / "again.pt").items() if k != "half"},
         {k: v for k, v in theirs.items() if k != "half"})  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == ["again.pt", "out.pt", "sample.pt"]


class Attack:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class Settings(dict):
    """An object with a state, items and a key of its own."""


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Attack(os.system, "touch hacked"), "posix.system"),
        (Attack(eval, "1"), "__builtin__.eval"),
        (Attack(getattr, "x", "y"), "__builtin__.getattr"),
        (Attack(bytearray, 10**12), "__builtin__.bytearray"),
        (os.system, "posix.system"),
        (np.ones(3), "numpy._core.multiarray._reconstruct"),
        ({1, 2}, "__builtin__.set"),
        (b"bytes that are long", "bytes"),
        (argparse.Namespace(lr=1e-4), "argparse.Namespace"),
        (Settings(a=Attack(os.system, "touch hacked")), "test_torch_file.Settings"),
        (torch.device("cpu"), "torch.device"),
        (torch.float32, "torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_a_tensor_or_container_is_skipped_by_name(tmp_path, monkeypatch, value, kind, new_format):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": [value], "b": torch.ones(2)}, "x.pt", _use_new_zipfile_serialization=new_format)
    read = torch_file.read("x.pt")
    assert isinstance(read["a"][0], Skipped)
    assert read["a"][0].kind == kind
    assert read["b"].tolist() == [1, 1]
    assert os.listdir() == ["x.pt"], "nothing was executed"


def test_what_is_skipped_in_a_dict_leaves_the_rest(tmp_path):
    value = {"sets": [{1}, frozenset([2])], (1, 2): 3, "rng": ("MT19937", np.arange(3)), "last": 4.5, b"k": b"v"}
    value |= {"default": collections.defaultdict(int, a=1), "fid": np.float64(3.2), "n": np.int64(7), "ok": np.bool_(1)}
    torch.save(value, tmp_path / "x.pt")
    read = torch_file.read(tmp_path / "x.pt")
    assert [(read[key], type(read[key])) for key in ("fid", "n", "ok")] == [(3.2, float), (7, int), (True, bool)]
    assert (read["default"], read["last"], read[b"k"]) == ({"a": 1}, 4.5, b"v")
    assert all(isinstance(skipped, Skipped) for skipped in (*read["sets"], read["rng"][1]))
    assert len(read) == len(value)


def test_tensors_of_other_types_are_skipped_by_type(tmp_path):
    torch.save({"w": torch.ones(2).to(torch.float8_e4m3fn), "v": torch.ones(2)}, tmp_path / "x.pt")
    read = torch_file.read(tmp_path / "x.pt")
    assert read["w"].kind == "torch.float8_e4m3fn tensor"
    assert read["v"].tolist() == [1, 1]
    archive(tmp_path / "q.pt", tensor_pickle(storage="QInt8Storage"), data__0=bytes(2))
    assert torch_file.read(tmp_path / "q.pt").kind == "torch.QInt8Storage"


def archive(path, data=b"", compress=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compress) as file:
        file.writestr("a/data.pkl", data)
        for name, content in entries.items():
            file.writestr(f"a/{name}".replace("__", "/"), content)


def tensor_pickle(shape=(2,), stride=(1,), offset=0, size=2, key="0", storage="FloatStorage", view=b""):
    out = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n" + storage.encode() + b"\n"
    number = lambda n: b"\x8a\x08" + struct.pack("<q", n)
    out += b"X" + struct.pack("<I", len(key)) + key.encode() + b"X\x03\x00\x00\x00cpu" + number(size) + view + b"tQ"
    out += number(offset) + b"(" + b"".join(map(number, shape)) + b"t(" + b"".join(map(number, stride)) + b"t\x89}tR."
    return out


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (dict(shape=(3,)), "reaches beyond its storage of 2 numbers"),
        (dict(shape=(2,), offset=1), "reaches beyond"),
        (dict(shape=(10**9,), stride=(0,)), "reaches beyond"),
        (dict(shape=(-2,)), "negative"),
        (dict(shape=(2,), stride=(-1,), offset=1), "negative"),
        (dict(shape=(2, 1)), "description is damaged"),
        (dict(size=10**15), "has 8 bytes, not 1000000000000000 numbers"),
        (dict(key="../x"), "is missing"),
        (dict(view=b"K\x00K\x00K\x02\x87"), "a storage is a view of another one"),
    ],
)
def test_impossible_tensors_are_refused(tmp_path, pickled, message):
    archive(tmp_path / "x.pt", tensor_pickle(**pickled), data__0=bytes(8))
    with pytest.raises(TorchFileError, match=message):
        torch_file.read(tmp_path / "x.pt")
    archive(tmp_path / "good.pt", tensor_pickle(), data__0=bytes(8))
    assert torch_file.read(tmp_path / "good.pt").tolist() == [0, 0]


def test_archives_that_unfold_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    archive(path, tensor_pickle(size=10**7), zipfile.ZIP_DEFLATED, data__0=bytes(4 * 10**7))
    with pytest.raises(TorchFileError, match="is compressed; PyTorch never does that"):
        torch_file.read(path)
    # Each list holds the one before it ten times: 10^60 items if it were unfolded.
    archive(path, b"\x80\x02]q\x00" + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(60)) + b".")
    read = torch_file.read(path)
    assert read[0] is read[9], "it is not unfolded, which would take forever"


@pytest.mark.parametrize("content", [b"}q\x00X\x01\x00\x00\x00ah\x00s", b"]" * 5000 + b"a" * 4999])
def test_content_without_end_or_bottom_is_no_checkpoint(tmp_path, content):
    archive(tmp_path / "x.pt", b"\x80\x02" + content + b".")
    with pytest.raises(TorchFileError, match="x.pt: it holds (a list|no tensors)"):
        official.read(tmp_path / "x.pt")


@pytest.mark.parametrize("call", [b"h\x00h\x01h\x02\x86R", b"h\x03h\x01\x85R", b"h\x01h\x01\x93"])
def test_a_long_text_that_is_used_again_and_again_is_not_copied(tmp_path, call):
    text = b"X" + struct.pack("<I", 100_000) + b"x" * 100_000
    content = b"\x80\x04c_codecs\nencode\nq\x00" + text + b"q\x01X\x06\x00\x00\x00latin1q\x02cnumpy\ndtype\nq\x03"
    archive(tmp_path / "x.pt", content + b"](" + call * 10_000 + b"e.")
    tracemalloc.start()
    assert len(torch_file.read(tmp_path / "x.pt")) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_other_files_are_told_apart(tmp_path):
    path = tmp_path / "x.pt"
    contents = {b"": "an empty file", b"\x1f\x8b\x08": "compressed by gzip", b"\n<!DOCTYPE html>": "a page of HTML"}
    contents |= {b"version https://git-lfs.github.com/spec/v1\n": "a pointer of Git LFS; `git lfs pull`"}
    contents |= {b"\x89PNG....": "neither as a zip nor as the older format", b"{}": "neither as a zip"}
    contents |= {b"\x80\x02": "truncated"}
    for content, message in contents.items():
        path.write_bytes(content)
        with pytest.raises(TorchFileError, match=f"x.pt(:| is) .*{message}"):
            torch_file.read(path)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(TorchFileError, match="neither as a zip nor as the older format"):
        torch_file.read(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("photo.png", b"")
    with pytest.raises(TorchFileError, match=r"no data.pkl"):
        torch_file.read(path)
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("value", [{"x": {1}}, {"x": object()}, [b"x"], {"x": np.array(["a"])}, {"x": 1j}])
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, value):
    with pytest.raises(TorchFileError, match="cannot be written"):
        torch_file.write(tmp_path / "x.pt", value)
    assert os.listdir(tmp_path) == []


def peak() -> int:
    """The most memory that this process has used, in KiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])


def test_twenty_thousand_mutated_files(tmp_path):
    """Each is read or refused with one line: no other error, no hang, no memory."""
    small = {
        "step": 3,
        "state": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)},
        "groups": [{"betas": (0.9, 0.99)}],
        "skipped": (argparse.Namespace(lr=1e-4), {1}, np.float64(3.2)),
    }
    originals = []
    for new_format in (True, False):
        torch.save(small, tmp_path / "x.pt", _use_new_zipfile_serialization=new_format)
        originals.append((tmp_path / "x.pt").read_bytes())
    draw = random.Random(0)
    path = tmp_path / "mutated.pt"
    torch_file.read(tmp_path / "x.pt")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak of earlier tests
    before = peak()
    read, slowest = 0, 0.0
    for i in range(20_000):
        content = bytearray(originals[i % 2])
        # Most of a zip file is padding: aim at its pickle and directory as well as anywhere.
        spans = [(0, len(content)), (0, min(700, len(content))), (max(0, len(content) - 900), len(content))]
        for _ in range(draw.choice((1, 1, 2, 5, 20))):
            at = draw.randrange(*draw.choice(spans))
            at = min(at, len(content) - 1)
            match draw.randrange(5):
                case 0:
                    content[at] = draw.randrange(256)
                case 1:
                    content[at] ^= 1 << draw.randrange(8)
                case 2:
                    content[at : at + 4] = draw.choice((b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80"))
                case 3:
                    del content[at : at + draw.randrange(1, 9)]
                case 4:
                    content[at:at] = content[at : at + draw.randrange(1, 40)]
        if draw.random() < 0.1:
            del content[draw.randrange(len(content)) :]
        path.write_bytes(content)
        started = time.process_time()
        with contextlib.suppress(TorchFileError):
            torch_file.read(path)
            read += 1
        slowest = max(slowest, time.process_time() - started)
    assert 0 < read < 15_000, "some mutations are harmless, most are not"
    assert slowest < 10, "seconds of CPU time; a good file takes a thousandth"
    grown = peak() - before
    assert grown < 50 * 1024, f"{grown} KiB"


def test_weights_that_are_not_finite_are_named(root, tmp_path):
    content = torch_file.read(root / "tests" / "golden" / "official_tiny.pt")
    name = "model.encoder.norm.bias"
    weights = dict(content["model"]) | {name: content["model"][name] * np.float32(np.nan)}
    torch_file.write(tmp_path / "diverged.pt", {"model": weights})
    notes = official.read(tmp_path / "diverged.pt").notes
    assert "note: 1 tensors hold NaN or infinity, such as encoder.norm.bias" in notes
