"""Checkpoints that go both ways. PyTorch is the judge: `torch_twin` is its side, with strict loading."""

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskdm_jax import config as config_lib
from maskdm_jax import sampling
from maskdm_jax.build import make_network, mask_plans, noise_schedule
from maskdm_jax.data.pipeline import TrainingData
from maskdm_jax.diffusion.gaussian import make_schedule
from maskdm_jax.errors import CheckpointError, ConfigError, TorchFileError
from maskdm_jax.interop import official as official_file
from maskdm_jax.interop import torch_file, uvit_file
from maskdm_jax.interop.convert import convert
from maskdm_jax.interop.names import UVIT
from maskdm_jax.models.representation import make_representation
from maskdm_jax.models.routing import take
from maskdm_jax.parallel.sharding import make_mesh
from maskdm_jax.training import checkpoint, loop, start
from maskdm_jax.training.start import abstract_state
from maskdm_jax.training.state import ema_step_size
from maskdm_jax.training.step import Inputs, make_loss, train_step

torch = pytest.importorskip("torch", reason="compares with PyTorch, which requirements-test.txt installs on 3.11")
import torch_twin  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

torch.set_num_threads(1)  # tests run beside each other

ONE = jax.devices()[:1]
KINDS = {  # official settings of every kind of network
    "plain": golden.TINY,
    "conditional": golden.TINY | dict(num_classes=5, mlp_time_embed=True, qkv_bias=True, encoder_depth=3, in_chans=4),
    "wavelet": golden.TINY | dict(in_chans=12, data_chans=3, scale=1, img_size=8, qkv_bias=True, encoder_depth=2),
    "wavelet_scale_2": golden.TINY | dict(in_chans=8, data_chans=2, scale=2, img_size=16, encoder_depth=2),
    "wavelet_conditional": golden.TINY
    | dict(in_chans=12, data_chans=3, scale=1, img_size=8, num_classes=5, encoder_depth=2),
}


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "run"
    convert(official, folder, heads=4)
    return folder


def train(config, workdir):
    """Train without previews."""
    return loop.train(config, TrainingData(config.data), workdir, devices=ONE)


def twin_file(path, c, schedule="linear", buffers=None, steps=3, counted=None, label_dropout=True):
    """A file as the official trainer writes it, made by PyTorch after `steps` steps, which count as `counted`."""
    torch.manual_seed(0)
    buffers = buffers or uvit_file.schedule_buffers(make_schedule(schedule))
    model, average = torch_twin.Diffusion(c, buffers), torch_twin.Diffusion(c, buffers)
    ema = torch_twin.Ema(model, average, 0.9, 1)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.99, 0.98), weight_decay=0.03)
    for step in range(steps):
        opt.zero_grad()
        # The token for "no label" takes part in the first step at most, so its optimizer state lags behind.
        without = label_dropout and step == 0
        used = [p for name, p in model.named_parameters() if without or "uncond_embed" not in name]
        sum((p * torch.randn_like(p)).sum() for p in used).backward()
        opt.step()
        ema.update()
    counted = counted or steps
    ema.step.fill_(counted)  # the EMA has copied the weights up to here
    for entry in opt.state.values():
        entry["step"] += counted - steps if entry["step"] == steps else 0
    parts = dict(step=counted, model=model.state_dict(), opt=opt.state_dict(), ema=ema.state_dict(), scaler=None)
    torch.save(parts, path)
    return path


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """Of each kind of network: its settings, a file from PyTorch, and the run folder made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    file = twin_file(folder / "twin.pt", KINDS[request.param])
    convert(file, folder / "run", heads=4)
    return KINDS[request.param], file, folder / "run"


def carried(path) -> list:
    """What a file and the folder made of it both hold."""
    content = torch_file.read(path)
    return [content["step"], content["model"], content["ema"], content["opt"]["state"]]


def test_there_and_back_is_bit_identical_for_every_kind(kind, tmp_path):
    _, file, run = kind
    convert(run, tmp_path / "back.pt")
    golden.same(carried(file), carried(tmp_path / "back.pt"))


def test_an_export_is_like_the_official_file(official, converted, tmp_path):
    convert(converted, tmp_path / "back.pt")
    golden.same(torch_file.read(official), torch_file.read(tmp_path / "back.pt"))


def inputs(c, seed=0):
    rng = np.random.RandomState(seed)
    x = rng.standard_normal((3, c["in_chans"], c["img_size"], c["img_size"])).astype(np.float32)
    labels = np.array([0, 4, 2]) if c["num_classes"] > 0 else None
    return x, np.array([0, 500, 999]), labels


def answers(c, wrapper, apply, params, given):
    """Check that our network and PyTorch's give the same outputs."""
    x, t, labels = given
    ours = apply(params, golden.nhwc(x), t, None if labels is None else jnp.int32(labels))
    with torch.no_grad():
        theirs = wrapper.model(
            torch.tensor(x), torch.tensor(t), labels=None if labels is None else torch.tensor(labels)
        )
    theirs = golden.nhwc(theirs.numpy())
    assert np.abs(ours - theirs).max() < 2e-5 * theirs.std()


