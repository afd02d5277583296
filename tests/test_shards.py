"""Parquet files of images and shards of a WebDataset. tests/golden/write_shards.py wrote those in tests/golden."""

import io
import json
import os
import pickle
import shutil
import sys
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from maskdm_jax.data import parquet, prepare, tars
from maskdm_jax.data.images import Framing, decode
from maskdm_jax.data.pipeline import TrainingData
from maskdm_jax.data.sources import Selection, open_source
from maskdm_jax.errors import DataError

KINDS = ("parquet", "webdataset")
LABELS = [i % 3 for i in range(10)]


@pytest.fixture(params=KINDS)
def place(request, root):
    """A set of ten images that the library of its format wrote."""
    return root / "tests" / "golden" / request.param


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(i).randint(0, 256, (8, 8, 3)).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def training_data(path, **changes):
    settings = dict(data__path=str(path), data__channels=3, model__num_classes=3) | changes
    return TrainingData(tiny.config(**settings).data)


def write_parquet(path, columns: dict, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def write_tar(path, files: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_sets_that_the_libraries_wrote_are_read_in_order(place):
    source = pickle.loads(pickle.dumps(open_source(str(place), labels=True)))
    assert len(source) == 10
    assert list(source.labels) == LABELS
    assert source.classes == (["cat", "dog", "eel"] if place.name == "parquet" else ["0", "1", "2"])
    for i in (9, 0, 4, 1):
        pixels = decode(source.read(i)[0], Framing(8))
        drawn = np.random.RandomState(i).randint(0, 256, (8, 8, 3)).astype(np.uint8)
        grey = np.asarray(Image.fromarray(drawn).convert("L"))[..., None]
        np.testing.assert_array_equal(pixels, np.broadcast_to(grey, pixels.shape) if i % 4 == 1 else drawn)
        assert source.read(i)[1] == i % 3
    shard = {"parquet": "train-00001-of-00002.parquet[4]", "webdataset": "train-002.tar/000009.png"}[place.name]
    assert source.names[9] == shard
    assert list(open_source(str(place)).labels) == []


def test_both_formats_hold_the_same_images(root):
    """Also those of palettes, of grey and of transparent colours."""
    first, second = (open_source(str(root / "tests" / "golden" / kind)) for kind in KINDS)
    assert [first.read(i) for i in range(10)] == [second.read(i) for i in range(10)]
    assert [Image.open(io.BytesIO(first.image(i))).mode for i in range(4)] == ["RGB", "L", "P", "RGBA"]


def test_preparing_either_format_gives_the_same_set(root, tmp_path):
    cards = []
    for kind in KINDS:
        source = open_source(str(root / "tests" / "golden" / kind), labels=True)
        cards.append(prepare.prepare(source, tmp_path / kind, Framing(8), name=kind, per_shard=4))
    assert cards[0]["content_hash"] == cards[1]["content_hash"]
    assert cards[0]["count_by_class"] == {"cat": 4, "dog": 3, "eel": 3}
    assert not cards[0]["left_out"]


def test_hosts_share_the_batches_and_a_restart_continues_them(place):
    data = training_data(place)
    whole = data.batches(batch_size=4, seed=1, host=0, hosts=1)
    batches = [next(whole) for _ in range(5)]  # two epochs
    for key in ("image", "label", "index"):
        halves = [data.batches(batch_size=4, seed=1, host=host, hosts=2) for host in range(2)]
        for batch in batches:
            np.testing.assert_array_equal(np.concatenate([next(half)[key] for half in halves]), batch[key])
    seen = np.concatenate([batch["image"] for batch in batches])
    epochs = [sorted(image.tobytes() for image in seen[start : start + 10]) for start in (0, 10)]
    everything = sorted(decode(data.source.image(i), Framing(8)).tobytes() for i in range(10))
    assert epochs == [everything, everything]
    assert not np.array_equal(seen[:10], seen[10:]), "shuffled"
    again = training_data(place).batches(batch_size=4, seed=1, host=0, hosts=1)
    again.seek({"global_next_index": 8})
    np.testing.assert_array_equal(next(again)["image"], batches[2]["image"])


@pytest.fixture
def copied(place, tmp_path):
    """A set that may be changed, of one of the two formats."""
    return shutil.copytree(place, tmp_path / place.name)


def test_an_index_is_made_once_until_a_file_changes(copied, monkeypatch):
    known = open_source(str(copied), labels=True)
    made = []
    for module, name in ((parquet, "_read_rows"), (tars, "_read_headers")):
        honest = getattr(module, name)
        monkeypatch.setattr(module, name, lambda file, honest=honest: made.append(file) or honest(file))
    again = open_source(str(copied), labels=True)
    assert [again.read(i) for i in range(10)] == [known.read(i) for i in range(10)]
    assert again.files_hash == known.files_hash
    assert not made
    changed = sorted(copied.rglob("train-*"))[1]
    os.utime(changed, (5, 5))
    open_source(str(copied))
    assert made == [str(changed)]


def test_equal_sets_have_equal_hashes_wherever_they_are(place, copied):
    known = open_source(str(place)).files_hash
    assert open_source(str(copied)).files_hash == known
    sorted(copied.rglob("train-*"))[1].unlink()
    assert open_source(str(copied)).files_hash != known


@pytest.mark.parametrize("options", [dict(compression="snappy"), dict(compression="zstd", use_dictionary=False), {}])
def test_images_of_compressed_files_are_copied_once(tmp_path, options):
    images = [png(i) for i in range(5)] + [png(1), b"x" * 70_000]
    path = write_parquet(tmp_path / "a.parquet", {"image": images}, row_group_size=3, **options)
    source = open_source(str(path))
    assert [source.image(i) for i in range(7)] == images
    assert all(source._in_copy)
    copy = parquet.index_path(str(path), ".images")
    copy.unlink()
    assert open_source(str(path)).image(6) == images[6], "made again"
    assert copy.exists()
    plain = write_parquet(tmp_path / "b.parquet", {"image": images}, compression="none", use_dictionary=False)
    source = open_source(str(plain))
    assert [source.image(i) for i in range(7)] == images
    assert not any(source._in_copy)


def test_no_copy_is_begun_that_does_not_fit(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", {"image": [png(0)]})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(DataError, match="a.parquet is compressed, and a copy .* GiB .*; set MASKDM_CACHE to a folder"):
        open_source(str(path))


def test_odd_rows_are_unreadable_images_with_their_names(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "there").write_bytes(png(7))
    rows = [
        dict(bytes=png(0), path="x.png"),
        dict(bytes=None, path="images/there"),
        dict(bytes=None, path="images/lost"),
        dict(bytes=b"", path=None),
        None,
        dict(bytes=b"no image", path=None),
        *(dict(bytes=png(i), path=None) for i in range(634)),
    ]
    path = write_parquet(
        tmp_path / "a.parquet", {"image": rows, "label": [0, 1, 2, 0, 1, 2] + [-1] + [None] + [0] * 632}
    )
    source = open_source(str(path), labels=True)
    assert source.classes == ["0", "1", "2"]
    assert source.read(1) == (png(7), 1)
    with pytest.raises(FileNotFoundError, match="images/lost"):
        source.read(2)
    for i in (3, 4):
        with pytest.raises(DataError, match="the row holds no image"):
            source.read(i)
    for _ in zip(range(80), training_data(path).batches(batch_size=8, seed=0), strict=False):
        pass  # an epoch
    for name in ("2", "3", "4", "5", "6", "7"):
        assert f"unreadable image a.parquet[{name}]: " in caplog.text
    assert "a.parquet[6]: its label -1 is none of 3 classes; replaced by its neighbour" in caplog.text
    part = Selection(source, [1, 6, 7], ["1", "0"])
    assert list(part.labels) == [0, -1, -1], "labels that are missing stay so"


def metadata(features) -> dict:
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def labelled(tmp_path, labels, names=None, column="label"):
    table = pa.table({"img": [png(0)] * len(labels), column: labels})
    features = {"img": {"_type": "Image"}, column: {"_type": "ClassLabel", "names": names} if names else {}}
    pq.write_table(table.replace_schema_metadata(metadata(features)), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), labels=True)
    return list(source.labels), source.classes


def test_classes_of_parquet_files(tmp_path):
    assert labelled(tmp_path, [2, 0], ["a", "b", "c"]) == ([2, 0], ["a", "b", "c"])
    assert labelled(tmp_path, [1, 0], ["a", "b"], column="fine_label") == ([1, 0], ["a", "b"])
    assert labelled(tmp_path, ["dog", "cat"]) == ([1, 0], ["cat", "dog"])
    assert labelled(tmp_path, [3, 0]) == ([3, 0], ["0", "1", "2", "3"])
    # ImageNet calls two classes "crane".
    assert labelled(tmp_path, [1, 0], ["crane", "eel", "crane"]) == ([1, 0], ["crane (0)", "eel", "crane (2)"])
    for labels, wrong in ((["dog", None], r"\[1\] is None"), ([0.5], r"\[0\] is 0.5"), ([True], r"\[0\] is True")):
        with pytest.raises(
            DataError, match=f"'label' of a.parquet{wrong}, not the (number|name) of a class; do without"
        ):
            labelled(tmp_path, labels)


def test_the_classes_of_imagenet_have_the_published_numbers(tmp_path):
    """Names of synsets are sorted; a list of other names has the order in which it was published."""
    wnids = [f"n{2_000_000 + 7 * i:08d}" for i in range(1000)]
    mixed = np.random.RandomState(0).permutation(1000)
    labels, classes = labelled(tmp_path, [0, 999, -1], [wnids[i] for i in mixed])
    assert classes == wnids
    assert labels == [mixed[0], mixed[999], -1]
    names = [f"{1000 - i} species" for i in range(1000)]
    assert labelled(tmp_path, [0, 999], names) == ([0, 999], names)
    files = {f"{i:04d}.{kind}": png(0) for i in range(1000) for kind in ["png"]}
    files |= {f"{i:04d}.json": json.dumps({"label": wnids[mixed[i]]}).encode() for i in range(1000)}
    source = open_source(str(write_tar(tmp_path / "a.tar", files)), labels=True)
    assert source.classes == wnids
    assert source.labels == list(mixed)
    assert not source.notes


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"x"], "label": [1]}, "a.parquet has no column 'image'; its columns are picture, label; rename"),
        ({"image": ["x"], "label": [1]}, "column 'image' is string, not bytes or a struct of bytes and path"),
        ({"image": [b"x"], "class": [1]}, "a.parquet has no column 'label'; its columns are image, class; do without"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "a.parquet holds no rows"),
    ],
)
def test_other_columns_are_named(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        open_source(str(write_parquet(tmp_path / "a.parquet", columns)), labels=True)


def test_several_columns_are_named(tmp_path):
    table = pa.table({"a": [b"x"], "b": [b"x"], "fine": [0], "coarse": [0]})
    label, image = {"_type": "ClassLabel", "names": ["x"]}, {"_type": "Image"}
    path = tmp_path / "a.parquet"
    pq.write_table(table.replace_schema_metadata(metadata({"a": image, "b": image})), path)
    with pytest.raises(DataError, match="has 2 columns of images; its columns are a, b, fine, coarse; rename or drop"):
        open_source(str(path))
    pq.write_table(table.replace_schema_metadata(metadata({"a": image, "fine": label, "coarse": label})), path)
    with pytest.raises(DataError, match="has 2 columns of labels; its columns are a, b, fine, coarse; do without"):
        open_source(str(path), labels=True)
    assert open_source(str(path)).image(0) == b"x"
    pq.write_table(table.replace_schema_metadata({b"huggingface": b"{"}), path)
    with pytest.raises(DataError, match="a.parquet has damaged metadata of the library datasets"):
        open_source(str(path))


def test_class_names_that_differ_between_files_are_an_error(tmp_path):
    for name, names in (("a", ["x", "y"]), ("b", ["y", "x"])):
        labelled(tmp_path, [0], names)
        (tmp_path / "a.parquet").rename(tmp_path / f"{name}.pq")
    for name in ("a", "b"):
        (tmp_path / f"{name}.pq").rename(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="b.parquet has other class names than a.parquet"):
        open_source(str(tmp_path), labels=True)


def test_a_damaged_shard_is_named(copied):
    shard = sorted(copied.rglob("train-*"))[1]
    whole = shard.read_bytes()
    for content, message in [
        (whole[: len(whole) // 2 - 100], "is not a readable|is cut short"),
        (b"version https://git-lfs.github.com/spec/v1\n" + bytes(90), "is a pointer of Git LFS; `git lfs pull`"),
        (b"", "is an empty file"),
        (b"<html>", "is a page of HTML"),
        (b"nonsense" * 300, "is not a readable"),
    ]:
        shard.write_bytes(content)
        with pytest.raises(DataError, match=rf"{shard} ({message})"):
            open_source(str(copied), labels=True)
    shard.write_bytes(whole)
    assert len(open_source(str(copied), labels=True)) == 10
    source = open_source(str(copied))
    shard.write_bytes(whole[:300])  # after its index was made
    with pytest.raises(DataError, match=rf"{shard} ends before byte \d+; copy it again"):
        source.read(7)


def test_a_damaged_page_of_a_compressed_file_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"image": [os.urandom(500) * 8 for _ in range(50)]})
    content = bytearray(path.read_bytes())
    content[3000:9000] = bytes(6000)
    path.write_bytes(content)
    with pytest.raises(DataError, match="a.parquet is not a readable Parquet file"):
        open_source(str(path))


def test_labels_beside_the_images_of_shards(tmp_path):
    def source(labels=True, **files):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        for number in range(2):
            part = {f"s/{number}.{kind.replace('_', '.')}": content for kind, content in files.items()}
            write_tar(tmp_path / "set" / f"{number}.tar", part)
        return open_source(str(tmp_path / "set"), labels)

    image = png(0)
    found = source(png=image, cls=b"1\n", json=b'{"label": 0}')
    assert (found.names, found.labels) == (["0.tar/s/0.png", "1.tar/s/1.png"], [1, 1])
    assert source(input_png=image, json=b'{"label": "cat"}').classes == ["cat"]
    assert not source(labels=False, png=image, json=b"{").classes
    bare = r"'0.tar/s/0.png' has no label in a .cls or .json beside it .2 of 2 images.; add it, or do with"
    for files in (dict(), dict(cls=b"-1"), dict(cls=b""), dict(json=b"{"), dict(json=b'{"id": 1}'), dict(cls=b"\xff")):
        with pytest.raises(DataError, match=bare):
            source(png=image, **files)
    write_tar(tmp_path / "set" / "0.tar", {"s/0.png": image, "s/0.cls": b"1", "s/lost.cls": b"1"})
    write_tar(tmp_path / "set" / "1.tar", {"s/1.png": image, "s/1.cls": b"0"})
    assert open_source(str(tmp_path / "set"), True).notes == (f"{tmp_path / 'set'}: 1 labels belong to no image",)
    write_tar(tmp_path / "set" / "1.tar", {"s/1.png": image})
    with pytest.raises(DataError, match=r"'1.tar/s/1.png' has no label .*1 of 2 images"):
        open_source(str(tmp_path / "set"), True)


def test_patterns_name_the_files(tmp_path):
    for i in range(12):
        write_tar(tmp_path / f"x-{i:03d}.tar", {"0.png": png(i)})
    whole = open_source(f"{tmp_path}/x-{{000..011}}.tar")
    assert [whole.image(i) for i in range(12)] == [png(i) for i in range(12)]
    assert open_source(f"{tmp_path}/x-0{{0,1}}0.tar").names == ["x-000.tar/0.png", "x-010.tar/0.png"]
    assert len(open_source(f"{tmp_path}/x-*1.tar")) == 2
    assert open_source(f"{tmp_path}/x-{{003..003}}.tar").names == ["0.png"]
    with pytest.raises(DataError, match=r"x-012.tar' does not exist .2 of 4 files of .*x-{010..013}.tar"):
        open_source(f"{tmp_path}/x-{{010..013}}.tar")
    with pytest.raises(DataError, match=r"y-\*.tar' fits no file"):
        open_source(f"{tmp_path}/y-*.tar")
    with pytest.raises(DataError, match="lost.parquet' does not exist"):
        open_source(f"{tmp_path}/lost.parquet")
    write_parquet(tmp_path / "folder.parquet" / "0.parquet", {"image": [png(5)]})
    assert open_source(f"{tmp_path}/folder.parquet").image(0) == png(5)
    shutil.rmtree(tmp_path / "folder.parquet")
    write_parquet(tmp_path / "a.parquet", {"image": [png(0)]})
    with pytest.raises(DataError, match=r"holds both .parquet and .tar files; give a pattern, such as .*\*.parquet"):
        open_source(str(tmp_path))
    (tmp_path / "0.png").write_bytes(png(0))
    assert open_source(str(tmp_path)).left_aside == {".tar": 12, ".parquet": 1}, "images come first"


def test_suffixes_may_be_capitals(tmp_path):
    for number, name in enumerate(("0.parquet", "1.PARQUET")):
        write_parquet(tmp_path / "rows" / name, {"image": [png(number)]})
    source = open_source(str(tmp_path / "rows"))
    assert [source.image(i) for i in range(2)] == [png(0), png(1)]
    write_parquet(tmp_path / "2.Parquet", {"image": [png(4)]})
    write_tar(tmp_path / "3.TAR", {"0.png": png(4)})
    for name in ("2.Parquet", "3.TAR"):
        assert open_source(str(tmp_path / name)).image(0) == png(4)


def test_splits_are_those_of_the_names(root, tmp_path):
    golden = root / "tests" / "golden" / "parquet"
    test = open_source(str(golden), labels=True, split="test")
    assert (len(test), list(test.labels)) == (3, [-1, -1, -1])
    assert len(open_source(str(golden), split="train")) == 10
    with pytest.raises(DataError, match="has the splits test, train, not 'validation'; set split .--config.data.split"):
        open_source(str(golden), split="validation")
    for name in ("imagenet1k-validation-00", "imagenet1k-test-00"):
        write_tar(tmp_path / f"{name}.tar", {"0.png": png(0)})
    with pytest.raises(DataError, match="has the splits test, validation, not 'train'; set split"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path), split="validation")) == 1
    write_tar(tmp_path / "x" / "a.tar", {"0.png": png(0)})
    with pytest.raises(DataError, match="has no splits; leave out split='train'"):
        open_source(str(tmp_path / "x"), split="train")


