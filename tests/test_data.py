import dataclasses
import io
import json
import logging
import multiprocessing.util
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile

import fsspec
import numpy as np
import pytest
import tiny
from PIL import Image

from maskdm_jax.data import pipeline, prepare, sources
from maskdm_jax.data.images import Framing, decode
from maskdm_jax.data.pipeline import TrainingData, _epoch_order
from maskdm_jax.data.sources import open_source, select
from maskdm_jax.errors import DataError


def png(value=0, size=(10, 8), mode="RGB", kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value).save(buffer, kind)
    return buffer.getvalue()


FILES = {
    "set/cat/a.png": png((10, 0, 0)),
    "set/cat/deep/b.PNG": png((20, 0, 0)),
    "set/dog/ü.jpg": png((30, 0, 0), kind="JPEG"),
    "set/dog/notes.txt": b"no image",
    "set/.hidden/c.png": png(),
    "__MACOSX/set/cat/._a.png": b"resource fork",
}


@pytest.fixture(params=["folder", "zip", "tar"])
def stored(request, tmp_path):
    """FILES as a folder, a zip or a tar."""

    def store(files):
        if request.param == "zip":
            with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
            return str(tmp_path / "images.zip")
        if request.param == "tar":
            with tarfile.open(tmp_path / "images.tar", "w") as archive:
                for name, content in files.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
            return str(tmp_path / "images.tar")
        for name, content in files.items():
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return str(tmp_path / "images")

    return store


def test_images_are_found_and_classes_are_the_first_level_that_differs(stored):
    source = open_source(stored(FILES), labels=True)
    assert source.names == ["set/cat/a.png", "set/cat/deep/b.PNG", "set/dog/ü.jpg"]
    assert source.classes == ["cat", "dog"]
    assert [source.read(i)[1] for i in range(3)] == [0, 0, 1]
    again = pickle.loads(pickle.dumps(source))
    assert again.read(2) == source.read(2)


def test_without_labels_any_layout_will_do(stored):
    source = open_source(stored({"a.png": png(), "x/y/b.png": png()}))
    assert source.names == ["a.png", "x/y/b.png"]
    assert source.classes == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": png(), "x/b.png": png()}, r"has no class folder for 'a.png'.*data.labels=False"),
        ({"a.png": png(), "b.png": png()}, r"has no class folder for 'a.png'.*data.labels=False"),
        ({"x/a.png": png(), "x/b.png": png()}, r"has only one class folder, 'x'; labels need two"),
    ],
)
def test_labels_of_a_set_without_class_folders_are_refused(stored, files, message):
    with pytest.raises(DataError, match=message):
        open_source(stored(files), labels=True)


FLAT = {f"set/00000/{i}.png": png(i) for i in range(3)} | {f"set/00001/{i}.png": png(i) for i in range(3, 6)}
LABELS = {"00000/0.png": 2, "00000/1.png": 0, "00000/2.png": 0, "00001/3.png": 2, "00001/4.png": 0, "00001/5.png": 2}
PETS = {name: {0: "dog", 2: "cat"}[label] for name, label in LABELS.items()}


def dataset_json(labels):
    return json.dumps({"labels": [[name.replace("/", "\\"), label] for name, label in labels.items()]}).encode()


def metadata_csv(labels, column="label", mark=""):
    lines = [f'"{name}",a caption,{label}' for name, label in labels.items()]
    return "\r\n".join([f"{mark}file_name,text,{column}", *lines]).encode()


def metadata_jsonl(labels):
    return "\n".join(json.dumps({"file_name": name, "label": label}) for name, label in labels.items()).encode()


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        ({"dataset.json": dataset_json(LABELS)}, ["0", "1", "2"]),
        ({"metadata.csv": metadata_csv(LABELS, "class", mark="\ufeff")}, ["0", "1", "2"]),
        ({"metadata.jsonl": metadata_jsonl(LABELS)}, ["0", "1", "2"]),
        ({"metadata.csv": metadata_csv({name: f"{label}.0" for name, label in LABELS.items()})}, ["0", "1", "2"]),
        ({"metadata.csv": metadata_csv(PETS)}, ["cat", "dog"]),
        ({"metadata.jsonl": metadata_jsonl(PETS), "dataset.json": b'{"name": "pets"}'}, ["cat", "dog"]),
        (
            {
                f"0000{n}/metadata.csv": metadata_csv({k[6:]: v for k, v in PETS.items() if k.startswith(f"0000{n}")})
                for n in range(2)
            },
            ["cat", "dog"],
        ),
    ],
)
def test_labels_beside_the_images_come_before_folders(stored, caplog, files, classes):
    source = open_source(stored(FLAT | {f"set/{name}": content for name, content in files.items()}), labels=True)
    assert source.classes == classes
    assert [source.classes[label] for label in source.labels] == [
        str(LABELS[name[4:]]) if "0" in classes else PETS[name[4:]] for name in source.names
    ]
    assert [source.read(i)[1] for i in range(6)] == source.labels
    assert source.left_aside == ({".json": 1} if len(files) == 2 and "dataset.json" in files else {})
    assert "are taken for classes" not in caplog.text