def test_the_network_answers_as_in_pytorch(kind):
    c, file, run = kind
    loaded = {which: sampling.load(run, weights=which) for which in ("params", "ema")}
    wrapper = torch_twin.Diffusion(c, uvit_file.schedule_buffers(make_schedule("linear")))
    content, prefix = torch.load(file, weights_only=True), "ema_model."
    states = {"params": content["model"]}
    states["ema"] = {k.removeprefix(prefix): v for k, v in content["ema"].items() if k.startswith(prefix)}
    apply = jax.jit(loaded["ema"].network.apply)
    for which, state in states.items():
        wrapper.load_state_dict(state, strict=True)
        answers(c, wrapper, apply, loaded[which].params, inputs(c))


@pytest.fixture(scope="module", params=["plain", "conditional", "wavelet"])
def ten_steps(request, tmp_path_factory):
    """Ten steps here and in PyTorch, from one official file with its optimizer, EMA and step."""
    c, folder = KINDS[request.param] | dict(encoder_depth=2), tmp_path_factory.mktemp(request.param)
    diffusion = dict(schedule="shifted_cosine", shift_size=32) if request.param == "conditional" else {}
    # 99 steps: the EMA's law changes at step 100, within the ten.
    buffers = uvit_file.schedule_buffers(noise_schedule(golden.config(c, diffusion=diffusion)))
    file = twin_file(folder / "file.pt", c, buffers=buffers, counted=99)
    lr, clip, every = 2e-4, 1.0, 2
    stage = dict(steps=200, batch_size=4, learning_rate=lr, b1=0.99, b2=0.98, weight_decay=0.03, clip_norm=clip)
    stage |= dict(ema_decay=0.9, ema_every=every)
    config = golden.config(c, stage, dict(kind="patch", ratio=[0.5, 0.25] if "data_chans" in c else 0.5), diffusion)
    convert(file, folder / "run", config=config_lib.to_dict(config))

    network, mesh = make_network(config), make_mesh(devices=ONE)
    found = checkpoint.find(folder / "run")
    state = checkpoint.load_state(found, abstract_state(config, 0, network, mesh))
    space, plans = make_representation(config), mask_plans(config, "stage")
    step = jax.jit(
        functools.partial(
            train_step,
            draw=lambda key, batch: batch,
            loss=make_loss(config, network),
            stage=config.stage["stage"],
            mesh=mesh,
        )
    )

    content = torch.load(file, weights_only=True)
    model = torch_twin.Diffusion(c, buffers)
    ema = torch_twin.Ema(model, torch_twin.Diffusion(c, buffers), 0.9, every)
    ema.load_state_dict(content["ema"], strict=True)
    opt = torch.optim.AdamW(model.parameters(), lr=lr)
    opt.load_state_dict(content["opt"])
    opt.param_groups[0]["lr"] = lr

    rng, here, there = np.random.RandomState(1), [], []
    for i in range(10):
        shape = (4, c["in_chans"], c["img_size"], c["img_size"])
        x0, noise = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
        t = rng.randint(0, 1000, 4)
        # every other batch without labels, so that both label tokens get gradients
        labels = rng.randint(0, 5, 4) if c["num_classes"] > 0 and i % 2 else None
        hidden = [
            np.stack([rng.permutation(plan.total) >= plan.visible for _ in range(4)]) for plan in plans
        ]  # per band, True where hidden
        positions = tuple(golden.positions(mask) for mask in hidden)
        positions = positions if "data_chans" in c else positions[0]
        visible = lambda x, p=positions: jax.tree.map(take, space.cut(jnp.asarray(golden.nhwc(x))), p)
        ours = None
        if c["num_classes"] > 0:
            ours = np.int32(-np.ones(4) if labels is None else labels)
        batch = Inputs(visible(x0), jnp.int32(t), visible(noise), positions, ours)
        state, metrics = step(state, batch)

        opt.zero_grad()
        at = lambda name, t=t: getattr(model, name)[t][:, None, None, None]
        x_t = at("sqrt_alphas_cumprod") * torch.tensor(x0)
        x_t += at("sqrt_one_minus_alphas_cumprod") * torch.tensor(noise)
        mask, given = torch.tensor(np.concatenate(hidden, 1)), None if labels is None else torch.tensor(labels)
        out = model.model(x_t, torch.tensor(t), mask=mask, labels=given)
        outs, targets = (out, batch.eps) if isinstance(out, tuple) else ((out,), (batch.eps,))
        loss = sum((o - torch.tensor(np.asarray(e))).square().mean() for o, e in zip(outs, targets, strict=True))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        ema.update()
        here.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        there.append((loss.item(), norm.item()))
    meta = checkpoint.load_meta(found)
    return types.SimpleNamespace(
        c=c, config=config, meta=meta, buffers=buffers, state=state, model=model, ema=ema, here=here, there=there
    )


