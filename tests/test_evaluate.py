"""Evaluation from paths to numbers, with random Inception weights: the network itself is tested elsewhere."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from maskdm_jax import sampling
from maskdm_jax.data import prepare
from maskdm_jax.data.images import Framing, open_image, save_png, to_pil
from maskdm_jax.data.prepared import read_card
from maskdm_jax.data.sources import Digits, open_source, select
from maskdm_jax.errors import DataError, EvaluationError, TorchFileError
from maskdm_jax.evaluation import features, inception, report
from maskdm_jax.evaluation.evaluate import Evaluator, check_comparable, compare, evaluate
from maskdm_jax.evaluation.features import Extractor, Images, open_images
from maskdm_jax.interop import torch_file
from maskdm_jax.parallel import processes
from maskdm_jax.parallel.sharding import make_mesh
from maskdm_jax.run import train
from maskdm_jax.training import step
from maskdm_jax.training.logs import read_metrics


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def weights(inception_weights):
    return inception_weights


@pytest.fixture(scope="module")
def extractor(weights):
    return Extractor(weights, batch_size=8, mesh=make_mesh(devices=jax.devices()[:2]))


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


def test_frechet_distance_of_two_folders(torch, folders, weights, extractor):
    """PyTorch's features of all images at once, and tr (Sa Sb)^(1/2) as the nuclear norm of Xa Xb^T, centred."""
    import torch_inception

    with torch.no_grad():
        state_dict = torch_file.read(weights)
        a, b = (torch_inception.features(state_dict, pixels(f)).numpy().astype(np.float64) for f in folders)
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum(a**2) + np.sum(b**2)
    expected -= 2 * np.linalg.norm(a @ b.T, ord="nuc")
    sets = [extractor(open_images(folder)) for folder in folders]
    assert [s.n for s in sets] == [11, 9]
    assert compare(*sets, ("fid",))["fid"] == pytest.approx(expected, rel=1e-4)


def test_distances_that_need_no_download(folders, monkeypatch):
    monkeypatch.setattr(inception, "fetch_weights", lambda: 1 / 0)
    wanted = ("fd_lite0", "kid_lite0", "pr_lite0")
    evaluator = Evaluator(wanted, batch_size=1)
    real, samples = (evaluator.samples(open_images(folder, n=8)) for folder in folders)
    assert real.features.shape == (8, 1280)
    result = compare(real, samples, wanted)
    assert result.keys() == {"fd_lite0", "kid_lite0", "kid_lite0_std", "precision_lite0", "recall_lite0"}
    same = compare(real, real, wanted)
    assert same["fd_lite0"] == pytest.approx(0, abs=1e-3 * result["fd_lite0"])
    assert same["precision_lite0"] == same["recall_lite0"] == 1


def test_an_npz_of_images_or_of_statistics_is_as_good_as_the_folder(folders, extractor, weights, tmp_path):
    np.savez(tmp_path / "images.npz", images=pixels(folders[1]))
    packed, loose = (extractor(open_images(path)) for path in (tmp_path / "images.npz", folders[1]))
    np.testing.assert_allclose(packed.features, loose.features, atol=1e-5)
    saved = tmp_path / "reference.npz"
    first, _, _ = evaluate(folders[0], folders[1], weights, wanted=("fid",), batch_size=8, statistics=saved)
    statistics = open_images(saved)
    assert statistics.n == 11
    again, _, _ = evaluate(saved, tmp_path / "images.npz", weights, wanted=("fid",), batch_size=8)
    assert again["fid"] == pytest.approx(first["fid"], rel=1e-6)
    with pytest.raises(EvaluationError, match="reference.npz holds statistics alone, .* need images"):
        check_comparable(statistics, packed.images, ("kid",))


