"""Checkpoints of JiT's authors, both ways."""

import argparse
import collections
import os

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from PIL import Image

import maskdm_jax
from maskdm_jax import config as config_lib
from maskdm_jax import sampling
from maskdm_jax.build import make_network
from maskdm_jax.data.pipeline import TrainingData
from maskdm_jax.errors import CheckpointError, ConfigError, TorchFileError
from maskdm_jax.interop import jit_file, official, torch_file
from maskdm_jax.interop.convert import convert
from maskdm_jax.interop.names import JIT
from maskdm_jax.parallel.sharding import make_mesh
from maskdm_jax.training import checkpoint, loop, start
from maskdm_jax.training.state import make_optimizer

ONE = jax.devices()[:1]
SETS = {"params": "model", "ema": "model_ema1", "ema2": "model_ema2"}


@pytest.fixture(scope="module")
def meta(jit_file):
    return golden.load(golden.expected_of(jit_file))[1]


@pytest.fixture(scope="module")
def options(meta):
    return dict(class_tokens_from=meta["config"]["in_context_start"])


@pytest.fixture(scope="module")
def run(jit_file, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "run"
    lines = convert(jit_file, folder, **options)
    assert len(lines) == 1, "everything of the file is used"
    return folder


@pytest.fixture
def content(jit_file):
    return torch_file.read(jit_file)


@pytest.fixture
def written(tmp_path, content):
    """Writes the file with changes at its top."""

    def write(name="odd.pth", **changes):
        whole = content | {"args": argparse.Namespace(**content["args"].settings)} | changes
        torch_file.write(tmp_path / name, {key: value for key, value in whole.items() if value is not None})
        return tmp_path / name

    return write


def test_all_three_sets_of_weights_give_the_recorded_outputs(jit_file, run, meta):
    recorded = np.load(golden.expected_of(jit_file))
    network = sampling.load(run).network
    apply = jax.jit(network.apply)
    labels = jnp.array(np.where(recorded["y"] == meta["num_classes"], -1, recorded["y"]), jnp.int32)
    for name, key in SETS.items():
        out = apply(sampling.load(run, weights=name).params, golden.nhwc(recorded["x"]), recorded["t"], labels)
        expected = golden.nhwc(recorded[f"out_{key}"])
        assert np.abs(out - expected).max() < 2e-5 * expected.std(), name


def close_positions(ours, theirs):
    """Two sets of weights are equal bit for bit, but for the position embedding, which is computed here."""
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, atol=1e-6 * name.endswith("pos_embed"), rtol=0)


def test_safetensors_of_every_set_go_both_ways(content, run, tmp_path):
    from safetensors.numpy import load_file

    for name, key in SETS.items():
        file = tmp_path / f"{name}.safetensors"
        convert(run, file, weights=name)
        found = load_file(file)
        close_positions({name: found[name.removeprefix("net.")] for name in content[key]}, content[key])
        convert(file, tmp_path / name)
        mine, theirs = sampling.load(tmp_path / name).params, sampling.load(run, weights=name).params
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    with pytest.raises(ConfigError, match="the source has no weights 'ema3'; it has params, ema, ema2"):
        convert(run, tmp_path / "none.safetensors", weights="ema3")
    assert not (tmp_path / "none.safetensors").exists()


def test_what_is_inferred_from_a_file(content, run, meta):
    config, network, args = sampling.load(run).config, meta["config"], content["args"].settings
    assert (config.data.image_size, config.model.patch_size) == (network["input_size"], network["patch_size"])
    model = config.model
    assert (model.network, model.width, model.depth) == ("jit", network["hidden_size"], network["depth"])
    assert (model.heads, model.num_classes) == (network["num_heads"], network["num_classes"])
    assert (model.jit.bottleneck, model.jit.class_tokens) == (network["bottleneck_dim"], network["in_context_len"])
    flow, sampler, stage = config.diffusion.flow, config.sampling, config.stage["stage"]
    assert (config.diffusion.process, config.diffusion.objective, flow.times) == ("flow", "x0", "logit_normal")
    assert (flow.noise_scale, flow.mean, flow.std) == (args["noise_scale"], args["P_mean"], args["P_std"])
    assert (sampler.method, sampler.steps) == (args["sampling_method"], args["num_sampling_steps"])
    assert sampler.guidance == args["cfg"] - 1
    assert (sampler.guidance_from, sampler.guidance_to) == (args["interval_min"], args["interval_max"])
    assert config.data.label_dropout == args["label_drop_prob"]
    assert (stage.learning_rate, stage.weight_decay, stage.clip_norm) == (args["lr"], 0.0, 0.0)
    assert (stage.b1, stage.b2) == tuple(content["optimizer"]["param_groups"][0]["betas"])
    assert (stage.ema_decay, stage.more_ema_decays) == (args["ema_decay1"], (args["ema_decay2"],))
    assert stage.ema_law == "plain"
    assert stage.steps == int(content["optimizer"]["state"][0]["step"])