def test_ten_steps_here_equal_ten_steps_there(ten_steps):
    """Losses, gradient norms, weights and EMA stay together."""
    for ours, theirs in zip(ten_steps.here, ten_steps.there, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        assert ours[1] == pytest.approx(theirs[1], rel=2e-5)
    c, state = ten_steps.c, ten_steps.state
    named = lambda tree: UVIT.state_dict(tree, c["patch_size"], c.get("scale", 1))
    for tree, wrapper in [(state.params, ten_steps.model), (state.ema, ten_steps.ema.ema_model)]:
        theirs = dict(wrapper.model.named_parameters())
        for name, tensor in named(tree).items():
            expected = theirs[name].detach().numpy()
            assert np.abs(tensor - expected).max() < 2e-5 * np.abs(expected).max(), name
    assert int(state.step) == 109 == int(ten_steps.ema.step)


def test_an_exported_file_works_in_pytorch(ten_steps, tmp_path):
    """Strict loading of all parts, equal outputs of raw and EMA weights, and the optimizer goes on."""
    c, config, buffers = ten_steps.c, ten_steps.config, ten_steps.buffers
    with contextlib.closing(checkpoint.Checkpoints(tmp_path / "run", keep=1)) as checkpoints:
        checkpoints.save(109, ten_steps.state, ten_steps.meta | dict(stage_step=109))
    lines = convert(tmp_path / "run", tmp_path / "model.pt")
    assert f"  encoder_heads: {config.model.heads}" in lines
    content = torch.load(tmp_path / "model.pt", weights_only=True, mmap=True)
    ema = torch_twin.Ema(torch_twin.Diffusion(c, buffers), torch_twin.Diffusion(c, buffers), 0.9, 1)
    ema.load_state_dict(content["ema"], strict=True)
    model = torch_twin.Diffusion(c, buffers)
    model.load_state_dict(content["model"], strict=True)
    assert content["step"] == int(ema.step) == 109
    assert ema.initted
    for name, values in buffers.items():
        np.testing.assert_array_equal(getattr(ema.ema_model, name), values)
    loaded = {which: sampling.load(tmp_path / "run", weights=which) for which in ("params", "ema")}
    apply = jax.jit(loaded["ema"].network.apply)
    for which, wrapper in [("params", model), ("params", ema.online_model), ("ema", ema.ema_model)]:
        answers(c, wrapper, apply, loaded[which].params, inputs(c))
    x, t, labels = (None if part is None else torch.tensor(part) for part in inputs(c))
    opt = torch.optim.AdamW(model.parameters(), lr=1.0)
    opt.load_state_dict(content["opt"])
    assert opt.param_groups[0]["lr"] == pytest.approx(2e-4)
    assert opt.param_groups[0]["betas"] == (0.99, 0.98)
    before, counts = [p.detach().clone() for p in model.parameters()], steps_of(opt)
    assert max(counts.values()) == 109
    model.model(x, t, labels=labels).square().mean().backward()
    opt.step()
    moved = [float((a - b.detach()).abs().max()) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(0 <= m < 0.01 for m in moved)
    assert max(moved) > 1e-5
    used = [p.grad is not None for p in model.parameters()]
    assert [steps_of(opt)[i] - counts[i] for i in range(len(before))] == used
    assert len(opt.state) == len(before)


def steps_of(opt) -> dict:
    """Steps that PyTorch's optimizer has done, by position of the tensor."""
    return {i: int(entry["step"]) for i, entry in opt.state_dict()["state"].items()}


def test_a_tensor_that_no_step_has_used_has_no_optimizer_state(tmp_path):
    c = KINDS["conditional"]
    file = twin_file(tmp_path / "twin.pt", c, label_dropout=False)
    convert(file, tmp_path / "run", heads=4)
    convert(tmp_path / "run", tmp_path / "back.pt")
    golden.same(carried(file), carried(tmp_path / "back.pt"))
    opt = torch.load(tmp_path / "back.pt", weights_only=True)["opt"]
    assert len(opt["state"]) == len(opt["param_groups"][0]["params"]) - 1


def test_safetensors_go_both_ways(official, converted, tmp_path):
    content = torch_file.read(official)
    for which, prefix, state_dict in [
        ("params", "model.", content["model"]),
        ("ema", "ema_model.model.", content["ema"]),
    ]:
        file = tmp_path / f"{which}.safetensors"
        convert(official, file, heads=4, weights=which)
        network = torch_twin.network(golden.TINY)
        network.load_state_dict(load_file(file), strict=True)
        for name, tensor in network.state_dict().items():
            np.testing.assert_array_equal(tensor, state_dict[prefix + name])
        lines = convert(file, tmp_path / which)  # heads and all else are in its header
        assert any("one set of weights" in line for line in lines)
        golden.same(sampling.load(tmp_path / which).params, sampling.load(converted, weights=which).params)
    convert(official, tmp_path / "half.safetensors", heads=4, dtype="bfloat16")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "ema.safetensors").stat().st_size
    network.load_state_dict(load_file(tmp_path / "half.safetensors"), strict=True)
    for name, tensor in network.state_dict().items():
        rounded = torch.from_numpy(state_dict[prefix + name].copy()).bfloat16().float()
        np.testing.assert_array_equal(tensor, rounded)
    convert(tmp_path / "ema.safetensors", tmp_path / "half_again.safetensors", dtype="bfloat16")
    once, again = (load_file(tmp_path / f"half{name}.safetensors") for name in ("", "_again"))
    torch.testing.assert_close(again, once, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="the source has no weights 'params'; it has ema$"):
        convert(tmp_path / "ema.safetensors", tmp_path / "raw.safetensors", weights="params")
    convert(tmp_path / "ema.safetensors", tmp_path / "ema.pt")
    back = torch_file.read(tmp_path / "ema.pt")
    golden.same(
        {k: v for k, v in back["model"].items() if k.startswith("model.")},
        {k.removeprefix("ema_model."): v for k, v in content["ema"].items() if k.startswith("ema_model.model.")},
    )
    opt = torch.optim.AdamW(torch_twin.network(golden.TINY).parameters())
    opt.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True)["opt"])


