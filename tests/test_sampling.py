import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from maskdm_jax import sampling
from maskdm_jax.build import make_network
from maskdm_jax.errors import CheckpointError, ConfigError, SamplingError
from maskdm_jax.evaluation.features import Extractor, sampled
from maskdm_jax.parallel.sharding import make_mesh
from maskdm_jax.run import check, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(tiny.config(stages=("finetune",), data__label_dropout=0.1), workdir, devices=jax.devices()[:1])
    return workdir


@pytest.fixture(scope="module")
def loaded(run):
    return sampling.load(run)


def images_of(folder, n):
    return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(n)])


@pytest.fixture(scope="module")
def ten(loaded, tmp_path_factory):
    return sampling.generate_to_folder(loaded, tmp_path_factory.mktemp("out") / "ten", 10, batch_size=8)


def test_an_image_is_the_same_in_any_batch_and_on_any_mesh():
    config = tiny.config()
    network = make_network(config)
    params = jax.jit(network.init)(jax.random.key(0))
    eight = sampling.make_generator(config, make_mesh(), 8)(params, 5, range(8), np.arange(8))
    one = sampling.make_generator(config, make_mesh(devices=jax.devices()[:1]), 8)(params, 5, range(8), np.arange(8))
    np.testing.assert_allclose(eight.astype(int), one, atol=1)
    some = sampling.make_generator(config, make_mesh(), 8)(params, 5, [6, 2], [6, 2])
    np.testing.assert_array_equal(some, eight[[6, 2]])
    other = sampling.make_generator(config, make_mesh(), 8)(params, 6, range(8), np.arange(8))
    assert (other != eight).mean() > 0.5


def test_images_are_the_same_bits_on_any_number_of_devices(loaded):
    """With as many images per device and call; other sizes of a device's batch may round differently."""
    mesh = lambda devices: dataclasses.replace(loaded, mesh=make_mesh(devices=jax.devices()[:devices]))

    def make(devices, batch_size=4):
        on = mesh(devices)
        on = dataclasses.replace(on, params=jax.device_put(on.params, NamedSharding(on.mesh, PartitionSpec())))
        batches = sampling.generate_batches(on, range(19), np.arange(19) % 10, seed=0, batch_size=batch_size)
        return np.concatenate([images for _, images in batches])

    one, two, eight = make(1), make(2), make(8)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, eight)
    np.testing.assert_allclose(one.astype(int), make(8, 1), atol=1)


HOST = """
import sys, jax
host, port, run, out, weights = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(host))
from maskdm_jax import sampling
from maskdm_jax.evaluation.features import Extractor, sampled
loaded = sampling.load(run)
sampling.generate_to_folder(loaded, out, 10, batch_size=2)
sampling.generate_to_folder(loaded, out + "npz", 10, batch_size=2, file_format="npz")
import numpy as np
found = Extractor(weights, batch_size=2)(sampled(loaded, 10, seed=0, batch_size=2))
np.savez(f"{out}-{host}.npz", features=found.features, sigma=found.moments.sigma)
"""


def test_hosts_share_the_work(run, loaded, inception_weights, tmp_path, child_env):
    """Two processes with two devices each: the same images and features as one process, each made once."""
    port = 20_000 + os.getpid() % 10_000  # below those that the system gives to others
    out = tmp_path / "out"
    environment = child_env | {"JAX_NUM_CPU_DEVICES": "2"}
    arguments = [str(port), str(run), str(out), str(inception_weights)]
    processes = [
        subprocess.Popen([sys.executable, "-c", HOST, str(host), *arguments], env=environment, stderr=subprocess.PIPE)
        for host in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-3000:]
    alone = sampling.generate_to_folder(loaded, tmp_path / "alone", 10, batch_size=2)
    np.testing.assert_array_equal(images_of(out, 10), images_of(alone, 10))
    packed = np.load(tmp_path / "outnpz" / "samples.npz")["images"]
    np.testing.assert_array_equal(packed[..., 0], images_of(alone, 10))
    extractor = Extractor(inception_weights, batch_size=2, mesh=make_mesh(devices=jax.devices()[:2]))
    expected = extractor(sampled(loaded, 10, seed=0, batch_size=1))
    for host in range(2):
        found = np.load(f"{out}-{host}.npz")
        np.testing.assert_allclose(found["features"], expected.features, atol=1e-4 * expected.features.std())
        np.testing.assert_allclose(
            found["sigma"], expected.moments.sigma, atol=1e-4 * np.abs(expected.moments.sigma).max()
        )
        assert found["sigma"].dtype == np.float64


