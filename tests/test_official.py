import argparse
import dataclasses
import functools
import random
import re

import golden
import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from maskdm_jax.build import make_network
from maskdm_jax.config import parse, to_dict
from maskdm_jax.errors import ConfigError, TorchFileError
from maskdm_jax.interop import official as official_file
from maskdm_jax.interop import torch_file
from maskdm_jax.interop.convert import convert
from maskdm_jax.interop.names import UVIT
from maskdm_jax.run import train
from maskdm_jax.training import checkpoint


@pytest.mark.parametrize(("which", "expected"), [("params", "out_model"), ("ema", "out_ema")])
def test_official_weights_give_the_same_outputs(root, official, which, expected):
    recorded = np.load(root / "tests" / "golden" / "official_tiny_expected.npz")
    network = make_network(golden.config(golden.TINY))
    file = official_file.read(official)
    params = UVIT.params(file.weights[which])
    out = jax.jit(network.apply)(params, golden.nhwc(recorded["x"]), recorded["t"])
    wanted = golden.nhwc(recorded[expected])
    assert np.abs(out - wanted).max() < 2e-5 * wanted.std()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A few 16 x 16 colour images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for i in range(10):
        Image.new("RGB", (16, 16), (20 * i, 100, 200)).save(folder / f"{i}.png")
    return folder


def finetune(images, official, **model):
    raw = to_dict(golden.config(golden.TINY)) | {"stages": ("stage",)}
    raw["init_from"] = str(official)
    raw["data"] |= dict(path=str(images))
    raw["model"] |= model
    raw["stage"] |= dict(learning_rate=0.0, batch_size=8)
    return parse(raw)


def test_a_run_starts_from_an_official_file(official, images, tmp_path):
    last = train(finetune(images, official), tmp_path / "run", devices=jax.devices()[:1])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"start: weights of {official}" in log
    assert "assumed are model.heads=4, diffusion.objective=noise\n" in log
    assert "model.heads=4 gives 8 channels per head, the official models have 64" in log
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        make_network(golden.config(golden.TINY)).abstract_params(),
    )
    trained = checkpoint.load_item(last, "params", abstract)  # with rate 0, the weights it started from
    jax.tree.map(np.testing.assert_array_equal, trained, golden.raw_weights(official))


def test_what_does_not_fit_is_named(official, images, tmp_path):
    config = finetune(images, official)
    linear = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, schedule="linear"))
    with pytest.raises(ConfigError, match=r"schedule cosine \(now linear\); .*--config.diffusion.schedule=cosine"):
        train(linear, tmp_path / "linear", devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"official_tiny.pt was trained with .*take its settings: --config\.model"):
        train(finetune(images, official, width=64), tmp_path / "a", devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match="none.pt', which does not exist"):
        train(tiny.config(init_from=str(tmp_path / "none.pt")), tmp_path / "b", devices=jax.devices()[:1])
    torch_file.write(tmp_path / "other.pt", {"weights": np.ones(3, np.float32)})
    with pytest.raises(
        TorchFileError, match="no tensors of a U-ViT or a JiT; a checkpoint of the official trainer is a dict of"
    ):
        official_file.read(tmp_path / "other.pt")
    model = {"model.conv1.weight": np.ones(3, np.float32), "model.encoder.norm.bias": np.ones(3, np.float32)}
    torch_file.write(tmp_path / "resnet.pt", {"model": model})
    with pytest.raises(TorchFileError, match="'model.model.conv1.weight' is not the name of a U-ViT tensor"):
        official_file.read(tmp_path / "resnet.pt")


def renamed(base, rename):
    """The file with its tensors' names changed, in the EMA after the name of the EMA's part."""
    in_ema = lambda name: ".".join((*name.split(".", 1)[:1], *map(rename, name.split(".", 1)[1:])))
    return base | {"model": {rename(k): v for k, v in base["model"].items()}} | {
        "ema": {in_ema(k): v for k, v in base["ema"].items()}
    }  # fmt: skip


def average(base):
    return {k.removeprefix("ema_model."): v for k, v in base["ema"].items() if k.startswith("ema_model.")}


def bare(state):
    return {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}


def in_groups(base, **changes):
    (group,) = base["opt"]["param_groups"]
    parts = group | {"params": group["params"][:20]}, group | {"params": group["params"][20:]} | changes
    return base | {"opt": {"state": base["opt"]["state"], "param_groups": list(parts)}}