def test_where_class_tokens_join_is_told_by_the_name_or_the_size_or_the_user(jit_file, content, written, tmp_path):
    found = official.read(jit_file)
    assert "model.jit.class_tokens_from" not in found.format.shown(found)
    for name, block in {"JiT-B/16": 4, "JiT-L/32": 8, "JiT-H/16": 10}.items():
        found.args["model"] = name
        assert found.format.shown(found)["model.jit.class_tokens_from"] == block
    found.args = {}
    shown = found.format.shown(found)
    with pytest.raises(ConfigError, match="--class_tokens_from is 3, but the file shows that it is 8; leave it out"):
        found.format.settings(found, shown | {"model.jit.class_tokens_from": 8}, None, 3)
    with pytest.raises(ConfigError, match="--num_heads is for a U-ViT"):
        found.format.settings(found, shown, 2, None)
    large = shown | {"model.width": 1024, "model.depth": 24}
    assert found.format.settings(found, large, None, None)["model.jit.class_tokens_from"] == 8
    assert "note: class tokens are assumed to join before block 8, as in the authors' JiT" in found.notes
    assert found.format.settings(found, large, None, 3)["model.jit.class_tokens_from"] == 3
    found.args = {"model": "custom"}
    with pytest.raises(ConfigError, match="pass --class_tokens_from=N"):
        found.format.settings(found, large, None, None)
    with pytest.raises(ConfigError, match="joi?n the patches cannot be seen in the file: pass --class_tokens_from=N"):
        convert(jit_file, tmp_path / "run")
    named = written(args=argparse.Namespace(**content["args"].settings | {"model": "JiT-B/16"}))
    with pytest.raises(ConfigError, match="class_tokens_from is 4; it must be below model.depth"):
        convert(named, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.pth"]


def test_without_settings_the_noise_scale_is_assumed_and_said(written, options, meta, tmp_path):
    lines = convert(written(args=None), tmp_path / "run", **options)
    scale = meta["config"]["input_size"] / 256
    assert f"note: the file does not show its noise scale; {scale:g} = image side / 256 is assumed" in lines
    config = sampling.load(tmp_path / "run").config
    assert (config.diffusion.flow.noise_scale, config.sampling.method) == (scale, "heun")


def test_only_a_network_of_the_authors_gets_their_name():
    config = maskdm_jax.recipe("imagenet256_jit_masked")
    other = maskdm_jax.recipe("imagenet256_jit_masked", {"model.jit.class_tokens_from": 2})
    assert [jit_file._name(config_lib.parse(c).model) for c in (config, other)] == ["JiT-B/16", "custom"]


def test_another_objective_is_not_exported(run, tmp_path):
    convert(run, tmp_path / "x.safetensors")
    weights, noted = official.read_safetensors(tmp_path / "x.safetensors")
    noted["config"]["diffusion"]["objective"] = "v"
    official.write_safetensors(tmp_path / "v.safetensors", weights.model | weights.fixed, noted)
    with pytest.raises(
        ConfigError, match="knows flow matching with x0 alone, and this run is flow with v; .*--for=tor"
    ):
        convert(tmp_path / "v.safetensors", tmp_path / "x.pth")


def test_a_number_of_sampling_steps_with_a_point(content, written, options, tmp_path):
    args = argparse.Namespace(**content["args"].settings | {"num_sampling_steps": 40.0})
    convert(written(args=args), tmp_path / "run", **options)
    assert sampling.load(tmp_path / "run").config.sampling.steps == 40
    convert(written(args=vars(args)), tmp_path / "of_dict", **options)  # as people save it for `weights_only=True`
    assert sampling.load(tmp_path / "of_dict").config.sampling.steps == 40


class Attack:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_settings_are_read_without_executing_anything(torch, jit_file, options, tmp_path, monkeypatch):
    content = torch.load(jit_file, weights_only=False)
    content["args"].device, content["args"].hook, content["rng"] = torch.device("cpu"), Attack(), Attack()
    torch.save(content, tmp_path / "x.pth")
    monkeypatch.chdir(tmp_path)
    lines = convert("x.pth", "run", **options)
    assert any(line.startswith("left out: 'rng' of the file (posix.system)") for line in lines)
    assert sorted(os.listdir()) == ["run", "x.pth"], "nothing was executed"
    assert sampling.load("run").config.diffusion.flow.noise_scale == content["args"].noise_scale


# --- Training further ---------------------------------------------------------------------------


def test_the_optimizer_goes_on_as_in_pytorch(torch, jit_file, run):
    """One more update of AdamW from the same gradients."""
    config, found = sampling.load(run).config, checkpoint.find(run)
    state = checkpoint.load_state(found, start.abstract_state(config, 0, make_network(config), make_mesh(devices=ONE)))
    content = torch.load(jit_file, weights_only=False)
    tensors = {
        name.removeprefix("net."): torch.nn.Parameter(tensor.clone()) for name, tensor in content["model"].items()
    }
    del tensors["pos_embed"]
    vectors = [name for name, tensor in tensors.items() if tensor.ndim <= 1 or name.endswith(".bias")]
    groups = [{"params": [tensors[n] for n in tensors if (n in vectors) is first]} for first in (True, False)]
    adamw = torch.optim.AdamW(groups)
    adamw.load_state_dict(content["optimizer"])
    rng = np.random.RandomState(0)
    grads = {name: rng.standard_normal(tensor.shape).astype(np.float32) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        tensor.grad = torch.tensor(grads[name])
    adamw.step()
    stage = config.stage["stage"]
    update = jax.jit(lambda g, s, p: optax.apply_updates(p, make_optimizer(stage).update(g, s, p)[0]))
    ours = JIT.state_dict(update(JIT.params(grads), state.opt_state, state.params), config.model.patch_size)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        before, after = content["model"][f"net.{name}"].numpy(), tensor.detach().numpy()
        rounding = 2 * np.finfo(np.float32).eps * np.abs(after).max()
        assert np.abs(ours[name] - after).max() < 1e-4 * np.abs(after - before).max() + rounding, name


@pytest.fixture
def further(run, tmp_path):
    """The converted run's config with images, for one more step."""
    raw = config_lib.to_dict(sampling.load(run).config)
    size = raw["data"]["image_size"]
    for i in range(2 * raw["model"]["num_classes"]):
        folder = tmp_path / "images" / str(i % raw["model"]["num_classes"])
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (60 * i % 256, 100, 200)).save(folder / f"{i}.png")
    raw["data"] |= dict(path=str(tmp_path / "images"), threads=1)
    raw["stage"] |= dict(steps=raw["stage"]["steps"] + 1, batch_size=2, learning_rate=0.0)
    raw["checkpoint"]["every"] = raw["log"]["every"] = 1
    raw["preview"]["every"], raw["log"]["tensorboard"] = 0, False
    return raw


def test_a_converted_run_goes_on(jit_file, further, content, tmp_path):
    config = config_lib.parse(further)
    convert(jit_file, tmp_path / "run", config=further)
    last = loop.train(config, TrainingData(config.data), tmp_path / "run", devices=ONE)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "resuming" in log
    assert "changed" not in log
    convert(last, tmp_path / "trained.pth")
    after, steps = torch_file.read(tmp_path / "trained.pth"), config.stage["stage"].steps
    assert {int(entry["step"]) for entry in after["optimizer"]["state"].values()} == {steps}
    for name, tensor in content["model"].items():
        np.testing.assert_array_equal(after["model"][name], tensor)  # with rate 0


def test_a_run_of_this_project_becomes_a_file_of_the_authors(torch, jit_file, run, content, tmp_path):
    """Weights, EMAs and optimizer are those of the file that the run was made from, bit for bit."""
    import torch_jit

    convert(run, tmp_path / "out.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(tmp_path / "out.pth", weights_only=True, mmap=True)
    assert list(found) == list(content)
    assert found["epoch"] == 0
    args = content["args"].settings
    assert list(vars(found["args"])) == list(args)
    assert vars(found["args"]) == args | {"model": "custom", "epochs": 1}
    twin = torch_jit.of_config(sampling.load(run).config)
    for key in SETS.values():
        close_positions(found[key], content[key])
        twin.load_state_dict({name.removeprefix("net."): tensor for name, tensor in found[key].items()}, strict=True)
    trained = [(name, p) for name, p in twin.named_parameters() if p.requires_grad]
    vector = lambda name, p: p.ndim <= 1 or name.endswith(".bias")
    adamw = torch.optim.AdamW([{"params": [p for n, p in trained if vector(n, p) is first]} for first in (True, False)])
    adamw.load_state_dict(found["optimizer"])
    golden.same(torch.load(jit_file, weights_only=False)["optimizer"]["state"], adamw.state_dict()["state"])


def test_an_exported_file_has_the_settings_of_its_own_stage(jit_file, further, tmp_path):
    further["stage"]["learning_rate"] = 0.25
    further |= dict(stages=["stage", "second"], second=further["stage"] | dict(learning_rate=0.5))
    convert(jit_file, tmp_path / "run", config=further)
    convert(tmp_path / "run", tmp_path / "out.pth")
    assert torch_file.read(tmp_path / "out.pth")["args"].settings["lr"] == 0.25


def test_init_from_takes_all_kinds(jit_file, run, further, tmp_path, caplog):
    expected = sampling.load(run, weights="params").params
    convert(run, tmp_path / "w.safetensors", weights="params")
    bare = {name.removeprefix("net."): tensor for name, tensor in torch_file.read(jit_file)["model"].items()}
    torch_file.write(tmp_path / "bare.pt", bare)
    for init_from in (jit_file, run, tmp_path / "w.safetensors", tmp_path / "bare.pt"):
        config = config_lib.parse(further | {"init_from": str(init_from)})
        abstract = start.abstract_state(config, 0, make_network(config), make_mesh(devices=ONE)).params
        params, _ = start.initial_weights(config, ["0", "1"], abstract)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    block = config.model.jit.class_tokens_from
    assumed = f"model.jit.class_tokens_from={block}, diffusion.flow.noise_scale={config.diffusion.flow.noise_scale}"
    assert f"bare.pt does not hold its settings; assumed are {assumed}" in caplog.text
    further["model"]["width"] *= 2
    with pytest.raises(
        ConfigError, match=r"was trained with model.width 32 \(now 64\); take its settings: --config.model.width=32"
    ):
        start.initial_weights(config_lib.parse(further | {"init_from": str(jit_file)}), ["0", "1"], abstract)


def test_weights_of_the_other_network_are_refused_by_its_name(root, jit_file, run, further, tmp_path):
    u_vit = root / "tests" / "golden" / "official_tiny.pt"
    for init_from in (jit_file, run):
        config = tiny.config(init_from=str(init_from))
        with pytest.raises(
            ConfigError, match="holds the weights of a network 'jit', but config.model.network is 'uvit'"
        ):
            start.initial_weights(config, [], make_network(config).abstract_params())
    config = config_lib.parse(further | {"init_from": str(u_vit)})
    with pytest.raises(ConfigError, match="holds the weights of a network 'uvit', but config.model.network is 'jit'"):
        start.initial_weights(config, [], make_network(config).abstract_params())
    with pytest.raises(ConfigError, match="holds the weights of a network 'uvit', but config.model.network is 'jit'"):
        convert(u_vit, tmp_path / "run", config=further)
    with pytest.raises(ConfigError, match="--class_tokens_from is for a JiT; the file holds a U-ViT"):
        convert(u_vit, tmp_path / "run", heads=4, class_tokens_from=4)


# --- EMAs and odd files -------------------------------------------------------------------------


def test_a_config_with_another_number_of_emas(jit_file, further, tmp_path):
    further["stage"]["more_ema_decays"] = ()
    lines = convert(jit_file, tmp_path / "one", config=further)
    assert "left out: ema2 of the file; more_ema_decays of its stage would make room for it" in lines
    assert checkpoint.weights_in(checkpoint.find(tmp_path / "one")) == ["params", "ema"]
    further["stage"]["more_ema_decays"] = (0.5, 0.4)
    lines = convert(jit_file, tmp_path / "three", config=further)
    assert "note: the config has 3 EMAs, the file 2; ema2 serves as the rest" in lines
    last, second = (sampling.load(tmp_path / "three", weights=name).params for name in ("ema3", "ema2"))
    jax.tree.map(np.testing.assert_array_equal, last, second)
    lines = convert(tmp_path / "three", tmp_path / "out.pth")
    assert "left out: ema3; such files have no place for it, a .safetensors does (--weights=ema3)" in lines


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("net.final_layer.linear.weight", None, "differ in names or shapes"),
        ("net.pos_embed", None, "tensor 'pos_embed' is missing"),
        (
            "net.pos_embed",
            np.zeros((1, 16, 32), np.float32),
            "'pos_embed' is not the sine-cosine embedding of a grid of",
        ),
        ("net.pos_embed", np.zeros((1, 15, 32), np.float32), "15 positions, which are not those of square images"),
        ("net.pos_embed", np.zeros((16, 32), np.float32), r"'pos_embed' is \(16, 32\); 3 dimensions are wanted"),
        ("net.cls_token", np.zeros((1, 1, 32), np.float32), "'model.net.cls_token' is not the name of a JiT tensor"),
        ("net.final_layer.linear.bias", np.zeros(48, np.int64), "is int64; float32 is wanted"),
        ("net.x_embedder.proj1.weight", np.zeros((8, 48), np.float32), "differ in names or shapes"),
    ],
)
def test_odd_weights_are_refused_by_name(jit_file, content, written, tmp_path, name, value, message):
    if jit_file.stem != "jit_tiny":
        pytest.skip("made for the tensors of jit_tiny.pth")
    model = {key: tensor for key, tensor in (content["model"] | {name: value}).items() if tensor is not None}
    file = written(model=collections.OrderedDict(model))
    with pytest.raises((TorchFileError, CheckpointError), match=message):
        convert(file, tmp_path / "run", class_tokens_from=1)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.pth"]