def test_statistics_count_before_images_of_the_same_file(folders, weights, tmp_path, caplog):
    """As in ADM's reference batches: `mu` and `sigma` of the whole set, and some of its images for other metrics."""
    whole, _, _ = evaluate(*folders, weights, batch_size=8, statistics=tmp_path / "jit.npz", wanted=("fid", "pr"))
    with np.load(tmp_path / "jit.npz") as file:
        of_set = {name: file[name] for name in ("mu", "sigma")}
    np.savez(tmp_path / "jit.npz", **of_set)
    np.savez(tmp_path / "adm.npz", pixels(folders[0])[:6], **of_set, mu_s=np.zeros(7), sigma_s=np.eye(7))
    options = dict(inception_weights=weights, batch_size=8)
    of_jit, real, _ = evaluate(tmp_path / "jit.npz", folders[1], **options)
    assert of_jit["fid"] == pytest.approx(whole["fid"], rel=1e-9)
    assert (of_jit["reference_n"], real.features) == (0, None)
    caplog.clear()
    of_adm, real, _ = evaluate(tmp_path / "adm.npz", folders[1], **options)
    assert of_adm["fid"] == of_jit["fid"]
    assert real.features is None, "no metric needs the features of the images"
    assert "6 images" not in caplog.text
    of_adm, real, samples = evaluate(tmp_path / "adm.npz", folders[1], **options, wanted=("fid", "pr"), keep=True)
    assert of_adm["fid"] == of_jit["fid"]
    assert real.features.shape == (6, 128)
    assert "Nearest reference images" in report._nearest(real, samples)
    assert open_images(tmp_path / "adm.npz", n=5).moments is None, "the statistics are not of these five"
    with pytest.raises(EvaluationError, match=r"made differently \(size: 24 and 8\)"):
        evaluate(tmp_path / "adm.npz", "digits", **options)
    np.savez(tmp_path / "adm.npz", pixels(folders[0])[:6], mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(EvaluationError, match=r"adm.npz: mu \(3,\) and sigma \(3, 3\) are not of 128 features"):
        evaluate(tmp_path / "adm.npz", folders[1], **options)


def test_images_may_differ_in_size_and_kind(folders, extractor, tmp_path):
    """In any order and batch, each has its own features; grey ones count as colour."""
    rng = np.random.RandomState(1)
    shapes = [(8, 8, 3), (8, 8, 3), (20, 10, 3), (8, 8), (8, 8, 3)]
    images = [rng.randint(0, 256, shape).astype(np.uint8) for shape in shapes]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    found = extractor(open_images(tmp_path)).features
    twice = lambda image: Images("one", 2, lambda start, stop: iter([np.atleast_3d(image)] * 2))
    alone = [extractor(twice(image)).features[0] for image in images]
    np.testing.assert_allclose(found, alone, atol=2e-4 * np.std(alone))


def test_sizes_are_compared_by_the_first_image(folders, tmp_path):
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 30)).save(tmp_path / "b.png")
    with pytest.raises(EvaluationError, match=r"made differently \(size: 24 and 20 x 30\)"):
        check_comparable(open_images(folders[0]), open_images(tmp_path), ("fid",))


@pytest.mark.parametrize("shape", [(20, 30, 3), (400, 299, 1)])
def test_an_image_is_resized_on_the_host_as_on_the_devices(shape):
    image = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    np.testing.assert_allclose(inception.resize_on_host(image), inception.resize(image[None])[0], atol=2e-6)


def test_files_of_others(folders, tmp_path):
    np.savez(tmp_path / "adm.npz", pixels(folders[1]))  # the array's name becomes arr_0
    assert open_images(tmp_path / "adm.npz").n == 9
    np.savez(tmp_path / "features.npz", pool_3=np.zeros((8, 2048)))
    with pytest.raises(EvaluationError, match=r"holds neither images \(images, arr_0\) nor .*, but pool_3"):
        open_images(tmp_path / "features.npz")


def prepared(source, out, **framing):
    prepare.prepare(source, out, Framing(**framing), name="digits")
    return out


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Eleven digits as a folder and as a prepared set."""
    folder, out = tmp_path_factory.mktemp("digits"), tmp_path_factory.mktemp("prepared") / "set"
    source = select(Digits(labels=True), fraction=0.006)
    for i in range(len(source)):
        save_png(folder / f"{i:02d}.png", to_pil(source.read(i)[0]))
    return folder, prepared(source, out, size=8, channels=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, weights, digits):
    """A run on the prepared set that evaluated itself."""
    workdir = tmp_path_factory.mktemp("run") / "digits"
    config = tiny.config(
        stages=("finetune",),
        data__path=str(digits[1]),
        evaluation__every=1,
        evaluation__metrics=("fid", "kid"),
        evaluation__inception_weights=str(weights),
    )
    with pytest.MonkeyPatch.context() as patch:  # so that the EMA is not yet the weights themselves
        patch.setattr(step, "ema_step_size", lambda *_, **__: 0.5)
        train(config, workdir, devices=jax.devices()[:1])
    return workdir


def test_samples_of_a_checkpoint_and_several_seeds(digits, run, weights):
    options = dict(wanted=("kid", "pr"), n=6, batch_size=8)
    one, _, _ = evaluate(digits[0], run, weights, seeds=[1], **options)
    two, _, _ = evaluate(digits[0], run, weights, seeds=[1, 2], **options)
    assert one["n"] == two["n"] == 6
    assert one["made_by"]["checkpoint"] == str(run / "checkpoints" / "2")
    assert one["kid"] in [pytest.approx(value, rel=1e-6) for value in two["range"]["kid"]]
    assert two["kid"] == pytest.approx(np.mean(two["range"]["kid"]))
    assert two["range"]["kid"][0] < two["range"]["kid"][1]
    with pytest.raises(EvaluationError, match=r"say how many images to make of it \(--n\)"):
        evaluate(digits[0], run, weights, batch_size=8)


def test_training_evaluates_itself(digits, run, weights):
    """At every step asked for, and equal to the same evaluation from outside."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "eval/fid" in line]
    assert [line["step"] for line in lines] == [1, 2]
    outside, _, _ = evaluate(digits[0], run, weights, wanted=("fid", "kid"), n=8, seeds=[3], batch_size=8)
    assert lines[-1]["eval/fid"] == pytest.approx(outside["fid"], rel=1e-4)
    assert lines[-1]["eval/kid"] == pytest.approx(outside["kid"], rel=1e-3)
    assert "evaluation of 8 samples of the EMA at step 2: fid " in (run / "log.txt").read_text()


