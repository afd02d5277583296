"""LMDB, TFDS data folders and batch files, written as their authors write them."""

import concurrent.futures
import io
import os
import pickle
import shutil
import tarfile
import zipfile

import lmdb
import numpy as np
import pytest
import tiny
from PIL import Image
from tensorflow_datasets.core.utils import gcs_utils

from maskdm_jax.data.databases import ArrayBatches
from maskdm_jax.data.pipeline import TrainingData
from maskdm_jax.data.sources import open_source
from maskdm_jax.errors import DataError


def encoded(seed, kind="PNG", size=(9, 8)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_lmdb(path, values):
    with lmdb.open(str(path), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)


def test_an_lmdb_of_encoded_images_or_of_pixels(tmp_path):
    values = {b"b": encoded(1, "WEBP"), b"a": encoded(2, "JPEG"), b"length": b"2", b"num-samples": b"2"}
    write_lmdb(tmp_path / "encoded", values)
    source = open_source(str(tmp_path / "encoded"))
    assert source.names == ["a", "b"]
    assert source.read(1) == (values[b"b"], 0)
    assert pickle.loads(pickle.dumps(source)).read(0) == (values[b"a"], 0)
    pixels = np.random.RandomState(0).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    write_lmdb(tmp_path / "pixels", {b"0": pixels.tobytes()})
    np.testing.assert_array_equal(open_source(str(tmp_path / "pixels")).read(0)[0], pixels)
    bitmap = encoded(3, "BMP", (16, 12))
    bitmap += bytes(3 * 20 * 20 - len(bitmap))  # as long as bare pixels would be
    write_lmdb(tmp_path / "bitmaps", {b"0": bitmap})
    assert open_source(str(tmp_path / "bitmaps")).read(0)[0] == bitmap
    shutil.copytree(tmp_path / "encoded", tmp_path / "copy")
    hashes = [open_source(str(tmp_path / name)).files_hash for name in ("encoded", "copy", "pixels", "bitmaps")]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    with pytest.raises(DataError, match="is an LMDB, which has no labels"):
        open_source(str(tmp_path / "pixels"), labels=True)
    write_lmdb(tmp_path / "empty", {})
    with pytest.raises(DataError, match="empty is empty; copy it again"):
        open_source(str(tmp_path / "empty"))
    whole = (tmp_path / "encoded" / "data.mdb").read_bytes()
    for name, content, message in [
        ("other", b"hello", "is not a readable LMDB .*MDB_INVALID: File is not an LMDB file.; copy it again"),
        ("start", whole[:4097], "is not a readable LMDB .*MDB_INVALID: File is not an LMDB file.; copy it again"),
        ("short", whole[:-1], "is not a readable LMDB .12287 of 12288 bytes are there.; copy it again"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / name))


def test_threads_open_an_lmdb_once(tmp_path):
    """As the first reads of a worker process do."""
    write_lmdb(tmp_path / "set", {b"0": encoded(1)})
    stored = pickle.dumps(open_source(str(tmp_path / "set")))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for _ in range(50):
            source = pickle.loads(stored)
            assert set(pool.map(source.read, [0] * 16)) == {(encoded(1), 0)}


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    import tensorflow_datasets as tfds

    class Pets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = dict(
                image=tfds.features.Image(shape=(None, None, 3)),
                label=tfds.features.ClassLabel(names=["cat", "dog"]),
                file_name=tfds.features.Text(),
            )
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(7), "test": self._generate_examples(3)}

        def _generate_examples(self, n):
            for i in range(n):
                yield i, {"image": io.BytesIO(encoded(i)), "label": i % 2, "file_name": f"{i}.png"}

    root = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gcs_utils, "_is_gcs_disabled", True)  # it would ask for the set over the network
        Pets(data_dir=root, file_format="array_record").download_and_prepare()
    return root / "pets" / "1.0.0"


