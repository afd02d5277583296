"""Prepared sets: made, stopped, broken, read."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from PIL import Image

from maskdm_jax.data import prepare
from maskdm_jax.data.images import Framing, decode
from maskdm_jax.data.pipeline import TrainingData
from maskdm_jax.data.prepared import PreparedImages, decode_record, encode_record, read_card, shard_name
from maskdm_jax.data.sources import open_source
from maskdm_jax.errors import DataError


def encoded(mode, size=(20, 14), kind="PNG", seed=0, **options) -> bytes:
    depth = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], depth)).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if depth == 1 else pixels[..., :4], None if mode == "P" else mode)
    if mode == "P":
        image = image.convert("P")
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    return encoded("RGB", kind="JPEG", exif=exif)


def deep() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 65536, (14, 20)).astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {
    "cat/grey.png": encoded("L"),
    "cat/alpha.png": encoded("RGBA"),
    "cat/palette.gif": encoded("P", kind="GIF"),
    "cat/cmyk.jpg": encoded("CMYK", kind="JPEG"),
    "cat/wrong_suffix.png": encoded("RGB", kind="JPEG"),
    "dog/turned.jpg": turned(),
    "dog/sixteen_bits.png": deep(),
    "dog/größe ☃.png": encoded("RGB"),
    "dog/wide.png": encoded("RGB", (300, 9)),
    "dog/grey.png": encoded("RGB", seed=3),  # the same name as another's
    "dog/exact.png": encoded("RGB", (12, 12), seed=4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name, content in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    return root


def make(folder, out, **options):
    framing = Framing(options.pop("size", 12))
    return prepare.prepare(open_source(str(folder), True), out, framing, **(dict(name="pets", per_shard=4) | options))


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "set"
    return out, make(folder, out)


def test_a_prepared_set_holds_what_training_would_have_read(folder, prepared):
    """Of every mode, orientation and depth: the same pixels, label and name."""
    out, card = prepared
    raw, ready = open_source(str(folder), True), open_source(str(out), True)
    assert isinstance(ready, PreparedImages)
    assert list(ready.names) == raw.names
    assert ready.classes == raw.classes == ["cat", "dog"]
    for i in range(len(raw)):
        (a, label_a), (b, label_b) = raw.read(i), ready.read(i)
        np.testing.assert_array_equal(decode(a, Framing(12, 3)), decode(b, Framing(12, 3)))
        assert label_a == label_b
    assert card["count"] == len(ready) == 11
    np.testing.assert_array_equal(ready.labels, raw.labels)
    assert card["count_by_class"] == {"cat": 5, "dog": 6}
    assert sorted(p.name for p in out.iterdir()) == ["card.json", *(shard_name(i, 3) for i in range(3)), "labels.npy"]


def test_the_card_says_how(prepared):
    out, card = prepared
    assert read_card(out) == card
    assert card["source"] == "pets"
    assert "bicubic" in card["image"]["resize"]
    assert card["image"]["size"] == 12
    assert len(card["shard_hashes"]) == card["shards"] == 3
    assert card["left_out"] == []


def test_training_reads_it_like_the_folder(folder, prepared):
    changes = dict(data__image_size=12, data__channels=3, model__num_classes=2, model__patch_size=2)
    settings = lambda path: tiny.config(data__path=str(path), **changes).data
    data = [TrainingData(settings(path)) for path in (prepared[0], folder)]
    ours, theirs = (some.batches(batch_size=4, seed=0) for some in data)
    for _ in range(5):
        a, b = next(ours), next(theirs)
        for key in b:
            np.testing.assert_array_equal(a[key], b[key])
    pickle.loads(pickle.dumps(data[0].source)).read(3)
    assert data[0].card["files_hash"] == data[0].card["content_hash"]


def test_the_hash_is_of_the_content(folder, prepared, tmp_path):
    assert make(folder, tmp_path / "a")["content_hash"] == prepared[1]["content_hash"]
    assert make(folder, tmp_path / "b", size=10)["content_hash"] != prepared[1]["content_hash"]
    assert make(folder, tmp_path / "a") == prepared[1], "a finished set is left alone"


def test_images_that_change_in_between(folder, prepared, tmp_path):
    """Neither an unfinished nor a finished set is taken for theirs; a copy in another place is the same."""
    root, out = tmp_path / "images", tmp_path / "set"
    shutil.copytree(folder, root)

    def stop(done):
        if done == 10:  # in the third of three shards
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(root, out, progress=stop)
    shutil.copy(root / "cat/alpha.png", root / "cat/grey.png")
    with pytest.raises(DataError, match="unfinished set of other images or settings .files_hash: .*; remove it or"):
        make(root, out)
    written = []
    card = make(folder, out, progress=written.append)
    assert written[0] == 4, "the first shard is not written again"
    assert card == prepared[1] == make(folder, out)
    with pytest.raises(DataError, match="a finished set .* which differs .files_hash: .*; give another folder"):
        make(root, out)
    older = {key: value for key, value in card.items() if key != "files_hash"} | {"names_hash": "0" * 64}
    (out / "card.json").write_text(json.dumps(older))
    assert make(folder, out) == older


def test_one_at_a_time(folder, tmp_path):
    def again(done):
        make(folder, tmp_path / "set")

    with pytest.raises(BlockingIOError, match="another process is writing there; wait for it: .*set'"):
        make(folder, tmp_path / "set", progress=again)
    assert make(folder, tmp_path / "set")["count"] == 11


def test_labels_that_change_in_between(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded("RGB"))

    def make(*labels):
        lines = [json.dumps({"file_name": f"{i}.png", "label": label}) for i, label in enumerate(labels)]
        (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(lines))
        source = open_source(str(tmp_path / "images"), True)
        return prepare.prepare(source, tmp_path / "set", Framing(12), name="pets")

    first = make(0, 1)
    with pytest.raises(DataError, match="which differs .labels_hash: .*; give another folder"):
        make(1, 0)
    assert make(0, 1) == first


def test_damaged_notes_of_a_stop_are_no_notes(folder, prepared, tmp_path):
    def stop(done):
        if done == 6:
            raise KeyboardInterrupt

    out = tmp_path / "set"
    for content in ("", "{"):
        with pytest.raises(KeyboardInterrupt):
            make(folder, out, progress=stop)
        (out / "shard-00000.json").write_text(content)
        shutil.copytree(out, tmp_path / f"copy{content}")
        assert make(folder, tmp_path / f"copy{content}") == prepared[1]
    (out / "plan.json").write_text("{")
    with pytest.raises(DataError, match="plan.json is damaged"):
        make(folder, out)
    (out / "plan.json").unlink()
    with pytest.raises(DataError, match="is not empty and holds no prepared set"):
        make(folder, out)


def test_the_hash_is_of_pixels_not_of_files(folder, prepared, tmp_path):
    """Other shards, another container, other encodings of the same pixels: the same set."""
    assert make(folder, tmp_path / "shards", per_shard=3)["content_hash"] == prepared[1]["content_hash"]
    again = prepare.prepare(open_source(str(prepared[0]), True), tmp_path / "again", Framing(12), name="pets")
    assert again["content_hash"] == prepared[1]["content_hash"]
    unlabelled = prepare.prepare(open_source(str(folder)), tmp_path / "flat", Framing(12), name="pets")
    assert unlabelled["content_hash"] != prepared[1]["content_hash"]


def test_records_come_back():
    for name, label, image in [("a/ü☃.png", 7, b"\x00\x01"), ("", -1, b""), ("x" * 300, 2**31 - 1, bytes(5))]:
        assert decode_record(encode_record(name, label, image)) == (name, label, image)


def test_a_stop_loses_one_shard_at_most(folder, prepared, tmp_path):
    """Stopped in every shard in turn, it goes on and ends with the same set."""
    written = []

    class Stop(Exception):
        pass

    for at in (2, 6, 10):

        def progress(done, at=at):
            written.append(done)
            if done == at:
                raise Stop

        with pytest.raises(Stop):
            make(folder, tmp_path / "set", progress=progress)
        with pytest.raises(DataError, match="its preparation was not finished|holds no images"):
            read_card(tmp_path / "set")
    card = make(folder, tmp_path / "set", progress=written.append)
    assert card["content_hash"] == prepared[1]["content_hash"]
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == sorted(p.name for p in prepared[0].iterdir())


def test_killed_while_the_plan_is_written(folder, prepared, tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    (out / ".plan.json.host.7.tmp").write_text("{")
    assert make(folder, out)["content_hash"] == prepared[1]["content_hash"]
    assert not list(out.glob(".*"))


def child(folder, out):
    make(folder, out, progress=lambda done: time.sleep(0.05 if done < 11 else 600))  # it never ends by itself


def test_kill_9_at_any_moment(folder, prepared, tmp_path):
    out = tmp_path / "set"
    context = multiprocessing.get_context("spawn")
    for wait in (0.05, 0.2):
        known = set(out.glob("shard-*.json"))
        process = context.Process(target=child, args=(folder, out))
        process.start()
        while set(out.glob("shard-*.json")) <= known and process.is_alive():
            time.sleep(0.005)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not (out / "card.json").exists()
    assert make(folder, out)["content_hash"] == prepared[1]["content_hash"]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in prepared[0].iterdir())


def test_unreadable_images_are_named_and_few(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for i in range(120):
        (root / f"{i:03d}.png").write_bytes(encoded("RGB", seed=i))
    (root / "007.png").write_bytes(encoded("RGB")[:50])
    (root / "120.heic").write_bytes(b"")
    source = open_source(str(root))
    card = prepare.prepare(source, tmp_path / "out", Framing(8), name="x")
    assert (card["count"], card["left_aside"]) == (119, {".heic": 1})
    assert [entry.split(":")[0] for entry in card["left_out"]] == ["007.png"]
    assert len(open_source(str(tmp_path / "out"))) == 119
    (root / "008.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"2 of 120 images are unreadable, more than 1% \(007.png: .*008.png"):
        prepare.prepare(source, tmp_path / "other", Framing(8), name="x")
    (root / "008.png").write_bytes(encoded("RGB", seed=8))
    assert prepare.prepare(source, tmp_path / "other", Framing(8), name="x")["content_hash"] == card["content_hash"]


def test_a_full_disk_and_a_lying_one(folder, tmp_path, monkeypatch):
    class Full(prepare.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("write() failed: No space left on device; writing")

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "ArrayRecordWriter", Full)
        with pytest.raises(
            OSError, match="00000-of-00003.arrayrecord cannot be written: write.. failed: No space left"
        ):
            make(folder, tmp_path / "set")
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["plan.json"]
    with monkeypatch.context() as patched:
        honest = prepare.ArrayRecordWriter.write
        lying = type("Lying", (prepare.ArrayRecordWriter,), {"write": lambda self, record: honest(self, record[:-1])})
        patched.setattr(prepare, "ArrayRecordWriter", lying)  # what is written differs from what was meant
        with pytest.raises(
            DataError, match=r"0-of-00003.arrayrecord is not what was written \(3 of 3 shards differ\); run the"
        ):
            make(folder, tmp_path / "set")
    assert not (tmp_path / "set" / "shard-00000.json").exists()
    assert make(folder, tmp_path / "set")["count"] == 11


def test_a_shard_that_rots_while_others_are_written_is_found_and_written_anew(folder, prepared, tmp_path):
    shard = tmp_path / "set" / shard_name(0, 3)

    def rot(done):
        if done == 10:
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)

    with pytest.raises(
        DataError, match=r"0-of-00003.arrayrecord is not what was written \(1 of 3 shards differ\); run the"
    ):
        make(folder, tmp_path / "set", progress=rot)
    assert not (tmp_path / "set" / "card.json").exists()
    assert make(folder, tmp_path / "set")["content_hash"] == prepared[1]["content_hash"]


def limited(folder, out, queue):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    try:
        make(folder, out)
    except OSError as error:
        queue.put(str(error))


def test_a_disk_that_takes_no_more(folder, prepared, tmp_path):
    """The kernel itself refuses to write on: one error, nothing half-written, and it goes on when there is space."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=limited, args=(folder, tmp_path / "set", queue))
    process.start()
    assert "cannot be written" in queue.get(timeout=60)
    process.join()
    assert not [p.name for p in (tmp_path / "set").iterdir() if p.suffix == ".arrayrecord" or p.name.endswith(".tmp")]
    assert make(folder, tmp_path / "set")["content_hash"] == prepared[1]["content_hash"]