def test_safetensors_from_elsewhere_and_a_bare_state_dict(official, converted, tmp_path):
    from safetensors.torch import save_file

    tensors = torch.load(official, weights_only=True)["model"]
    save_file(dict(tensors), tmp_path / "wrapper.safetensors")
    bare = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    save_file({name: t.to(torch.bfloat16) for name, t in bare.items()}, tmp_path / "half.safetensors")
    torch.save(bare, tmp_path / "bare.pt")
    expected = sampling.load(converted, weights="params").params
    save_file({f"module.{name}": t.clone() for name, t in bare.items()}, tmp_path / "parallel.safetensors")
    for name in ("wrapper.safetensors", "bare.pt", "parallel.safetensors"):
        lines = convert(tmp_path / name, tmp_path / name.partition(".")[0], heads=4)
        assert any("cosine is assumed" in line for line in lines) == (name != "wrapper.safetensors")
        golden.same(sampling.load(tmp_path / name.partition(".")[0]).params, expected)
        jax.tree.map(np.testing.assert_array_equal, expected, golden.raw_weights(tmp_path / name))
    with pytest.raises(ConfigError, match="pass --num_heads=H"):
        convert(tmp_path / "half.safetensors", tmp_path / "half")
    convert(tmp_path / "half.safetensors", tmp_path / "half", heads=4)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-2), sampling.load(tmp_path / "half").params, expected
    )


def test_what_is_inferred_from_a_file(kind):
    c, _, run = kind
    config = sampling.load(run).config
    assert config.data.image_size == c["img_size"] * (2 if "data_chans" in c else 1)
    assert config.data.channels == c.get("data_chans", c["in_chans"])
    assert config.model.depth == c["encoder_depth"] // 2 * 2
    assert config.model.num_classes == max(c["num_classes"], 0)
    assert config.model.qv_bias is c["qkv_bias"]
    assert config.model.time_mlp is c["mlp_time_embed"]
    assert config.model.mlp_ratio == c["mlp_ratio"]
    assert config.model.wavelet_scale == c.get("scale", 0)
    assert config.diffusion.schedule == "linear"
    assert (config.stage["stage"].b2, config.stage["stage"].weight_decay) == (0.98, 0.03)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "shifted"])
def test_the_schedule_is_recognised(schedule, tmp_path):
    made = make_schedule("shifted_cosine", size=256) if schedule == "shifted" else make_schedule(schedule)
    content = torch.load(twin_file(tmp_path / "a.pt", golden.TINY, steps=1), weights_only=True)
    content["model"] |= {k: torch.tensor(v) for k, v in uvit_file.schedule_buffers(made).items()}
    torch.save(content, tmp_path / "b.pt")
    convert(tmp_path / "b.pt", tmp_path / "run", heads=4)
    diffusion = sampling.load(tmp_path / "run").config.diffusion
    expected = ("shifted_cosine", 256) if schedule == "shifted" else (schedule, 64)
    assert (diffusion.schedule, diffusion.shift_size) == expected
    content["model"]["betas"] = torch.linspace(0.01, 0.02, 1000)
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(TorchFileError, match=r"c.pt: its betas are those of no noise schedule"):
        convert(tmp_path / "c.pt", tmp_path / "odd", heads=4)
    assert not (tmp_path / "odd").exists()