def test_labels_on_an_object_store():
    files = fsspec.filesystem("memory")
    for name, content in (FLAT | {"set/dataset.json": dataset_json(LABELS)}).items():
        files.pipe(f"/labels/{name}", content)
    source = open_source("memory://labels/set", labels=True)
    assert source.labels == list(LABELS.values())
    files.rm("/labels", recursive=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"dataset.json": b'{"labels": null}'},
            "dataset.json cannot be used for labels .it lists none.; repair or remove",
        ),
        ({"dataset.json": b'{"labels": [["a.png", [0.1, 0.9]]]}'}, "'a.png' is .0.1, 0.9., not the number or name of"),
        ({"dataset.json": b'{"labels": [["a.png"'}, "dataset.json cannot be used for labels"),
        ({"dataset.json": b"\xff"}, "dataset.json cannot be used for labels"),
        ({"metadata.csv": metadata_csv(LABELS, "kind")}, "columns .'file_name', 'text', 'kind'. none is named label"),
        ({"metadata.csv": metadata_csv(dict(LABELS, **{"00000/0.png": ""}))}, "label of '00000/0.png' is '', not the"),
        ({"metadata.jsonl": b'{"file_name": "a.png"}\n{"file_name": "b.png", "label": 1}'}, "label of 'a.png' is None"),
        (
            {"metadata.jsonl": b'{"file_name": "a.png", "label": 1}\n{"label": 1}'},
            "metadata.jsonl cannot be used for labels",
        ),
        ({"metadata.jsonl": b'{"file_name": 3, "label": 1}\n[]'}, "metadata.jsonl cannot be used for labels"),
        ({"metadata.csv": b"file_name,label\na.png,1,2,3\n"}, "metadata.csv cannot be used .* more fields than"),
        ({"metadata.csv": b"file_name,label,label\na.png,1,2\n"}, "two of its columns .* have the same name"),
        ({"metadata.csv": metadata_csv(LABELS) + b"\n00000/0.png,,1"}, "it gives two labels to '00000/0.png'"),
        (
            {"Metadata.CSV": metadata_csv(dict(LABELS, **{"00000/0.png": -1}))},
            "label of '00000/0.png' is '-1', not the",
        ),
        ({"metadata.csv": metadata_csv(dict(LABELS, **{"00000/0.png": 0.5}))}, "label of '00000/0.png' is '0.5', not"),
        (
            {"metadata.jsonl": b'{"file_name": "a.png", "label": NaN}'},
            "label of 'a.png' is nan, not the number or name",
        ),
        (
            {"metadata.csv": metadata_csv({k: LABELS[k] for k in list(LABELS)[:4]})},
            "metadata.csv lack a label for 'set/00001/4.png' .2 of 6 images.; add it, or do without labels",
        ),
        (
            {"metadata.csv": metadata_csv(LABELS), "dataset.json": dataset_json(LABELS | {"00000/1.png": 1})},
            "set/dataset.json and set/metadata.csv give different labels to 'set/00000/1.png'; remove one",
        ),
    ],
)
def test_labels_beside_the_images_are_never_guessed(stored, files, message):
    place = stored(FLAT | {f"set/{name}": content for name, content in files.items()})
    with pytest.raises(DataError, match=message):
        open_source(place, labels=True)
    assert len(open_source(place)) == 6


def test_accents_of_names_are_compared_however_they_are_written(stored):
    files = {"u\u0308.png": png(1), "b.png": png(2), "metadata.csv": metadata_csv({"./\u00fc.png": 1, "b.png": 0})}
    assert open_source(stored(files), labels=True).labels == [0, 1]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metadata.csv", metadata_csv(LABELS).replace(b",", b";")),
        ("dataset.json", b"[]"),
        ("metadata.parquet", b"PAR1"),
    ],
)
def test_a_label_file_that_is_not_used_is_named(stored, caplog, file, content):
    unused = f"no labels are taken from {file}: a metadata.csv or .jsonl needs a column 'file_name', a dataset.json"
    files = {f"{kind}/{i}.png": png(i) for i, kind in enumerate(("cat", "dog"))}
    source = open_source(place := stored(files | {file: content}), labels=True)
    assert source.classes == ["cat", "dog"]
    assert source.notes[0].startswith(f"{place}: {unused}")
    assert source.notes[1].startswith(f"{place}: the folders cat, dog are taken for classes. If they only divide")
    assert all(note in caplog.text for note in source.notes)
    assert select(source, fraction=0.5).notes == source.notes
    source = open_source(
        stored(files | {"metadata.jsonl": metadata_jsonl(dict.fromkeys(files, 0)), file: content}), True
    )
    assert source.notes[0].startswith(f"{place}: {unused}")
    assert "taken for classes" not in source.notes[-1]