def test_a_run_that_cannot_be_evaluated_does_not_begin(folders, weights, tmp_path):
    for changes, message in [
        (dict(evaluation__reference=str(folders[0])), "were made differently .size: 24 and 8"),
        (dict(evaluation__reference=str(tmp_path / "none")), "does not exist"),
        (dict(evaluation__inception_weights=str(tmp_path / "none")), "No such file"),
    ]:
        settings = dict(evaluation__every=1, evaluation__inception_weights=str(weights)) | changes
        with pytest.raises((EvaluationError, DataError, OSError), match=message):
            train(tiny.config(**settings), tmp_path / "run", devices=jax.devices()[:1])


def test_what_was_not_made_alike_is_refused(folders, weights, tmp_path, run):
    source = open_source(str(folders[0]))
    fine, cut = prepared(source, tmp_path / "a", size=8), prepared(source, tmp_path / "b", size=8, crop="0,0,16")
    with pytest.raises(EvaluationError, match=r"made differently \(crop: centre and 0,0,16\)"):
        evaluate(fine, cut, weights, batch_size=8)
    with pytest.raises(
        EvaluationError, match="size: 24 and 8.*prepare the reference as the training data was, or give --allow_mis"
    ):
        evaluate(folders[0], fine, weights, batch_size=8)
    with pytest.raises(EvaluationError, match="channels: 3 and 1; .*colour: .*RGB and .*grey"):
        evaluate(fine, run, weights, n=6)
    result, real, made = evaluate(folders[0], fine, weights, batch_size=8, allow_mismatch=True, keep=True)
    assert result["fid"] > 0
    few = dataclasses.replace(made, features=made.features[:3], logits=made.logits[:3])
    for metric, message in [("is", "3 images do not fill 10 splits"), ("pr", "need more than 3 images")]:
        with pytest.raises(EvaluationError, match=f"/a and .*{message}"):
            compare(real, few, (metric,))


def test_samples_carry_the_card_of_their_training(digits, run, weights, tmp_path):
    """From the prepared set through the checkpoint to the samples' folder."""
    loaded = sampling.load(run)
    assert loaded.card["content_hash"] == read_card(digits[1])["content_hash"]
    out = sampling.generate_to_folder(loaded, tmp_path / "out", 4, batch_size=4)
    packed = sampling.generate_to_folder(loaded, tmp_path / "npz", 4, batch_size=4, file_format="npz")
    other = prepared(open_source(str(digits[0])), tmp_path / "other", size=8, channels=1, filter="box")
    adm = prepared(open_source(str(digits[0])), tmp_path / "adm", size=8, channels=1, crop="adm")
    for path in (out, packed, packed / "samples.npz"):
        images = open_images(path)
        assert images.card == loaded.card
        assert images.made_by["seed"] == 0
        check_comparable(open_images(digits[1]), images, ("fid",))
        with pytest.raises(EvaluationError, match="resize: Pillow box with antialiasing.* and Pillow bicubic"):
            check_comparable(open_images(other), images, ("fid",))
        with pytest.raises(EvaluationError, match="crop: adm and centre; resize: Pillow box to half sizes, then bic"):
            check_comparable(open_images(adm), images, ("fid",))
    reference = Evaluator(inception_weights=weights, batch_size=8).reference(open_images(out))
    assert reference.n == 4, "not the statistics of the training data, whose content hash is in the card"