def test_sets_on_an_object_store(place, monkeypatch):
    files = fsspec.filesystem("memory")
    for path in place.rglob("*.*"):
        files.pipe(f"/shards/{path.relative_to(place)}", path.read_bytes())
    local, folder = open_source(str(place), labels=True), "data/" if place.name == "parquet" else ""
    suffix = {"parquet": "*-of-00002.parquet", "webdataset": "{000..002}.tar"}[place.name]
    for address in ("memory://shards", f"memory://shards/{folder}train-{suffix}"):
        source = pickle.loads(pickle.dumps(open_source(address, labels=True)))
        assert [source.read(i) for i in range(10)] == [local.read(i) for i in range(10)]
        assert (list(source.names), source.files_hash) == (list(local.names), local.files_hash)
    (first, *_) = files.glob("/shards/**/train-*0*")
    files.pipe(first, files.cat_file(first)[:400])
    with pytest.raises(DataError, match=rf"memory:/{first} is (not a readable|cut short)"):
        open_source("memory://shards")
    files.rm("/shards", recursive=True)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", {"image": [png(0)]})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(DataError, match=r"needs PyArrow: pip install -e '.\[parquet\]'$"):
            open_source(str(path))

    def lost(address):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lost)
    for scheme, extra in (("gs", "gcs"), ("s3", "s3")):
        with pytest.raises(
            DataError, match=rf"^{scheme}://b/x needs a package that is missing: .*\[{extra}\]' .Please"
        ):
            open_source(f"{scheme}://b/x")
