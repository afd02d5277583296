"""The folder for PyTorch users draws the same images as this project, without it."""

import dataclasses
import importlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import maskdm_jax
from maskdm_jax import config as config_lib
from maskdm_jax.build import make_network, make_sampler
from maskdm_jax.diffusion.samplers import image_noise
from maskdm_jax.errors import ConfigError
from maskdm_jax.interop.convert import convert
from maskdm_jax.interop.jit_file import positions
from maskdm_jax.interop.names import NETWORKS
from maskdm_jax.interop.official import write_safetensors
from maskdm_jax.interop.torch_folder import write
from maskdm_jax.models.representation import make_representation

torch = pytest.importorskip("torch")

FLOW = dict(diffusion__process="flow", diffusion__objective="x0", sampling__method="heun", sampling__steps=4)
FLOW |= dict(data__label_dropout=0.1)
SETTINGS = {
    "uvit": dict(data__label_dropout=0.1, diffusion__timesteps=60, stages=("pretrain",)),
    "wavelet": dict(model__wavelet_scale=1, model__patch_size=1, sampling__steps=5, stages=("pretrain",)),
    "jit": FLOW | dict(model__network="jit", model__jit=dict(bottleneck=4, class_tokens=3, class_tokens_from=1)),
}


@pytest.fixture(scope="module", params=SETTINGS)
def made(request, tmp_path_factory):
    """(config, our network, its parameters, the folder)"""
    root, config = tmp_path_factory.mktemp(request.param), tiny.config(**SETTINGS[request.param])
    network, names = make_network(config), NETWORKS[config.model.network]
    noisy = lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)  # some begin as zeros
    params = jax.device_get(jax.tree.map(noisy, network.init(jax.random.key(1))))
    tensors = names.state_dict(params, config.model.patch_size, config.model.wavelet_scale)
    tensors |= {name: positions(config) for name in names.fixed}
    noted = dict(config=config_lib.to_dict(config), stage="pretrain", classes=list("0123456789"), weights="ema")
    write_safetensors(root / "weights.safetensors", tensors, noted)
    convert(root / "weights.safetensors", root / "run")
    (root / "run" / "samples").mkdir()
    Image.new("RGB", (9, 9)).save(root / "run" / "samples" / "step_0000000.png")
    lines = [{"step": 0, "stage": "pretrain", "eval/fd_lite0": 123.456}, {"step": 0, "loss": 0.5}]
    (root / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    convert(root / "run", root / "folder", for_torch=True)
    return config, network, params, root / "folder"


@pytest.fixture
def code(made, monkeypatch):
    """The folder's modules, modeling and sample."""
    monkeypatch.syspath_prepend(str(made[3]))
    for name in ("modeling", "sample"):
        sys.modules.pop(name, None)
    yield importlib.import_module("modeling"), importlib.import_module("sample")
    for name in ("modeling", "sample"):
        sys.modules.pop(name, None)


TRAJECTORIES = {
    "uvit": [
        dict(sampling__steps=37, diffusion__objective="v", sampling__eta=0.5),
        dict(sampling__steps=7, sampling__guidance=1.5, sampling__guidance_from=0.3, sampling__guidance_to=0.8),
        dict(
            sampling__method="ddpm", diffusion__schedule="linear", sampling__guidance=8.0, sampling__guidance_from=0.3
        ),
        dict(sampling__method="dpm_solver", sampling__order=3, sampling__steps=7, diffusion__objective="x0"),
        dict(sampling__method="dpm_solver", sampling__spacing="time_quadratic", sampling__steps=5),
        dict(diffusion__schedule="shifted_cosine", diffusion__shift_size=256, sampling__method="dpm_solver"),
    ],
    "wavelet": [{}],
    "jit": [
        dict(sampling__guidance=0.7),
        dict(diffusion__objective="v", sampling__method="euler"),
        dict(sampling__method="dpm_solver", sampling__steps=6),
        dict(diffusion__process="edm", sampling__churn=3.0),
        dict(diffusion__process="edm", sampling__method="dpm_solver", sampling__steps=6),
    ],
}


def test_same_noise_same_images(made, code):
    config, network, params, folder = made
    modeling, sample = code
    model, kind = modeling.from_pretrained(folder), folder.parent.name.rstrip("0123456789")
    space, labels = make_representation(config), np.array([1, 4, 9])
    x, noise = image_noise(jax.random.key(5), jnp.arange(3), space.shape)
    torched = lambda a: torch.tensor(np.asarray(a).transpose(0, 3, 1, 2))
    for changes in TRAJECTORIES[kind]:
        changed = tiny.config(**SETTINGS[kind] | changes)
        ours = jax.jit(lambda params, x, c=changed: space.decode(make_sampler(c, network)(params, x, noise, labels)))
        model.config["diffusion"] |= dataclasses.asdict(changed.diffusion)
        settings = dataclasses.asdict(changed.sampling)
        theirs = sample.from_noise(model, torched(x), lambda i: torched(noise(i)), torch.tensor(labels), **settings)
        ours = np.asarray(ours(params, x)).astype(int)
        assert ours.std() > 10
        assert np.abs(ours - theirs).max() <= 1, changes


def test_generate(made, code):
    modeling, sample = code
    model = modeling.from_pretrained(made[3])
    images = sample.generate(model, 5, labels=[3, "7"], seed=2, steps=2, batch_size=2)
    np.testing.assert_array_equal(images[:3], sample.generate(model, 3, labels=[3, 7], seed=2, steps=2, batch_size=1))
    np.testing.assert_array_equal(images[:1], sample.generate(model, 1, labels=3, seed=2, steps=2))
    method = "heun" if model.config["diffusion"]["process"] == "ddpm" else "ddim"
    for changes, message in (
        (dict(step=2), r"unknown settings \['step'\]; there are"),
        (dict(method=method), f"method is '{method}'; the process"),
        (dict(steps=0), "steps is 0; it must be 1 to"),
        (dict(labels=["ten"]), r"unknown labels \['ten'\]; the classes are"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.generate(model, 1, **changes)
    with pytest.raises(ValueError, match="n is 0; it must be at least 1"):
        sample.generate(model, 0)
    if model.config["model"]["wavelet_scale"]:
        with pytest.raises(ValueError, match="labels is None; a wavelet model with classes has no token for that"):
            sample.from_noise(model, torch.zeros(1, *sample.noise_shape(model)), None)
    with pytest.raises(ValueError, match="weak is 'shallow'; with guidance, it must be 'unlabelled' here"):
        sample.generate(model, 1, guidance=1.0, weak="shallow")
    model.config |= dict(guidable=False, classes=[])
    with pytest.raises(ValueError, match="guidance needs a network"):
        sample.generate(model, 1, guidance=1.0)
    with pytest.raises(ValueError, match="the network has no classes"):
        sample.generate(model, 1, labels=[1])


def test_a_sampler_that_the_folder_lacks(made, code, tmp_path):
    config, *_ = made
    _, sample = code
    assert tuple(sample.SAMPLERS) == write.METHODS
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, method="mine"))
    with pytest.raises(
        ConfigError, match="method of runs/x is 'mine'; a folder for PyTorch has the samplers ddim, ddpm"
    ):
        write.write(tmp_path, "title", config, [], "ema", "runs/x")
    assert not list(tmp_path.iterdir())


def test_it_comes_back(made):
    config, _, params, folder = made
    loaded = maskdm_jax.load(folder)
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    with pytest.raises(ConfigError, match="exists already"):
        convert(folder.parent / "run", folder, for_torch=True)


@pytest.mark.parametrize("made", ["uvit"], indirect=True)
def test_it_runs_on_torch_alone(made, child_env):
    folder = made[3]
    blocked = ("jax", "flax", "maskdm_jax", "ml_collections", "orbax", "scipy")
    start = f"import sys; sys.modules |= dict.fromkeys({blocked}); sys.argv = sys.argv[1:]; "
    start += "import runpy; sys.path.insert(0, '.'); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", start, "sample.py", "--n=5", "--steps=2", "--labels=3,7"]
    done = subprocess.run(command, cwd=folder, env=child_env, capture_output=True, text=True)
    assert done.stdout == "5 images in grid.png\n", done.stderr
    with Image.open(folder / "grid.png") as grid:
        assert grid.size == (3 * 64, 2 * 64)
    done = subprocess.run([*command, "--labels=ten"], cwd=folder, env=child_env, capture_output=True, text=True)
    assert "unknown labels ['ten']; the classes are" in done.stderr


@pytest.mark.parametrize("made", ["jit"], indirect=True)
def test_card(made, tmp_path):
    convert(made[3].parent / "weights.safetensors", tmp_path / "of_file", for_torch=True)
    assert "The weights are the average `ema`. " in (tmp_path / "of_file" / "README.md").read_text()
    convert(made[3].parent / "run", tmp_path / "raw", for_torch=True, weights="params")
    assert "fd_lite0" not in (tmp_path / "raw" / "README.md").read_text(), "these are the EMA's"
    assert not (tmp_path / "raw" / "samples.png").exists()
    card = (made[3] / "README.md").read_text()
    assert "![Samples](samples.png)" in card
    assert "trained on `digits` by MaskDM-JAX" in card
    assert "- fd_lite0: 123.5" in card
    assert "of 10 classes" in card
    assert "A JiT that generates" in card
    table = write._stages(tiny.config(), 5)
    assert table.splitlines()[2:] == [
        "| pretrain | 4 | 8 | 50%, patch | 0.001 |",
        "| finetune | 1 | 8 | none | 0.001 |",
    ]
    assert "Licence of the images and of these weights: not stated." in card
