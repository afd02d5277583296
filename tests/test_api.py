"""The package from Python."""

import doctest
import shutil
import subprocess
import sys

import numpy as np
import pytest

import maskdm_jax
from maskdm_jax import api
from maskdm_jax.config import parse
from maskdm_jax.errors import ConfigError, MaskDMError, SamplingError
from maskdm_jax.interop.convert import convert


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run of the doctests, which train, load and sample in the order of the module."""
    runs = tmp_path_factory.mktemp("runs")
    names = dict(maskdm_jax=maskdm_jax, runs=runs)
    failures = []
    for name in ("recipe", "train", "load"):
        test = doctest.DocTestFinder(recurse=False).find(getattr(api, name), name, globs=names)[0]
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(test, out=failures.append, clear_globs=False)
        names = test.globs
    assert not failures, "".join(failures)
    return names


def test_what_a_model_does(trained):
    model = trained["model"]
    images = model.sample(12, seed=3)
    assert images.dtype == np.uint8
    assert model.classes[:2] == ["0", "1"]
    np.testing.assert_array_equal(images, model.sample(12, seed=3, batch_size=12))
    assert (model.sample(12, seed=3, steps=4) != images).any()
    assert (model.sample(12, seed=4) != images).any()
    x0 = model.denoise(np.zeros((2, 8, 8, 1)), 0.5, labels=[1, 2])
    assert x0.shape == (2, 8, 8, 1)
    assert (x0 != model.denoise(np.zeros((2, 8, 8, 1)), [0.5, 0.9], labels=[1, 2]))[1].any()
    with pytest.raises(SamplingError, match=r"labels \['ten'\] are neither classes"):
        model.sample(1, labels=["ten"])
    with pytest.raises(ConfigError, match="config.sampling.step is not a setting; did you mean 'steps'"):
        model.sample(1, step=3)
    np.testing.assert_array_equal(model.sample(2, labels="7"), model.sample(2, labels=[7]))
    np.testing.assert_array_equal(model.sample(2, labels=7), model.sample(2, labels=np.array([7])))
    for wrong in (dict(n=0), dict(n=2.5), dict(n=1, seed=-1), dict(n=1, seed=2**32), dict(n=1, batch_size=0)):
        with pytest.raises(SamplingError, match="n and batch_size must be at least 1, and seed"):
            model.sample(**wrong)
    with pytest.raises(SamplingError, match=r"labels \[99\] are neither classes"):
        model.denoise(np.zeros((2, 8, 8, 1)), 0.5, labels=99)
    assert len(repr(model)) < 5000, "without its parameters"


def test_a_file_loads_like_its_run(trained, tmp_path):
    convert(trained["last"], tmp_path / "weights.safetensors")
    model = maskdm_jax.load(tmp_path / "weights.safetensors")
    assert model.checkpoint == tmp_path / "weights.safetensors"
    np.testing.assert_array_equal(model.sample(4, seed=5), trained["model"].sample(4, seed=5))
    with pytest.raises(SamplingError, match="was not trained for the weak prediction of guidance=1"):
        model.sample(1, guidance=1.0)
    with pytest.raises(ConfigError, match="the source has no weights 'ema2'; it has ema\\b"):
        maskdm_jax.load(tmp_path / "weights.safetensors", weights="ema2")
    run = tmp_path / "run"
    shutil.copytree(trained["last"].parent.parent, run)
    (run / "export.safetensors").write_bytes(b"")
    assert maskdm_jax.load(run).checkpoint == run / "checkpoints" / trained["last"].name, "not the export beside it"


def test_the_shipped_model_draws(tmp_path, monkeypatch):
    model = maskdm_jax.load("emoji64")
    assert model.classes[0] == "google_activities"
    images = model.sample(2, labels=["google_smileys_emotion"], steps=6).astype(int)
    assert images.shape == (2, 64, 64, 3)
    border, centre = images[:, [0, -1]].mean(), images[:, 24:40, 24:40].mean()
    assert border > 240, "emoji are on white"
    assert centre < 230
    (tmp_path / "emoji64").mkdir()  # a folder of this name comes first
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MaskDMError, match="emoji64 holds no"):
        maskdm_jax.load("emoji64")


def test_train_takes_the_name_of_a_recipe(monkeypatch):
    monkeypatch.setattr(api.run, "train", lambda config, workdir: config)
    assert maskdm_jax.train("demo", "x") == parse(maskdm_jax.recipe("demo"))


def test_recipes():
    config = maskdm_jax.recipe("celeba64_pretrain:crop_50", {"model.jit.dropout": 0.5})
    assert config.pretrain.mask.kind == "crop"
    assert config.model.jit.dropout == 0.5
    with pytest.raises(ConfigError, match="there is no recipe 'celeba'; give the path of a FILE.py or one of .*demo"):
        maskdm_jax.recipe("celeba")
    with pytest.raises(ConfigError, match="celeba64_pretrain:nope: mask 'nope' is unknown"):
        maskdm_jax.recipe("celeba64_pretrain:nope")
    with pytest.raises(ConfigError, match="pretrain.steps.x: steps is a setting"):
        maskdm_jax.recipe("demo", {"pretrain.steps.x": 3})
    with pytest.raises(MaskDMError, match="config.prtrain is neither a section .* did you mean 'pretrain'"):
        maskdm_jax.train(maskdm_jax.recipe("demo", {"prtrain.steps": 3}), "nowhere")
    with pytest.raises(MaskDMError, match="config.data.pth is not a setting; did you mean 'path'"):
        maskdm_jax.train(maskdm_jax.recipe("demo", {"data.pth": "x"}), "nowhere")
    with pytest.raises(AttributeError, match="has no attribute 'sample'"):
        getattr(maskdm_jax, "sample")  # noqa: B009


def test_a_parsed_config_trains(trained):
    config = trained["model"].config  # of a run that is finished
    assert maskdm_jax.train(config, trained["runs"] / "small") == trained["last"]


def test_pages_of_the_api(tmp_path):
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "--output-directory", str(tmp_path), "maskdm_jax"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Warn" not in done.stdout + done.stderr
    assert (tmp_path / "maskdm_jax" / "training" / "step.html").exists()


def test_the_package_that_is_built(root, child_env, tmp_path):
    """It holds recipes, programs and data, and its command runs outside of the clone."""
    source = tmp_path / "source"  # setuptools writes beside what it builds
    ignored = shutil.ignore_patterns(".*", "runs", "tests", "docs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(root, source, ignore=ignored)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(tmp_path / "site"), str(source)]
    subprocess.run(command, check=True, cwd=tmp_path)
    package = tmp_path / "site" / "maskdm_jax"
    for folder, place in (
        (root / "maskdm_jax", package),
        *((root / n, package / n) for n in ("configs", "launch", "pretrained")),
    ):
        for path in folder.rglob("*.*"):
            assert "__pycache__" in path.parts or (place / path.relative_to(folder)).exists(), path
    env = child_env | dict(PYTHONPATH=str(tmp_path / "site"))
    run = lambda *args: subprocess.run(
        [tmp_path / "site" / "bin" / "maskdm", *args], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    done = run("train", "--config=celeba64_pretrain:crop_50", "--print_config", "--config.pretrain.steps=7")
    assert "--config.pretrain.steps=7" in done.stdout, done.stderr
    assert "--config.pretrain.mask.kind='crop'" in done.stdout
    done = run("tarin")
    assert done.returncode == 78
    assert "PROGRAM is one of" in done.stderr