def test_a_tfds_folder_is_read_without_tensorflow(tfds_folder):
    source = open_source(str(tfds_folder), labels=True)
    assert source.classes == ["cat", "dog"]
    assert len(source) == 7
    assert len(open_source(str(tfds_folder), split="test")) == 3
    images = {source.read(i)[0]: source.read(i)[1] for i in range(7)}
    assert images == {encoded(i): i % 2 for i in range(7)}
    assert source.labels == [source.read(i)[1] for i in range(7)]
    assert pickle.loads(pickle.dumps(source)).read(3) == source.read(3)
    test = open_source(str(tfds_folder), labels=True, split="test")
    assert source.files_hash == open_source(str(tfds_folder)).files_hash != test.files_hash
    with pytest.raises(DataError, match="split 'validation': Unknown split"):
        open_source(str(tfds_folder), split="validation")
    data = tiny.config(data__path=str(tfds_folder), data__split="test", data__channels=3, model__num_classes=2).data
    batch = next(TrainingData(data).batches(batch_size=4, seed=0))
    assert batch["image"].shape == (4, 8, 8, 3)


def test_other_sources_have_no_splits(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(0))
    for path in (str(tmp_path), "digits"):
        with pytest.raises(DataError, match="has no splits; leave out split='train'"):
            open_source(path, split="train")


PLANES = np.random.RandomState(0).randint(0, 256, (5, 3 * 4 * 4)).astype(np.uint8)


@pytest.fixture
def batches(tmp_path):
    """The same five images as a pickle in a tar, an .npz in a zip, and a loose .npz."""
    first = pickle.dumps({b"data": PLANES[:3], b"labels": [1, 2, 3]}, protocol=2)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("x/data_batch_1")
        entry.size = len(first)
        archive.addfile(entry, io.BytesIO(first))
    buffer = io.BytesIO()
    np.savez(buffer, data=PLANES[3:4], labels=np.asarray([3]))
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("two.npz", buffer.getvalue())
    np.savez(tmp_path / "three.npz", data=PLANES[4:], labels=np.asarray([1]))
    return [
        (str(tmp_path / "a.tar.gz"), "x/data_batch_1"),
        (str(tmp_path / "b.zip"), "two.npz"),
        (str(tmp_path / "three.npz"), ""),
    ]


def test_batch_files(batches):
    source = ArrayBatches(batches, ["one", "two", "three"], first_label=1)
    assert source.labels == [0, 1, 2, 2, 0]
    assert list(source.names) == ["data_batch_1[0]", "data_batch_1[1]", "data_batch_1[2]", "two.npz[0]", "three.npz[0]"]
    for i in (4, 0, 3, 1, 2):
        image, label = pickle.loads(pickle.dumps(source)).read(i)
        np.testing.assert_array_equal(image, PLANES[i].reshape(3, 4, 4).transpose(1, 2, 0))
        assert label == source.labels[i]
    plain = ArrayBatches(batches, [])
    assert source.files_hash == plain.files_hash != ArrayBatches(batches[:2], []).files_hash
    assert len(plain) == 5
    assert plain.labels == []
    assert plain.read(2)[1] == 0
    with pytest.raises(DataError, match="labels 1 to 3 are not 3 classes"):
        ArrayBatches(batches, ["one", "two", "three"])


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_batch_files_are_not_executed(tmp_path):
    def write(content):
        (tmp_path / "data_batch_1").write_bytes(content)
        return [(str(tmp_path / "data_batch_1"), "")]

    good = pickle.dumps({"data": PLANES, "labels": [0] * 5})
    unfolding = [0]
    for _ in range(60):
        unfolding = [unfolding] * 10
    assert len(ArrayBatches(write(good), ["x"])) == 5
    for content, message in [
        (pickle.dumps(Evil(tmp_path / "mark")), "it names posix.system, which is not an array"),
        (good[:-40], "damaged or of another kind"),
        (b"", "damaged or of another kind"),
        (pickle.dumps([1]), "damaged or of another kind"),
        (
            pickle.dumps({"data": PLANES.astype(float), "labels": []}),
            "an array of shape .5, 48. has 1920 bytes, not rows of one byte per number",
        ),
        (pickle.dumps({"data": np.array([[1, "x"]], object), "labels": [0]}), "damaged or of another kind"),
        (pickle.dumps({"data": PLANES, "labels": [0]}), "5 images and 1 labels"),
        (pickle.dumps({"data": PLANES, "labels": unfolding}), "damaged or of another kind"),
    ]:
        with pytest.raises(DataError, match=message):
            ArrayBatches(write(content), ["x"])
    assert not (tmp_path / "mark").exists()