FULL, WEIGHTS, EMA = {"params", "ema", "moments"}, {"params"}, {"params", "ema"}
OF_OTHERS = {  # how others save the same checkpoint; which parts can be read; what the notes say
    "parallel": (lambda base: renamed(base, "module.{}".format), FULL, []),
    "compiled": (lambda base: renamed(base, "_orig_mod.{}".format), FULL, []),
    "compiled network": (lambda base: renamed(base, lambda k: k.replace("model.", "model._orig_mod.", 1)), FULL, []),
    "compiled and parallel": (lambda base: renamed(base, "_orig_mod.module.{}".format), FULL, []),
    "sharded": (lambda base: renamed(base, "_fsdp_wrapped_module.{}".format), FULL, []),
    "nested": (lambda base: {"checkpoint": {"state": base["model"]}, "step": base["step"]}, WEIGHTS, []),
    "under another key": (lambda base: {"state_dict": base["model"]}, WEIGHTS, []),
    "bare": (lambda base: bare(base["model"]), WEIGHTS, []),
    "bare in a dict": (lambda base: {"net": bare(base["model"]), "epoch": 3}, WEIGHTS, ["'epoch' of the file .int"]),
    "EMA alone": (lambda base: base["ema"], EMA, ["no 'model'"]),
    "EMA and step": (lambda base: {"ema": base["ema"], "step": base["step"]}, EMA, ["no 'model'"]),
    "EMA as a state dict": (lambda base: base | {"ema": average(base)}, FULL, []),
    "EMA of bare weights": (lambda base: base | {"ema": None, "params_ema": bare(average(base))}, FULL, []),
    "EMA by its state dict's name": (
        lambda base: {"state_dict": base["model"], "state_dict_ema": average(base), "global_step": 130}, EMA, []
    ),
    "AveragedModel": (
        lambda base: {"step": 130, "model": base["model"]}
        | {"swa": {"module." + k: v for k, v in average(base).items()} | {"n_averaged": np.array(30)}},
        EMA, ["'swa.n_averaged' of the file"],
    ),
    "optimizer under another key": (
        lambda base: {k: v for k, v in base.items() if k != "opt"} | {"optimizer": base["opt"]}, FULL, []
    ),
    "equal groups": (in_groups, FULL, []),
    "unequal groups": (lambda base: in_groups(base, weight_decay=0.5), EMA, ["2 groups of tensors have different"]),
    "float64": (
        lambda base: base | {"model": {k: v.astype(np.float64) for k, v in base["model"].items()}}, FULL, ["rounded"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OF_OTHERS)
def test_files_of_others(official, tmp_path, case):
    """The same tensors, wherever they are; what is not read is named, and nothing else is."""
    change, parts, notes = OF_OTHERS[case]
    base, expected = torch_file.read(official), official_file.read(official)
    torch_file.write(tmp_path / "x.pt", change(base))
    found = official_file.read(tmp_path / "x.pt")
    jax.tree.map(np.testing.assert_array_equal, found.model, expected.model)
    assert list(found.model) == list(expected.model)
    if "ema" in parts:
        jax.tree.map(np.testing.assert_array_equal, found.emas, expected.emas)
        assert found.ema_step in (None, 130)
    if "moments" in parts:
        jax.tree.map(np.testing.assert_array_equal, found.moments, expected.moments)
        assert found.group == expected.group
    assert (bool(found.emas), found.moments is not None) == ("ema" in parts, "moments" in parts)
    said = [note for note in (*found.notes, found.optimizer_problem) if note]
    assert len(said) == len(notes)
    for note, line in zip(notes, said, strict=True):
        assert re.search(note, line)
    assert (found.buffers is None) == case.startswith("bare")


def test_unknown_content_is_skipped_and_named(official, tmp_path, torch):
    content = torch.load(official, weights_only=True)
    content |= {"args": argparse.Namespace(lr=1e-4), "best_fid": np.float64(3.2), "seen": {1}, "mean": np.ones(3)}
    content |= {"device": torch.device("cpu"), "rng": ("MT19937", np.arange(3)), "empty": None}
    torch.save(content, tmp_path / "x.pt")
    found, expected = official_file.read(tmp_path / "x.pt"), official_file.read(official)
    jax.tree.map(np.testing.assert_array_equal, found.moments, expected.moments)
    kinds = dict(
        args="argparse.Namespace", best_fid="float", seen="__builtin__.set", device="torch.device", rng="tuple"
    )
    kinds["mean"] = "numpy._core.multiarray._reconstruct"
    assert sorted(found.notes) == sorted(f"left out: {name!r} of the file ({kind})" for name, kind in kinds.items())


def test_numbers_of_numpy_serve_as_numbers(official, tmp_path, torch):
    content = torch.load(official, weights_only=True)
    content["step"] = np.int64(content["step"])
    content["opt"]["param_groups"][0]["lr"] = np.float64(3e-4)
    torch.save(content, tmp_path / "x.pt")
    found = official_file.read(tmp_path / "x.pt")
    assert (found.step, found.group["lr"], found.notes) == (130, 3e-4, [])


def test_numbers_of_8_bits_are_refused_by_name(official, tmp_path, torch):
    from safetensors.torch import save_file

    weights = bare(torch.load(official, weights_only=True)["model"])
    weights["encoder.norm.weight"] = weights["encoder.norm.weight"].to(torch.float8_e4m3fn)
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(TorchFileError, match="x.pt: encoder.norm.weight is a torch.float8_e4m3fn tensor, not a"):
        official_file.read(tmp_path / "x.pt")
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(TorchFileError, match="x.safetensors: encoder.norm.weight is a F8_E4M3 tensor, not a tensor of"):
        official_file.read_safetensors(tmp_path / "x.safetensors")


def test_moments_follow_the_order_of_the_files_own_tensors(official, tmp_path):
    """PyTorch numbers tensors in the order of the network that wrote the file, which may be another one."""
    base, expected = torch_file.read(official), official_file.read(official)
    names = [name for name in base["model"] if name.removeprefix("model.") in expected.model]
    numbers = {name: number for number, name in enumerate(names)}
    state, last = base["opt"]["state"], len(names) - 1
    others = {name: tensor for name, tensor in base["model"].items() if name not in names}
    model = others | {name: base["model"][name] for name in reversed(names)}
    changed = base | {"model": model, "ema": None}
    changed["opt"] = base["opt"] | {"state": {last - n: state[n] for n in numbers.values() if n in state}}
    torch_file.write(tmp_path / "x.pt", changed)
    found = official_file.read(tmp_path / "x.pt")
    assert list(found.model) == list(reversed(expected.model))
    jax.tree.map(np.testing.assert_array_equal, found.moments, expected.moments)


def test_an_object_in_place_of_weights_is_named(tmp_path, torch):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "x.pt")
    with pytest.raises(TorchFileError, match="x.pt: it holds a torch.nn.modules.linear.Linear; a checkpoint of the"):
        official_file.read(tmp_path / "x.pt")


def test_a_folder_is_read_if_its_weights_are_in_one_file(official, tmp_path):
    weights = bare(torch_file.read(official)["model"])
    save_file(weights, tmp_path / "mine.safetensors")
    jax.tree.map(np.testing.assert_array_equal, official_file.load(tmp_path)[0].model, weights)
    save_file(weights, tmp_path / "model-00002-of-00002.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    for given in (tmp_path, index):
        with pytest.raises(
            TorchFileError, match=f"{given}: weights in several files are not read; merge them into one"
        ):
            convert(given, tmp_path / "run", heads=4)
    save_file(weights, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, official_file.load(tmp_path)[0].model, weights)


JUNK = [None, -1, 2**40, 1e300, float("nan"), True, "x", b"", [], [0], {}, {"a": 1}, {0: 1}, (), (1, 2, 3)]
JUNK += [
    np.zeros(shape, dtype) for shape in [(), (0,), (3,), (1, 2), (2, 0, 3), (1, 1, 1, 1)] for dtype in ("f4", "i8")
]
LOOP, DEEP = {}, functools.reduce(lambda inner, _: [inner], range(5000), [])
LOOP["x"] = LOOP
JUNK += [LOOP, DEEP]


def test_averages_in_safetensors_have_no_step(official, tmp_path):
    content = torch_file.read(official)
    tensors = content["model"] | {f"ema.{name}": tensor for name, tensor in average(content).items()}
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "x.pt", heads=4)
    ema = torch_file.read(tmp_path / "x.pt")["ema"]
    assert (ema["step"], ema["initted"]) == (0, True)
    golden.same(average(content), average({"ema": ema}))


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
            found.format.shown(dataclasses.replace(found, buffers=None))  # recognising a schedule takes long
            found.names.params(found.model)
            messages += [message for message in (found.optimizer_problem, *found.notes) if message]
        except (TorchFileError, ValueError) as error:
            messages.append(str(error))
    assert 1_000 < len(messages) < 2_000
    assert all(len(message.splitlines()) == 1 for message in messages)