def test_the_schedule_is_kept_or_the_guess_is_said(tmp_path):
    """Never a silent cosine: buffers count wherever they are, in any precision, all of them or not."""
    from safetensors.torch import save_file

    content = torch.load(twin_file(tmp_path / "a.pt", golden.TINY, schedule="linear", steps=1), weights_only=True)
    save_file(dict(content["model"]), tmp_path / "wrapper.safetensors")
    torch.save({"model": {k: t.half() for k, t in content["model"].items()}}, tmp_path / "half.pt")
    torch.save({"model": {k: t.bfloat16() for k, t in content["model"].items()}}, tmp_path / "bfloat.pt")
    del content["model"]["alphas"]
    torch.save(content, tmp_path / "part.pt")
    for name in ("wrapper.safetensors", "half.pt", "bfloat.pt", "part.pt"):
        convert(tmp_path / name, tmp_path / f"of_{name[:4]}", heads=4)
        assert sampling.load(tmp_path / f"of_{name[:4]}").config.diffusion.schedule == "linear"


def test_a_config_must_agree_with_what_the_source_knows(converted, tmp_path):
    convert(converted, tmp_path / "w.safetensors")
    raw = config_lib.to_dict(golden.config(golden.TINY | dict(encoder_heads=8), diffusion=dict(schedule="linear")))
    for src, dst in [(tmp_path / "w.safetensors", "run"), (converted, "w.pt"), (converted, "v.safetensors")]:
        flags = "take its settings: --config.model.heads=4 --config.diffusion.schedule=cosine"
        with pytest.raises(ConfigError, match=rf"was trained with model.heads 4 \(now 8\), diffusion.* {flags}"):
            convert(src, tmp_path / dst, config=raw)
        assert not (tmp_path / dst).exists()


def test_an_unusual_optimizer_or_no_ema_does_not_keep_the_weights_back(official, tmp_path):
    content = torch_file.read(official)
    content["opt"], content["ema"] = {"state": {}, "param_groups": [{"momentum": 0.9}, {}]}, {}
    torch_file.write(tmp_path / "sgd.pt", content)
    lines = convert(tmp_path / "sgd.pt", tmp_path / "w.safetensors", heads=4)
    assert any("no EMA" in line for line in lines)
    golden.raw_weights(tmp_path / "sgd.pt")
    lines = convert(tmp_path / "sgd.pt", tmp_path / "sgd", heads=4)
    assert any(line.startswith("left out: the optimizer ('opt': it knows 0 tensors") for line in lines)
    assert "checkpoint 130: weights, step 130" in lines[0]
    raw = config_lib.to_dict(golden.config(golden.TINY, dict(steps=130)))
    with pytest.raises(ConfigError, match="'opt': it knows 0 tensors.*leave --config out to sample, or start from the"):
        convert(tmp_path / "sgd.pt", tmp_path / "further", config=raw)
    del content["opt"]
    torch_file.write(tmp_path / "none.PT", content)
    lines = convert(tmp_path / "none.PT", tmp_path / "run", heads=4)
    assert any("one set of weights" in line for line in lines)


def test_what_a_killed_call_left_is_not_taken_over(official, tmp_path):
    """A number of a process may come again, and with it the temporary folder's name."""
    other = twin_file(tmp_path / "other.pt", golden.TINY, counted=130)
    convert(other, tmp_path / f".run.{os.getpid()}.tmp", heads=4)
    convert(official, tmp_path / "run", heads=4)
    expected = golden.raw_weights(official)
    jax.tree.map(np.testing.assert_array_equal, sampling.load(tmp_path / "run", weights="params").params, expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.pt", "run"]


def test_a_process_that_the_official_code_lacks_is_not_exported(converted, tmp_path):
    raw = config_lib.to_dict(sampling.load(converted).config)
    raw["diffusion"] |= dict(process="flow", objective="v")
    noted = dict(config=raw, stage="stage", classes=[], weights="ema")
    official_file.write_safetensors(
        tmp_path / "x.safetensors", UVIT.state_dict(sampling.load(converted).params, 2), noted
    )
    with pytest.raises(ConfigError, match="knows DDPM alone, and this run is of the process flow; .*--for=torch"):
        convert(tmp_path / "x.safetensors", tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_a_damaged_run_folder_is_named(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "run")
    meta = next((tmp_path / "run").rglob("meta")) / "metadata"
    content = json.loads(meta.read_text())
    for key, value, message in [
        ("stage", "other", "its stage 'other' is not in its config"),
        ("classes", None, "lacks"),
    ]:
        broken = {k: v for k, v in (content | {key: value}).items() if v is not None or k == "images"}
        meta.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=f"checkpoints/130 is damaged.*{message}"):
            convert(tmp_path / "run", tmp_path / "out.pt")


def test_a_converted_run_goes_on_and_init_from_takes_all_kinds(official, converted, tmp_path):
    from PIL import Image

    for i in range(10):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (20 * i, 100, 200)).save(tmp_path / "images" / f"{i}.png")
    shallow, stage = golden.TINY | dict(encoder_depth=2), dict(steps=131, learning_rate=0.0)
    file = twin_file(tmp_path / "file.pt", shallow, schedule="cosine", counted=130)
    raw = config_lib.to_dict(golden.config(shallow, stage))
    raw["data"]["path"] = str(tmp_path / "images")
    config = config_lib.parse(raw)
    convert(file, tmp_path / "run", config=raw)
    last = train(config, tmp_path / "run")
    assert last.name == "131"
    assert "resuming" in (tmp_path / "run" / "log.txt").read_text()
    assert "changed" not in (tmp_path / "run" / "log.txt").read_text()
    state = checkpoint.load_state(last, abstract_state(config, 0, make_network(config), make_mesh(devices=ONE)))
    assert int(state.step) == 131 == int(optax.tree.get(state.opt_state, "ScaleByScheduleState").count)
    convert(tmp_path / "run", tmp_path / "trained.pt")
    before, after = torch_file.read(file), torch_file.read(tmp_path / "trained.pt")
    assert (after["step"], after["ema"]["step"], after["opt"]["state"][0]["step"]) == (131, 131, 131)
    golden.same(before["model"], after["model"])

    expected = sampling.load(converted, weights="params").params
    convert(official, tmp_path / "w.safetensors", heads=4, weights="params")
    raw = config_lib.to_dict(golden.config(golden.TINY)) | {"data": raw["data"]}
    for init_from in (official, converted, tmp_path / "w.safetensors"):
        raw["init_from"] = str(init_from)
        begun = config_lib.parse(raw)
        checkpoints, mesh = checkpoint.Checkpoints(tmp_path / f"from_{init_from.name}", keep=1), make_mesh(devices=ONE)
        state = start.begin(begun, make_network(begun), mesh, checkpoints, TrainingData(begun.data)).state
        golden.same(jax.tree.map(np.asarray, state.params), expected)