def test_splits_are_not_taken_for_classes(stored, caplog):
    place = stored({f"set/{split}/{kind}/0.png": png() for split in ("train", "Test") for kind in ("cat", "dog")})
    with pytest.raises(DataError, match="is divided into Test, train: splits, not classes; give the path of one of"):
        open_source(place, labels=True)
    assert len(open_source(place)) == 4
    assert f"{place}: the images of all splits are used: Test, train; for one, give its path" in caplog.text


def test_folders_that_may_be_buckets_are_not_taken_for_classes_in_silence(stored, caplog):
    assert open_source(stored(FLAT), labels=True).classes == ["00000", "00001"]
    assert "the folders 00000, 00001 are taken for classes. If they only divide the files, do without" in caplog.text


def test_labels_of_images_that_are_not_there_are_counted(stored, caplog):
    labels = dataset_json(LABELS | {"00007/lost.png": 9})
    assert open_source(stored(FLAT | {"set/dataset.json": labels}), labels=True).classes == ["0", "1", "2"]
    assert "set/dataset.json list 1 images that are not there" in caplog.text


def test_what_pillow_decodes_is_used_and_the_rest_is_counted(stored, caplog):
    kinds = dict(jfif="JPEG", jpe="JPEG", avif="AVIF", jp2="JPEG2000", tga="TGA", apng="PNG", pnm="PPM", ico="ICO")
    images = {f"a.{suffix}": png((9, 9, 9), (16, 16), kind=kind) for suffix, kind in kinds.items()}
    others = {"b.heic": b"x", "c.HEIC": b"x", "README": b"", ".hidden/d.png": png(), "e.mpg": b"", "f.pdf": b""}
    source = open_source(place := stored(images | others))
    assert source.names == sorted(images)
    assert [int(decode(source.read(i)[0], Framing(16)).mean().round()) for i in range(8)] == [9] * 8
    left_aside = {".heic": 2, "without suffix": 1, "hidden": 1, ".mpg": 1, ".pdf": 1}
    assert source.left_aside == left_aside
    assert "left aside 2 .heic, 1 " in caplog.text
    assert sources.card_of(source, Framing(8))["left_aside"] == left_aside
    assert select(source, fraction=0.5).left_aside == left_aside
    line = f"8 images from {place}, left aside: 2 .heic, 1 without suffix, 1 .mpg, 1 .pdf, 1 hidden"
    assert sorted(str(TrainingData(colour(place))).split(", ")) == sorted(line.split(", "))


def test_equal_files_have_equal_hashes_and_other_files_have_others(stored, tmp_path):
    def hash_of(files):
        shutil.rmtree(tmp_path / "images", ignore_errors=True)
        source = open_source(stored(files))
        assert sources.card_of(source, Framing(8))["files_hash"] == source.files_hash
        return source.files_hash

    known = hash_of(FILES)
    (tmp_path / "elsewhere").mkdir()
    for place in ("images", "images.zip", "images.tar"):
        if (tmp_path / place).exists():
            (tmp_path / place).rename(tmp_path / "elsewhere" / place)
            assert open_source(str(tmp_path / "elsewhere" / place)).files_hash == known
    renamed = {name.replace("cat", "car"): content for name, content in FILES.items()}
    resized = FILES | {"set/cat/a.png": FILES["set/cat/a.png"] + b"x"}
    assert hash_of(FILES | {"set/notes.txt": b""}) == known, "of the images alone"
    assert len({known, hash_of(renamed), hash_of(resized), hash_of({"set/cat/a.png": png()})}) == 4


def test_other_labels_have_another_hash(stored):
    def card(labels):
        return sources.card_of(open_source(stored(FLAT | {"set/dataset.json": dataset_json(labels)}), True), Framing(8))

    known, changed = card(LABELS), card(LABELS | {"00000/0.png": 0})
    assert known["files_hash"] == changed["files_hash"]
    assert known["labels_hash"] != changed["labels_hash"]
    assert known == card(LABELS)
    assert sources.card_of(open_source(stored(FLAT)), Framing(8))["labels_hash"] == ""


def test_parts_of_a_set_have_hashes_of_their_own():
    whole = sources.Digits()
    parts = [whole, select(whole, fraction=0.5), select(whole, fraction=0.5, seed=1)]
    assert len({part.files_hash for part in parts}) == 3
    assert select(whole, fraction=0.5).files_hash == parts[1].files_hash