def test_images_and_settings_are_written(ten, loaded):
    assert images_of(ten, 10).shape == (10, 8, 8)
    settings = json.loads((ten / "samples.json").read_text())
    assert settings["labels"] == list(range(10))
    assert settings["weights"] == "ema"
    assert settings["checkpoint"] == str(loaded.checkpoint)


def test_going_on_makes_the_same_images(ten, loaded, tmp_path):
    done = []
    out = sampling.generate_to_folder(loaded, tmp_path / "out", 4, batch_size=8, progress=done.append)
    sampling.generate_to_folder(loaded, out, 10, batch_size=8, progress=done.append)
    np.testing.assert_array_equal(images_of(out, 10), images_of(ten, 10))
    (out / "000003.png").unlink()
    sampling.generate_to_folder(loaded, out, 10, batch_size=8, progress=done.append)
    np.testing.assert_array_equal(images_of(out, 10), images_of(ten, 10))
    assert done == [4, 10, 10]


def test_npz(ten, loaded, tmp_path):
    out = sampling.generate_to_folder(loaded, tmp_path / "out", 10, batch_size=8, file_format="npz")
    stored = np.load(out / "samples.npz")
    np.testing.assert_array_equal(stored["images"][..., 0], images_of(ten, 10))
    assert stored["labels"].tolist() == list(range(10))
    assert sorted(path.name for path in out.iterdir()) == ["samples.json", "samples.npz"]
    before = (out / "samples.npz").stat().st_mtime_ns
    sampling.generate_to_folder(loaded, out, 10, batch_size=8, file_format="npz")
    assert (out / "samples.npz").stat().st_mtime_ns == before, "nothing to do"
    sampling.generate_to_folder(loaded, out, 12, batch_size=8, file_format="npz")
    more = np.load(out / "samples.npz")["images"]
    np.testing.assert_array_equal(more[:10], stored["images"])
    with pytest.raises(SamplingError, match="holds 12 images, more than n = 5"):
        sampling.generate_to_folder(loaded, out, 5, batch_size=8, file_format="npz")
    (out / "samples.npz").write_bytes(b"PK")
    with pytest.raises(SamplingError, match="samples.npz is damaged"):
        sampling.generate_to_folder(loaded, out, 12, batch_size=8, file_format="npz")
    (out / "samples.json").write_bytes(b"")
    with pytest.raises(SamplingError, match="samples.json is damaged"):
        sampling.generate_to_folder(loaded, out, 12, batch_size=8, file_format="npz")


def test_labels_are_cycled_through(loaded, tmp_path):
    out = sampling.generate_to_folder(loaded, tmp_path / "out", 5, labels=[3, 1], batch_size=8, file_format="npz")
    assert np.load(out / "samples.npz")["labels"].tolist() == [3, 1, 3, 1, 3]
    named = sampling.generate_to_folder(
        loaded, tmp_path / "named", 2, labels=["3", "1"], batch_size=8, file_format="npz"
    )
    assert np.load(named / "samples.npz")["labels"].tolist() == [3, 1]
    with pytest.raises(
        SamplingError, match=r"labels \[10, -1, 'cat'\] are neither classes \(0, 1.*nor numbers in 0..9"
    ):
        sampling.generate_to_folder(loaded, tmp_path / "b", 5, labels=[10, 2, -1, "cat"])
    assert not (tmp_path / "b").exists()


