import random

import golden
import jax
import numpy as np
import pytest
import tiny

from maskdm_jax.build import make_network
from maskdm_jax.config import parse, to_dict
from maskdm_jax.errors import CheckpointError, TorchFileError
from maskdm_jax.interop import official as official_file
from maskdm_jax.interop import torch_file
from maskdm_jax.run import train
from maskdm_jax.training import checkpoint

TINY = dict(
    img_size=16, patch_size=2, in_chans=3, encoder_embed_dim=32, encoder_depth=4, encoder_heads=4, mlp_ratio=2
) | dict(qkv_bias=False, num_classes=-1, mlp_time_embed=False)  # of official_tiny.pt


@pytest.fixture(scope="module")
def official(root):
    return root / "tests" / "golden" / "official_tiny.pt"


@pytest.mark.parametrize(("which", "expected"), [("params", "out_model"), ("ema", "out_ema")])
def test_official_weights_give_the_same_outputs(root, official, which, expected):
    recorded = np.load(root / "tests" / "golden" / "official_tiny_expected.npz")
    network = make_network(golden.config(TINY))
    params = official_file.load_weights(official, which)
    out = jax.jit(network.apply)(params, golden.nhwc(recorded["x"]), recorded["t"])
    wanted = golden.nhwc(recorded[expected])
    assert np.abs(out - wanted).max() < 2e-5 * wanted.std()


def test_names_and_layouts_there_and_back(official):
    """Every tensor, bit for bit, in the order of the official network."""
    model = torch_file.read(official)["model"]
    theirs = {name.removeprefix("model."): t for name, t in model.items() if name.startswith("model.")}
    back = official_file.state_dict_from_params(official_file.params_from_state_dict(theirs), patch_size=2)
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(back[name], tensor)


@pytest.mark.parametrize("case", ["uvit_block", "uvit_cond_timemlp_qkvbias_patch", "uvit_cond_unlabelled_crop"])
def test_all_kinds_of_names(root, case):
    _, meta = golden.load(root / "tests" / "golden" / f"{case}.npz")
    theirs = {name: golden.weight(name, shape) for name, shape in meta["state_dict"].items()}
    ours = official_file.params_from_state_dict(theirs)
    back = official_file.state_dict_from_params(ours, meta["config"]["patch_size"])
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(back[name], tensor)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A few 16 x 16 colour images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for i in range(10):
        Image.new("RGB", (16, 16), (20 * i, 100, 200)).save(folder / f"{i}.png")
    return folder


def finetune(images, official, **model):
    raw = to_dict(golden.config(TINY)) | {"stages": ("stage",)}
    raw["init_from"] = str(official)
    raw["data"] |= dict(path=str(images))
    raw["model"] |= model
    raw["stage"] |= dict(learning_rate=0.0, batch_size=8)
    return parse(raw)


def test_a_run_starts_from_an_official_file(official, images, tmp_path):
    last = train(finetune(images, official), tmp_path / "run", devices=jax.devices()[:1])
    assert f"start: weights of {official}" in (tmp_path / "run" / "log.txt").read_text()
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        make_network(golden.config(TINY)).abstract_params(),
    )
    trained = checkpoint.load_item(last, "params", abstract)  # with rate 0, the weights it started from
    jax.tree.map(np.testing.assert_array_equal, trained, official_file.load_weights(official, "params"))


def test_what_does_not_fit_is_named(official, images, tmp_path):
    with pytest.raises(CheckpointError, match=r"official_tiny.pt do not fit config.model: .*is \(.*there and"):
        train(finetune(images, official, width=64), tmp_path / "a", devices=jax.devices()[:1])
    with pytest.raises(CheckpointError, match="none.pt' is not a file"):
        train(tiny.config(init_from=str(tmp_path / "none.pt")), tmp_path / "b", devices=jax.devices()[:1])
    torch_file.write(tmp_path / "other.pt", {"weights": np.ones(3, np.float32)})
    with pytest.raises(TorchFileError, match="has no .model.; a checkpoint of the official trainer is a dict of"):
        official_file.load_weights(tmp_path / "other.pt", "params")
    torch_file.write(tmp_path / "resnet.pt", {"model": {"model.conv1.weight": np.ones(3, np.float32)}})
    with pytest.raises(TorchFileError, match="'conv1.weight' is not the name of a U-ViT tensor"):
        official_file.load_weights(tmp_path / "resnet.pt", "params")


JUNK = [None, -1, 2**40, 1e300, float("nan"), True, "x", b"", [], [0], {}, {"a": 1}, {0: 1}, (), (1, 2, 3)]
JUNK += [
    np.zeros(shape, dtype) for shape in [(), (0,), (3,), (1, 2), (2, 0, 3), (1, 1, 1, 1)] for dtype in ("f4", "i8")
]


def test_content_of_any_kind_gives_an_official_file_or_one_clear_error(official, monkeypatch):
    """A whole file whose parts are exchanged for others at random, at any depth."""
    whole, draw = torch_file.read(official), random.Random(0)
    messages = []
    for _ in range(2_000):
        content, target = whole, None
        path = []
        while isinstance(content, (dict, list)) and content and (not path or draw.random() < 0.8):
            path.append(draw.choice(list(content) if isinstance(content, dict) else range(len(content))))
            content = content[path[-1]]
        broken = target = dict(whole)
        for key in path[:-1]:
            target[key] = target[key].copy()
            target = target[key]
        if draw.random() < 0.2:
            del target[path[-1]]
        elif isinstance(target, dict) and draw.random() < 0.2:
            target[draw.choice(["x", 3, "model.encoder.norm.bias", "encoder.norm.bias"])] = draw.choice(JUNK)
        else:
            target[path[-1]] = draw.choice(JUNK)
        monkeypatch.setattr(torch_file, "read", lambda _, content=broken: content)
        try:
            found = official_file.read("odd.pt")
            official_file.architecture(found.model)
            official_file.params_from_state_dict(found.model)
        except (TorchFileError, ValueError) as error:
            messages.append(str(error))
    assert 1_000 < len(messages) < 2_000
    assert all(len(message.splitlines()) == 1 for message in messages)