def test_links_are_followed_or_named(tmp_path):
    for name in ("b", "b/deep"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "deep" / "1.png").write_bytes(png(7))
    (tmp_path / "a").symlink_to("b")  # a class that is a link does not take the other's images
    (tmp_path / "b" / "lost.png").symlink_to("nowhere.png")
    (tmp_path / "b" / "round.png").symlink_to("round.png")
    source = open_source(str(tmp_path), labels=True)
    assert source.names == [f"{a}/{b}" for a in "ab" for b in ("deep/1.png", "lost.png", "round.png")]
    assert source.read(0) == (png(7), 0)
    assert source.read(3) == (png(7), 1)
    for i in (1, 2):
        with pytest.raises(OSError, match="No such file|Too many levels"):
            source.read(i)


def test_links_and_pipes_do_not_catch_the_reader(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png())
    for name in ("b", "c", "d"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert open_source(str(tmp_path)).names == ["a/1.png"]


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [(8, 1, "password required"), (10, 9, "compression method is not supported")],  # 9: Deflate64, of Windows
)
def test_a_zip_that_python_cannot_unpack(tmp_path, at, value, reason):
    path = str(tmp_path / "x.zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png())
        archive.writestr("metadata.csv", metadata_csv({"a.png": 0}))
    content = bytearray((tmp_path / "x.zip").read_bytes())
    for match in re.finditer(b"PK\x01\x02", content):
        content[match.start() + at] |= value
    (tmp_path / "x.zip").write_bytes(content)
    source = open_source(path)
    with pytest.raises(DataError, match=f"1 of 1 images are unreadable, more than 1% .a.png: .*{reason}"):
        pipeline.check_unreadable(pipeline.probe(source, Framing(8), 9).unreadable, 1)  # as the dry run does
    with pytest.raises(DataError, match=f"1 of 1 images are unreadable, more than 1% .a.png: .*{reason}"):
        prepare.prepare(source, tmp_path / "set", Framing(8), name="x")
    with pytest.raises(DataError, match=f"a.png .*{reason}"):
        take(TrainingData(colour(path)).batches(batch_size=1, seed=0), 1)
    with pytest.raises(DataError, match=f"metadata.csv cannot be used for labels .*{reason}"):
        open_source(path, labels=True)


def test_of_entries_with_one_name_the_last_counts(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", png(1))
        archive.writestr("b.png", png(2))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.png", png(3))
    source = open_source(str(tmp_path / "x.zip"))
    assert source.names == ["a.png", "b.png"]
    assert source.read(0)[0] == png(3)


@pytest.mark.parametrize(("batch_size", "hosts"), [(1, 1), (2, 2)])
def test_batches_of_one(batch_size, hosts):
    rows = [
        take(TrainingData(DATA).batches(batch_size=batch_size, seed=0, host=h, hosts=hosts), 3) for h in range(hosts)
    ]
    assert [[int(b["index"][0]) for b in host] for host in rows] == [
        list(range(h, 3 * hosts, hosts)) for h in range(hosts)
    ]


def test_bad_paths_are_named(tmp_path, stored):
    with pytest.raises(DataError, match="'nowhere' does not exist; give a folder or .zip"):
        open_source("nowhere")
    with pytest.raises(DataError, match="'~nobody-of-this-name/x' cannot be opened: Could not determine home"):
        open_source("~nobody-of-this-name/x")
    with pytest.raises(DataError, match="holds no images that Pillow can decode; it holds 2 .txt, 1 without suffix"):
        open_source(stored({"a.txt": b"text", "b.txt": b"", "b": png()}))
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DataError, match="broken.zip is not a readable zip"):
        open_source(str(tmp_path / "broken.zip"))
    (tmp_path / "page.zip").write_bytes(b"<html>quota exceeded")
    with pytest.raises(DataError, match="page.zip is a page of HTML or XML, as a download that failed leaves it"):
        open_source(str(tmp_path / "page.zip"))
    (tmp_path / "set.rar").write_bytes(b"Rar!")
    with pytest.raises(DataError, match="neither a folder nor a .zip or .tar"):
        open_source(str(tmp_path / "set.rar"))


def test_classes_and_fractions_are_selected():
    whole = sources.Digits(labels=True)
    odd = select(whole, ("7", "3"))
    assert odd.classes == ["7", "3"]
    assert len(odd) == sum(label in (3, 7) for label in whole.labels)
    assert [odd.read(i)[1] for i in range(len(odd))] == odd.labels
    assert {whole.labels[int(name[7:-1])] for name in odd.names} == {3, 7}
    np.testing.assert_array_equal(odd.read(5)[0], whole.read(int(odd.names[5][7:-1]))[0])
    tenth, hundredth, other = (select(whole, (), share, seed) for share, seed in ((0.1, 0), (0.01, 0), (0.1, 1)))
    assert (len(tenth), len(hundredth)) == (180, 18)
    assert set(hundredth.names) < set(tenth.names) != set(other.names)
    assert list(tenth.names) == list(select(whole, (), 0.1).names)
    assert tenth.classes == whole.classes
    unlabelled = select(whole, ("7", "3"), labels=False)
    assert (unlabelled.classes, unlabelled.labels, unlabelled.read(0)[1]) == ([], [], 0)
    assert list(unlabelled.names) == list(odd.names)
    assert select(whole) is whole
    with pytest.raises(DataError, match=r"classes \['x'\] are not in the data; it has 0, 1, 2"):
        select(whole, ("7", "x"))
    whole.classes = [*whole.classes, "ten"]
    with pytest.raises(DataError, match="no image has one of the classes ten"):
        select(whole, ("ten",))
    assert pickle.loads(pickle.dumps(odd)).read(3)[1] == odd.read(3)[1]


def test_training_on_a_part():
    data = TrainingData(tiny.config(data__classes=("7", "3"), data__fraction=0.5, model__num_classes=2).data)
    batches = data.batches(batch_size=16, seed=0)
    assert len(data.source) == 181
    assert set(next(batches)["label"].tolist()) == {0, 1}
    data = tiny.config(data__classes=("7",), data__labels=False, model__num_classes=0).data
    assert set(next(TrainingData(data).batches(batch_size=4, seed=0))["label"].tolist()) == {0}


def test_a_busy_disk_is_asked_again(monkeypatch, caplog):
    """Errors of reading pass; what is not there is not there."""
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    failures = []

    class Busy(sources.Digits):
        def read(self, i):
            if len(failures) < 3:
                failures.append(i)
                raise OSError("Stale file handle")
            return super().read(i)

    assert sources.read_patiently(Busy(labels=True), 4)[1] == sources.Digits(labels=True).read(4)[1] > 0
    assert failures == [4, 4, 4]
    assert [record.getMessage() for record in caplog.records] == [
        f"digits[4]: Stale file handle; trying again in {pause} s" for pause in (1, 5)
    ]

    class Gone(sources.Digits):
        def read(self, i):
            failures.append(i)
            raise FileNotFoundError(i)

    with pytest.raises(FileNotFoundError):
        sources.read_patiently(Gone(), 5)
    assert failures.count(5) == 1


def test_the_embedded_set():
    source = sources.Digits(labels=True)
    assert len(source) == 1797
    assert source.classes == list("0123456789")
    image, label = source.read(0)
    assert (image.shape, image.dtype, label) == ((8, 8, 1), np.uint8, 0)
    counts = np.bincount([source.read(i)[1] for i in range(len(source))])
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180], "as published"