def test_other_folders_are_not_touched(folder, prepared, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="is not empty and holds no prepared set"):
        make(folder, tmp_path / "full")
    with pytest.raises(DataError, match="holds a finished set of pets at 12 px"):
        make(folder, prepared[0], size=16)
    with pytest.raises(DataError, match="PNG images, of 1 or 3 channels, not 4"):
        prepare.prepare(open_source(str(folder)), tmp_path / "new", Framing(8, 4), name="x")
    with pytest.raises(KeyError, match="stop"):
        make(folder, tmp_path / "half", progress=lambda done: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(DataError, match="unfinished set of other images or settings .image.size: 12 -> 16.; remove it"):
        make(folder, tmp_path / "half", size=16)


def test_damaged_sets_are_named(prepared, tmp_path):
    def broken(change):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        shutil.copytree(prepared[0], tmp_path / "set")
        change(tmp_path / "set")
        return str(tmp_path / "set")

    shard = shard_name(1, 3)
    swapped = np.load(prepared[0] / "labels.npy")[::-1].copy()
    source = open_source(broken(lambda p: np.save(p / "labels.npy", swapped)), True)
    with pytest.raises(DataError, match="its label is 0, but labels.npy says 1"):
        source.read(0)
    for change, message in [
        (lambda p: (p / shard).unlink(), f"lacks {shard}"),
        (lambda p: (p / shard).write_bytes((p / shard).read_bytes()[:-80]), "has a damaged shard"),
        (lambda p: (p / "labels.npy").unlink(), "labels.npy is missing"),
        *[
            (lambda p, labels=labels: np.save(p / "labels.npy", labels), message)
            for labels, message in [
                (np.zeros(3, np.int32), r"holds int32 \(3,\), not a label for each of 11 images"),
                (np.zeros(11), "holds float64"),
                (np.full(11, "cat"), "holds <U3"),
                (np.full(11, 2, np.int32), "labels 2 to 2 are not 2 classes"),
            ]
        ],
        (lambda p: (p / "labels.npy").write_bytes(b"PK\x03\x04"), "labels.npy is missing or damaged"),
        (lambda p: (p / "card.json").unlink(), "holds a part of a prepared set, without its card.json: give launch/"),
        *[
            (lambda p, text=text: (p / "card.json").write_text(text), "card.json is damaged or of another kind")
            for text in ("", "{", "{}", "[]", "null", "[" * 100_000)
        ],
        (
            lambda p: (p / "card.json").write_text('{"format": "maskdm-jax prepared images, version 2"}'),
            "its format is 'maskdm-jax prepared images, version 2', not",
        ),
        (
            lambda p: (p / "card.json").write_text(json.dumps(read_card(p) | {"count": 12})),
            "has 11 images, its card says",
        ),
        (lambda p: (p / "card.json").write_text(json.dumps(read_card(p) | {"classes": []})), "prepared without labels"),
    ]:
        with pytest.raises(DataError, match=message):
            open_source(broken(change), True)


def test_a_damaged_record_is_one_unreadable_image(prepared, caplog):
    data = tiny.config(data__path=str(prepared[0]), data__channels=3, data__labels=False, model__num_classes=0).data
    data = TrainingData(data)
    records = data.source._records

    class Damaged:
        def __getitem__(self, i):
            if i == 5:
                raise RuntimeError("chunk data hash mismatch")
            return records[i]

    data.source._records = Damaged()
    batches = data.batches(batch_size=11, seed=0)
    with pytest.raises(DataError, match="1 of 11 images are unreadable, more than 1% .image 5: chunk data hash mism"):
        next(batches)
    batches.close()


def test_names_that_are_no_utf8(root, tmp_path, child_env):
    for name in (b"\xff\xfe/x\xe9.png", b"other/a, b.png", b"other/bad\xe9.png"):
        path = os.path.join(os.fsencode(tmp_path / "images"), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(encoded("RGB") if b"bad" not in name else b"")
    for i in range(150):
        (tmp_path / "images" / "other" / f"{i}.png").write_bytes(encoded("RGB", (8, 8), seed=i))
    command = [sys.executable, "launch/prepare_data.py", f"--src={tmp_path / 'images'}", f"--out={tmp_path / 'set'}"]
    done = subprocess.run(
        [*command, "--size=8", "--labels"], cwd=root, env=child_env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "left out: other/bad\\udce9.png: an empty file" in done.stdout
    source = open_source(str(tmp_path / "set"), True)
    assert source.classes == ["other", "\udcff\udcfe"]
    assert os.fsencode(source.names[len(source) - 1]) == b"\xff\xfe/x\xe9.png"


def test_from_the_command_line(root, folder, tmp_path, child_env):
    def run(*args):
        command = [sys.executable, "launch/prepare_data.py", *map(str, args)]
        return subprocess.run(command, cwd=root, env=child_env, capture_output=True, text=True, timeout=120)

    done = run(f"--src={folder}", f"--out={tmp_path / 'set'}", "--size=8", "--labels", "--crop=adm")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"done: 11 images in 2 classes in {tmp_path / 'set'}, content ")
    image = read_card(tmp_path / "set")["image"]
    assert (image["crop"], image["resize"].split(" with")[0]) == ("adm", "Pillow box to half sizes, then bicubic")
    ready = open_source(str(tmp_path / "set"))
    for i, name in enumerate(ready.names):
        expected = decode((folder / name).read_bytes(), Framing(8, crop="adm"))
        np.testing.assert_array_equal(decode(ready.read(i)[0], Framing(8)), expected)
    done = run(f"--src={folder}", f"--out={tmp_path / 'small'}", "--size=8", "--max_pixels=400")
    assert "1 of 11 images are unreadable, more than 1% (dog/wide.png: it has 300 x 9 pixels" in done.stderr
    done = run(f"--src={tmp_path / 'none'}", f"--out={tmp_path / 'other'}", "--size=8")
    assert done.returncode == 1
    assert done.stderr.startswith("error: '")
