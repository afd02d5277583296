"""Checkpoints between meshes, and damaged ones."""

import gc
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maskdm_jax.build import make_network
from maskdm_jax.errors import CheckpointError, ConfigError
from maskdm_jax.parallel import sharding
from maskdm_jax.training import checkpoint
from maskdm_jax.training.start import abstract_state

CONFIG = tiny.config(model__width=128)  # wide enough for some tensors to be split
META = dict(stage="pretrain", stage_step=3, past={}, data={}, window={}, images=None, classes=[], card={})
META |= dict(config=tiny.raw())


def mesh_of(devices: int):
    """Devices and how they share: from 2 on, two share a copy of the state."""
    return sharding.make_mesh(fsdp=min(devices, 2), devices=jax.devices()[:devices])


def abstract(mesh):
    return abstract_state(CONFIG, 0, make_network(CONFIG), mesh)


@pytest.fixture(scope="module")
def state():
    """A state full of numbers, as NumPy arrays and key data."""
    draw, shapes = np.random.RandomState(0), abstract(mesh_of(1))

    def fill(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return np.asarray(jax.random.key_data(jax.random.key(5)))
        return (draw.standard_normal(leaf.shape) * 100).astype(leaf.dtype)

    return jax.tree.map(fill, shapes)


def placed(state, mesh):
    key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    def put(leaf, array):
        if key(leaf):
            return jax.device_put(jax.random.wrap_key_data(array), NamedSharding(mesh, P()))
        return sharding.put(array, leaf.sharding)

    return jax.tree.map(put, abstract(mesh), state)


def assert_same(found, state):
    def same(a, b):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a = jax.random.key_data(a)
        np.testing.assert_array_equal(a, b)

    jax.tree.map(same, found, state)


@pytest.mark.parametrize("devices", [1, 8])
def test_what_one_mesh_saved_any_other_restores(state, tmp_path, devices):
    """Bit for bit, and placed as the new mesh has it."""
    folder = checkpoint.Checkpoints(tmp_path, keep=1)
    folder.save(3, placed(state, mesh_of(devices)), META)
    folder.wait()
    for others in (1, 2, 4, 8):
        wanted = abstract(mesh_of(others))
        found = checkpoint.load_state(folder.folder / "3", wanted)
        assert_same(found, state)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, found, wanted))
    split = sum("fsdp" in leaf.sharding.spec for leaf in jax.tree.leaves(found.opt_state))
    assert split > 10, "nothing was split: the test says little"


@pytest.fixture
def two(state, tmp_path):
    """A folder with checkpoints 3 and 4."""
    folder = checkpoint.Checkpoints(tmp_path / "run", keep=2)
    for step in (3, 4):
        folder.save(step, placed(state, mesh_of(1)), META)
    folder.wait()
    return folder


def test_every_damaged_file_is_noticed_or_does_not_matter(two, state):
    """Each file in turn is cut and removed; all that was not noticed is done once more, together."""
    write = lambda path, content: path.unlink() if content is None else path.write_bytes(content)
    newest, said, harmless = two.folder / "4", [], []
    checkpoint.check(newest)
    for path in sorted(path for part in ("params", "meta") for path in (newest / part).rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], None):
            write(path, content)
            try:
                checkpoint.check(newest)
                harmless.append((path, content))  # the second half of a file may be superseded, the first not
            except CheckpointError as error:
                said.append(str(error))
            write(path, whole)
    assert len(said) > 8
    assert all("checkpoints/4 is damaged" in text and len(text) < 500 for text in said)
    for path, content in harmless:
        write(path, content)
    assert_same(checkpoint.load_state(two.folder / "4", abstract(mesh_of(1))), state)


def test_a_full_disk_is_named(two, state, monkeypatch):
    usage = shutil.disk_usage(two.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    said = r"\(step 5 takes 0.01 GB and .* has 0.00 GB free\); check that it is writable and has room; the same "
    with pytest.raises(CheckpointError, match=said + "command resumes from step 4"):
        two.save(5, placed(state, mesh_of(1)), META)
    assert two.latest_valid() == 4


def test_a_folder_that_disappeared_is_named(two, state):
    away = two.folder.rename(two.folder.with_name("moved"))
    with pytest.raises(CheckpointError, match="No such file or directory.*; check that it is writable and has room"):
        two.save(5, placed(state, mesh_of(1)), META)
    away.rename(two.folder)
    assert two.latest_valid() == 4


def test_paths_that_orbax_takes_for_patterns_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"runs\[1\]: no checkpoint can be kept below a folder with \[ \] in its"):
        checkpoint.Checkpoints(tmp_path / "runs[1]", keep=1)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_version_is_left_alone(two, state):
    path = two.folder / "4" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | dict(config=meta["config"] | dict(future=1))))
    with pytest.raises(ConfigError, match="checkpoints/4 was made by another version of this project: config.future"):
        two.latest_valid()
    path.write_text(json.dumps(meta | dict(past=3, window=None)))
    with pytest.raises(CheckpointError, match="4 is damaged .its meta lacks or garbles past, window"):
        checkpoint.load_meta(two.folder / "4")


def test_folders_that_are_no_checkpoints_are_never_deleted(two, state, caplog):
    """Such as those of another program, or a checkpoint that lost a part."""
    for step in (1, 7):
        (two.folder / str(step)).mkdir()
        (two.folder / str(step) / "model.pt").touch()
    with caplog.at_level("WARNING"):
        assert two.latest_valid() == 4
    assert "checkpoints/7 is no checkpoint; renamed to 7.damaged" in caplog.text
    for step in (5, 6):
        two.save(step, placed(state, mesh_of(1)), META)
    two.wait()
    assert {p.name for p in two.folder.iterdir()} == {"1.damaged", "5", "6", "7.damaged"}
    assert (two.folder / "1.damaged" / "model.pt").exists()


def test_the_newest_whole_one_is_used_and_the_damaged_one_moved_aside(two, state, caplog):
    shutil.rmtree(two.folder / "4" / "ema" / "d")
    two = checkpoint.Checkpoints(two.folder.parent, keep=2)  # of a new start
    with caplog.at_level("WARNING"):
        assert two.latest_valid() == 3
    assert "checkpoints/4 is damaged" in caplog.text
    assert "renamed to 4.damaged, resuming from 3" in caplog.text
    assert (two.folder / "4.damaged").is_dir()
    two.save(4, placed(state, mesh_of(1)), META)
    two.wait()
    assert two.latest_valid() == 4
    before = sorted(path.name for path in two.folder.iterdir())
    for step in (3, 4):
        (two.folder / str(step) / "params" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read; if the disk is in order, remove them"):
        two.latest_valid()
    assert sorted(path.name for path in two.folder.iterdir()) == before, "none was renamed"
    gc.collect()