def test_a_file_of_the_second_stage(official, tmp_path):
    stage = dict(steps=130, learning_rate=2e-4)
    raw = config_lib.to_dict(golden.config(golden.TINY, stage))
    raw["first"], raw["stages"] = raw["stage"] | dict(steps=50), ["first", "stage"]
    with pytest.raises(ConfigError, match=r"at step 130, but config.first.steps is 50; give the stage .* with --stage"):
        convert(official, tmp_path / "run", config=raw)
    assert not (tmp_path / "run").exists()
    convert(official, tmp_path / "run", config=raw, stage="stage")
    found = checkpoint.find(tmp_path / "run")
    assert found.name == "180"
    meta = checkpoint.load_meta(found)
    assert meta["past"] == {"first": 50}
    assert meta["data"] == {"global_next_index": 130 * 8}


def test_an_exported_average_is_not_copied_again(converted, tmp_path):
    """The official EMA goes on from an exported step after the copying steps by averaging, as training here does."""
    convert(converted, tmp_path / "out.pt")
    exported = torch.load(tmp_path / "out.pt", weights_only=True)["ema"]
    buffers = uvit_file.schedule_buffers(make_schedule("cosine"))
    ema = torch_twin.Ema(torch_twin.Diffusion(golden.TINY, buffers), torch_twin.Diffusion(golden.TINY, buffers), 0.9, 1)
    ema.load_state_dict(exported, strict=True)
    assert (int(ema.step), bool(ema.initted)) == (130, True)
    name = "model.encoder.norm.weight"
    ema.online_model.get_parameter(name).data += 1
    ema.update()
    size = float(ema_step_size(130, decay=0.9, every=1))
    expected = torch.lerp(exported[f"ema_model.{name}"], exported[f"online_model.{name}"] + 1, size)
    torch.testing.assert_close(ema.ema_model.get_parameter(name).data, expected)
    assert 0 < size < 1