def test_statistics_of_a_prepared_set_are_kept(folders, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    sources = [open_source(str(folder)) for folder in folders]
    data, other = prepared(sources[0], tmp_path / "a", size=12), prepared(sources[1], tmp_path / "b", size=12)
    first, _, _ = evaluate(data, other, weights, batch_size=8)
    (kept,) = (tmp_path / "cache" / "statistics").iterdir()
    assert kept.name.startswith(read_card(data)["content_hash"])
    monkeypatch.setattr(Extractor, "__call__", lambda self, images, **options: 1 / 0)
    assert Evaluator(inception_weights=weights).reference(open_images(data)).n == 11
    with pytest.raises(ZeroDivisionError):
        Evaluator(("kid",), weights).reference(open_images(data))
    with pytest.raises(ZeroDivisionError):
        Evaluator(inception_weights=weights).reference(open_images(data, n=5))
    # Another process has no such file: all compute the statistics, since that takes all of them.
    monkeypatch.setattr(processes, "gather", lambda array: np.stack([array, np.zeros_like(array)]))
    with pytest.raises(ZeroDivisionError):
        Evaluator(inception_weights=weights).reference(open_images(data))
    monkeypatch.undo()
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    again, _, _ = evaluate(data, other, weights, batch_size=8)
    assert again == first


def test_weights_are_fetched_once_and_checked(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "URL", weights.as_uri())
    with pytest.raises(OSError, match=r"cannot be fetched \(it arrived with hash .*--inception_weights"):
        inception.fetch_weights()
    assert not list((tmp_path / "cache" / "weights").iterdir())
    monkeypatch.setattr(inception, "SHA256", inception.file_hash(weights))
    path = inception.fetch_weights()
    assert path.read_bytes() == weights.read_bytes()
    monkeypatch.setattr(inception, "URL", "file:///nowhere")
    assert inception.fetch_weights() == path
    monkeypatch.setenv("MASKDM_CACHE", str(tmp_path / "other"))
    with pytest.raises(OSError, match="file:///nowhere cannot be fetched"):
        inception.fetch_weights()


def test_what_cannot_be_evaluated_is_named(folders, extractor, weights, tmp_path):
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((3, 4)))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "float.npz", images=np.zeros((3, 8, 8, 3)))
    np.savez(tmp_path / "nan.npz", mu=np.full(8, np.nan), sigma=np.eye(8))
    odd = [np.zeros(2), "abc", np.nan, np.inf]
    for i, n in enumerate(odd):
        np.savez(tmp_path / f"n{i}.npz", mu=np.zeros(8), sigma=np.eye(8), n=n)
    np.savez(tmp_path / "text_mu.npz", mu=np.full(8, "x"), sigma=np.eye(8))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    content = bytearray((tmp_path / "other.npz").read_bytes())
    (tmp_path / "odd_header.npz").write_bytes(content.replace(b"{'descr'", b"{'descr(").replace(b"x.npy", b"n.npy"))
    content[6] |= 1  # flags of the entry in either header: encrypted
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.npz").write_bytes(content.replace(b"x.npy", b"n.npy"))
    np.savez(tmp_path / "empty.npz", images=np.zeros((0, 8, 8, 3), np.uint8))
    with pytest.raises(EvaluationError, match="empty.npz has 0 images; at least 2 are needed"):
        check_comparable(open_images(tmp_path / "empty.npz"), open_images(folders[0]), ("fid",))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_bytes((folders[0] / "000.png").read_bytes()[: 200 - 100 * i])
    for path, options, error, message in [
        ("none.npz", {}, EvaluationError, "none.npz does not exist"),
        ("text.npz", {}, EvaluationError, "text.npz is damaged or not an .npz file"),
        ("odd.npz", {}, EvaluationError, r"odd.npz: mu \(3,\) and sigma \(3, 4\) must be a vector and a square"),
        ("other.npz", {}, EvaluationError, "holds neither images .*, but x"),
        ("float.npz", {}, EvaluationError, "images are float64 .*; uint8"),
        ("nan.npz", {}, EvaluationError, "mu and sigma must be finite"),
        *[(f"n{i}.npz", {}, EvaluationError, f"n{i}.npz: ") for i in range(len(odd))],
        ("text_mu.npz", {}, EvaluationError, "text_mu.npz: could not convert string to float"),
        ("array.npz", {}, EvaluationError, "array.npz is damaged or not an .npz file"),
        ("locked.npz", {}, EvaluationError, "locked.npz is damaged or not an .npz file .*password required"),
        ("odd_header.npz", {}, EvaluationError, "odd_header.npz is damaged or not an .npz file"),
        ("nowhere", {}, DataError, "does not exist"),
        ("broken", {}, DataError, r"0.png cannot be read"),
        (folders[0], dict(n=12), EvaluationError, "has 11 images, fewer than n = 12"),
    ]:
        with pytest.raises(error, match=message):
            extractor(open_images(tmp_path / path, **options))
    with pytest.raises(EvaluationError, match="several seeds need a checkpoint"):
        evaluate(folders[0], folders[1], weights, seeds=[0, 1])
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    for pair in [(tmp_path / "narrow.npz", folders[0]), (folders[0], tmp_path / "narrow.npz")]:
        with pytest.raises(EvaluationError, match=r"narrow.npz: mu \(3,\) and sigma \(3, 3\) are not of 128 features"):
            evaluate(*pair, weights, batch_size=8)
    with pytest.raises(EvaluationError, match="the metric is 'fdi'; it must be one of fid, kid, is, pr, fd_lite0"):
        evaluate(*folders, weights, wanted=("fdi",))
    with pytest.raises(EvaluationError, match="fid, fd_lite0, whose features are of different networks"):
        evaluate(*folders, weights, wanted=("fid", "fd_lite0"))
    with pytest.raises(EvaluationError, match="latents: the metrics compare images of 1 or 3 channels, not 4"):
        features.transform("latents", open_source("digits"), Framing(8, 4))


