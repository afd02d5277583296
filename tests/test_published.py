"""The published layouts, in small."""

import io
import pickle
import subprocess
import sys
import tarfile
import zipfile

import lmdb
import numpy as np
import pytest
from PIL import Image

from maskdm_jax.data import published
from maskdm_jax.data.prepared import read_card
from maskdm_jax.data.published import open_published
from maskdm_jax.errors import DataError


def jpeg(seed, size=(178, 218)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1] // 2, size[0] // 2, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_files(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def names(source):
    return [name.rsplit("/", 1)[-1] for name in source.names]


FACES = {f"img_align_celeba/{i:06d}.jpg": jpeg(i) for i in range(1, 7)}
TEXT = b"000001.jpg 0\n000002.jpg 1\n000003.jpg 0\n000004.jpg 2\n000005.jpg 0\n000006.jpg 2\n"
CSV = b"image_id,partition\n" + TEXT.replace(b" ", b",")


@pytest.fixture(params=["official", "unpacked", "mirror folder", "mirror zip"])
def celeba(request, tmp_path):
    if request.param == "official":  # Img/img_align_celeba.zip, Eval/list_eval_partition.txt
        (tmp_path / "Img").mkdir()
        write_zip(tmp_path / "Img" / "img_align_celeba.zip", FACES)
        write_files(tmp_path, {"Eval/list_eval_partition.txt": TEXT})
    elif request.param == "unpacked":
        write_files(tmp_path, FACES | {"list_eval_partition.txt": TEXT})
    elif request.param == "mirror folder":
        write_files(tmp_path, {f"img_align_celeba/{name}": face for name, face in FACES.items()})
        write_files(tmp_path, {"list_eval_partition.csv": CSV})
    else:
        files = {f"img_align_celeba/{name}": face for name, face in FACES.items()} | {"list_eval_partition.csv": CSV}
        write_zip(tmp_path / "archive.zip", files)
        return tmp_path / "archive.zip"
    return tmp_path


def test_celeba(celeba, tmp_path):
    for split, expected in {"train": "135", "": "135", "valid": "2", "test": "46", "all": "123456"}.items():
        source, got = open_published("celeba", str(celeba), split=split, any_count=True)
        assert names(source) == [f"00000{i}.jpg" for i in expected]
        assert got == (split or "train")
        assert source.read(0)[0] == FACES[f"img_align_celeba/00000{expected[0]}.jpg"]
    with pytest.raises(DataError, match=r"holds 3 images, but celeba \(train\) has 162770"):
        open_published("celeba", str(celeba))
    with pytest.raises(DataError, match="no split 'dev'; choose from train, valid, test, all"):
        open_published("celeba", str(celeba), split="dev")
    with pytest.raises(DataError, match="celeba has no classes; leave --labels out"):
        open_published("celeba", str(celeba), labels=True)


def test_celeba_without_its_split_file(tmp_path):
    write_files(tmp_path, FACES)
    with pytest.raises(DataError, match="lacks list_eval_partition.txt, the official split"):
        open_published("celeba", str(tmp_path))


@pytest.mark.parametrize("celeba", ["official"], indirect=True)
def test_celeba_is_cropped_as_in_the_literature(root, celeba, tmp_path, child_env):
    """128 x 128 from (25, 57), bilinear to 64: from the command line to the pixels."""
    command = [sys.executable, "launch/prepare_data.py", "--dataset=celeba", f"--src={celeba}", "--any_count"]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'out'}"], cwd=root, env=child_env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    card = read_card(tmp_path / "out")
    assert (card["source"], card["split"], card["count"]) == ("celeba", "train", 3)
    assert card["image"] == published.SETS["celeba"].framing.describe()
    from maskdm_jax.data.sources import open_source

    image = Image.open(io.BytesIO(open_source(str(tmp_path / "out")).read(1)[0]))
    face = Image.open(io.BytesIO(FACES["img_align_celeba/000003.jpg"]))
    np.testing.assert_array_equal(image, face.crop((25, 57, 153, 185)).resize((64, 64), Image.Resampling.BILINEAR))


def test_celebahq(tmp_path):
    masks = {f"CelebAMask-HQ/CelebAMask-HQ-mask-anno/0/{i}_hair.png": jpeg(i, (8, 8)) for i in range(9)}
    faces = {f"CelebAMask-HQ/CelebA-HQ-img/{i}.jpg": jpeg(i, (8, 8)) for i in range(3)}
    write_zip(tmp_path / "CelebAMask-HQ.zip", masks | faces)
    source, _ = open_published("celebahq", str(tmp_path / "CelebAMask-HQ.zip"), any_count=True)
    assert names(source) == ["0.jpg", "1.jpg", "2.jpg"]
    (tmp_path / "lmdb").mkdir()
    with (
        lmdb.open(str(tmp_path / "lmdb" / "train.lmdb"), map_size=1 << 20) as database,
        database.begin(write=True) as t,
    ):
        t.put(b"0", bytes(range(48)))
    source, _ = open_published("celebahq", str(tmp_path / "lmdb"), split="train", any_count=True)
    assert source.read(0)[0].shape == (4, 4, 3)
    write_files(tmp_path, {"flat/1.png": jpeg(0, (8, 8))})
    source, split = open_published("celebahq", str(tmp_path / "flat"), any_count=True)
    assert (len(source), split) == (1, "all")