def test_what_cannot_work_is_said_and_nothing_is_written(official, converted, tmp_path):
    def fails(error, match, src=official, dst=tmp_path / "out", **options):
        with pytest.raises(error, match=match):
            convert(src, dst, **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == before

    before = []
    fails(ConfigError, "pass --num_heads=H")
    tiny_config = config_lib.to_dict(golden.config(golden.TINY))
    fails(ConfigError, "--num_heads .* for files without settings; --config has them", config=tiny_config, heads=4)
    fails(ConfigError, r"config.model.heads is 5; it must be a divisor of model.width 32", heads=5)
    wrong = config_lib.to_dict(golden.config(golden.TINY | dict(encoder_embed_dim=64, encoder_depth=6)))
    fails(ConfigError, r"model.width 32 \(now 64\), model.depth 5 \(now 7\); take its settings: --config", config=wrong)
    linear = config_lib.to_dict(golden.config(golden.TINY, diffusion=dict(schedule="linear")))
    fails(
        ConfigError,
        r"diffusion.schedule cosine \(now linear\); take its settings: --config.diffusion.schedule=cosine",
        config=linear,
    )
    fails(ConfigError, "of the same kind", dst=tmp_path / "again.pt")
    fails(ConfigError, "--dtype=bfloat16 is for a .safetensors or .*out holds all weights, in", dtype="bfloat16")
    fails(ConfigError, "--weights=params is for a .safetensors or .*out holds all weights", weights="params")
    fails(ConfigError, ".onnx is not known", dst=tmp_path / "model.onnx")
    fails(CheckpointError, "none.pt does not exist", src=tmp_path / "none.pt")
    fails(CheckpointError, "holds no checkpoint", src=tmp_path / "none", dst=tmp_path / "out.pt")
    fails(ConfigError, "--stage names a stage of a --config", heads=4, stage="pretrain")
    fails(ConfigError, "without settings; .*run has them", src=converted, dst=tmp_path / "out.pt", heads=2)
    fails(ConfigError, "exists already", dst=official.parent, heads=4)
    fails(CheckpointError, "cannot be written: .*Not a directory|File exists", dst=official / "out", heads=4)
    fails(CheckpointError, "cannot be written: .*too long", dst=tmp_path / ("x" * 300), heads=4)
    fails(CheckpointError, "cannot be read: .*too long", src=tmp_path / ("x" * 300 + ".pt"), heads=4)

    before = ["damaged.pt"]
    content = official.read_bytes()
    (tmp_path / "damaged.pt").write_bytes(content[: len(content) // 2])
    fails(TorchFileError, "damaged.pt is damaged", src=tmp_path / "damaged.pt", heads=4)
    before = ["damaged.pt", "short.safetensors"]
    convert(official, tmp_path / "short.safetensors", heads=4)
    content = (tmp_path / "short.safetensors").read_bytes()
    for cut in (4, 100, len(content) // 2):
        (tmp_path / "short.safetensors").write_bytes(content[:cut])
        fails(TorchFileError, r"short.safetensors: it is damaged", src=tmp_path / "short.safetensors", heads=4)


def change(content, where, value):
    *path, last = where
    node = functools.reduce(lambda node, key: node[key], path, content)
    if value is None:
        del node[last]
    else:
        node[last] = value


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("step",), -3, "step is -3, which is not a count"),
        (("step",), "many", "step is 'many', which is not a count"),
        (("model", "model.encoder.norm.weight"), None, "differ in names or shapes"),
        (("model", "model.encoder.norm.weight"), np.zeros(32, np.int64), "is int64; float32 is wanted"),
        (("model", "model.encoder.norm.weight"), np.zeros(5, np.float32), "differ in names or shapes"),
        (("model", "model.final.weight"), np.zeros(5, np.float32), "'model.model.final.weight' is not the name of a"),
        (("model", "model.encoder.norm.weight"), "text", "is a str, not a tensor"),
        (("ema", "ema_model.model.encoder.norm.weight"), None, "differ in names"),
        (("step",), 2**31, "counts go up to"),
        (("model", "encoder.norm.weight"), np.zeros(32, np.float32), "several networks, 'model.model.[*]' .66 tensors"),
        (("model", "module.model.encoder.norm.weight"), np.zeros(32, np.float32), "two tensors 'model.model.encoder.n"),
        (("model", "model.encoder.in_blocks.01.norm1.weight"), np.zeros(32, np.float32), "is not the name of"),
        (("model", f"model.encoder.in_blocks.{'9' * 5000}.norm1.weight"), np.zeros(32, np.float32), "is not the name"),
        (("model", "model.encoder.encoder_pos_embed"), np.zeros((2, 65, 32), np.float32), "differ in names"),
    ],
)
def test_odd_official_files_are_refused_by_name(official, tmp_path, where, value, message):
    content = torch_file.read(official)
    change(content, where, value)
    torch_file.write(tmp_path / "odd.pt", content)
    with pytest.raises((TorchFileError, CheckpointError), match=message):
        convert(tmp_path / "odd.pt", tmp_path / "run", heads=4)
    assert [p.name for p in tmp_path.iterdir()] == ["odd.pt"]


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("state", 3, "exp_avg"), np.zeros(3, np.float32), r"a moment of .* is \(3,\), the tensor"),
        (("state", 3, "max_exp_avg_sq"), np.zeros(3, np.float32), "is not that of AdamW"),
        (("state", 3), None, r"has done \[0, 130\] steps on different tensors"),
        (("state", 3, "step"), np.float32(7), r"has done \[7, 130\] steps on different tensors"),
        (("param_groups", 0, "params"), [0, 1], "it knows 2 tensors, the network has 66"),
        (("param_groups", 0, "params"), [[0]] * 66, "it knows 66 tensors"),
        (("param_groups",), [{}, {}], "it knows 0 tensors"),
        (("state",), None, "it lacks state"),
        (("param_groups", 0, "betas"), (0.9, 0.9, 0.9), r"its betas is \(0.9, 0.9, 0.9\); two numbers"),
        (("param_groups", 0, "lr"), "low", "its lr is 'low', which is not a number"),
        (("param_groups", 0, "eps"), 1e-3, "its eps is 0.001; training here has 1e-08"),
        (("param_groups", 0, "maximize"), True, "its maximize is True; training here has False"),
        (("param_groups", 0, "amsgrad"), True, "its amsgrad is True; training here has False"),
        (("param_groups", 0, "decoupled_weight_decay"), False, "decoupled_weight_decay is False; training here has"),
    ],
)
def test_an_optimizer_that_cannot_go_on_is_left_out_by_name(official, tmp_path, where, value, message):
    content = torch_file.read(official)
    change(content["opt"], where, value)
    torch_file.write(tmp_path / "odd.pt", content)
    lines = convert(tmp_path / "odd.pt", tmp_path / "run", heads=4)
    assert [line for line in lines if re.search(rf"^left out: the optimizer .*{message}", line)]
    assert "weights, EMA, step 130" in lines[0]
    raw = config_lib.to_dict(golden.config(golden.TINY, dict(steps=130)))
    with pytest.raises(ConfigError, match=rf"optimizer cannot be continued .*{message}.*--config.init_from"):
        convert(tmp_path / "odd.pt", tmp_path / "further", config=raw)