def test_folders_are_not_mixed(ten, loaded, run, tmp_path):
    with pytest.raises(SamplingError, match=r"other settings \(seed: 0 -> 1\)"):
        sampling.generate_to_folder(loaded, ten, 10, seed=1, batch_size=8)
    with pytest.raises(SamplingError, match="holds 10 images, more than n = 4; give another folder"):
        sampling.generate_to_folder(loaded, ten, 4, batch_size=8)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "samples.json").write_text("[1]")
    with pytest.raises(SamplingError, match="samples.json is damaged .it holds no settings.; give another folder"):
        sampling.generate_to_folder(loaded, tmp_path / "damaged", 4)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SamplingError, match="is not empty and holds no samples.json"):
        sampling.generate_to_folder(loaded, tmp_path, 10)
    with pytest.raises(SamplingError, match="format 'jpg' is unknown"):
        sampling.generate_to_folder(loaded, tmp_path / "a", 1, file_format="jpg")
    with pytest.raises(SamplingError, match="has no weights 'best'; it has params, ema"):
        sampling.load(run, weights="best")
    with pytest.raises(ConfigError, match="sampling.steps is 2000"):
        sampling.load(run, sampling={"steps": 2000})
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        sampling.load(tmp_path)


def test_guidance_and_dpm_solver(loaded, run):
    def make(**changes):
        other = sampling.load(run, sampling=changes)
        return next(sampling.generate_batches(other, range(4), [0, 1, 2, 3], seed=0, batch_size=4))[1].astype(int)

    plain, same, strong = make(), make(guidance=0.0), make(guidance=4.0)
    np.testing.assert_array_equal(plain, same)
    assert (strong != plain).any()
    solver = make(method="dpm_solver", steps=4)
    assert solver.shape == plain.shape
    assert (make(method="dpm_solver", steps=4, guidance=4.0) != solver).any()


def test_guidance_needs_a_network_that_knows_no_label(run, tmp_path):
    with pytest.raises(ConfigError, match="'unlabelled', is not trained; that needs data.label_dropout above 0"):
        check(tiny.config(sampling__guidance=2.0, data__label_dropout=0.0))
    routed = dict(model__outer_blocks=1, sampling__guidance=2.0)
    with pytest.raises(ConfigError, match="'shallow', is not trained; that needs a stage with shallow above 0"):
        check(tiny.config(**routed, sampling__weak="shallow"))
    with pytest.raises(ConfigError, match="'sparse', is not trained; that needs a stage with a mask"):
        check(tiny.config(**routed, sampling__weak="sparse", pretrain__mask__kind="none"))
    with pytest.raises(ConfigError, match="weak_rate is 0.05, which hides no patch; raise it"):
        check(tiny.config(**routed, sampling__weak="sparse", sampling__weak_rate=0.05))
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "2" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["config"]["data"]["label_dropout"] = 0.0
    path.write_text(json.dumps(meta))
    with pytest.raises(
        SamplingError, match="run.* was not trained for the weak prediction of guidance=1.5, 'unlabelled'"
    ):
        sampling.load(tmp_path / "run", sampling={"guidance": 1.5})


def test_samples_of_a_run_that_moved_go_on(run, tmp_path):
    shutil.copytree(run, tmp_path / "before")
    sampling.generate_to_folder(sampling.load(tmp_path / "before"), tmp_path / "out", 2, batch_size=8)
    (tmp_path / "before").rename(tmp_path / "after")
    sampling.generate_to_folder(sampling.load(tmp_path / "after"), tmp_path / "out", 4, batch_size=8)
    assert len(list((tmp_path / "out").glob("0*.png"))) == 4
    loaded = sampling.load(tmp_path / "after")
    other = dataclasses.replace(loaded, params=jax.tree.map(lambda leaf: leaf * 0, loaded.params))
    with pytest.raises(SamplingError, match="other settings .*weights_hash"):
        sampling.generate_to_folder(other, tmp_path / "out", 5, batch_size=8)


