"""Tar archives and object stores; folders and zips are in test_data."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from maskdm_jax.data import prepare, prepared
from maskdm_jax.data.images import Framing
from maskdm_jax.data.sources import open_source
from maskdm_jax.errors import DataError


def png(value) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {"set/b/ü.png": png(1), "set/a/2.png": png(2), "set/a/1.png": png(3), "set/a/notes.txt": b"no image"}
NAMES = ["set/a/1.png", "set/a/2.png", "set/b/ü.png"]


def archive_of(files, links=()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, kind, target in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)
    return buffer.getvalue()


@pytest.fixture
def tar(tmp_path):
    path = tmp_path / "set.tar"
    path.write_bytes(archive_of(FILES))
    return path


def test_a_tar_is_read_in_place(tar):
    source = open_source(str(tar), labels=True)
    assert source.names == NAMES
    assert source.classes == ["a", "b"]
    assert [source.read(i) for i in range(3)] == [(FILES[name], int("/b/" in name)) for name in NAMES]
    assert pickle.loads(pickle.dumps(source)).read(2) == source.read(2)


@pytest.mark.parametrize(("opener", "suffix"), [(gzip.open, "gz"), (bz2.open, "bz2"), (lzma.open, "xz")])
def test_a_compressed_tar_is_decompressed_once(tar, tmp_path, opener, suffix):
    packed, scratch = tmp_path / f"set.tar.{suffix}", tmp_path / "scratch"
    with opener(packed, "wb") as file:
        file.write(tar.read_bytes())
    with pytest.raises(DataError, match="is compressed; prepare the images once with launch/prepare_data.py"):
        open_source(str(packed))
    source = open_source(str(packed), labels=True, scratch=scratch)
    assert source.names == NAMES
    assert source.read(2) == (FILES[NAMES[2]], 1)
    assert scratch.read_bytes() == tar.read_bytes()
    made = scratch.stat().st_ino
    open_source(str(packed), scratch=scratch)
    open_source(str(tar), scratch=tmp_path / "other")
    assert scratch.stat().st_ino == made, "not made again"
    scratch.write_bytes(b"of an archive that was replaced")
    os.utime(scratch, (0, 0))
    open_source(str(packed), scratch=scratch)
    assert scratch.read_bytes() == tar.read_bytes()
    with opener(packed, "wb") as file:
        file.write(archive_of({"a/1.png": png(1)}))
    with pytest.raises(DataError, match=rf"^{packed} has only one class folder"):
        open_source(str(packed), labels=True, scratch=tmp_path / "third")
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(DataError, match="is damaged"):
        open_source(str(packed), scratch=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_tar_compressed_otherwise(tmp_path):
    (tmp_path / "set.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(DataError, match="set.tar.zst is compressed by zstd; decompress it first: zstd -d set.tar.zst"):
        open_source(str(tmp_path / "set.tar.zst"))


def test_links_in_a_tar_lead_to_their_images(tmp_path):
    links = [
        ("b/hard.png", tarfile.LNKTYPE, "a/1.png"),
        ("b/soft.png", tarfile.SYMTYPE, "../a/1.png"),
        ("b/twice.png", tarfile.SYMTYPE, "soft.png"),
        ("b/outside.png", tarfile.SYMTYPE, "/etc/passwd"),
        ("b/round.png", tarfile.SYMTYPE, "round.png"),
    ]
    (tmp_path / "set.tar").write_bytes(archive_of({"a/1.png": png(1)}, links))
    source = open_source(str(tmp_path / "set.tar"), labels=True)
    read = dict(zip(source.names, range(6), strict=True))
    for name in ("hard", "soft", "twice"):
        assert source.read(read[f"b/{name}.png"]) == (png(1), 1)
    for name in ("outside", "round"):
        with pytest.raises(DataError, match="a link to no file of the archive"):
            source.read(read[f"b/{name}.png"])


def test_damaged_tars_are_named(tar):
    whole = tar.read_bytes()
    for length in (600, 700, 1100, 1600):  # within the first image, its padding, headers, the second image
        tar.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"set.tar (is not a readable tar file|is cut short)"):
            open_source(str(tar))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        second = archive.getmembers()[1].offset
    flipped = bytearray(whole)
    flipped[second + 5] ^= 1
    for content in (whole[:second], whole[: second + 100], bytes(flipped)):  # Python sees an end in each
        tar.write_bytes(content)
        with pytest.raises(DataError, match="set.tar is cut short or damaged at byte"):
            open_source(str(tar))
    tar.write_bytes(b"hello" * 300)
    with pytest.raises(DataError, match="set.tar is not a readable tar file"):
        open_source(str(tar))


@pytest.fixture
def store():
    files = fsspec.filesystem("memory")
    for name, content in FILES.items():
        files.pipe(f"/bucket/{name}", content)
    yield files
    files.rm("/bucket", recursive=True)


def test_images_on_an_object_store(store, tmp_path):
    source = open_source("memory://bucket/set", labels=True)
    assert source.names == [name.removeprefix("set/") for name in NAMES]
    assert source.read(2) == (FILES["set/b/ü.png"], 1)
    assert pickle.loads(pickle.dumps(source)).read(0) == source.read(0)
    with pytest.raises(DataError, match="memory://bucket/none does not exist or is empty"):
        open_source("memory://bucket/none")
    with pytest.raises(DataError, match="memory://bucket/x.tar.gz: tar archives are read from a local disk alone"):
        open_source("memory://bucket/x.tar.gz")
    with pytest.raises(DataError, match="nonsense://x cannot be reached: Protocol not known"):
        open_source("nonsense://x")


def test_a_zip_on_an_object_store(store, tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    store.pipe("/bucket/set.zip", (tmp_path / "set.zip").read_bytes())
    source = pickle.loads(pickle.dumps(open_source("memory://bucket/set.zip")))
    assert source.names == NAMES
    assert source.read(1) == (FILES["set/a/2.png"], 0)


def test_a_prepared_set_on_an_object_store_is_copied_once_and_verified(tar, store, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "set"
    card = prepare.prepare(open_source(str(tar), True), out, Framing(4), name="x", per_shard=2)
    for path in out.iterdir():
        store.pipe(f"/bucket/done/{path.name}", path.read_bytes())
    source = open_source("memory://bucket/done", labels=True)
    assert source.card == card
    np.testing.assert_array_equal(source.labels, [0, 0, 1])
    shard = f"/bucket/done/{prepared.shard_name(0, 2)}"
    store.pipe(shard, store.cat_file(shard)[:-40])
    assert open_source("memory://bucket/done", labels=True).read(0) == source.read(0), "from the cache"
    (cached,) = (tmp_path / "cache" / "sets").iterdir()
    (cached / "labels.npy").unlink()
    (cached / prepared.shard_name(1, 2)).unlink()
    assert open_source("memory://bucket/done", labels=True).read(2) == source.read(2), "what is missing is copied again"
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "other"))
    with pytest.raises(DataError, match="00000-of-00002.arrayrecord is not what its card says"):
        open_source("memory://bucket/done", labels=True)
    assert not list((tmp_path / "other").rglob("*.arrayrecord*"))
    store.rm(shard)
    for path, file in (("memory://bucket/done", shard), ("memory://bucket/none.zip", "/bucket/none.zip")):
        with pytest.raises(DataError, match=f"^{path} cannot be opened, a file is missing: {file}"):
            open_source(path)
    monkeypatch.setenv("MASKDM_CACHE", "/dev/null")
    with pytest.raises(DataError, match="^memory://bucket/done cannot be opened: .*Not a directory: '/dev/null"):
        open_source("memory://bucket/done")