def test_what_differs_from_the_usual_is_named(official, tmp_path):
    content = torch_file.read(official)
    content["ema"]["step"], content["ema"]["initted"] = np.array(77), np.array(False)
    content["scaler"], content["note"] = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 12}, "hello"
    content["opt"]["param_groups"][0]["initial_lr"] = np.array(1e-4)  # as `capturable` has it
    for entry in content["opt"]["state"].values():
        entry["step"] = np.array(128.0, np.float32)  # half-precision training skips steps
    torch_file.write(tmp_path / "odd.pt", content)
    lines = convert(tmp_path / "odd.pt", tmp_path / "run", heads=4)
    assert any("EMA says step 77, initted False at training step 130" in line for line in lines)
    assert [line for line in lines if line.startswith("left out")] == [
        "left out: 'scaler' of the file (dict)",
        "left out: 'note' of the file (str)",
    ]
    convert(tmp_path / "run", tmp_path / "back.pt")
    back = torch_file.read(tmp_path / "back.pt")
    golden.same(content["opt"]["state"], back["opt"]["state"])
    assert (back["ema"]["step"], back["opt"]["param_groups"][0]["lr"]) == (130, pytest.approx(1e-4))


def test_a_folder_that_will_not_fit_is_not_begun(official, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(CheckpointError, match=r"run cannot be written: .* takes 0.00 GB and .* has 0.00 GB free"):
        convert(official, tmp_path / "run", heads=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("run", "maskdm_jax.interop.convert.write_atomically"),
        ("run", "maskdm_jax.training.checkpoint.Checkpoints.wait"),
        ("w.safetensors", "maskdm_jax.interop.official.write_atomically"),
        ("back.pt", "zipfile.ZipFile.writestr"),
    ],
)
def test_a_full_disk_leaves_nothing(official, converted, tmp_path, monkeypatch, name, broken):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be written: .*No space left"):
        convert(converted if name == "back.pt" else official, tmp_path / name, heads=None if name == "back.pt" else 4)
    assert not list(tmp_path.iterdir())


def test_a_file_given_as_a_run_names_the_command_that_makes_it_one(official, converted, tmp_path):
    """It works as it is where the file shows the heads, or has 64 channels per head as the official models do."""
    file = tmp_path / "model 20.pt"
    twin_file(file, golden.TINY | dict(encoder_embed_dim=64, encoder_heads=1, encoder_depth=2))
    with pytest.raises(CheckpointError, match="model 20.pt is not a run of this project; .*, convert it: ") as caught:
        sampling.load(file)
    program, *flags = shlex.split(str(caught.value).partition("convert it: python ")[2])
    src, dst = (flag.partition("=")[2] for flag in flags)
    assert (program, src, dst) == ("launch/convert.py", str(file), "runs/model 20")
    lines = convert(src, tmp_path / dst)
    assert any("width / 64 = 1 is assumed" in line for line in lines)
    assert sampling.load(tmp_path / dst).config.model.heads == 1
    with pytest.raises(ConfigError, match="config.model.heads is 0"):
        convert(src, tmp_path / "no_heads", heads=0)
    shards = tmp_path / "shards"
    shards.mkdir()
    convert(converted, shards / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"convert.py --src={shards} --dst=runs/shards"):
        checkpoint.find(shards)
    assert not any("heads" in line for line in convert(shards, tmp_path / "run"))


def test_from_the_command_line(root, official, tmp_path, child_env):
    def run(*args):
        command = [sys.executable, "launch/convert.py", *map(str, args)]
        return subprocess.run(command, cwd=root, env=child_env, capture_output=True, text=True, timeout=120)

    done = run(f"--src={official}", f"--dst={tmp_path / 'run'}", "--num_heads=4")
    assert done.returncode == 0, done.stderr
    assert "holds checkpoint 130: weights, EMA, optimizer, step 130 of stage 'stage'" in done.stdout
    assert not done.stderr
    done = run(f"--src={official}", f"--dst={tmp_path / 'other'}")
    assert done.returncode == 78
    assert done.stderr.startswith("error: the number of attention heads cannot be seen in the file")
