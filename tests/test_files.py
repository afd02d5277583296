"""Tar archives and object stores; folders and zips are in test_data."""

import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from maskdm_jax.data import prepare, prepared
from maskdm_jax.data.files import read_range
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


@pytest.mark.parametrize(("opener", "suffix"), [(gzip.open, "tar.gz"), (gzip.open, "tgz"), (lzma.open, "tar.xz")])
def test_a_compressed_tar_is_named_as_one(tar, tmp_path, opener, suffix):
    packed = tmp_path / f"set.{suffix}"
    with opener(packed, "wb") as file:
        file.write(tar.read_bytes())
    with pytest.raises(DataError, match=f"^{packed} is compressed by (gzip|xz); unpack it first"):
        open_source(str(packed))


def test_a_range_of_a_file(tmp_path):
    """Also of more than 2 GiB, which Linux reads in several calls."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**31 + 100)
        file.seek(0, os.SEEK_END)
        file.write(b"end")
    found = read_range(str(tmp_path / "sparse"), 1, 2**31 + 102)
    assert (len(found), found[-4:]) == (2**31 + 102, b"\0end")
    (tmp_path / "file").write_bytes(bytes(range(100)))
    assert read_range(str(tmp_path / "file"), 10, 50) == bytes(range(10, 60))
    with pytest.raises(DataError, match="file ends before byte 101; copy it again"):
        read_range(str(tmp_path / "file"), 1, 100)


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


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "store", "prepared"])
def test_the_classes_of_imagenet_have_the_published_numbers(tmp_path, caplog, kind):
    """0 to 999 in the order of their names, in whatever order the files are."""
    drawn = np.random.RandomState(0).permutation(10_000)[:1000]
    wnids = ["n01440764", *(f"n{2_000_000 + number:08d}" for number in drawn)][:1000]
    path = {"zip": tmp_path / "train.zip", "tar": tmp_path / "train.tar"}.get(kind, tmp_path / "train")

    def write(wnids):
        files = {f"train/{wnid}/{wnid}_{i}.png": png(i) for i, wnid in enumerate(wnids)}
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
        elif kind == "tar":
            path.write_bytes(archive_of(files))
        elif kind == "store":
            fsspec.filesystem("memory").pipe({f"/imagenet/{name}": content for name, content in files.items()})
        else:
            for name, content in files.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(content)
        return open_source("memory://imagenet" if kind == "store" else str(path), True)

    whole = write(wnids)
    assert not whole.notes
    if kind == "prepared":
        prepare.prepare(whole, tmp_path / "set", Framing(4), name="x", per_shard=300)
        whole = open_source(str(tmp_path / "set"), True)
    assert whole.classes == sorted(wnids)
    assert [whole.classes[whole.labels[i]] for i in range(1000)] == [name.split("/")[-2] for name in whole.names]
    assert whole.labels[0] == whole.classes.index("n01440764") == 0
    assert [whole.read(i)[1] for i in (0, 1, 999)] == [0, 1, 999]
    if kind == "store":
        fsspec.filesystem("memory").rm("/imagenet", recursive=True)


def test_names_of_a_zip_from_windows(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, system, content in [
            ("cat\\", 0, b""),
            ("cat\\1.png", 0, png(1)),
            ("dog/2.png", 0, png(2)),
            ("dog/a\\b.png", 3, png(3)),  # of Unix, where it is a name
        ]:
            entry = zipfile.ZipInfo(name)
            entry.create_system = system
            archive.writestr(entry, content)
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path / "set.zip"), True)))
    assert source.names == ["cat/1.png", "dog/2.png", "dog/a\\b.png"]
    assert (source.classes, source.labels) == (["cat", "dog"], [0, 1, 1])
    assert [source.read(i)[0] for i in range(3)] == [png(1), png(2), png(3)]
    assert not source.left_aside


def test_deeply_nested_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):  # Python's limit of recursion is 1,000
        os.mkdir("d")
        os.chdir("d")
    with open("1.png", "wb") as file:
        file.write(png(1))
    os.chdir(tmp_path)
    source = open_source(str(tmp_path))
    assert (len(source), source.read(0)) == (1, (png(1), 0))
    os.remove(source.names[0])
    os.removedirs(os.path.dirname(source.names[0]))  # which shutil.rmtree may not reach


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
    store.pipe("/bucket/set.tar.gz", b"x")
    for name in ("none", "set.tar.gz"):
        with pytest.raises(DataError, match=f"memory://bucket/{name} is no folder or is empty; give a folder of"):
            open_source(f"memory://bucket/{name}")
    with pytest.raises(DataError, match="nonsense://x cannot be reached: Protocol not known"):
        open_source("nonsense://x")


def test_a_zip_on_an_object_store(store, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    store.pipe("/bucket/set.zip", (tmp_path / "set.zip").read_bytes())
    source = pickle.loads(pickle.dumps(open_source("memory://bucket/set.zip")))
    assert source.names == NAMES
    assert source.read(1) == (FILES["set/a/2.png"], 0)


def test_prepared_sets_of_equal_images_on_an_object_store_keep_their_cards(tar, store, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    source = open_source(str(tar), True)
    for name in ("first", "second"):
        source.classes = [f"{name} a", f"{name} b"]
        card = prepare.prepare(source, tmp_path / name, Framing(4), name=name)
        store.put(str(tmp_path / name), f"/bucket/{name}", recursive=True)
        assert open_source(f"memory://bucket/{name}", labels=True).card == card


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