class TestDecode:
    def test_the_right_size_passes_untouched(self):
        pixels = np.random.RandomState(0).randint(0, 256, (16, 16, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        np.testing.assert_array_equal(decode(buffer.getvalue(), Framing(16, 3)), pixels)

    def test_short_side_then_centre_crop(self):
        pixels = np.zeros((8, 32, 3), np.uint8)
        pixels[:, 12:20] = 255  # the middle
        assert decode(pixels, Framing(8, 3)).min() == 255
        assert decode(pixels, Framing(4, 3)).mean() > 240

    def test_very_long_images_cost_no_more_than_their_middle(self):
        assert decode(np.full((1, 60_000, 3), 7, np.uint8), Framing(64, 3)).min() == 7
        assert decode(np.full((1, 1, 1), 7, np.uint8), Framing(64, 3)).max() == 7

    @pytest.mark.parametrize(
        ("mode", "value", "expected"),
        [
            ("L", 100, 100),
            ("1", 1, 255),
            ("I;16", 100 * 256, 100),
            ("LA", (100, 255), 100),
            ("LA", (100, 0), 255),
            ("RGBA", (100, 100, 100, 255), 100),
            ("RGBA", (0, 0, 0, 0), 255),
            ("P", 0, 0),
        ],
    )
    def test_modes(self, mode, value, expected):
        image = decode(png(value, (8, 8), mode), Framing(8, 3))
        assert (image == expected).all()
        assert image.shape == (8, 8, 3)

    def test_16_bit_grey_that_is_dark(self):
        """It is not taken for 8 bits, whatever the file's kind."""
        pixels = np.full((8, 8), 200, ">u2")
        assert not decode(b"P5\n8 8\n65535\n" + pixels.tobytes(), Framing(8, 1)).any()
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint16)).save(buffer, "TIFF")
        assert not decode(buffer.getvalue(), Framing(8, 1)).any()

    def test_16_bit_grey_with_a_transparent_value(self):
        pixels = np.full((8, 8), 100 << 8, np.uint16)
        pixels[:, 4:] = 1000
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", transparency=1000)
        assert decode(buffer.getvalue(), Framing(8, 1))[0, :, 0].tolist() == [100] * 4 + [255] * 4

    def test_cmyk_becomes_rgb(self):
        image = decode(png((0, 255, 255, 0), (8, 8), "CMYK", "TIFF"), Framing(8, 3))
        assert image[0, 0].tolist() == [255, 0, 0]


