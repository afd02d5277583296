"""Run folders in an object store: the same files, bits and guarantees as on a disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from unittest import mock

import fsspec
import jax
import numpy as np
import pytest
import tiny
from moto.server import ThreadedMotoServer

from maskdm_jax import run, sampling, storage
from maskdm_jax.errors import CheckpointError, ConfigError
from maskdm_jax.interop import convert
from maskdm_jax.parallel import processes
from maskdm_jax.storage import location
from maskdm_jax.training import checkpoint, logs


@pytest.fixture(scope="module")
def server(root):
    """Address of a server for one bucket."""
    command = [sys.executable, root / "tests" / "gcs_server.py"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def store_env(server):
    """Variables that make gs:// mean that server, for this process and its children."""
    variables = dict(STORAGE_EMULATOR_HOST=server, TENSORSTORE_GCS_HTTP_URL=server, EPATH_USE_TF="0")
    variables |= dict(GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false")  # it would ask Google for the kind of the bucket
    before = dict(os.environ)
    os.environ.update(variables)
    yield variables
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def bucket(store_env):
    return "gs://bucket"


@pytest.fixture(scope="module")
def runs(bucket, tmp_path_factory):
    """The same run on a disk and in the bucket."""
    config, disk = tiny.config(preview__every=2), tmp_path_factory.mktemp("run")
    for folder in (disk, f"{bucket}/run"):
        run.train(config, folder)
    return disk, location(f"{bucket}/run")


def metrics(folder):
    timed = ("images_per_second", "waiting_for_data")
    return [{k: v for k, v in line.items() if k not in timed} for line in logs.read_metrics(folder / "metrics.jsonl")]


def test_a_run_in_a_bucket_is_the_run_on_a_disk(runs):
    disk, stored = runs
    assert metrics(stored) == metrics(disk)
    assert (stored / "config.json").read_bytes() == (disk / "config.json").read_bytes()
    for step in (4, 6):
        name = f"samples/step_{step:07d}.png"
        assert (stored / name).read_bytes() == (disk / name).read_bytes()
    log = (stored / "log.txt").read_text()
    assert f"run folder {stored}" in log
    assert "maskdm-" not in log, "no path of the temporary folder"
    assert f"{stored} holds samples, checkpoints/6" in log.splitlines()[-1]
    assert not (stored / "owner.json").exists()
    loaded = [sampling.load(folder) for folder in runs]
    for a, b in zip(*(jax.tree.leaves(one.params) for one in loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    checkpoint.check(checkpoint.find(stored))


def test_it_resumes_where_it_was(runs, bucket):
    disk, _ = runs
    folder = f"{bucket}/resumed"
    run.train(tiny.config(stages=("pretrain",)), folder)
    run.train(tiny.config(), folder)
    assert metrics(location(folder)) == metrics(disk)
    run.train(tiny.config(), folder)
    assert "nothing left to do" in (location(folder) / "log.txt").read_text()


def test_one_host_asks_the_store_at_a_start(runs, monkeypatch):
    """However many hosts there are: the others get the answers from the first."""
    _, stored = runs
    store, asked = type(fsspec.filesystem("gs")), []
    request = store._request

    async def counted(self, method, path, *args, **kwargs):
        asked.append((method, path))
        return await request(self, method, path, *args, **kwargs)

    monkeypatch.setattr(store, "_request", counted)

    def requests(first):
        asked.clear()
        monkeypatch.setattr(processes, "is_first", lambda: first)
        monkeypatch.setattr(processes, "gather", lambda value: [value if first else 6])
        with storage.mirrored(stored, restore=logs.CONTINUED, active=first):
            assert checkpoint.Checkpoints(stored, keep=1).latest_valid() == 6
        return len(asked)

    assert requests(first=False) == 0
    assert 0 < requests(first=True) < 120


def test_what_was_not_finished_is_no_checkpoint(bucket):
    unfinished = location(f"{bucket}/killed/checkpoints/9")
    for name in ("_CHECKPOINT_METADATA", "params/_METADATA", "meta/metadata"):
        (unfinished / name).write_bytes(b"{}")
    (unfinished.parent / "7" / "mine.txt").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.find(unfinished.parent.parent)
    checkpoints = checkpoint.Checkpoints(unfinished.parent.parent, keep=1)
    assert checkpoints.latest_valid() is None
    assert not unfinished.exists()
    assert (unfinished.parent / "7.damaged" / "mine.txt").read_bytes() == b"mine"
    checkpoints.close()


def test_sampling_into_a_bucket(runs, bucket, tmp_path):
    disk, stored = runs
    here, there = sampling.load(disk), sampling.load(stored)
    folder = sampling.generate_to_folder(there, f"{bucket}/samples", 5, batch_size=4)
    name = folder / "000003.png"
    content = name.read_bytes()
    name.unlink()
    sampling.generate_to_folder(there, folder, 6, batch_size=4)
    assert name.read_bytes() == content
    sampling.generate_to_folder(here, tmp_path / "samples", 6, batch_size=4)
    for i in range(6):
        assert (folder / f"{i:06d}.png").read_bytes() == (tmp_path / "samples" / f"{i:06d}.png").read_bytes()
    packed = sampling.generate_to_folder(there, f"{bucket}/packed", 6, batch_size=4, file_format="npz")
    with (packed / "samples.npz").open("rb") as file:
        assert np.load(file)["images"].shape == (6, 8, 8, 1)
    assert not (packed / "parts").exists()


def test_evaluation_in_a_bucket(root, runs, bucket, store_env, child_env):
    """Real images, a run, saved statistics and the report are all in the store."""
    disk, stored = runs
    real = sampling.generate_to_folder(sampling.load(disk), f"{bucket}/real", 8, batch_size=8)
    command = [sys.executable, root / "launch" / "evaluate.py", f"--reference={real}", f"--samples={stored}", "--n=8"]
    command += ["--metrics=kid_lite0", f"--report={bucket}/report.html", f"--save_statistics={bucket}/statistics.npz"]
    done = subprocess.run(command, env=child_env | store_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kid_lite0" in json.loads(done.stdout.splitlines()[-1])
    assert b"</html>" in location(f"{bucket}/report.html").read_bytes()
    assert location(f"{bucket}/statistics.npz").exists()


def test_conversion_from_and_to_a_bucket(runs, bucket, tmp_path):
    disk, stored = runs
    for source, target in ((disk, tmp_path / "a.pt"), (stored, f"{bucket}/a.pt")):
        convert.convert(source, target)
    assert location(f"{bucket}/a.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()
    convert.convert(f"{bucket}/a.pt", f"{bucket}/back", heads=2)
    assert checkpoint.find(f"{bucket}/back").parent.parent == location(f"{bucket}/back")


def test_one_process_owns_a_folder(bucket, monkeypatch, caplog):
    monkeypatch.setattr(storage, "HEARTBEAT", 0.1)
    monkeypatch.setattr(storage, "PATIENCE", 3)
    ended = []
    monkeypatch.setattr(storage.os, "_exit", ended.append)
    folder = location(f"{bucket}/owned")
    with storage.lock_dir(folder), pytest.raises(BlockingIOError, match="is writing there"), storage.lock_dir(folder):
        pass
    monkeypatch.setattr(storage, "PATIENCE", 0.5)
    (folder / "owner.json").write_bytes(json.dumps(dict(owner="a process that was killed", beat=7)).encode())
    with storage.lock_dir(folder):
        assert "killed" not in (folder / "owner.json").read_text()
    assert not ended
    with storage.lock_dir(folder):
        (folder / "owner.json").write_bytes(json.dumps(dict(owner="another", beat=0)).encode())
        while not ended:
            time.sleep(0.05)
    assert ended[0] == 1


def test_a_watcher_sees_what_is_written(bucket, monkeypatch, server):
    """Also while the store refuses requests: then later."""
    monkeypatch.setattr(storage, "UPLOAD_EVERY", 0.05)
    folder = location(f"{bucket}/watched")
    with storage.mirrored(folder) as (local, _), (local / "metrics.jsonl").open("a") as file:
        for number in range(3):
            if number == 1:
                urllib.request.urlopen(f"{server}/faults?status=503&count=3").close()
            file.write(f'{{"step": {number}}}\n')
            file.flush()
            while not (
                (folder / "metrics.jsonl").exists() and len(logs.read_metrics(folder / "metrics.jsonl")) > number
            ):
                time.sleep(0.05)
        (local / "part.tmp").write_bytes(b"x")
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    with storage.mirrored(folder, restore=logs.CONTINUED) as (local, _):
        assert (local / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_a_temporary_file_may_vanish_during_an_upload(bucket, monkeypatch):
    folder, version = location(f"{bucket}/vanishing"), storage._version
    monkeypatch.setattr(storage, "_version", lambda file: (file.suffix == ".tmp" and file.unlink()) or version(file))
    with storage.mirrored(folder) as (local, upload):
        (local / ".a.tmp").write_bytes(b"x")
        (local / "b").write_bytes(b"x")
        upload()
    assert [path.name for path in folder.iterdir()] == ["b"]


def test_a_store_that_refuses_ends_the_run_with_one_line(bucket, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("the credentials have expired\nand so on")

    folder = location(f"{bucket}/refused")
    monkeypatch.setattr(fsspec.filesystem("gs"), "put_file", refuse)
    message = r"^gs://bucket/refused/a cannot be written \(the credentials have expired\)$"
    with pytest.raises(OSError, match=message), storage.mirrored(folder) as (local, _):
        (local / "a").write_bytes(b"")


def test_an_upload_that_is_never_answered(bucket, monkeypatch, server):
    folder = location(f"{bucket}/stalled")
    assert not folder.exists()  # else the file system that epath keeps would have the limit below
    for name in ("gs", "gcs"):
        assert fsspec.config.conf[name]["requests_timeout"] == storage.REQUEST_LIMIT
        monkeypatch.setitem(fsspec.config.conf[name], "requests_timeout", 0.5)
    urllib.request.urlopen(f"{server}/faults?status=0&count=1").close()
    message = r"gs://bucket/stalled/a cannot be written \(FSTimeoutError\)"
    with storage.mirrored(folder) as (local, upload):
        (local / "a").write_bytes(b"x")
        with pytest.raises(OSError, match=message):
            upload()
    assert (folder / "a").read_bytes() == b"x", "it was repeated at the end"


def test_images_are_not_waited_for_without_limit(root, child_env):
    """Also if the run folder is on a disk, so that no other part of the program prepares for stores."""
    show = "import fsspec, maskdm_jax.data.files as _; print(fsspec.filesystem('gs', token='anon').requests_timeout)"
    done = subprocess.run([sys.executable, "-c", show], cwd=root, env=child_env, capture_output=True, text=True)
    assert done.stdout.split() == [str(storage.REQUEST_LIMIT)], done.stderr


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://", "give a path on a disk or an address"),
        ("ftp://host/run", "give a path on a disk or an address"),
        ("s3://bucket/run", r"needs s3fs; pip install 'maskdm-jax\[s3\]"),
    ],
)
def test_addresses_that_cannot_work(address, message, monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        location(address)


@pytest.fixture(scope="module")
def s3():
    """A bucket at s3://, of a server in this process."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    keys = dict(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(AWS_ENDPOINT_URL=address, EPATH_USE_TF="0", **keys).items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield location("s3://bucket")
    server.stop()


def test_a_run_at_s3(s3, runs, monkeypatch):
    """Interrupted and resumed there, it is the run on a disk; what does not count any more is deleted."""
    disk, _ = runs
    put = storage._upload

    def refuse(file, target):
        if "checkpoints/4/params" in str(target):
            raise OSError("the credentials have expired")
        put(file, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_upload", refuse)
        message = r"to s3://bucket/run/checkpoints \(the credentials have expired\).* resumes from step 2$"
        with pytest.raises(CheckpointError, match=message):
            run.train(tiny.config(), s3 / "run")
    run.train(tiny.config(), s3 / "run")
    assert metrics(s3 / "run") == metrics(disk)
    here, there = (sampling.load(folder) for folder in (disk, s3 / "run"))
    for a, b in zip(*(jax.tree.leaves(one.params) for one in (here, there)), strict=True):
        np.testing.assert_array_equal(a, b)
    names = lambda folder: sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names(s3 / "run") == names(disk)
    convert.convert(s3 / "run", s3 / "exported.pt")
    convert.convert(s3 / "exported.pt", s3 / "imported", heads=2)
    checkpoint.check(checkpoint.find(s3 / "imported"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="s3://bucket/run: several processes cannot write checkpoints to s3://"):
        checkpoint.check_path("s3://bucket/run")


def test_a_run_that_was_copied_to_s3(s3, runs, monkeypatch):
    """It counts, also if there is no room for its copy."""
    disk, _ = runs
    storage.upload(disk, s3 / "copied")
    checkpoints = checkpoint.Checkpoints(s3 / "copied", keep=1)
    assert checkpoints.latest_valid() == 6
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(fsspec.filesystem("s3"), "get", mock.Mock(side_effect=full))
    with pytest.raises(
        ConfigError, match=r"s3://bucket/copied/checkpoints/6/params does not fit on the disk of .* TMPDIR"
    ):
        checkpoints.latest_valid()
    assert checkpoints.latest() == 6


def test_a_file_at_s3_can_be_read_while_it_is_replaced(s3):
    write = lambda count: storage.write_atomically(s3 / "metrics.jsonl", b'{"step": 1}\n' * count)
    write(1)
    writer = threading.Thread(target=lambda: [write(count) for count in range(1, 31)])
    writer.start()
    while writer.is_alive():
        assert logs.read_metrics(s3 / "metrics.jsonl")
    assert len(logs.read_metrics(s3 / "metrics.jsonl")) == 30


def test_killed_in_a_bucket(bucket, store_env, child_env, root, tmp_path):
    """Killed at some moment and started again, a run has the history of an undisturbed one."""
    short = "from maskdm_jax import storage; storage.HEARTBEAT, storage.PATIENCE = 0.2, 1; import sys, runpy; "
    start = short + "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    settings = [f"--config.model.{key}" for key in ("width=16", "depth=1", "heads=2")]
    settings += ["--config.preview.every=0", "--config.log.every=1", "--config.log.tensorboard=False"]
    settings += ["--config.checkpoint.every=3", "--config.pretrain.batch_size=8", "--config.stages=('pretrain',)"]
    command = [sys.executable, "-c", start, "launch/train.py", "--config=configs/demo.py", *settings]
    env = child_env | store_env

    def begin(folder, steps):
        args = [*command, f"--workdir={folder}", f"--config.pretrain.steps={steps}"]
        output = subprocess.PIPE
        return subprocess.Popen(args, cwd=root, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)

    process = begin(f"{bucket}/killed_run", 100_000)
    newest = lambda: max((int(p.name) for p in location(f"{bucket}/killed_run/checkpoints").iterdir()), default=0)
    while not (location(f"{bucket}/killed_run/checkpoints").exists() and newest() >= 6):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    steps = newest() + 4
    for folder in (f"{bucket}/killed_run", tmp_path / "undisturbed"):
        process = begin(folder, steps)
        output = process.communicate()[0]
        assert process.returncode == 0, output
    assert metrics(location(f"{bucket}/killed_run")) == metrics(tmp_path / "undisturbed")
    assert "start: resuming" in (location(f"{bucket}/killed_run") / "log.txt").read_text()