def test_vggface2(tmp_path):
    files = {f"train/n00000{p}/000{i}_01.jpg": jpeg(p * 10 + i, (9, 8)) for p in (2, 3) for i in (1, 2)}
    write_tar(tmp_path / "vggface2_train.tar.gz", files, "w:gz")
    with pytest.raises(DataError, match="vggface2_train.tar.gz is compressed by gzip; unpack it first"):
        open_published("vggface2", str(tmp_path), any_count=True)
    write_tar(tmp_path / "vggface2_train.tar", files)
    packed, _ = open_published("vggface2", str(tmp_path), any_count=True)
    write_files(tmp_path / "unpacked", files | {"test/n000001/0001_01.jpg": jpeg(5, (9, 8))})
    loose, _ = open_published("vggface2", str(tmp_path / "unpacked"), any_count=True)
    for source in (packed, loose):
        assert source.classes == ["n000002", "n000003"]
        assert source.labels == [0, 0, 1, 1]
        assert [source.read(i)[0] for i in range(4)] == list(files.values())


def test_lsun_church(tmp_path):
    path = tmp_path / "church_outdoor_val_lmdb"
    with lmdb.open(str(path), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        transaction.put(b"0a", jpeg(1, (9, 8)))
    for src in (tmp_path, tmp_path / "church_outdoor_val_lmdb"):
        source, _ = open_published("lsun_church", str(src), split="valid", any_count=True)
        assert source.read(0) == (jpeg(1, (9, 8)), 0)
    write_zip(tmp_path / "church_outdoor_train_lmdb.zip", {"church_outdoor_train_lmdb/data.mdb": b"x"})
    with pytest.raises(DataError, match="cannot be read inside a zip; unpack it first"):
        open_published("lsun_church", str(tmp_path), any_count=True)


ROWS = np.random.RandomState(0).randint(0, 256, (12, 3072)).astype(np.uint8)


def cifar(pack):
    """Files of CIFAR-10 with two images each."""
    labels = [i % 10 for i in range(12)]
    named = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return {name: pack(ROWS[2 * i : 2 * i + 2], labels[2 * i : 2 * i + 2]) for i, name in enumerate(named)}


@pytest.mark.parametrize("kind", ["python tar", "python folder", "binary tar"])
def test_cifar10(tmp_path, kind):
    if kind.startswith("python"):
        files = cifar(lambda data, labels: pickle.dumps({b"data": data, b"labels": labels, b"filenames": [b"a"]}, 2))
        files = {f"cifar-10-batches-py/{name}": content for name, content in files.items()}
    else:
        files = cifar(lambda data, labels: np.concatenate([np.asarray(labels, np.uint8)[:, None], data], 1).tobytes())
        files = {f"cifar-10-batches-bin/{name}.bin": content for name, content in files.items()}
    if kind.endswith("folder"):
        write_files(tmp_path, files)
    else:
        write_tar(tmp_path / f"cifar-10-{kind.split()[0]}.tar.gz", files, "w:gz")
    source, _ = open_published("cifar10", str(tmp_path), any_count=True)
    assert len(source) == 10
    assert source.classes == published.CIFAR10
    assert source.labels == list(range(10))
    np.testing.assert_array_equal(source.read(7)[0], ROWS[7].reshape(3, 32, 32).transpose(1, 2, 0))
    source, _ = open_published("cifar10", str(tmp_path), split="test", any_count=True, labels=False)
    assert (len(source), source.classes) == (2, [])


def test_imagenet64(tmp_path):
    def part(start, stop):
        made = {}
        for batch in range(start, stop):
            buffer = io.BytesIO()
            np.savez(buffer, data=np.full((2, 12288), batch, np.uint8), labels=np.asarray([batch, 1000]))
            made[f"train_data_batch_{batch}.npz"] = buffer.getvalue()
        return made

    write_zip(tmp_path / "Imagenet64_train_part1_npz.zip", part(1, 6))
    write_zip(tmp_path / "Imagenet64_train_part2_npz.zip", part(6, 11))
    source, _ = open_published("imagenet64", str(tmp_path), any_count=True)
    assert len(source) == 20
    assert source.labels[:4] == [0, 999, 1, 999]
    assert [int(source.read(2 * i)[0][0, 0, 0]) for i in range(10)] == list(range(1, 11)), "10 comes after 9"
    with pytest.raises(DataError, match="holds no file that matches"):
        open_published("imagenet64", str(tmp_path), split="valid")


def test_what_is_not_there(tmp_path):
    for dataset in published.SETS:
        with pytest.raises(DataError, match="does not exist; give the folder with the files"):
            open_published(dataset, str(tmp_path / "none"))
        with pytest.raises(DataError):
            open_published(dataset, str(tmp_path))
    with pytest.raises(DataError, match="tfds:no_such_set cannot be prepared by TFDS"):
        open_published("cifar10", "tfds:no_such_set")