def take(batches, n):
    with_all = [next(batches) for _ in range(n)]
    batches.close()
    return with_all


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


DATA = tiny.config().data


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    source = sources.Digits(labels=True)
    first, second = (
        np.concatenate([b["image"].reshape(-1, 64) for b in take(batches, 3)])
        for batches in (TrainingData(DATA).batches(batch_size=599, seed=seed) for seed in (0, 1))
    )
    everything = np.sort(np.stack([source.read(i)[0].reshape(64) for i in range(1797)]).astype(int) @ np.arange(1, 65))
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(epoch.astype(int) @ np.arange(1, 65)), everything)
    assert (first != second).any()


ORDERS = [
    [1, 5, 7, 3, 8, 9, 0, 6, 2, 4],
    [0, 6, 4, 8, 2, 9, 5, 1, 3, 7],
    [5, 3, 1, 2, 6, 7, 9, 0, 8, 4],
    [262, 713, 927, 1081, 1707],
]


def test_orders_never_change():
    """A run that goes on with newer libraries must see the same images: these numbers were recorded."""
    assert _epoch_order(10, 0, 0).tolist() == ORDERS[0]
    assert _epoch_order(10, 0, 1).tolist() == ORDERS[1]
    assert _epoch_order(10, 1, 0).tolist() == ORDERS[2]
    assert [int(name[7:-1]) for name in select(sources.Digits(), (), 0.003).names] == ORDERS[3]