def test_what_a_model_cannot_do_is_said(tmp_path):
    config = tiny.config(model__num_classes=0, data__labels=False, data__channels=4)
    model = sampling.from_weights(tmp_path / "model.pt", "ema", config, [], {})
    with pytest.raises(SamplingError, match="unconditional model; leave labels out"):
        sampling.label_cycle(model, [1])
    with pytest.raises(SamplingError, match="4 channels cannot be PNG files; use --format=npz"):
        sampling.generate_to_folder(model, tmp_path / "a", 1)


def test_images_between_two(loaded):
    """Hardly noised, the row goes from one image to the other; all start from the same noise."""
    size, channels = loaded.config.data.image_size, loaded.config.data.channels
    a = np.full((size, size, channels), 30, np.uint8)
    b = np.full((size, size, channels), 220, np.uint8)
    row = sampling.interpolate(loaded, a, b, n=5, start=0).astype(int)
    np.testing.assert_allclose(row.mean((1, 2, 3)), [30, 77.5, 125, 172.5, 220], atol=3)
    np.testing.assert_array_equal(row, sampling.interpolate(loaded, a, b, n=5, start=0))
    far = sampling.interpolate(loaded, a, b, n=3, start=900, seed=1, label="4")
    assert far.shape == (3, size, size, channels)
    other = sampling.interpolate(loaded, a, b, n=3, start=900, seed=2, label=4)
    assert (far != other).any()
    same = sampling.interpolate(loaded, a, a, n=3, start=900, seed=2, label=4)
    np.testing.assert_array_equal(same[0], same[2])


def test_bad_interpolations_are_refused(loaded, run):
    image = np.zeros((8, 8, 1), np.uint8)
    for options, message in [
        (dict(n=3, start=1000), "start is 1000 and n is 3; they must be in 0..999"),
        (dict(n=0, start=10), "n is 0"),
        (dict(n=3, start=10, label="cat"), r"labels \['cat'\] are neither classes"),
    ]:
        with pytest.raises(SamplingError, match=message):
            sampling.interpolate(loaded, image, image, **options)
    fast = sampling.load(run, sampling=dict(method="dpm_solver"))
    with pytest.raises(SamplingError, match="dpm_solver starts from pure noise only"):
        sampling.interpolate(fast, image, image, n=3, start=10)
    data = dataclasses.replace(loaded.config.data, label_dropout=0.0)
    labelled = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=data))
    for call in (
        lambda: sampling.interpolate(labelled, image, image, n=3, start=10),
        lambda: labelled.denoise(np.zeros((2, 8, 8, 1)), 0.5),
    ):
        with pytest.raises(SamplingError, match="was trained only with labels; give one, such as '0'"):
            call()
    assert labelled.denoise(np.zeros((2, 8, 8, 1)), 0.5, labels=1).shape == (2, 8, 8, 1)


def test_interpolation_from_the_command_line(root, run, tmp_path, child_env):
    for i in range(2):
        Image.new("L", (20, 12), 200 * i).save(tmp_path / f"{i}.png")

    def call(images, *args):
        command = [sys.executable, "launch/interpolate.py", f"--run={run}", f"--images={images}", *args]
        return subprocess.run(command, cwd=root, env=child_env, capture_output=True, text=True, timeout=120)

    images, out = f"{tmp_path / '0.png'},{tmp_path / '1.png'}", tmp_path / "out" / "between.png"
    done = call(images, f"--out={out}", "--n=3", "--seeds=2", "--start=100")
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(out)).shape == (2 * 68 + 4, 5 * 68 + 4, 3)
    done = call(f"{tmp_path / '0.png'},{tmp_path / 'none.png'}")
    assert done.returncode == 1
    assert "none.png" in done.stderr
    assert "Traceback" not in done.stderr