def test_damaged_notes_of_samples_are_named(folders, tmp_path):
    good = dict(checkpoint="runs/x/1", weights="ema", sampling={}, card={"image": {"size": 24}})
    shutil.copytree(folders[0], tmp_path / "samples")
    for noted in ("{", "[]", "[" * 100_000, '{"seed": 0}'):
        (tmp_path / "samples" / "samples.json").write_text(noted)
        with pytest.raises(EvaluationError, match="samples.json is damaged .*or remove it"):
            open_images(tmp_path / "samples")
    (tmp_path / "samples" / "samples.json").write_text(json.dumps(good))
    images = open_images(tmp_path / "samples")
    assert (images.card, images.made_by["weights"]) == (good["card"], "ema")


def test_a_few_images_are_decoded_ahead_in_order(tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(features, "open_image", lambda *args: decoded.append(1) or open_image(*args))
    for i in range(60):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    images = open_images(tmp_path)
    for i, image in enumerate(images.iterate(10, 60)):
        assert image[0, 0, 0] == i + 10
        assert len(decoded) <= i + 30  # those ahead, and those in threads
    assert len(decoded) == 50


def test_a_neighbour_replaces_an_unreadable_image_as_in_training(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "data")
    (tmp_path / "data" / "003.png").write_bytes(b"no image")
    images = features.transform("data", open_source(str(tmp_path / "data")), Framing(24))
    found, expected = np.stack(list(images.iterate(0, 9))), pixels(folders[1])
    np.testing.assert_array_equal(found, expected[[0, 1, 2, 4, 4, 5, 6, 7, 8]])


def test_from_the_command_line(root, folders, weights, child_env, tmp_path):
    def run(*args):
        command = [sys.executable, "launch/evaluate.py", f"--reference={folders[0]}", *map(str, args)]
        return subprocess.run(command, cwd=root, env=child_env, capture_output=True, text=True, timeout=200)

    report = tmp_path / "report.html"
    options = (f"--inception_weights={weights}", "--metrics=fid,kid,pr", "--batch=8", f"--report={report}")
    marked = tmp_path / "marked"  # made from a checkpoint that this machine cannot see
    shutil.copytree(folders[1], marked)
    (marked / "samples.json").write_text(json.dumps(dict(checkpoint="ftp://b/runs/a/checkpoints/7", card={})))
    done = run(f"--samples={marked}", *options)
    assert "error: the report was not written: ftp://b" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["n"] == 9
    done = run(f"--samples={folders[1]}", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() >= {"fid", "kid", "kid_std", "precision", "recall", "reference", "samples", "n"}
    assert (result["reference_n"], result["n"]) == (11, 9)
    assert f"{result['fid']:.4g}" in report.read_text()
    done = run(f"--samples={folders[1]}", f"--inception_weights={folders[0]}/000.png")
    assert done.returncode == TorchFileError.status
    assert "000.png" in done.stderr
    assert "Traceback" not in done.stderr