def test_labels_go_with_images():
    source = sources.Digits(labels=True)
    known = {source.read(i)[0].tobytes(): source.read(i)[1] for i in range(1797)}
    (batch,) = take(TrainingData(DATA).batches(batch_size=64, seed=0), 1)
    assert [known[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()
    assert batch["index"].tolist() == list(range(64))
    assert (batch["image"].dtype, batch["label"].dtype, batch["index"].dtype) == (np.uint8, np.int32, np.uint32)


def test_position_is_restored_exactly():
    straight = take(TrainingData(DATA).batches(batch_size=8, seed=5), 6)
    first = TrainingData(DATA).batches(batch_size=8, seed=5)
    state = [next(first) for _ in range(3)] and first.state()
    assert state == {"global_next_index": 24}
    again = TrainingData(DATA).batches(batch_size=8, seed=5)
    again.seek(state)
    for a, b in zip(take(again, 3), straight[3:], strict=True):
        same(a, b)
    first.close()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batch_in_order(hosts):
    straight = take(TrainingData(DATA).batches(batch_size=8, seed=5), 3)
    parts = [take(TrainingData(DATA).batches(batch_size=8, seed=5, host=h, hosts=hosts), 3) for h in range(hosts)]
    for k, whole in enumerate(straight):
        same({key: np.concatenate([part[k][key] for part in parts]) for key in whole}, whole)
    with pytest.raises(DataError, match="batch_size 8 does not divide among 3 hosts"):
        TrainingData(DATA).batches(batch_size=8, seed=5, hosts=3)


def test_threads_and_worker_processes_change_nothing():
    straight = take(TrainingData(DATA).batches(batch_size=8, seed=5), 5)
    for changes in (dict(data__threads=4), dict(data__workers=2)):
        batches = TrainingData(tiny.config(**changes).data).batches(batch_size=8, seed=5)
        batches.seek({"global_next_index": 8})  # in the middle of what two workers would take turns at
        for a, b in zip(take(batches, 4), straight[1:], strict=True):
            same(a, b)


def test_a_set_that_fits_into_memory_is_decoded_once(monkeypatch):
    read, epochs = [], {}

    class Counted(sources.Digits):
        def read(self, i):
            read.append(i)
            return super().read(i)

    monkeypatch.setattr(pipeline, "open_source", lambda *_: Counted(labels=True))
    enough = 1797 * (64 + 400)
    for limit in (enough, enough - 1):
        monkeypatch.setattr(pipeline, "KEPT_BYTES", limit)
        data = TrainingData(dataclasses.replace(DATA, threads=1))  # which never read one image at the same time
        epochs[limit] = take(data.batches(batch_size=599, seed=0), 6)
        assert (len(read) == 1797) == (limit == enough)
    for kept, fresh in zip(*epochs.values(), strict=True):
        same(kept, fresh)


def numbered(n, broken=()):
    """n files whose pixels tell their number; those in `broken` are cut short."""
    files = {f"{i:04d}.png": png((i % 256, i // 256, 0), (8, 8)) for i in range(n)}
    return files | {f"{i:04d}.png": files[f"{i:04d}.png"][:40] for i in broken}


def colour(path, channels=3):
    """Settings of unlabelled images."""
    return tiny.config(data__path=path, data__channels=channels, data__labels=False, model__num_classes=0).data


def test_unreadable_images_are_named_and_replaced_by_their_neighbour(stored, caplog):
    data = TrainingData(colour(stored(numbered(200, [7, 8]))))
    caplog.set_level(logging.WARNING)
    batches = data.batches(batch_size=50, seed=0)
    runs = [take(batches, 4)]
    batches.seek({"global_next_index": 0})
    runs.append(take(batches, 4))
    for a, b in zip(*runs, strict=True):
        same(a, b)
    seen = np.bincount(np.concatenate([b["image"][:, 0, 0, 0] for b in runs[0]]), minlength=200)
    assert seen[[7, 8, 9]].tolist() == [0, 0, 3], "both neighbours stand in"
    assert np.delete(seen, [7, 8, 9]).tolist() == [1] * 197
    assert set(data.unreadable) == {7, 8}
    assert "0007.png: not an image of a known kind" in caplog.text
    assert caplog.text.count("unreadable image") == 2, "each is named once"


def test_worker_processes_report_why_an_image_is_unreadable(tmp_path):
    for name, content in numbered(100, [7]).items():
        (tmp_path / name).write_bytes(content)
    data = TrainingData(dataclasses.replace(colour(str(tmp_path)), workers=1))
    take(data.batches(batch_size=100, seed=0), 1)
    assert data.unreadable == {7: "0007.png: not an image of a known kind, or damaged"}


def test_a_worker_process_that_dies_is_an_error_and_not_a_wait_without_end(monkeypatch):
    honest = multiprocessing.util.spawnv_passfds

    def spawn(path, args, passfds):
        pid = honest(path, args, passfds)
        if any(b"spawn_main" in os.fsencode(arg) for arg in args):
            os.kill(pid, signal.SIGKILL)  # before it has read what it shall do
        return pid

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawn)
    batches, failed = TrainingData(tiny.config(data__workers=1).data).batches(batch_size=8, seed=0), []

    def read():
        try:
            next(batches)
        except DataError as error:
            failed.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(100)
    assert len(failed) == 1
    assert "terminated unexpectedly with exit code -9." in failed[0]
    assert "lower --config.data.workers" in failed[0]
    batches.close()


def spawned() -> set[int]:
    """Worker processes of this one."""
    lists = [path.read_text().split() for path in pathlib.Path("/proc/self/task").glob("*/children")]
    pids = {int(pid) for children in lists for pid in children}
    return {pid for pid in pids if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()}


def test_a_sigterm_to_the_workers_changes_no_batch():
    """As of SLURM and systemd, which send it to every process; the run itself saves then."""
    made = (TrainingData(tiny.config(data__workers=n).data).batches(batch_size=8, seed=0) for n in (1, 0))
    batches, undisturbed = made
    for _ in range(3):
        next(batches), next(undisturbed)
    before = spawned()
    assert before
    for pid in before:
        os.kill(pid, signal.SIGTERM)
    for _ in range(40):  # more than are ready
        batch, expected = next(batches), next(undisturbed)
        assert all((batch[name] == expected[name]).all() for name in expected)
    assert not before & spawned()
    batches.close()
    undisturbed.close()


KILLED = """
import os, signal, time, tiny
from maskdm_jax.data.pipeline import TrainingData
if __name__ == "__main__":
    batches = TrainingData(tiny.config(data__workers=2, data__threads=2).data).batches(batch_size=8, seed=0)
    [next(batches) for _ in range(5)]
    time.sleep(1)  # until the workers wait to hand over further batches
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_worker_processes_end_with_a_killed_run(root, tmp_path, child_env):
    (tmp_path / "killed.py").write_text(KILLED)
    env = child_env | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    # The pipe of its output is open until the last of its processes has ended.
    done = subprocess.run([sys.executable, tmp_path / "killed.py"], env=env, stdout=subprocess.PIPE, timeout=100)
    assert done.returncode == -signal.SIGKILL


def test_some_images_are_read_to_see_what_they_are(tmp_path):
    animation = io.BytesIO()
    Image.new("RGB", (9, 9)).save(animation, "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])
    files = numbered(5, [3]) | {"9999.gif": animation.getvalue()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = pipeline.probe(open_source(str(tmp_path)), Framing(9), 100)
    assert found.images == 6
    assert found.unreadable == ["0003.png: not an image of a known kind, or damaged"]
    assert found.notes == [
        "4 of 6 images read are smaller than 9 x 9 pixels, so they are enlarged",
        "1 of 6 images read are animated or of several pages, so the first alone is used",
    ]
    assert pipeline.probe(sources.Digits(), Framing(8, 1), 7)[::2] == (7, [])


def test_classes_without_images_are_named(caplog):
    labels = dict(data__fraction=0.003, data__labels=True)
    data = TrainingData(tiny.config(**labels).data)
    empty = [name for name in data.classes if data.classes.index(name) not in data.source.labels]
    assert data.source.notes == (f"digits: no image has the class {', '.join(empty)} ({len(empty)} classes)",)
    assert data.source.notes[0] in caplog.text
    assert not TrainingData(tiny.config().data).source.notes


def test_more_than_one_percent_unreadable_stops(stored):
    batches = TrainingData(colour(stored(numbered(200, [3, 50, 120])))).batches(batch_size=50, seed=0)
    with pytest.raises(
        DataError, match=r"3 of 200 images are unreadable, more than 1% \(0003.png: not an image of a kn"
    ):
        take(batches, 4)
    batches.close()


def test_an_image_beyond_the_limit_of_pixels_names_the_setting(tmp_path):
    (tmp_path / "a.png").write_bytes(png(7, (20, 10), "L"))
    settings = colour(str(tmp_path))
    assert take(TrainingData(settings).batches(batch_size=1, seed=0), 1)[0]["image"].min() == 7
    batches = TrainingData(dataclasses.replace(settings, max_pixels=199)).batches(batch_size=1, seed=0)
    with pytest.raises(DataError, match=r"a.png \(it has 20 x 10 pixels, .* raise --config.data.max_pixels"):
        next(batches)
    batches.close()


def test_a_label_of_no_class_is_not_trained_on(monkeypatch):
    """Such as -1, which TFDS gives to images without a label."""

    class Unlabelled(sources.Digits):
        def read(self, i):
            image, label = super().read(i)
            return image, -1 if i == 5 else label

    monkeypatch.setattr(pipeline, "open_source", lambda *_: Unlabelled(labels=True))
    data = TrainingData(DATA)
    (batch,) = take(data.batches(batch_size=1797, seed=0), 1)
    assert batch["label"].min() == 0
    assert data.unreadable == {5: "digits[5]: its label -1 is none of 10 classes"}


class Latents(sources.Source):
    """Twelve arrays of four channels, wider than high; image 7 has one channel less when `odd`."""

    def __init__(self, odd=False):
        super().__init__([f"latent {i}" for i in range(12)])
        self.arrays = [np.random.RandomState(i).randint(0, 256, (8, 12, 4), np.uint8) for i in range(12)]
        if odd:
            self.arrays[7] = self.arrays[7][..., :3]

    def image(self, i):
        return self.arrays[i]


def test_arrays_of_any_number_of_channels_pass_through(monkeypatch):
    monkeypatch.setattr(pipeline, "open_source", lambda *_: Latents())
    data = TrainingData(colour("latents", 4))
    assert data.card["image"]["channels"] == 4
    (batch,) = take(data.batches(batch_size=12, seed=0), 1)
    assert batch["image"].shape == (12, 8, 8, 4)
    order = _epoch_order(12, 0, 0)
    np.testing.assert_array_equal(batch["image"], [Latents().arrays[i][:, 2:10] for i in order])
    smaller = decode(Latents().arrays[0], Framing(4, 4))
    for channel in range(4):
        one = decode(Latents().arrays[0][..., channel : channel + 1], Framing(4, 1))
        np.testing.assert_array_equal(smaller[..., channel : channel + 1], one)


@pytest.mark.parametrize(
    ("source", "channels", "message"),
    [
        (Latents(odd=True), 4, "1 of 12 images .*latent 7: .*array of 3 channels, not .* 4; set data.channels to 3"),
        (
            Latents(),
            3,
            r"latent \d+ .it is an array of 4 channels, not .* 3; set data.channels to 4. and its 11 neighb",
        ),
        (Latents(), 2, r"latent \d+ .it is an array of 4 channels, not .* 2; set data.channels to 4"),
        (sources.Digits(), 4, r"digits\[\d+\] .it is an array of 1 channels, not .* 4; set data.channels to 1"),
        (None, 4, r"a.png .it is an encoded image of 3 channels, not .* 4; set data.channels to 3 .*or 1"),
    ],
)
def test_other_numbers_of_channels_are_refused(monkeypatch, tmp_path, source, channels, message):
    (tmp_path / "a.png").write_bytes(png(size=(8, 8)))
    if source is not None:
        monkeypatch.setattr(pipeline, "open_source", lambda *_: source)
    batches = TrainingData(colour(str(tmp_path), channels)).batches(batch_size=12, seed=0)
    with pytest.raises(DataError, match=message):
        next(batches)
    batches.close()