def test_a_file_with_a_part_of_a_network_is_refused(content, written, tmp_path):
    part = lambda key: collections.OrderedDict((n, t) for n, t in content[key].items() if ".blocks.1." not in n)
    file = written(**{key: part(key) for key in SETS.values()})
    with pytest.raises(CheckpointError, match="are not those of a whole JiT"):
        convert(file, tmp_path / "run", class_tokens_from=1)


@pytest.mark.parametrize(
    ("group", "changes", "message"),
    [
        (1, dict(weight_decay=0.1), "its 2 groups of tensors have different settings"),
        (0, dict(params=[0, 1]), "it knows 30 tensors, the network has 70"),
    ],
)
def test_an_optimizer_that_cannot_go_on_is_left_out_by_name(
    jit_file, content, written, further, options, tmp_path, group, changes, message
):
    if jit_file.stem != "jit_tiny":
        pytest.skip("made for the tensors of jit_tiny.pth")
    content["optimizer"]["param_groups"][group] |= changes
    file = written()
    lines = convert(file, tmp_path / "run", **options)
    assert any(line.startswith(f"left out: the optimizer ('optimizer': {message}") for line in lines)
    with pytest.raises(ConfigError, match=f"optimizer cannot be continued .*{message}.*--config.init_from"):
        convert(file, tmp_path / "further", config=further)


def test_a_config_must_agree_with_the_file(jit_file, further, tmp_path):
    further["diffusion"]["flow"]["noise_scale"] = 0.5
    with pytest.raises(
        ConfigError, match=r"flow.noise_scale 1.0 \(now 0.5\); .*--config.diffusion.flow.noise_scale=1.0"
    ):
        convert(jit_file, tmp_path / "run", config=further)
    assert not (tmp_path / "run").exists()
