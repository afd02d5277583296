"""Evaluation from paths to numbers, with random Inception weights: the network itself is tested elsewhere."""

import json
import subprocess
import sys

import golden
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from maskdm_jax import torch_file, train
from maskdm_jax.data.sources import DataError
from maskdm_jax.evaluation import inception
from maskdm_jax.evaluation.evaluate import compare, evaluate
from maskdm_jax.evaluation.features import EvaluationError, Extractor, load_set
from maskdm_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def weights(root, tmp_path_factory):
    _, meta = golden.load(root / "tests" / "golden" / "fid_inception.npz")
    state_dict = {name: golden.inception_weight(name, shape) for name, shape in meta["state_dict"].items()}
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch_file.write(path, {name: np.asarray(value) for name, value in state_dict.items()})
    return path


@pytest.fixture(scope="module")
def extractor(weights):
    return Extractor(inception.load_weights(weights), batch_size=8, mesh=make_mesh(devices=jax.devices()[:2]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 11 and 9 images of 24 x 24."""
    rng, made = np.random.RandomState(0), []
    for count, high in ((11, 256), (9, 200)):
        made.append(tmp_path_factory.mktemp("images"))
        for i in range(count):
            small = rng.randint(0, high, (6, 6, 3)).astype(np.uint8)
            Image.fromarray(np.kron(small, np.ones((4, 4, 1), np.uint8))).save(made[-1] / f"{i:03d}.png")
    return made


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_frechet_distance_of_two_folders(folders, weights, extractor):
    """Written out: features of all images at once, and tr (Sa Sb)^(1/2) as the nuclear norm of Xa Xb^T, centred."""
    params = inception.load_weights(weights)
    a, b = (np.asarray(jax.jit(inception.apply)(params, pixels(f))[0], np.float64) for f in folders)
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum(a**2) + np.sum(b**2)
    expected -= 2 * np.linalg.norm(a @ b.T, ord="nuc")
    sets = [load_set(folder, extractor) for folder in folders]
    assert [s.n for s in sets] == [11, 9]
    assert compare(*sets, ("fid",))["fid"] == pytest.approx(expected, rel=1e-4)


def test_an_npz_of_images_or_of_statistics_is_as_good_as_the_folder(folders, extractor, weights, tmp_path):
    np.savez(tmp_path / "images.npz", images=pixels(folders[1]))
    packed, loose = load_set(tmp_path / "images.npz", extractor), load_set(folders[1], extractor)
    np.testing.assert_allclose(packed.features, loose.features, atol=1e-5)
    saved = tmp_path / "reference.npz"
    first = evaluate(folders[0], folders[1], weights, wanted=("fid",), batch_size=8, save_statistics=saved)
    statistics = load_set(saved, extractor)
    assert statistics.n == 11
    assert compare(statistics, packed, ("fid",))["fid"] == pytest.approx(first["fid"], rel=1e-6)
    with pytest.raises(EvaluationError, match="KID and precision/recall need images, but .*reference.npz holds"):
        compare(statistics, packed, ("kid",))


def test_images_may_differ_in_size_and_kind(folders, extractor, tmp_path):
    """In any order and batch, each has its own features; grey ones count as colour."""
    rng = np.random.RandomState(1)
    shapes = [(8, 8, 3), (8, 8, 3), (20, 10, 3), (8, 8), (8, 8, 3)]
    images = [rng.randint(0, 256, shape).astype(np.uint8) for shape in shapes]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    found = load_set(tmp_path, extractor).features
    alone = [extractor("one", [np.atleast_3d(image)] * 2).features[0] for image in images]
    np.testing.assert_allclose(found, alone, atol=2e-4 * np.std(alone))


def test_samples_of_a_checkpoint_and_several_seeds(folders, weights, tmp_path):
    config = tiny.config(stages=("finetune",))
    train.train(config, tmp_path / "run", devices=jax.devices()[:1])
    options = dict(wanted=("kid", "pr"), n=6, batch_size=8)
    one = evaluate(folders[0], tmp_path / "run", weights, seeds=[1], **options)
    two = evaluate(folders[0], tmp_path / "run", weights, seeds=[1, 2], **options)
    assert one["n"] == two["n"] == 6
    assert one["kid"] in [pytest.approx(value, rel=1e-6) for value in two["range"]["kid"]]
    assert two["kid"] == pytest.approx(np.mean(two["range"]["kid"]))
    assert two["range"]["kid"][0] < two["range"]["kid"][1]
    with pytest.raises(EvaluationError, match=r"say how many images to make of it \(--n\)"):
        evaluate(folders[0], tmp_path / "run", weights, batch_size=8)


def test_what_cannot_be_evaluated_is_named(folders, extractor, weights, tmp_path):
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "float.npz", images=np.zeros((3, 8, 8, 3)))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_bytes((folders[0] / "000.png").read_bytes()[: 200 - 100 * i])
    for path, options, error, message in [
        ("none.npz", {}, EvaluationError, "none.npz does not exist"),
        ("text.npz", {}, EvaluationError, "text.npz is damaged or not an .npz file"),
        ("odd.npz", {}, EvaluationError, r"odd.npz: mu \(3,\) and sigma \(3, 3\) are not of 2048 features"),
        ("other.npz", {}, EvaluationError, "holds neither images nor statistics"),
        ("float.npz", {}, EvaluationError, "images are float64 .*; uint8"),
        ("nowhere", {}, DataError, "does not exist"),
        ("broken", {}, DataError, r"0.png cannot be read"),
        (folders[0], dict(n=12), EvaluationError, "has 11 images, fewer than n = 12"),
    ]:
        with pytest.raises(error, match=message):
            load_set(tmp_path / path, extractor, **options)
    with pytest.raises(EvaluationError, match="several seeds need a checkpoint"):
        evaluate(folders[0], folders[1], weights, seeds=[0, 1])


def test_from_the_command_line(root, folders, weights, child_env):
    def run(*args):
        command = [sys.executable, "launch/evaluate.py", f"--reference={folders[0]}", *map(str, args)]
        return subprocess.run(command, cwd=root, env=child_env, capture_output=True, text=True, timeout=200)

    done = run(f"--samples={folders[1]}", f"--inception_weights={weights}", "--metrics=fid,kid,pr", "--batch=8")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() >= {"fid", "kid", "kid_std", "precision", "recall", "reference", "samples", "n"}
    assert (result["reference_n"], result["n"]) == (11, 9)
    done = run(f"--samples={folders[1]}", f"--inception_weights={folders[0]}/000.png")
    assert done.returncode == 1
    assert "000.png" in done.stderr
    assert "Traceback" not in done.stderr
